"""Attention: causal with a key-value cache, and of every token to every token.

Dimensions: B batch, T tokens, C context (cache length), H heads, K width of a head, d model width.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from quweit_jax.errors import check_choice
from quweit_jax.layers.costs import Call
from quweit_jax.layers.norms import Initializer, RMSNorm, normal
from quweit_jax.layers.rotary import RopeScaling, rotate
from quweit_jax.layers.ternary import BitLinear
from quweit_jax.ops.counts import BYTES, FLOAT, Elementwise, LayerCosts

ATTENTIONS = ("auto", "xla", "cudnn")
LINEARS = ("dense", "ternary")


def pick_attention(implementation: str, dtype: DTypeLike) -> Literal["xla", "cudnn"]:
    """What runs attention: for 'auto', 'cudnn' (flash attention) in half precision on a GPU, else
    'xla'.
    """
    check_choice("attention", implementation, ATTENTIONS)
    if implementation in ("xla", "cudnn"):
        return implementation
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return "cudnn" if half and jax.default_backend() == "gpu" else "xla"


def _projection(
    attention: CausalSelfAttention | SelfAttention, features: int, init: Initializer, name: str
) -> nn.Module:
    """A projection inside of an attention, of the kind that its field `linear` names."""
    check_choice("linear", attention.linear, LINEARS)
    dtype, use_bias = attention.dtype, attention.use_bias
    if attention.linear == "ternary":
        own_norm = getattr(attention, "own_norms", True)
        return BitLinear(features, init, dtype=dtype, use_norm=own_norm, name=name)
    output_bias: bool | None = getattr(attention, "output_bias", None)
    if name == "proj" and output_bias is not None:
        use_bias = output_bias
    return nn.Dense(features, use_bias, dtype, kernel_init=init, name=name)


def token_positions(
    module: nn.Module, shape: tuple[int, ...], valid: Bool[Array, "B T"] | None, decode: bool
) -> Int[Array, "#B T"]:
    """The place of each of (B, T) tokens in its text, (B or 1, T): padding (valid (B, T) False)
    doesn't count.

    With decode=True they go on from what the module's `cache` has counted.
    """
    batch, tokens = shape
    counted = (
        jnp.arange(tokens)[None] if valid is None else jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    )
    if not decode:
        return counted
    seen = module.variable("cache", "positions", jnp.zeros, (batch,), jnp.int32)
    start = seen.value[:, None]
    if not module.is_initializing():
        seen.value = seen.value + (tokens if valid is None else valid.sum(1, dtype=jnp.int32))
    return start + counted


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention. With decode=True it appends to a cache of `context` keys and
    values.

    Args:
      num_heads: H. context: the cache's length. dropout: of attention weights and of the output.
      use_bias: biases of both projections. output_bias: of the output projection, where that is
        another (None: as `use_bias`). kernel_init, output_init: of the queries, keys and values,
        and of the output projection.
      implementation: 'auto', 'xla' or 'cudnn' (flash attention on NVIDIA GPUs, half precision).
      num_kv_heads: fewer heads of keys and values, each shared by several of queries (0: as many).
        head_width: K (0: d / H).
      rotary: base of rotary position embeddings, 0 for none. rope: how they are scaled.
      linear: both projections are 'dense', or 'ternary': a `BitLinear` each, without biases.
      own_norms: of 'ternary', whether each brings a norm of its own; without, queries, keys and
        values are three matrices, each with its own scale, as in BitNet b1.58.
      sub_norm: epsilon of an RMSNorm before the output projection, 0 for none.
    """

    num_heads: int
    context: int
    dropout: float = 0.0
    use_bias: bool = False
    kernel_init: Initializer = normal(0.02)
    output_init: Initializer = normal(0.02)
    implementation: str = "auto"
    dtype: DTypeLike = jnp.float32
    num_kv_heads: int = 0
    head_width: int = 0
    rotary: float = 0.0
    linear: str = "dense"
    rope: RopeScaling = RopeScaling()
    output_bias: bool | None = None
    own_norms: bool = True
    sub_norm: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T d"],
        valid: Bool[Array, "B T"] | None = None,
        *,
        positions: Int[Array, "#B T"] | None = None,
        train: bool = False,
        decode: bool = False,
    ) -> Float[Array, "B T d"]:
        """x (B, T, d), valid (B, T) bool: tokens that are not padding, positions (B or 1, T) if
        rotary -> (B, T, d).
        """
        batch, tokens, width = x.shape
        heads, kv_heads, head = (
            self.num_heads,
            self.num_kv_heads or self.num_heads,
            self.head_width or width // self.num_heads,
        )
        widths = {"query": heads, "key": kv_heads, "value": kv_heads}
        if not self._in_three:
            widths = {"qkv": heads + 2 * kv_heads}
        read = [
            _projection(self, count * head, self.kernel_init, name)(x)
            for name, count in widths.items()
        ]
        qkv = jnp.concatenate(read, -1).reshape(batch, tokens, -1, head)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        if self.rotary:
            assert positions is not None
            scaled = (positions, self.rotary, self.rope, self.context)
            q, k = rotate(q, *scaled), rotate(k, *scaled)
        mask = None
        if decode:
            k, v, mask = self._cache(k, v, valid)
        elif valid is not None:
            # Padding sees itself, so that its results are numbers; nobody else sees it.
            mask = (valid[:, None, :] | jnp.eye(tokens, dtype=bool))[:, None]
        implementation = (
            "xla" if mask is not None else pick_attention(self.implementation, self.dtype)
        )
        if train and self.dropout > 0:
            mixed = self._attend_with_dropout(q, k, v, mask)
        else:
            mixed = jax.nn.dot_product_attention(
                q, k, v, mask=mask, is_causal=not decode, implementation=implementation
            )
        mixed = mixed.reshape(batch, tokens, heads * head)
        if self.sub_norm:
            mixed = RMSNorm(self.sub_norm, self.dtype, name="sub_norm")(mixed)
        out = _projection(self, width, self.output_init, "proj")(mixed)
        return nn.Dropout(self.dropout, deterministic=not train)(out)

    @property
    def _in_three(self) -> bool:
        """Whether queries, keys and values have a projection each."""
        return self.linear == "ternary" and not self.own_norms

    def _attend_with_dropout(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / jnp.sqrt(q.shape[-1]).astype(q.dtype)
        visible = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool)) & (
            True if mask is None else mask
        )
        weights = jax.nn.softmax(
            jnp.where(visible, scores.astype(jnp.float32), -jnp.inf), axis=-1
        ).astype(q.dtype)
        weights = nn.Dropout(self.dropout, deterministic=False)(weights)
        return jnp.einsum("bhqs,bshk->bqhk", weights, v)

    def _cache(self, k: Array, v: Array, valid: Array | None) -> tuple[Array, Array, Array]:
        """Writes k and v behind what the cache holds; returns all of it and which places each query
        may see.
        """
        batch, tokens, heads, width = k.shape
        shape = (batch, self.context, heads, width)
        keys = self.variable("cache", "keys", jnp.zeros, shape, k.dtype)
        values = self.variable("cache", "values", jnp.zeros, shape, v.dtype)
        length = self.variable("cache", "length", lambda: jnp.zeros((), jnp.int32))
        padding = self.variable("cache", "padding", jnp.zeros, (batch, self.context), jnp.bool_)
        start = length.value
        if not self.is_initializing():
            keys.value = jax.lax.dynamic_update_slice(keys.value, k, (0, start, 0, 0))
            values.value = jax.lax.dynamic_update_slice(values.value, v, (0, start, 0, 0))
            if valid is not None:
                padding.value = jax.lax.dynamic_update_slice(padding.value, ~valid, (0, start))
            length.value = start + tokens
        places, queries = jnp.arange(self.context)[None, :], (start + jnp.arange(tokens))[:, None]
        visible = (places <= queries) & (~padding.value[:, None, :] | (places == queries))
        return keys.value, values.value, visible[:, None]

    def costs(self, call: Call) -> list[LayerCosts]:
        """The newest of `call.context` tokens (None: of as many as fit) reads the others' keys and
        values from the cache.
        """
        heads, kv_heads = self.num_heads, self.num_kv_heads or self.num_heads
        head = self.head_width or call.width // heads
        rows = _attention_costs(call, call.context or self.context, heads, kv_heads, head, True)
        if self.rotary:  # cosine and sine of half a head's angles, then two products and a sum
            values, angles = call.rows * (heads + kv_heads) * head, call.rows * head // 2
            counts = Elementwise.of(FLOAT, 2 * values + angles, values, functions=2 * angles)
            rows.insert(0, call.row("attention", "rotary", elementwise=counts))
        return call.inner("projection", after={"value" if self._in_three else "qkv": rows})


class SelfAttention(nn.Module):
    """Multi-head attention of every token to every token, as in an encoder.

    Args:
      num_heads: H. use_bias: biases of both projections. kernel_init, output_init: of the queries,
        keys and values, and of the output projection.
      implementation, linear: see `CausalSelfAttention`.
    """

    num_heads: int
    use_bias: bool = True
    kernel_init: Initializer = normal(0.02)
    output_init: Initializer = normal(0.02)
    implementation: str = "auto"
    dtype: DTypeLike = jnp.float32
    linear: str = "dense"

    @nn.compact
    def __call__(self, x: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        """x (B, T, d) -> (B, T, d)."""
        batch, tokens, width = x.shape
        qkv = _projection(self, 3 * width, self.kernel_init, "qkv")(x)
        q, k, v = jnp.split(qkv.reshape(batch, tokens, 3 * self.num_heads, -1), 3, axis=2)
        implementation = pick_attention(self.implementation, self.dtype)
        mixed = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
        return _projection(self, width, self.output_init, "proj")(
            mixed.reshape(batch, tokens, width)
        )

    def costs(self, call: Call) -> list[LayerCosts]:
        """Keys and values are activations, of as many tokens as there are queries."""
        heads, tokens = self.num_heads, call.shape[-2]
        rows = _attention_costs(call, tokens, heads, heads, call.width // heads, False)
        return call.inner("projection", after={"qkv": rows})


def _attention_costs(
    call: Call, attended: int, heads: int, kv_heads: int, head: int, cached: bool
) -> list[LayerCosts]:
    """Scores, softmax and mix of all queries. cached: keys and values come from a cache, to which
    each query's own are added; else they are activations.
    """
    types, queries, rounds = call.types, call.rows, call.types.operands == "int8"
    scores, mixed, written = (queries * count * head for count in (heads, heads, kv_heads))
    scores = queries * heads * attended
    operand, act = BYTES[types.operands], BYTES[types.activations]
    held = (1 if cached else queries // attended) * attended * kv_heads * head * operand

    def one(part: str, read: int, rescaled: int, wrote: int) -> LayerCosts:
        return call.row(
            "attention",
            part,
            multiplications={types.operands: scores * head},
            additions={types.accumulator: scores * head},
            elementwise=Elementwise.of(FLOAT, (rescaled + read + written) * rounds),
            comparisons=2 * (read + written) * rounds,
            activations=read * operand + wrote * act + (0 if cached else held),
            state=held + written * operand if cached else 0,
            state_bytes=held if cached else 0,
        )

    softmax = call.row(  # times 1 / sqrt(K); less the largest, exponential, sum, division
        "attention",
        "softmax",
        elementwise=Elementwise.of(FLOAT, scores, 2 * scores, scores, scores),
        comparisons=scores,
        activations=2 * scores * act,
    )
    return [one("scores", mixed, scores, scores), softmax, one("mix", scores, mixed, mixed)]
