"""`deploy.prune`: tables that are constant on the data go, and no
output changes.
"""

import dataclasses

import jax
import numpy as np
import pytest

from quweit_jax.deploy import prune
from quweit_jax.deploy.tables import Block
from quweit_jax.models.dwn import DWN, DWNConfig
from quweit_jax.models.gpt import GPT, GPTConfig
from quweit_jax.models.matmulfree import MatMulFree, MatMulFreeConfig
from quweit_jax.models.options import WeightlessOptions
from quweit_jax.models.vit import ViT, ViTConfig
from tests.compiled import quick_jit
from tests.deploy.test_packed import perturbed

pytestmark = pytest.mark.usefixtures("compile_quickly")

SMALL = WeightlessOptions(num_luts=24, lut_inputs=3, thermometer_bits=3, vector_init=0.3)
DEEP = dataclasses.replace(SMALL, num_luts=(40, 16))
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 5)).astype(np.int32)
IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
ROWS = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)


def gpt(options):
    return GPT(
        GPTConfig(
            11,
            context=5,
            layers=1,
            heads=2,
            width=8,
            mlp="weightless",
            remat=True,
            weightless=options,
        )
    ), TOKENS


def vit(options):
    return ViT(
        ViTConfig(5, "mu/4", width=16, mlp="weightless", integer=True, weightless=options)
    ), IMAGES


def dwn(**options):
    return DWN(DWNConfig(3, lut_inputs=3, thermometer_bits=2, **options)), ROWS


CASES = {
    "gpt": lambda: gpt(DEEP),
    "gpt, grouped": lambda: gpt(dataclasses.replace(SMALL, sum="grouped", signed=False)),
    "matmulfree": lambda: (
        MatMulFree(
            MatMulFreeConfig(11, context=5, width=8, layers=1, mlp="weightless", weightless=SMALL)
        ),
        TOKENS,
    ),
    "integer": lambda: vit(DEEP),
    "integer, grouped": lambda: vit(dataclasses.replace(SMALL, num_luts=32, sum="grouped")),
    "dwn": lambda: dwn(num_luts=(40, 21)),
    "dwn, learnable reduction": lambda: dwn(num_luts=(30,), reduction="learnable", tau=0.7),
}


def trained(name):
    """A model, variables that look trained, and inputs."""
    model, inputs = CASES[name]()
    variables = jax.device_get(quick_jit(model.init)(jax.random.key(0), inputs))
    if "ranges" not in variables:
        return model, perturbed(variables), inputs
    _, moved = quick_jit(lambda v, x: model.apply(v, x, train=True, mutable=["ranges"]))(
        variables, inputs
    )
    return model, {**variables, **moved}, inputs


@pytest.mark.parametrize("name", CASES)
def test_outputs_stay_the_same_to_the_bit(name):
    model, variables, inputs = trained(name)
    whole = prune.deploy(model, variables, inputs)
    batches = [
        (inputs, np.ones(len(inputs), np.float32)),
        (inputs[::-1].copy(), np.arange(len(inputs), dtype=np.float32)),
    ]
    counts = prune.count_ones(whole, batches)
    assert counts.keys() == whole.blocks.keys()
    pruned, folds = prune.prune(whole, counts)
    assert sum(int((~kept).sum()) for left in folds.values() for kept in left.kept) > 0
    for block, left in folds.items():
        assert [len(t) for t in pruned.blocks[block].tables] == [int(k.sum()) for k in left.kept]
    tokens = inputs.size // len(inputs) if inputs.dtype == np.int32 else 1
    outputs = (2 * len(inputs) - 1) * tokens  # one example has no weight
    assert prune.compare(whole, pruned, batches) == prune.Comparison(outputs, outputs, outputs)
    # Both are the model that was trained.
    expected = quick_jit(model.apply)(variables, inputs)
    found = quick_jit(model.apply)(pruned.variables, inputs)
    np.testing.assert_allclose(found, expected, atol=0.02 if "ranges" in variables else 1e-4)


@pytest.mark.parametrize("name", ["dwn", "gpt"])
def test_counts_are_those_of_examples_with_weight(name):
    model, variables, inputs = trained(name)
    whole = prune.deploy(model, variables, inputs)
    batches = [(inputs, np.eye(len(inputs), dtype=np.float32)[i]) for i in (0, 1)]
    first, both = prune.count_ones(whole, batches[:1]), prune.count_ones(whole, batches)
    repeated = prune.count_ones(
        whole, [(np.stack([inputs[1]] * len(inputs)), np.ones(len(inputs), np.float32))]
    )
    for block, counts in both.items():
        assert counts.tokens == 2 * first[block].tokens
        for total, one, other in zip(counts.ones, first[block].ones, repeated[block].ones):
            np.testing.assert_array_equal(total, one + other // len(inputs))


def test_a_change_that_matters_is_told():
    model, variables, inputs = trained("dwn")
    whole = prune.deploy(model, variables, inputs)

    class Changed:
        def apply(self, variables, x):
            return model.apply(variables, x) + (np.arange(len(x)) == 2)[:, None] * [0, 0, 99.0]

    other = dataclasses.replace(whole, model=Changed())
    found = prune.compare(whole, other, [(inputs, np.ones(len(inputs), np.float32))])
    assert (
        found.outputs == len(inputs)
        and found.same_logits == len(inputs) - 1 <= found.same_decisions
    )


def random_block(draw, constant_inputs):
    tables = (
        draw.integers(0, 2, (20, 8)).astype(bool),
        draw.integers(0, 2, (12, 8)).astype(bool),
        draw.integers(0, 2, (6, 8)).astype(bool),
    )
    wiring = (
        draw.integers(0, 9, (20, 3)),
        draw.integers(0, 20, (12, 3)),
        draw.integers(0, 12, (6, 3)),
    )
    wiring[0][:8] %= constant_inputs
    return Block(tables, wiring, 9, 1)


def naive(tables, wiring, bits):
    """Layer after layer, table after table: bits (T, F) -> [(T, L)]."""
    layers = []
    for layer, places in zip(tables, wiring):
        bits = np.asarray(
            [
                [
                    layer[j][sum(int(row[p]) << k for k, p in enumerate(places[j]))]
                    for j in range(len(layer))
                ]
                for row in bits
            ]
        )
        layers.append(bits)
    return layers


@pytest.mark.parametrize("seed", range(5))
def test_folding_three_layers_against_a_naive_evaluation(seed):
    draw = np.random.default_rng(seed)
    bits = draw.integers(0, 2, (40, 9))
    bits[:, :3] = [0, 1, 1]  # inputs that never change make tables that never change
    block = random_block(draw, 3)
    layers = naive(block.tables, block.wiring, bits)
    constant = [(x == x[0]).all(0) for x in layers]
    left = prune.fold(block, constant, [x[0] for x in layers])
    assert all((~k).sum() > 0 for k in left.kept[:2]) and not (left.kept[-1] & constant[-1]).any()
    expected = layers[-1][:, left.kept[-1]]
    np.testing.assert_array_equal(naive(left.tables, left.wiring, bits)[-1], expected)
    # Every kept table is read by a kept one.
    for below, wiring in zip(left.kept, left.wiring[1:]):
        assert set(wiring.ravel()) == set(range(int(below.sum())))


def test_a_layer_keeps_a_table():
    block = Block(
        (np.zeros((4, 2), bool), np.ones((2, 2), bool)),
        (np.zeros((4, 1), int), np.zeros((2, 1), int)),
        1,
        1,
    )
    left = prune.fold(
        block, [np.ones(4, bool), np.ones(2, bool)], [np.zeros(4, bool), np.ones(2, bool)]
    )
    assert [int(k.sum()) for k in left.kept] == [1, 1]


@pytest.mark.parametrize("num_luts", [9, (20, 9)])
def test_vector_tables_are_left_alone(num_luts):
    model, inputs = gpt(dataclasses.replace(SMALL, num_luts=num_luts, sum="vector"))
    variables = quick_jit(model.init)(jax.random.key(0), inputs)
    assert prune.deploy(model, variables, inputs) is None


def test_models_without_tables():
    model = GPT(GPTConfig(11, context=9, layers=1, heads=2, width=8))
    variables = quick_jit(model.init)(jax.random.key(0), TOKENS)
    assert prune.deploy(model, variables, TOKENS) is None
