"""`data.documents`: sets of documents as streams of tokens that go on exactly, on any number of
processes, and read no more than they use.
"""

import itertools
import json
import random

import numpy as np
import pytest

from quweit_jax.data import documents, image_sources, pipeline, registry, tokenizers
from quweit_jax.data.documents import PackedDocuments
from quweit_jax.data.registry import DataConfig
from quweit_jax.data.text import document_folder
from quweit_jax.errors import InputError
from quweit_jax.training.setup import assemble

BYTES = tokenizers.ByteTokenizer()


def tales(count, seed=0, longest=60):
    """Texts that are all different; one is empty, one much longer than any window."""
    draw = random.Random(seed)
    texts = [
        f"tale {i}: " + "".join(draw.choices("abcé 数", k=draw.randint(1, longest)))
        for i in range(count)
    ]
    texts[count // 2], texts[count // 3] = "", "long " * 80 + str(seed)
    return texts


class Texts:
    """A source in memory that notes what is read of it."""

    place = "texts, split train"

    def __init__(self, texts):
        self.texts, self.reads = texts, []

    def __len__(self):
        return len(self.texts)

    def read(self, index):
        self.reads.append(index)
        return self.texts[index]

    def identity(self):
        return "texts"


class Endless(Texts):
    """As many documents as a crawl of the web has."""

    def __init__(self):
        super().__init__(())

    def __len__(self):
        return 365_000_000

    def read(self, index):
        self.reads.append(index)
        return f"document {index} " * 5


def prepare(folder, name, splits, feature="text"):
    """A real TFDS set of array_record files, made without TensorFlow; read back as one that TFDS
    does not know.
    """
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {feature: tfds.features.Text(), "id": np.int64}
                ),
            )

        def _split_generators(self, dl_manager):
            return {
                split: [(i, {feature: text, "id": i}) for i, text in enumerate(texts)]
                for split, texts in splits.items()
            }

        def _generate_examples(self):
            raise NotImplementedError

    Builder.name = name
    Builder(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder of TFDS sets: `tales` with all splits, `fables` with train alone, `single` of one
    text, `unnamed` without a feature 'text'.
    """
    folder = tmp_path_factory.mktemp("tfds")
    prepare(
        folder,
        "tales",
        {"train": tales(40), "validation": tales(9, seed=1), "test": tales(5, seed=2)},
    )
    prepare(folder, "fables", {"train": tales(30, seed=3)})
    prepare(folder, "single", {"train": ["one long text " * 9], "validation": ["held out " * 9]})
    prepare(folder, "unnamed", {"train": tales(4)}, feature="content")
    return folder


def config(sets, name="tales", **changes):
    return DataConfig(
        **(
            {
                "source": "tfds",
                "name": name,
                "data_dir": str(sets),
                "tokenizer": "byte",
                "validation_tokens": 100,
            }
            | changes
        )
    )


def packed(count=12, context=16, source=None, tokenizer=BYTES, **options):
    source = Texts(tales(count)) if source is None else source
    return PackedDocuments(source, tokenizer, context, len(source), **options)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def batches(examples, batch_size=4, seed=0, prefetch=0, **share):
    return pipeline.train_batches(examples, batch_size, seed, prefetch=prefetch, **share)


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.keys() == other.keys() == {"inputs", "targets"}
        for key in one:
            assert one[key].dtype == np.int32
            np.testing.assert_array_equal(one[key], other[key])


def row(found, index, key="inputs"):
    return np.concatenate([batch[key][index] for batch in found])


def drawn(count, epochs, seed=0):
    """The order in which documents are drawn, as the reads of a single row tell."""
    source = Texts([f"{i}" for i in range(count)])
    stream = batches(packed(source=source, context=1), 1, seed)
    while len(source.reads) <= epochs * count:
        next(stream)
    return source.reads[: epochs * count]


@pytest.mark.parametrize("context", [7, 16, 300])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_rows_hold_the_drawn_documents_and_the_tokens_after_them(batch_size, context):
    texts, order = tales(12), drawn(12, epochs=8)
    found = take(batches(packed(context=context), batch_size), 20 if context < 300 else 2)
    assert found[0]["inputs"].shape == (batch_size, context)
    for index in range(batch_size):
        stream = "".join("\n" + texts[i] for i in order[index::batch_size] * 8).encode()
        inputs = row(found, index)
        assert inputs.astype(np.uint8).tobytes() == stream[: len(inputs)]
        assert (
            row(found, index, "targets").astype(np.uint8).tobytes() == stream[1 : len(inputs) + 1]
        )


def test_every_epoch_draws_all_documents_in_another_order():
    order = np.reshape(drawn(20, epochs=3), (3, 20))
    np.testing.assert_array_equal(np.sort(order), [np.arange(20)] * 3)
    assert len({tuple(epoch) for epoch in order}) == 3 and tuple(order[0]) != tuple(range(20))
    assert drawn(20, epochs=1, seed=1) != list(order[0])


def test_fewer_documents_than_rows_are_repeated():
    found = take(batches(packed(source=Texts(["first", "second"]), context=50), 8), 1)
    for index in range(8):
        words = BYTES.decode(row(found, index)).split("\n")
        assert words[0] == "" and set(words[1:-1]) == {"first", "second"}


@pytest.mark.parametrize(("prefetch", "threads"), [(0, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("context", [5, 40, 150])
def test_a_state_resumes_bit_for_bit(context, prefetch, threads):
    examples = packed(60, context, threads=threads)
    whole = take(batches(packed(60, context)), 12)
    stream = batches(examples, prefetch=prefetch)
    states = [json.dumps(stream.get_state())]
    for expected in whole:
        same([next(stream)], [expected])
        states.append(json.dumps(stream.get_state()))
    for place in (0, 1, 2, 5, 9):
        again = batches(examples, prefetch=prefetch)
        again.set_state(json.loads(states[place]))
        assert json.dumps(again.get_state()) == states[place]
        same(take(again, 3), whole[place : place + 3])
    stream.set_state(json.loads(states[5]))  # and back, in one that is running
    same(take(stream, 7), whole[5:])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_documents(processes):
    whole = take(batches(packed(40, context=8)), 3)
    sources_read, found, states = [], [], []
    for index in range(processes):
        source = Texts(tales(40))
        stream = batches(
            packed(source=source, context=8), process_index=index, process_count=processes
        )
        found.append(take(stream, 3))
        sources_read.append(set(source.reads))
        states.append(json.loads(json.dumps(stream.get_state())))
    same(
        [
            {
                key: np.concatenate([part[step][key] for part in found])
                for key in ("inputs", "targets")
            }
            for step in range(3)
        ],
        whole,
    )
    assert sum(map(len, sources_read)) == len(set.union(*sources_read)), (
        "no document is read by two processes"
    )
    # What they save together goes on in any number of processes.
    after = take(batches(packed(40, context=8)), 6)[3:]
    for count in (1, 2, 4):
        for index in range(count):
            again = batches(packed(40, context=8), process_index=index, process_count=count)
            again.set_state(pipeline.join_states(states))
            mine = slice(index * 4 // count, (index + 1) * 4 // count)
            same(take(again, 3), [{key: batch[key][mine] for key in batch} for batch in after])
    with pytest.raises(
        InputError,
        match=r"the place in the documents of row 0 of the batch, found those of rows "
        r".*join_states",
    ):
        batches(packed(40, context=8), process_index=0, process_count=processes).set_state(
            states[-1]
        )


def test_states_of_other_examples_join_to_themselves():
    examples = image_sources.ArrayExamples(np.arange(9.0), np.arange(9))
    states = []
    for index in range(2):
        stream = pipeline.train_batches(examples, 2, 0, process_index=index, process_count=2)
        take(stream, 3)
        states.append(stream.get_state())
    assert pipeline.join_states(states) == states[0] == states[1]


def test_no_more_documents_are_read_than_the_windows_need():
    source = Endless()
    examples = packed(source=source, context=64)
    take(batches(examples, 4), 8)
    used = 4 * 8 * 64 / (5 * len("document 123456789 ") + 1)
    assert (
        len(source.reads) <= used + 2 * 4
    )  # and for each row the one it is in, and the one it asks for to fill up
    stream = batches(examples, 4)
    state = stream.get_state()
    source.reads.clear()
    stream.set_state(state)
    assert not source.reads
    take(stream, 300)
    state = stream.get_state()
    source.reads.clear()
    batches(examples, 4).set_state(state)
    assert len(source.reads) <= 2 * 4, (
        "a resumed run looks up where it was; it does not read all again"
    )


def test_loading_reads_few_documents(monkeypatch):
    train, validation = Endless(), Endless()
    monkeypatch.setattr(
        registry, "load", lambda config: documents.DocumentSplits(train, validation)
    )
    data = pipeline.load(
        DataConfig(tokenizer="bpe", bpe_vocab_size=270, limit_bytes=2000, validation_tokens=500), 16
    )
    assert len(data.train) == 365_000_000 and len(data.validation) == (500 - 16) // 16
    assert (
        train.reads == [*range(len(train.reads) - 4), 0, 1, 2, 3]
        and len(train.reads) < 2000 / 50 + 4
    )
    assert (
        validation.reads == list(range(len(validation.reads))) and len(validation.reads) < 500 / 10
    )


def test_tfds_set(sets):
    data = pipeline.load(config(sets), 16)
    assert (len(data.train), data.outputs, data.labels, data.image_shape) == (40, 256, (), None)
    assert sorted(data.train.source.read(i) for i in range(40)) == sorted(tales(40))
    held_out = registry.load(config(sets)).validation
    first = "".join("\n" + held_out.read(i) for i in range(9)).encode()[:100]
    assert (
        isinstance(data.validation, pipeline.TokenWindows)
        and bytes(data.validation.tokens.tolist()) == first
    )
    example = data.train[0]
    assert (
        example["inputs"].shape == example["targets"].shape == (16,)
        and example["inputs"].dtype == np.int32
    )
    np.testing.assert_array_equal(example["inputs"][1:], example["targets"][:-1])
    assert BYTES.decode(data.train[39]["inputs"]).startswith(
        ("\n" + data.train.source.read(39))[:10]
    )
    assert data.fit_batch().shape == (1, 16)
    same(
        take(batches(data.train, prefetch=2), 5),
        take(batches(pipeline.load(config(sets), 16).train), 5),
    )
    assert next(pipeline.eval_batches(data.validation, 2))["inputs"].shape == (2, 16)


def test_the_fingerprint_tells_set_tokenizer_and_split(sets):
    def fingerprint(name="tales", **changes):
        return pipeline.load(config(sets, name, **changes), 8).fingerprint

    assert fingerprint() == fingerprint()
    assert (
        len(
            {
                fingerprint(),
                fingerprint("fables"),
                fingerprint("fables", validation_tokens=9),
                fingerprint(tokenizer="bpe"),
            }
        )
        == 4
    )


def test_several_validation_splits(sets):
    data = pipeline.load(
        config(sets, validation_split="validation+test", validation_tokens=10_000), 8
    )
    texts = BYTES.decode(data.validation.tokens)
    assert all(text in texts for text in tales(9, seed=1) + tales(5, seed=2))


def test_without_a_validation_split_the_last_documents_are_held_out(sets):
    data = pipeline.load(config(sets, "fables", validation_tokens=10, validation_fraction=0.5), 8)
    every = data.train.source
    assert len(data.train) in (28, 29) and BYTES.decode(data.validation.tokens) == (
        "\n" + every.read(29) + "\n" + every.read(28)
    ).encode()[:10].decode(errors="replace")
    capped = pipeline.load(config(sets, "fables", validation_tokens=10_000), 8)
    assert len(capped.train) == 27, "never more than validation_fraction"
    assert BYTES.decode(capped.validation.tokens) == "".join(
        "\n" + every.read(i) for i in (29, 28, 27)
    )
    source = Texts(tales(30))
    take(batches(PackedDocuments(source, BYTES, 16, 27)), 100)
    assert set(source.reads) == set(range(27))


def test_a_set_of_one_text_stays_one_text(sets):
    data = pipeline.load(config(sets, "single", tokenizer="char"), 8)
    assert (
        isinstance(data.train, pipeline.TokenWindows)
        and data.tokenizer.decode(data.train.tokens) == "one long text " * 9
    )


class Ended(tokenizers.ByteTokenizer):
    """Bytes with an end of text."""

    vocab_size, end_of_text = 257, 256


def test_an_end_of_text_parts_documents():
    texts, order = tales(12), drawn(12, epochs=1)
    found = take(batches(packed(tokenizer=Ended()), 1), 12)
    expected = np.concatenate([part for i in order for part in ([256], BYTES.encode(texts[i]))])
    np.testing.assert_array_equal(row(found, 0), expected[: 12 * 16])
    np.testing.assert_array_equal(row(found, 0, "targets"), expected[1 : 12 * 16 + 1])
    tokens, left = documents.held_out(
        documents.DocumentSplits(Texts(texts), Texts(["one", "two"])), Ended(), 99, 0.1
    )
    assert left == 12 and tokens.tolist() == [256, *b"one", 256, *b"two"]


def test_a_run_goes_on_with_the_tokenizer_it_has_saved(sets, tmp_path):
    source = pipeline.load(config(sets, tokenizer="bpe", bpe_vocab_size=280), 16)
    tokenizers.save(source.tokenizer, tmp_path / "tokenizer.json")
    with_file = config(sets, tokenizer="file", tokenizer_path="/nowhere")
    again = pipeline.load(with_file, 16, tokenizers.load(tmp_path / "tokenizer.json"))
    assert again.fingerprint == source.fingerprint and again.outputs == source.outputs
    same(take(batches(again.train), 3), take(batches(source.train), 3))


def test_what_training_asks_of_the_data(tiny_config, tmp_path):
    (tmp_path / "tales.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in tales(60))
    )
    values = {
        "data.source": "document_folder",
        "data.path": tmp_path,
        "data.tokenizer": "byte",
        "data.validation_tokens": 300,
    }
    parts = assemble(tiny_config(values))
    batch = next(batches(parts.data.train, parts.config.batch_size))
    assert {key: (value.shape, value.dtype) for key, value in parts.abstract_batch().items()} == {
        key: (value.shape, value.dtype) for key, value in batch.items()
    }
    assert (
        batch["inputs"].shape == (8, 16)
        and parts.init_inputs.shape == (1, 16)
        and parts.model.config.vocab_size == 256
    )


def test_errors(sets, tmp_path):
    def fails(message, context=8, name="tales", **changes):
        with pytest.raises(InputError, match=message):
            pipeline.load(config(sets, name, **changes), context)

    fails(
        r"data\.name: unnamed has features \['content', 'id'\]; expected a text named 'text'",
        name="unnamed",
        validation_split="train",
    )
    fails(r"data\.validation_split: tales has no split 'dev'; it has ", validation_split="dev")
    fails(
        r"data\.validation_tokens: expected at least 201 for a context of 200 .*found 100",
        context=200,
    )
    fails(
        r"the validation text \(tales, split test\) has \d+ tokens, fewer than the context of 900",
        900,
        validation_split="test",
        validation_tokens=5000,
    )
    fails(
        r"data\.tokenizer: expected byte, bpe or file for tales, split train, found char: "
        r".*tokenizer=byte or bpe",
        tokenizer="char",
    )
    fails(r"data\.tokenizer: expected one of .*'file'\], found 'words'", tokenizer="words")
    fails(
        r"data\.tokenizer_path: expected a tokenizer\.json or its folder .*found nothing",
        tokenizer="file",
    )
    with pytest.raises(
        InputError, match=r"data\.validation_tokens: expected a whole number of 2 or more, found 1"
    ):
        config(sets, validation_tokens=1)
    with pytest.raises(InputError, match="batch_size: 5 cannot be shared equally by 2 processes"):
        batches(packed(), 5, process_count=2)
    with pytest.raises(
        InputError,
        match=r"data\.source: tfds is text, which the model of this config does not read",
    ):
        pipeline.load(config(sets))
    alone = documents.DocumentSplits(Texts(["alone"]), None)
    with pytest.raises(
        InputError,
        match=r"expected two or more documents in texts, split train, which has no validation "
        r"split, found 1",
    ):
        documents.held_out(alone, BYTES, 10, 0.1)
    for path in ("", tmp_path / "nowhere"):
        with pytest.raises(
            InputError,
            match=r"data\.path: expected a folder of documents .*found '.*(nothing|nowhere)'",
        ):
            document_folder(DataConfig(path=str(path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError,
        match=r"data\.path: expected documents \(files ending in \.txt, \.jsonl, .*\) in .*empty, "
        r"found none",
    ):
        document_folder(DataConfig(path=str(tmp_path / "empty")))
    with pytest.raises(
        InputError, match=r"data\.validation_split: .*empty has no folder 'train' beside 'dev'"
    ):
        document_folder(DataConfig(path=str(tmp_path / "empty"), validation_split="dev"))
    (tmp_path / "empty" / "train").mkdir()
    with pytest.raises(
        InputError,
        match=r"data\.validation_split: no folder 'dev' in .*empty; leave it out for validation, "
        r"val, test",
    ):
        document_folder(DataConfig(path=str(tmp_path / "empty"), validation_split="dev"))


def test_a_tokenizer_that_cannot_part_documents():
    class Spaceless(tokenizers.ByteTokenizer):
        def encode(self, text):
            return super().encode(text.strip())

    with pytest.raises(
        InputError, match=r"expected an end-of-text token or one for line ends, .*found neither"
    ):
        packed(tokenizer=Spaceless())


def test_sets_that_cannot_be_read_at_random(sets, tmp_path):
    folder = tmp_path / "tales" / "1.0.0"
    folder.mkdir(parents=True)
    for file in (sets / "tales" / "1.0.0").iterdir():
        (folder / file.name).write_bytes(
            file.read_bytes().replace(b'"array_record"', b'"tfrecord"')
        )
    with pytest.raises(
        InputError,
        match=r"expected tales as array_record files, found another format in .*1\.0\.0; add them "
        r"with tfds convert_format",
    ):
        pipeline.load(config(tmp_path), 8)
    information = json.loads((sets / "tales" / "1.0.0" / "dataset_info.json").read_text())
    for split in information["splits"]:
        split["shardLengths"] = ["0"] if split["name"] == "validation" else split["shardLengths"]
    (folder / "dataset_info.json").write_text(json.dumps(information))
    with pytest.raises(
        InputError,
        match=r"data\.name: expected documents in tales, split validation, found none; use another",
    ):
        pipeline.load(config(tmp_path), 8)
