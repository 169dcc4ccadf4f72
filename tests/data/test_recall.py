"""`data.recall`: texts of keys and values whose answers can be looked up, and losses that count
nothing else.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.data import pipeline
from quweit_jax.data.recall import RecallTexts
from quweit_jax.data.registry import DataConfig
from quweit_jax.errors import InputError
from quweit_jax.training.losses import cross_entropy

CONFIG = DataConfig(source="recall", recall_pairs=5, recall_symbols=40)


def test_every_key_is_asked_once_and_its_value_is_the_target():
    data = pipeline.load(CONFIG, 32)
    assert data.outputs == 40 == data.tokenizer.vocab_size
    seen = set()
    for i in range(50):
        text = data.train[i]
        inputs, targets = text["inputs"], text["targets"]
        assert inputs.shape == targets.shape == (32,) and inputs.dtype == np.int32
        held = dict(zip(inputs[0:10:2].tolist(), inputs[1:10:2].tolist()))
        assert len(held) == 5 and all(0 < key < 20 <= value < 40 for key, value in held.items())
        asked = np.flatnonzero(targets >= 0)
        assert (asked >= 10).all() and sorted(inputs[asked].tolist()) == sorted(held)
        assert [held[key] for key in inputs[asked].tolist()] == targets[asked].tolist()
        assert not np.delete(inputs[10:], asked - 10).any()  # blanks between
        seen.add(inputs.tobytes())
    assert len(seen) == 50
    np.testing.assert_array_equal(
        data.train[3]["inputs"], pipeline.load(CONFIG, 32).train[3]["inputs"]
    )
    held_out = {data.validation[i]["inputs"].tobytes() for i in range(50)}
    assert not held_out & seen
    text = data.tokenizer.decode(data.train[0]["inputs"])
    np.testing.assert_array_equal(data.tokenizer.encode(text), data.train[0]["inputs"])


def test_batches_go_on_where_they_were():
    data = pipeline.load(CONFIG, 20)
    batches = pipeline.train_batches(data.train, 4, 0, prefetch=0)
    next(batches)
    place = batches.get_state()
    expected = next(batches)
    batches.set_state(place)
    np.testing.assert_array_equal(next(batches)["targets"], expected["targets"])
    assert len(list(pipeline.eval_batches(data.validation, 8, 2))) == 2


def test_losses_leave_out_what_is_no_target():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    targets = jnp.asarray([[-1, 2, -1], [4, -1, -1]])
    sums = cross_entropy(logits, targets)
    chances = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(sums["loss"], -chances[0, 1, 2] - chances[1, 0, 4], rtol=1e-6)
    assert sums["count"] == 2
    gradient = jax.grad(lambda x: cross_entropy(x, targets)["loss"])(logits)
    assert not gradient[0, 0].any() and gradient[0, 1].any()
    assert cross_entropy(logits, targets, jnp.asarray([0.0, 1.0]))["count"] == 1


@pytest.mark.parametrize(
    ("change", "context", "said"),
    [
        ({"recall_pairs": 9}, 32, "need a context of 36"),
        ({"recall_symbols": 10}, 32, "at least 11"),
    ],
    ids=str,
)
def test_what_has_no_room_is_refused_by_name(change, context, said):
    config = DataConfig(**{"source": "recall", "recall_pairs": 5, "recall_symbols": 40, **change})
    with pytest.raises(InputError, match=said):
        pipeline.load(config, context)
    with pytest.raises(InputError, match=r"data\.recall_pairs"):
        DataConfig(source="recall", recall_pairs=0)
    assert len(RecallTexts(3, 32, 5, 40, 0, 0)) == 3
