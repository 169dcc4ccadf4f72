"""`deploy.pack`: a model evaluated in its deployed form gives the logits it was trained to
give.
"""

import functools
import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest

from quweit_jax.deploy.pack import describe, describe_lines, pack, stored_bytes
from quweit_jax.errors import InputError
from quweit_jax.layers.lookup import MAPPINGS
from quweit_jax.layers.weightless import SUMS, WeightlessBlock
from quweit_jax.models.dwn import DWN, DWNConfig
from quweit_jax.models.gpt import GPT, GPTConfig
from quweit_jax.models.options import WeightlessOptions
from tests.compiled import quick_jit

SMALL = {"num_luts": 16, "lut_inputs": 3, "thermometer_bits": 3, "vector_init": 0.5}


class Stack(nn.Module):
    """Blocks at two depths of a user's model, and something dense."""

    options: tuple

    @nn.compact
    def __call__(self, x):
        block = functools.partial(WeightlessBlock, 4, **dict(self.options))
        x = nn.Dense(4)(x) + block(name="first")(x)
        return nn.Sequential([block(), nn.Dense(3)])(x)


def perturbed(variables, scale=0.05):
    """As after training: no parameter is at its round initial value."""
    leaves, structure = jax.tree.flatten(jax.device_get(variables["params"]))
    draw = np.random.default_rng(7)
    params = structure.unflatten(
        [leaf + scale * draw.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    )
    return {**jax.device_get(variables), "params": params}


def start(model, inputs):
    return perturbed(quick_jit(model.init)(jax.random.key(0), inputs))


def check(model, variables, inputs, **options):
    expected = quick_jit(functools.partial(model.apply, **options))(variables, inputs)
    weights = pack(model, variables, inputs)
    found = quick_jit(lambda inputs: model.apply(weights, inputs, **options))(inputs)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.std(expected) > 1e-3


# Every mapping with every sum, and both with and without signs.
CASES = [
    {"mapping": m, "sum": s, "signed": (i + j) % 2 == 0}
    for (i, m), (j, s) in itertools.product(enumerate(MAPPINGS), enumerate(SUMS))
]
MORE = [
    {"num_luts": (20, 12)},
    {"use_norm": False, "lut_inputs": 1},
    {"norm_bias": True, "lut_inputs": 6},
    {"learn_thresholds": False},
]


@pytest.mark.parametrize("options", CASES + MORE, ids=str)
def test_packed_blocks_give_the_same_output(options):
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    block = WeightlessBlock(4, **SMALL | options)
    check(block, start(block, x), x)


def test_blocks_of_a_users_model():
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    model = Stack(tuple(SMALL.items()))
    check(model, start(model, x), x)


def test_a_whole_gpt():
    weightless = WeightlessOptions(num_luts=32, vector_init=0.3)
    model = GPT(
        GPTConfig(
            11,
            context=9,
            layers=3,
            heads=2,
            width=8,
            mlp="weightless+dense+weightless",
            remat=True,
            weightless=weightless,
        )
    )
    tokens = np.random.default_rng(0).integers(0, 11, (2, 9)).astype(np.int32)
    check(model, start(model, tokens), tokens, train=False)


def test_real_sums_are_rounded_to_int8():
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    block = WeightlessBlock(4, int8_sums=False, **SMALL)
    variables = start(block, x)
    found = block.apply(pack(block, variables, x), x)
    largest = np.abs(variables["params"]["vectors"]).max(axis=0)
    error = np.abs(np.asarray(found) - np.asarray(block.apply(variables, x)))
    assert (error <= 16 * largest / 127 / 2 + 1e-5).all() and error.max() > 0


def test_packing_leaves_no_block_behind():
    x = np.zeros((1, 6), np.float32)
    model = Stack(tuple(SMALL.items()))
    weights = pack(model, start(model, x), x)
    assert set(weights) == {"params", "packed"}
    assert set(weights["packed"]) == {"first", "WeightlessBlock_0"}
    assert {name: set(held) for name, held in weights["params"].items()} == {
        "Dense_0": {"kernel", "bias"},
        "Dense_1": {"kernel", "bias"},
        "first": {"norm"},
        "WeightlessBlock_0": {"norm"},
    }
    block = weights["packed"]["first"]
    assert block["vectors"].dtype == np.int8
    assert {name: held.dtype for name, held in block["luts_0"].items()} == {
        "tables": np.uint8,
        "wiring": np.uint8,
    }


def test_wiring_of_many_inputs_takes_wider_integers():
    x = np.zeros((1, 150), np.float32)
    block = WeightlessBlock(4, num_luts=200, lut_inputs=3, thermometer_bits=2)
    wiring = pack(block, start(block, x), x)["packed"]["luts_0"]["wiring"]
    assert wiring.dtype == np.uint16 and wiring.max() == 299


class Mixer(nn.Module):
    """A block that is not the whole model."""

    block: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.block(x)


def test_bytes_counted_by_hand():
    block = WeightlessBlock(4, num_luts=10, lut_inputs=3, thermometer_bits=2)
    model, x = Mixer(block), np.zeros((1, 6), np.float32)
    found = pack(model, start(model, x), x)
    tables, wiring, thresholds = 10 * 1, 10 * 3 * 1, 6 * 2 * 4
    vectors, scales, bias, norm = 10 * 4 * 1, 4 * 4, 4 * 4, 6 * 4
    assert (
        stored_bytes(found) == tables + wiring + thresholds + vectors + scales + bias + norm == 184
    )
    facts = describe(model, found, x)
    assert facts == {
        "form": "packed",
        "block_bytes": 184,
        "dense_mlp_bytes_int8": 8 * 6 * 4,
        "model_bytes": 184,
    }
    (line,) = describe_lines(facts)
    assert (
        line.startswith("weightless blocks at inference: 184 bytes")
        and "192 in int8, 768 in float32" in line
    )


def test_models_without_a_packed_form():
    model, x = nn.Dense(3), np.zeros((1, 6), np.float32)
    with pytest.raises(InputError, match="nothing to pack"):
        pack(model, start(model, x), x)


@pytest.mark.parametrize("reduction", ["group_sum", "learnable"])
def test_a_classifier(reduction):
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    model = DWN(DWNConfig(2, num_luts=8, lut_inputs=2, thermometer_bits=2, reduction=reduction))
    variables = start(model, x)
    packed = pack(model, variables, x)
    assert set(packed) == {"packed"}
    np.testing.assert_array_equal(model.apply(packed, x), model.apply(variables, x))
    assert describe_lines(describe(model, packed, x)) == []
