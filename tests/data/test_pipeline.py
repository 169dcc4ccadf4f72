"""`data.pipeline`: every example once an epoch, the same for every run and any number
of processes.
"""

import itertools

import numpy as np
import pytest

from quweit_jax.data import image_sources, pipeline, tokenizers
from quweit_jax.data.registry import DataConfig
from quweit_jax.errors import InputError

CONTEXT = 5


def windows(count=24, context=CONTEXT):
    """Windows over tokens that are all different, so that each token tells its place."""
    return pipeline.TokenWindows(np.arange(count * context + context, dtype=np.int32), context)


def labelled(count=22):
    return image_sources.ArrayExamples(
        np.arange(count, dtype=np.float32)[:, None], np.arange(count, dtype=np.int32)
    )


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others):
        assert set(one) == set(other)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def starts(batches):
    return np.concatenate([batch["inputs"][:, 0] for batch in batches])


@pytest.mark.parametrize(
    ("length", "count", "shifts"),
    [(6, 1, 1), (9, 1, 4), (10, 1, 5), (15, 2, 5), (16, 2, 5), (101, 19, 5)],
)
def test_windows_and_their_successors(length, count, shifts):
    examples = pipeline.TokenWindows(np.arange(length, dtype=np.int32), CONTEXT)
    assert (len(examples), examples.shifts) == (count, shifts)
    for index in (0, count - 1):
        for shift in range(shifts):
            window = examples.window(index, shift)
            np.testing.assert_array_equal(
                window["inputs"], np.arange(CONTEXT) + index * CONTEXT + shift
            )
            np.testing.assert_array_equal(window["targets"], window["inputs"] + 1)


@pytest.mark.parametrize("prefetch", [0, 4])
def test_batches_are_deterministic(prefetch):
    first = take(pipeline.train_batches(windows(), 4, seed=3, prefetch=prefetch), 15)
    same(first, take(pipeline.train_batches(windows(), 4, seed=3), 15))
    assert (starts(first) != starts(take(pipeline.train_batches(windows(), 4, seed=4), 15))).any()
    assert (
        first[0]["inputs"].shape == first[0]["targets"].shape == (4, CONTEXT)
        and first[0]["inputs"].dtype == np.int32
    )


def test_every_window_once_an_epoch_in_another_order_and_place():
    batches = take(pipeline.train_batches(windows(24), 4, seed=0), 6 * 5)
    epochs = [starts(batches[6 * e : 6 * (e + 1)]) for e in range(5)]
    shifts = []
    for epoch in epochs:
        assert len(set(epoch % CONTEXT)) == 1  # one shift for the whole epoch
        shifts.append(int(epoch[0] % CONTEXT))
        np.testing.assert_array_equal(np.sort(epoch // CONTEXT), np.arange(24))
    assert shifts[0] == 0 and len(set(shifts)) > 1
    orders = [tuple(epoch // CONTEXT) for epoch in epochs]
    assert len(set(orders)) == 5 and orders[0] != tuple(range(24))
    for batch in batches:
        np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)


def test_batches_run_on_from_one_epoch_into_the_next():
    # 22 examples in batches of 4: no example is left out at the end of an epoch.
    seen = starts(take(pipeline.train_batches(labelled(22), 4, seed=0), 11))
    np.testing.assert_array_equal(np.sort(seen[:22]), np.arange(22))
    np.testing.assert_array_equal(np.sort(seen[22:]), np.arange(22))


@pytest.mark.parametrize("examples", [windows(6), labelled(6)], ids=["text", "labelled"])
def test_a_saved_state_gives_the_same_following_batches(examples):
    iterator = pipeline.train_batches(examples, 4, seed=1)
    take(iterator, 4)
    state = iterator.get_state()
    expected = take(iterator, 7)
    other = pipeline.train_batches(examples, 4, seed=1)
    other.set_state(state)
    same(take(other, 7), expected)
    iterator.set_state(state)  # back again
    same(take(iterator, 7), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(processes):
    whole = take(pipeline.train_batches(windows(10), 8, seed=2), 6)
    shares = [
        take(
            pipeline.train_batches(
                windows(10), 8, seed=2, process_index=p, process_count=processes
            ),
            6,
        )
        for p in range(processes)
    ]
    for step in range(6):
        assert all(len(share[step]["inputs"]) == 8 // processes for share in shares)
        together = np.concatenate([share[step]["inputs"] for share in shares])
        np.testing.assert_array_equal(
            sorted(map(tuple, together)), sorted(map(tuple, whole[step]["inputs"]))
        )


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("count", "batch_size"), [(22, 4), (8, 4), (3, 8), (1, 2)])
def test_eval_batches_cover_the_split_once(count, batch_size, processes):
    seen = []
    for p in range(processes):
        batches = list(
            pipeline.eval_batches(
                labelled(count), batch_size, process_index=p, process_count=processes
            )
        )
        assert len(batches) == -(-count // batch_size)
        for batch in batches:
            assert batch["inputs"].shape == (batch_size // processes, 1) and set(
                batch["weights"]
            ) <= {0, 1}
            seen += list(batch["targets"][batch["weights"] == 1])
    assert sorted(seen) == list(range(count))


def test_limited_eval_batches_are_spread_evenly():
    batches = list(pipeline.eval_batches(labelled(100), 5, limit=2))
    np.testing.assert_array_equal(
        np.concatenate([b["targets"] for b in batches]), np.arange(0, 100, 10)
    )
    same(batches, list(pipeline.eval_batches(labelled(100), 5, limit=2)))
    assert len(list(pipeline.eval_batches(labelled(7), 5, limit=9))) == 2


def test_load_text(tiny_text):
    config = DataConfig("text_file", path=str(tiny_text), limit_bytes=0)
    data = pipeline.load(config, context=8)
    text = tiny_text.read_text(encoding="utf-8")
    assert data.outputs == len(set(text)) and data.tokenizer is not None
    assert (
        data.tokenizer.decode(data.train.tokens) + data.tokenizer.decode(data.validation.tokens)
        == text
    )
    assert data.fit_batch().shape == (1, 8)
    assert data.fingerprint == pipeline.load(config, context=8).fingerprint
    assert (
        data.fingerprint
        != pipeline.load(
            DataConfig("text_file", path=str(tiny_text), limit_bytes=2000), context=8
        ).fingerprint
    )
    given = pipeline.load(config, context=8, tokenizer=tokenizers.ByteTokenizer())
    assert given.outputs == 256
    np.testing.assert_array_equal(given.train.tokens[:20], list(text[:20].encode()))


def test_characters_of_the_validation_text_belong_to_the_vocabulary(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a" * 90 + "z" * 10, encoding="utf-8")
    data = pipeline.load(DataConfig("text_file", path=str(file), limit_bytes=0), context=4)
    assert data.outputs == 2 and set(data.validation.tokens) == {1}


def test_load_labelled():
    data = pipeline.load(DataConfig("digits"))
    assert data.outputs == 10 and data.tokenizer is None and data.labels == tuple("0123456789")
    fitted = data.fit_batch()
    assert fitted.shape == (1437, 64)
    other = pipeline.load(DataConfig("digits", split_seed=1))
    assert data.fingerprint == pipeline.load(DataConfig("digits")).fingerprint != other.fingerprint


def test_errors(tiny_text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("word " * 10, encoding="utf-8")
    with pytest.raises(
        InputError,
        match=r"the validation text has 5 tokens, fewer than the context of 8 "
        r".*--config\.model\.context=4",
    ):
        pipeline.load(DataConfig("text_file", path=str(short), limit_bytes=0), context=8)
    with pytest.raises(
        InputError,
        match=r"the training text has 45 tokens, fewer than the context of 45 .*context=44",
    ):
        pipeline.load(DataConfig("text_file", path=str(short), limit_bytes=0), context=45)
    with pytest.raises(
        InputError,
        match=r"data\.source: text_file is text, which the model of this config does not read",
    ):
        pipeline.load(DataConfig("text_file", path=str(tiny_text), limit_bytes=0))
    with pytest.raises(InputError, match="batch_size: 5 cannot be shared equally by 2 processes"):
        pipeline.train_batches(labelled(), 5, seed=0, process_count=2)
    with pytest.raises(InputError, match="the training split is empty"):
        pipeline.train_batches(labelled(0), 5, seed=0)
