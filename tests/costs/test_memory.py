"""Bytes of training from the compiled step, with and without remat,
and of inference from counts.
"""

import types

import jax
import jax.numpy as jnp
import pytest

from quweit_jax.commands.costs import training_memory
from quweit_jax.costs import count, memory
from quweit_jax.errors import InputError
from tests.compiled import CHEAP


def test_bytes_of_a_compiled_step():
    state = types.SimpleNamespace(
        params={"w": jnp.zeros((4, 8))},
        constants={},
        opt_state=(jnp.zeros(3, jnp.int8), jnp.zeros((4, 8))),
        ema=None,
    )
    batch = {"inputs": jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)}
    compiled = types.SimpleNamespace(
        memory_analysis=lambda: types.SimpleNamespace(temp_size_in_bytes=1000)
    )
    found = memory.of_training(state, batch, compiled, 500)
    assert found == memory.TrainingMemory(
        parameters=128,
        constants=0,
        optimizer=3 + 128,
        average=0,
        batch=16,
        working=1000,
        activations=500,
    )
    assert found.total == 128 + 131 + 16 + 1000
    with pytest.raises(InputError, match="does not tell"):
        memory.of_training(state, batch, types.SimpleNamespace(memory_analysis=lambda: None), 0)


def test_what_a_gradient_keeps():
    """Of tanh(x w) times v summed: the tanh's result (or what its derivative makes of it) for its
    own gradient, and for v's; not x, w or v.
    """
    x, w = jnp.ones((5, 3)), jnp.ones((3, 7))

    def loss(params, x):
        return (jnp.tanh(x @ params["w"]) * params["v"]).sum()

    plain = memory.kept_for_backward(loss, {"w": w, "v": jnp.ones((5, 7))}, x)
    again = memory.kept_for_backward(jax.checkpoint(loss), {"w": w, "v": jnp.ones((5, 7))}, x)
    assert plain in (5 * 7 * 4, 2 * 5 * 7 * 4) and again == 0


def test_training_with_and_without_remat(tiny_config):
    """Of a block only its input is kept with remat, (8, 16, 32) floats; without, also norms,
    queries, keys, values, scores, hidden numbers.
    """
    config = tiny_config({"model.layers": 1, "model.mlp": "dense"})
    found = training_memory(config, 30, CHEAP)
    assert set(found) == {"without remat", "with remat"}
    parameters = count.of_config(config, outputs=30).parameters
    for needed in found.values():
        assert needed["parameters"] == 4 * parameters
        assert (
            2 * 4 * parameters <= needed["optimizer"] < 2 * 4 * parameters + 200
        )  # Adam's two moments, and its counters
        assert needed["batch"] == 2 * 8 * 16 * 4
        assert needed["total"] == sum(
            v for k, v in needed.items() if k not in ("total", "activations")
        )
    plain, again = found["without remat"]["activations"], found["with remat"]["activations"]
    tokens, scores = 8 * 16, 8 * 2 * 16 * 16
    block = 4 * (
        tokens * (3 * 32 + 4 * 32) + scores
    )  # at the least: queries, keys and values, hidden numbers, softmax
    assert plain - again > block
    assert again >= 4 * tokens * 32
    assert found["without remat"]["working"] > plain / 2


def test_bytes_of_inference():
    counted = count.count({"name": "gpt", "layers": 2, "heads": 2, "width": 32, "context": 16}, 11)
    one, four = memory.of_inference(counted), memory.of_inference(counted, 4)
    assert one.weights == four.weights == 4 * counted.parameters
    assert one.state == 2 * 2 * 16 * 32 * 4 and four.state == 4 * one.state
    assert one.activations == 4 * (32 + 4 * 32)  # into and out of the widest layer
    assert four.total == one.weights + 4 * (one.state + one.activations)
    with pytest.raises(InputError, match="found 0"):
        memory.of_inference(counted, 0)
