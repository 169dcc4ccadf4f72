"""`layers.delta`: the whole gated delta mixer against its formulas in float64, decoding, padding,
ternary projections packed, and what it costs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.costs import count
from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError
from quweit_jax.layers.delta import GatedDelta
from tests.compiled import decoded, quick_jit

BATCH, TOKENS, WIDTH, HEADS, HEAD = 2, 21, 12, 3, 4


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mixer(**options):
    return GatedDelta(HEADS, output_init=jax.nn.initializers.normal(0.3), **options)


def params_of(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, WIDTH)))["params"]
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda s: draw.normal(0, 0.5, s.shape).astype(np.float32), shapes)


def silu(x):
    return x / (1 + np.exp(-x))


def reference(params, x):
    """The published layer for one text (T, d), step by step."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = x.astype(np.float64)
    mixed = {}
    for name in ("query", "key", "value"):
        y = np.concatenate([np.zeros((3, HEADS * HEAD)), x @ p[name]["kernel"]])
        taps = p[f"{name}_conv"]["kernel"]
        summed = sum(y[i : i + len(x)] * taps[i] for i in range(4))
        mixed[name] = silu(summed).reshape(-1, HEADS, HEAD)
    q, k = (mixed[n] / np.linalg.norm(mixed[n], axis=-1, keepdims=True) for n in ("query", "key"))
    steps = np.log1p(np.exp(x @ p["step"]["kernel"] + p["gate_bias"]))
    gate = np.exp(-np.exp(p["gate_rate"]) * steps)
    rate = 1 / (1 + np.exp(-x @ p["rate"]["kernel"]))
    read = np.zeros((len(x), HEADS, HEAD))
    for h in range(HEADS):
        s = np.zeros((HEAD, HEAD))
        for t in range(len(x)):
            keep = np.eye(HEAD) - rate[t, h] * np.outer(k[t, h], k[t, h])
            s = gate[t, h] * s @ keep + rate[t, h] * np.outer(mixed["value"][t, h], k[t, h])
            read[t, h] = s @ q[t, h] / np.sqrt(HEAD)
    read = read / np.sqrt(np.square(read).mean(-1, keepdims=True) + 1e-6)
    read = (read * p["read_norm"]["scale"]).reshape(len(x), -1)
    return (read * silu(x @ p["gate"]["kernel"])) @ p["proj"]["kernel"]


def test_it_is_its_formulas():
    module, x = mixer(), normal(BATCH, TOKENS, WIDTH)
    params = params_of(module)
    out = quick_jit(module.apply)({"params": params}, x)
    for row in range(BATCH):
        expected = reference(params, x[row])
        np.testing.assert_allclose(out[row], expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("pieces", [(1,) * 5 + (16,), (2, 18, 1)], ids=str)
def test_decoding_is_the_parallel_form(pieces):
    module, x = mixer(), normal(BATCH, TOKENS, WIDTH)
    params = params_of(module)
    whole = quick_jit(module.apply)({"params": params}, x)
    found, cache, _ = decoded(module, params, x, pieces)
    assert cache["state"].shape == (BATCH, HEADS, HEAD, HEAD) and not cache["state"].any()
    np.testing.assert_allclose(found, whole, atol=1e-4 * float(np.abs(whole).max()))


def test_padding_on_the_left_changes_nothing_and_an_ended_row_keeps_its_state():
    module, x = mixer(), normal(1, 9, WIDTH)
    params = {"params": params_of(module)}
    apply = quick_jit(module.apply)
    expected = apply(params, x)
    padded = np.concatenate([normal(1, 4, WIDTH, seed=5), x], 1)
    valid = np.arange(13)[None] >= 4
    np.testing.assert_allclose(apply(params, padded, valid)[:, 4:], expected, atol=1e-4)
    step = quick_jit(functools.partial(module.apply, decode=True, mutable=["cache"]))
    _, held = step(params, padded, valid)
    _, after = step({**params, **held}, x[:, :1], np.zeros((1, 1), bool))
    for one, other in zip(jax.tree.leaves(held), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)


def test_ternary_projections_are_packed_and_compute_the_same():
    module, x = mixer(linear="ternary"), normal(BATCH, TOKENS, WIDTH)
    params = params_of(module)
    expected = quick_jit(module.apply)({"params": params}, x)
    packed = pack(module, {"params": params}, x[:, :2])
    assert packed["packed"].keys() == {"query", "key", "value", "gate", "proj"}
    assert not packed["params"].keys() & packed["packed"].keys()
    found = quick_jit(module.apply)(packed, x)
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("linear", ["dense", "ternary"])
def test_gradients_reach_everything(linear):
    module, x = mixer(linear=linear), normal(1, TOKENS, WIDTH)

    def loss(params):
        return jnp.square(module.apply({"params": params}, x)).sum()

    gradient = quick_jit(jax.grad(loss))(params_of(module))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.any(leaf), jax.tree_util.keystr(path)


def test_a_pattern_of_mixers_and_what_it_costs():
    """Three of four blocks carry a state of fixed size; by hand: five matrices of d^2, two of d H,
    and a state of d^2 / H numbers a block.
    """
    options = {"name": "transformer_pp", "width": 32, "layers": 4, "heads": 2, "hidden": 48}
    options |= {"mlp": "none", "context": 64}
    pattern = "gated_delta+gated_delta+gated_delta+attention"
    assert models.build(options | {"mixer": pattern}, 7).config.mixers()[2:] == (
        "gated_delta",
        "attention",
    )
    delta, attention = (
        count.count(options | {"mixer": kind}, 7) for kind in ("gated_delta", "attention")
    )
    kinds = delta.by_kind()
    assert kinds["projection"].multiplications == {"float32": 4 * (5 * 32 * 32 + 2 * 32 * 2)}
    assert kinds["recurrence"].state_bytes == 4 * 4 * (2 * 16 * 16 + 3 * 3 * 32)
    both = count.count(options | {"mixer": pattern}, 7).by_kind()
    assert 4 * both["recurrence"].state_bytes == 3 * kinds["recurrence"].state_bytes
    assert (
        4 * both["attention"].total_multiplications
        == attention.by_kind()["attention"].total_multiplications
    )
    for mixer_kind, said in (("mlgru", "mixer"), ("attention+gated_delta+attention", "divides")):
        with pytest.raises(InputError, match=rf"model\.mixer: expected .*{said}|model\.mixer"):
            models.build(options | {"mixer": mixer_kind}, 7)


def test_a_width_that_heads_do_not_divide():
    with pytest.raises(InputError, match="multiples of its 3 heads"):
        GatedDelta(3).init(jax.random.key(0), jnp.zeros((1, 1, 10)))
