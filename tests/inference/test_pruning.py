"""`inference.deployed` and `inference.pruning`: tables that are constant on the data go, and no output changes."""

import dataclasses

import jax
import numpy as np
import pytest

from quweit_jax.inference import deployed, pruning
from quweit_jax.inference.deployed import Block
from quweit_jax.models.dwn import DWN, DWNConfig
from quweit_jax.models.gpt import GPT, GPTConfig
from quweit_jax.models.matmulfree import MatMulFree, MatMulFreeConfig
from quweit_jax.models.options import WeightlessOptions
from quweit_jax.models.vit import ViT, ViTConfig
from tests.compiled import quick_jit
from tests.inference.test_packed import perturbed

SMALL = WeightlessOptions(num_luts=24, lut_inputs=3, thermometer_bits=3, vector_init=0.3)
DEEP = dataclasses.replace(SMALL, num_luts=(40, 16))
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 5)).astype(np.int32)
IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
ROWS = np.random.default_rng(0).normal(size=(12, 7)).astype(np.float32)


def gpt(options):
    return GPT(GPTConfig(11, context=9, layers=2, heads=2, width=8, mlp="weightless+dense", remat=True, weightless=options)), TOKENS


def vit(options, integer):
    return ViT(ViTConfig(5, "mu/4", width=16, mlp="weightless", integer=integer, weightless=options)), IMAGES


CASES = {
    "gpt": lambda: gpt(DEEP),
    "gpt, grouped": lambda: gpt(dataclasses.replace(SMALL, sum="grouped", signed=False)),
    "matmulfree": lambda: (
        MatMulFree(MatMulFreeConfig(11, context=9, width=8, layers=2, mlp="weightless", weightless=SMALL)),
        TOKENS,
    ),
    "vit": lambda: vit(SMALL, False),
    "integer": lambda: vit(DEEP, True),
    "integer, grouped": lambda: vit(dataclasses.replace(SMALL, num_luts=32, sum="grouped"), True),
    "dwn": lambda: (DWN(DWNConfig(3, num_luts=(40, 20), lut_inputs=3, thermometer_bits=2)), ROWS),
    "dwn, learnable reduction": lambda: (DWN(DWNConfig(2, num_luts=(30,), lut_inputs=3, thermometer_bits=2, reduction="learnable", tau=0.7)), ROWS),
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    model, inputs = CASES[request.param]()
    variables = jax.device_get(quick_jit(model.init)(jax.random.key(0), inputs))
    if "ranges" in variables:  # as training would set them
        variables = {**variables, **model.apply(variables, inputs, train=True, mutable=["ranges"])[1]}
    else:
        variables = perturbed(variables)
    return model, variables, inputs, deployed.deploy(model, variables, inputs.shape[1:])


def test_outputs_stay_the_same_to_the_bit(case):
    model, variables, inputs, whole = case
    weights = np.ones(len(inputs), np.float32)
    batches = [(inputs, weights), (inputs[::-1].copy(), weights)]
    counts = pruning.count_ones(whole, batches)
    assert counts.keys() == whole.blocks.keys()
    pruned, folds = pruning.prune(whole, counts)
    dropped = sum(int((~kept).sum()) for left in folds.values() for kept in left.kept)
    assert dropped > 0
    for name, left in folds.items():
        assert [len(t) for t in pruned.blocks[name].tables] == [int(k.sum()) for k in left.kept]
    found = pruning.compare(whole, pruned, batches)
    outputs = 2 * (inputs.size if inputs.dtype == np.int32 else len(inputs))
    assert found == pruning.Comparison(outputs, outputs, outputs)
    # What was kept does matter: other data are decided with other logits.
    expected = model.apply(variables, inputs)
    np.testing.assert_allclose(pruned.apply(pruned.variables, inputs, None), expected, atol=0.02 if "ranges" in variables else 1e-4)


def test_counts_are_those_of_examples_with_weight(case):
    *_, inputs, whole = case
    weights = np.zeros(len(inputs), np.float32)
    weights[1] = 1
    one, both = (pruning.count_ones(whole, [batch]) for batch in ((inputs, weights), (inputs, np.ones_like(weights))))
    alone = pruning.count_ones(whole, [(inputs[1:2], weights[1:2])])
    for name, counts in one.items():
        assert counts.tokens == alone[name].tokens == both[name].tokens // len(inputs) > 0
        for ours, expected in zip(counts.ones, alone[name].ones):
            np.testing.assert_array_equal(ours, expected)


def random_block(draw, constant_inputs):
    tables = (draw.integers(0, 2, (20, 8)).astype(bool), draw.integers(0, 2, (12, 8)).astype(bool), draw.integers(0, 2, (6, 8)).astype(bool))
    wiring = (draw.integers(0, 9, (20, 3)), draw.integers(0, 20, (12, 3)), draw.integers(0, 12, (6, 3)))
    wiring[0][:8] %= constant_inputs
    return Block(tables, wiring, 9, 1)


def naive(tables, wiring, bits):
    """Layer after layer, table after table: bits (T, F) -> [(T, L)]."""
    layers = []
    for layer, places in zip(tables, wiring):
        bits = np.asarray([[layer[j][sum(int(row[p]) << k for k, p in enumerate(places[j]))] for j in range(len(layer))] for row in bits])
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
    left = pruning.fold(block, constant, [x[0] for x in layers])
    assert all((~k).sum() > 0 for k in left.kept[:2]) and not (left.kept[-1] & constant[-1]).any()
    expected = layers[-1][:, left.kept[-1]]
    np.testing.assert_array_equal(naive(left.tables, left.wiring, bits)[-1], expected)
    # Every kept table is read by a kept one.
    for below, wiring in zip(left.kept, left.wiring[1:]):
        assert set(wiring.ravel()) == set(range(int(below.sum())))


def test_a_layer_keeps_a_table():
    block = Block((np.zeros((4, 2), bool), np.ones((2, 2), bool)), (np.zeros((4, 1), int), np.zeros((2, 1), int)), 1, 1)
    left = pruning.fold(block, [np.ones(4, bool), np.ones(2, bool)], [np.zeros(4, bool), np.ones(2, bool)])
    assert [int(k.sum()) for k in left.kept] == [1, 1]


def test_models_without_tables():
    model = GPT(GPTConfig(11, context=9, layers=1, heads=2, width=8))
    variables = quick_jit(model.init)(jax.random.key(0), TOKENS)
    assert deployed.deploy(model, variables) is None
