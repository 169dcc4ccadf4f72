"""Files that are read from their beginning: each format's documents, the streams made of them, and
sets that Hugging Face's `datasets` saved.
"""

from __future__ import annotations

import gzip
import itertools
import json

import numpy as np
import pytest

from quweit_jax.data import pipeline, tokenizers
from quweit_jax.data.registry import DataConfig
from quweit_jax.data.shards import ShardedDocuments
from quweit_jax.data.streams import StreamedDocuments
from quweit_jax.errors import InputError

pa = pytest.importorskip("pyarrow")
BYTES = tokenizers.ByteTokenizer()
FORMATS = (".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet")


def write(path, documents, key="text"):
    """A file of documents in the format that its name says."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        table = pa.table({"id": list(range(len(documents))), key: documents})
        return parquet.write_table(table, path, row_group_size=3)
    lines = "".join(json.dumps({key: text, "id": 1}) + "\n\n" for text in documents).encode()
    if path.suffix == ".gz":
        lines = gzip.compress(lines[:50]) + gzip.compress(lines[50:])  # as pigz writes it
    elif path.suffix == ".zst":
        out = pa.BufferOutputStream()
        with pa.CompressedOutputStream(out, "zstd") as stream:
            stream.write(lines)
        lines = out.getvalue().to_pybytes()
    return path.write_bytes(lines)


def corpus(folder, files=5, seed=0):
    """Files of 0 to 6 documents of 0 to 29 letters."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, kind in zip(range(files), itertools.cycle(FORMATS)):
        texts = [f"{number}.{i}" + "x" * int(draw.integers(26)) for i in range(draw.integers(1, 7))]
        write(folder / f"part-{number}{kind}", texts)
        found.append(texts)
    return found


def opened(folder, context=8, threads=1):
    names = sorted(path.name for path in folder.iterdir())
    return StreamedDocuments(ShardedDocuments(folder, names, "text"), BYTES, context, threads)


@pytest.mark.parametrize("kind", [*FORMATS, ".txt"])
def test_a_file_gives_its_documents_from_any_one_on(tmp_path, kind):
    texts = ["first\nof two", "sécond", "", "fourth", "fifth"]
    if kind == ".txt":
        (tmp_path / "a.txt").write_text("alone", encoding="utf-8")
        texts = ["alone"]
    else:
        write(tmp_path / f"a{kind}", texts)
    source = ShardedDocuments(tmp_path, [f"a{kind}"], "text")
    for start in range(len(texts) + 2):
        assert list(source.documents(0, start)) == texts[start:]


def reference(files, batch, groups, context, seed, count):
    """The first `count` batches of inputs, as the module's first paragraph says."""
    texts = {
        group: (
            text
            for place in itertools.count(group, groups)
            for text in files[
                np.random.default_rng((seed, place // len(files))).permutation(len(files))[
                    place % len(files)
                ]
            ]
        )
        for group in range(groups)
    }
    rows, batches = {row: [] for row in range(batch)}, []
    for _ in range(count):
        made = []
        for row, left in rows.items():
            while len(left) < context:
                left += BYTES.encode("\n" + next(texts[row * groups // batch])).tolist()
            made.append(left[:context])
            del left[:context]
        batches.append(made)
    return np.asarray(batches)


@pytest.mark.parametrize(("batch", "groups"), [(4, 4), (6, 3), (1, 1), (10, 5), (7, 1)])
def test_rows_are_dealt_the_documents_of_their_files(tmp_path, batch, groups):
    files = corpus(tmp_path / "c")
    found = pipeline.train_batches(opened(tmp_path / "c"), batch, 3)
    batches = [next(found) for _ in range(30)]
    inputs = np.stack([b["inputs"] for b in batches])
    np.testing.assert_array_equal(inputs, reference(files, batch, groups, 8, 3, 30))
    # a row's windows lie end to end, and its targets are its inputs one token later
    streams = inputs.swapaxes(0, 1).reshape(batch, -1)
    targets = np.stack([b["targets"] for b in batches]).swapaxes(0, 1).reshape(batch, -1)
    np.testing.assert_array_equal(targets[:, :-1], streams[:, 1:])


@pytest.mark.parametrize("threads", [1, 3])
def test_a_state_goes_on_bit_for_bit(tmp_path, threads):
    corpus(tmp_path / "c")
    whole, states = pipeline.train_batches(opened(tmp_path / "c"), 6, 1), []
    batches = []
    for _ in range(25):
        states.append(json.dumps(whole.get_state()))
        batches.append(next(whole))
    for at in (0, 1, 7, 20):
        again = pipeline.train_batches(opened(tmp_path / "c", threads=threads), 6, 1)
        again.set_state(json.loads(states[at]))
        for expected in batches[at:]:
            for key, value in next(again).items():
                np.testing.assert_array_equal(value, expected[key])


def test_processes_read_their_own_files_and_go_on_as_any_number(tmp_path):
    corpus(tmp_path / "c", files=4)
    examples, each = opened(tmp_path / "c"), {}
    for count in (1, 2, 4):
        each[count] = [
            pipeline.train_batches(examples, 8, 5, process_index=i, process_count=count)
            for i in range(count)
        ]
    for _ in range(12):
        batches = {
            count: np.concatenate([next(part)["inputs"] for part in parts])
            for count, parts in each.items()
        }
        np.testing.assert_array_equal(batches[2], batches[1])
        np.testing.assert_array_equal(batches[4], batches[1])
    joined = pipeline.join_states([part.get_state() for part in each[4]])
    for part in each[2]:
        part.set_state(joined)
    expected = next(each[1][0])["inputs"]
    found = np.concatenate([next(part)["inputs"] for part in each[2]])
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="4 files are read as 4 streams, which 8 processes"):
        pipeline.train_batches(examples, 8, 5, process_count=8)


def test_a_folder_of_compressed_files_is_a_source(tmp_path):
    files = corpus(tmp_path / "all", files=3)
    config = DataConfig("document_folder", path=str(tmp_path / "all"), tokenizer="byte")
    data = pipeline.load(config, 4)
    last = "".join("\n" + text for text in files[2])
    assert BYTES.decode(data.validation.tokens) == last, "the last file is held out"
    assert len(data.train) == 2 and data.train[1]["inputs"].shape == (4,)
    corpus(tmp_path / "two" / "train", files=2)
    held_out = corpus(tmp_path / "two" / "val", files=1, seed=9)
    config = DataConfig("document_folder", path=str(tmp_path / "two"), tokenizer="bpe")
    data = pipeline.load(config, 4)
    assert len(data.train) == 2
    decoded = data.tokenizer.decode(data.validation.tokens)
    assert decoded == "".join("\n" + text for text in held_out[0])
    other = pipeline.load(DataConfig(**{**vars(config), "path": str(tmp_path / "all")}), 4)
    assert other.fingerprint != data.fingerprint


def test_what_is_damaged_is_named(tmp_path):
    for kind in (".jsonl.gz", ".jsonl.zst", ".parquet"):
        path = tmp_path / f"cut{kind}"
        write(path, ["a text of some length"] * 50)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(InputError, match=rf"cut{kind} cannot be read"):
            list(ShardedDocuments(tmp_path, [path.name], "text").texts())
    write(tmp_path / "other.parquet", ["a"], key="content")
    with pytest.raises(InputError, match=r"data.text_column: .* found id \(int64\), content"):
        ShardedDocuments(tmp_path, ["other.parquet"], "text")
    assert list(ShardedDocuments(tmp_path, ["other.parquet"], "content").texts()) == ["a"]
    write(tmp_path / "b.jsonl.gz", ["a"], key="content")
    with pytest.raises(InputError, match=r'expected \{"text": "..."\} at document 1 of .*b.jsonl'):
        list(ShardedDocuments(tmp_path, ["b.jsonl.gz"], "text").texts())
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "a.json.gz", ["a"])
    with pytest.raises(InputError, match="two or more files"):
        pipeline.load(
            DataConfig("document_folder", path=str(tmp_path / "one"), tokenizer="byte"), 4
        )


def save_set(folder, parts):
    """What `datasets.Dataset.save_to_disk` writes, as far as it is read."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, texts in zip(names, parts):
        columns = {
            "text": pa.array(texts, pa.string()),
            "label": pa.array([0] * len(texts), "int8"),
        }
        table = pa.table(columns)
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_set_that_datasets_saved(tmp_path):
    parts = [["a", "bé\r\nb", "c"], [], ["d", "e"]]
    save_set(tmp_path / "set" / "train", parts)
    save_set(tmp_path / "set" / "test", [["held out"]])
    config = DataConfig("document_folder", path=str(tmp_path / "set"), tokenizer="byte")
    data = pipeline.load(config, 4)
    assert [data.train.source.read(i) for i in range(5)] == ["a", "bé\nb", "c", "d", "e"]
    assert BYTES.decode(data.validation.tokens) == "\nheld out"
    with pytest.raises(InputError, match=r"data\.text_column"):
        pipeline.load(DataConfig(**{**vars(config), "text_column": "label"}), 4)
    (tmp_path / "set" / "train" / "state.json").write_text('{"_data_files": [{"filename": 3}]}')
    with pytest.raises(InputError, match="names no Arrow files"):
        pipeline.load(config, 4)


def test_datasets_itself_writes_such_a_set(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    texts = [f"text {i}" for i in range(7)]
    splits = datasets.DatasetDict()
    for split, part in {"train": texts, "validation": texts[:2]}.items():
        splits[split] = datasets.Dataset(
            datasets.table.InMemoryTable.from_pydict({"text": part}), fingerprint=split
        )
    splits.save_to_disk(str(tmp_path / "set"), num_shards={"train": 3, "validation": 1})
    config = DataConfig("document_folder", path=str(tmp_path / "set"), tokenizer="byte")
    data = pipeline.load(config, 4)
    assert [data.train.source.read(i) for i in range(7)] == texts
    assert BYTES.decode(data.validation.tokens) == "\ntext 0\ntext 1"
