"""`layers.attention`: attention against its formula, its cache against its parallel form."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError
from quweit_jax.layers.attention import CausalSelfAttention, pick_attention
from quweit_jax.layers.mlp import MLP
from quweit_jax.layers.ternary import BitLinear
from tests.compiled import decoded, quick_jit

BATCH, TOKENS, WIDTH, HEADS = 2, 7, 12, 3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def attention(**options):
    return CausalSelfAttention(
        HEADS, context=TOKENS, output_init=jax.nn.initializers.normal(0.3), **options
    )


@pytest.fixture(scope="module")
def params():
    found = quick_jit(attention(use_bias=True).init)(jax.random.key(0), jnp.zeros((1, 1, WIDTH)))[
        "params"
    ]
    return jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(1), p.shape), jax.device_get(found)
    )


def reference_attention(params, x):
    out = np.zeros(x.shape)
    for b in range(len(x)):
        q, k, v = np.split(x[b] @ params["qkv"]["kernel"] + params["qkv"]["bias"], 3, axis=-1)
        for h in range(HEADS):
            part = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
            for t in range(x.shape[1]):
                scores = np.asarray(
                    [q[t, part] @ k[s, part] / math.sqrt(WIDTH // HEADS) for s in range(t + 1)],
                    np.float64,
                )
                weights = np.exp(scores - scores.max())
                out[b, t, part] = (weights / weights.sum()) @ v[: t + 1, part]
    return out @ params["proj"]["kernel"] + params["proj"]["bias"]


def test_attention_is_its_formula(params):
    x = normal(BATCH, TOKENS, WIDTH)
    out = quick_jit(attention(use_bias=True).apply)({"params": params}, x)
    np.testing.assert_allclose(out, reference_attention(params, x), atol=1e-4)


def test_attention_with_dropout_is_the_same_where_nothing_is_dropped(params):
    x = normal(BATCH, TOKENS, WIDTH)
    module = attention(use_bias=True, dropout=1e-7)
    out = quick_jit(
        lambda x: module.apply(
            {"params": params}, x, train=True, rngs={"dropout": jax.random.key(0)}
        )
    )(x)
    np.testing.assert_allclose(out, reference_attention(params, x), atol=1e-4)


def test_attention_is_causal(params):
    x, apply = normal(1, TOKENS, WIDTH), quick_jit(attention(use_bias=True).apply)
    whole = np.asarray(apply({"params": params}, x))
    for t in range(TOKENS):
        changed = x.copy()
        changed[:, t] += 1
        out = np.asarray(apply({"params": params}, changed))
        np.testing.assert_array_equal(out[:, :t], whole[:, :t])
        assert (out[:, t:] != whole[:, t:]).any(axis=-1).all()


@pytest.mark.parametrize("pieces", [(1,) * TOKENS, (3, 1, 3)], ids=str)
def test_decoding_with_a_cache_is_the_parallel_form(params, pieces):
    x, module = normal(BATCH, TOKENS, WIDTH), attention(use_bias=True)
    found, empty, cache = decoded(module, params, x, pieces)
    assert empty["length"] == 0 and empty["keys"].shape == (BATCH, TOKENS, HEADS, WIDTH // HEADS)
    assert cache["length"] == TOKENS
    np.testing.assert_allclose(found, reference_attention(params, x), atol=1e-4)


def test_bfloat16(params):
    x = normal(BATCH, TOKENS, WIDTH)
    out = quick_jit(attention(use_bias=True, dtype=jnp.bfloat16).apply)({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    expected = reference_attention(params, x)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), expected, atol=0.03 * np.abs(expected).max()
    )


def test_picking_an_implementation():
    assert (
        pick_attention("xla", jnp.float32) == "xla"
        and pick_attention("cudnn", jnp.bfloat16) == "cudnn"
    )
    assert pick_attention("auto", jnp.float32) == "xla"
    assert pick_attention("auto", jnp.bfloat16) == (
        "cudnn" if jax.default_backend() == "gpu" else "xla"
    )
    with pytest.raises(InputError, match="Did you mean 'cudnn'"):
        pick_attention("cuda", jnp.float32)


@pytest.mark.parametrize("use_bias", [False, True])
def test_norm_and_mlp_are_their_formulas(use_bias):
    x = 3 * normal(4, WIDTH) + 1
    norm, mlp = (
        nn.LayerNorm(use_bias=use_bias, epsilon=1e-5),
        MLP(ratio=2, use_bias=use_bias, output_init=jax.nn.initializers.normal(0.3)),
    )
    scale, bias = normal(WIDTH, seed=1), normal(WIDTH, seed=2)
    found = norm.apply({"params": {"scale": scale} | ({"bias": bias} if use_bias else {})}, x)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, normed * scale + (bias if use_bias else 0), atol=1e-5)
    weights = jax.device_get(quick_jit(mlp.init)(jax.random.key(0), x)["params"])
    weights = jax.tree.map(lambda p: p + 0.1, weights)
    hidden = x @ weights["up"]["kernel"] + (weights["up"]["bias"] if use_bias else 0)
    gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    expected = gelu @ weights["down"]["kernel"] + (weights["down"]["bias"] if use_bias else 0)
    assert weights["up"]["kernel"].shape == (WIDTH, 2 * WIDTH)
    np.testing.assert_allclose(mlp.apply({"params": weights}, x), expected, atol=1e-4, rtol=1e-4)


def test_ternary_projections_are_bit_linears_packed_and_decoded():
    layer, x = attention(linear="ternary", use_bias=True), normal(BATCH, TOKENS, WIDTH)
    params = jax.device_get(quick_jit(layer.init)(jax.random.key(0), x)["params"])
    params = jax.tree.map(lambda p: p + np.float32(0.2) * normal(*p.shape, seed=1), params)
    assert set(params["qkv"]) == {"kernel", "norm_scale"}
    found = quick_jit(layer.apply)({"params": params}, x)
    # the same attention between what two layers of the ternary language models compute
    qkv = BitLinear(3 * WIDTH).apply({"params": params["qkv"]}, x)
    q, k, v = (a.reshape(BATCH, TOKENS, HEADS, -1) for a in np.split(qkv, 3, axis=-1))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
    expected = BitLinear(WIDTH).apply({"params": params["proj"]}, mixed)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    packed = pack(layer, {"params": params}, x)
    np.testing.assert_allclose(quick_jit(layer.apply)(packed, x), found, atol=1e-4)
    cache, parts = {}, []
    for t in range(TOKENS):
        part, cache = layer.apply(
            {**packed, **cache}, x[:, t : t + 1], decode=True, mutable=["cache"]
        )
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, 1), found, atol=1e-4)
    grads = jax.grad(lambda p: jnp.square(layer.apply({"params": p}, x)).sum())(params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_an_unknown_linear_is_named():
    with pytest.raises(InputError, match="linear: expected"):
        attention(linear="sparse").init(jax.random.key(0), jnp.zeros((1, 1, WIDTH)))
