"""Gated delta network: a token mixer whose state holds values under keys (Yang, Kautz and
Hatamizadeh 2024, arXiv 2412.06464), with dense or ternary projections.

Dimensions: B batch, T tokens, d model width, H heads, K width of a head, C channels.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from quweit_jax.errors import InputError, check_choice
from quweit_jax.layers import groups
from quweit_jax.layers.costs import Call
from quweit_jax.layers.norms import Initializer, RMSNorm, normal
from quweit_jax.layers.ternary import BitLinear
from quweit_jax.ops.counts import BYTES, FLOAT, Elementwise, LayerCosts
from quweit_jax.ops.delta import gated_delta, gated_delta_step

groups.declare("no_decay", "gate_rate", "gate_bias")
LINEARS = ("dense", "ternary")
_TAPS = 4  # tokens that a short convolution sees


def _init_gate_rate(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Logarithms of rates between 1 and 16, as published."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1, 16))


def _init_gate_bias(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """What softplus makes steps of between 0.001 and 0.1, as published."""
    low, high = jnp.log(1e-3), jnp.log(0.1)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))


class ShortConvolution(nn.Module):
    """Each channel's newest four values, weighed and added up, and SiLU: (B, T, C) -> (B, T, C).

    With decode=True it goes on from the three values before, in its `cache`. What is not valid is
    0, so padding belongs on the left.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T C"],
        valid: Bool[Array, "B T"] | None = None,
        *,
        decode: bool = False,
    ) -> Float[Array, "B T C"]:
        """x (B, T, C), valid (B, T) bool -> (B, T, C)."""
        batch, tokens, channels = x.shape
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        kernel = self.param("kernel", uniform, (_TAPS, channels), jnp.float32)
        wide = x.astype(jnp.float32)
        if valid is not None:
            wide = jnp.where(valid[..., None], wide, 0)
        before = jnp.zeros((batch, _TAPS - 1, channels), jnp.float32)
        if decode:
            kept = self.variable("cache", "window", lambda: before)
            before = kept.value
        seen = jnp.concatenate([before, wide], 1)
        if decode and not self.is_initializing():
            new = seen[:, tokens:]
            if valid is not None:  # a row that has ended keeps what it saw
                new = jnp.where(valid[:, -1:, None], new, before)
            kept.value = new
        total = sum(
            (jax.lax.dynamic_slice_in_dim(seen, i, tokens, 1) * kernel[i] for i in range(_TAPS)),
            jnp.float32(0),
        )
        return jax.nn.silu(total).astype(self.dtype)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Four products and three additions a channel, a SiLU, the window read and written."""
        n, held = call.size, (_TAPS - 1) * call.width * BYTES[FLOAT]
        counts = Elementwise.of(FLOAT, (_TAPS + 1) * n, (_TAPS - 1) * n, functions=n)
        weights = _TAPS * call.width
        row = call.row(
            "recurrence",
            elementwise=counts,
            stored={FLOAT: weights * BYTES[FLOAT]},
            activations=2 * n * BYTES[call.types.activations],
            state=2 * held,
            state_bytes=held,
            parameters=weights,
        )
        return [row]


class GatedDelta(nn.Module):
    """The token mixer: queries, keys and values through short convolutions, keys and queries at
    length 1, the gated delta rule, and an RMSNorm of what each head reads, times a SiLU gate.

    With decode=True it goes on from the state in its `cache`, (B, H, K, K) float32.

    Args:
      num_heads: H. head_width: K, of keys and values (0: d / H).
      linear: the five large projections are 'dense', or 'ternary': a `BitLinear` without norm each.
        The two of d to H numbers, for gate and rate, stay dense.
      kernel_init, output_init: of the projections, and of the last. epsilon: of the norm.
        implementation: of `ops.delta.gated_delta`.
    """

    num_heads: int
    head_width: int = 0
    linear: str = "dense"
    kernel_init: Initializer = normal(0.02)
    output_init: Initializer = normal(0.02)
    epsilon: float = 1e-6
    implementation: str = "auto"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T d"],
        valid: Bool[Array, "B T"] | None = None,
        *,
        decode: bool = False,
    ) -> Float[Array, "B T d"]:
        """x (B, T, d), normalized, valid (B, T) bool: tokens that are not padding -> (B, T, d)."""
        check_choice("GatedDelta: linear", self.linear, LINEARS)
        batch, tokens, width = x.shape
        heads = self.num_heads
        if not self.head_width and width % heads:
            raise InputError(
                f"GatedDelta: expected a width in multiples of its {heads} heads, found {width}."
            )
        head = self.head_width or width // heads

        def linear(name: str, features: int, init: Initializer) -> nn.Module:
            if self.linear == "ternary":
                return BitLinear(features, init, dtype=self.dtype, use_norm=False, name=name)
            return nn.Dense(features, False, self.dtype, kernel_init=init, name=name)

        def mixed(name: str) -> Array:
            found = linear(name, heads * head, self.kernel_init)(x)
            convolved = ShortConvolution(self.dtype, name=f"{name}_conv")(
                found, valid, decode=decode
            )
            return convolved.reshape(batch, tokens, heads, head)

        q, k, v = (mixed(name).astype(jnp.float32) for name in ("query", "key", "value"))
        q, k = _unit(q) / jnp.sqrt(head), _unit(k)
        fast = self.param("gate_rate", _init_gate_rate, (heads,), jnp.float32)
        bias = self.param("gate_bias", _init_gate_bias, (heads,), jnp.float32)
        wide = x.astype(jnp.float32)
        step = nn.Dense(heads, False, kernel_init=self.kernel_init, name="step")(wide)
        log_gate = -jnp.exp(fast) * jax.nn.softplus(step + bias)
        rate = jax.nn.sigmoid(
            nn.Dense(heads, False, kernel_init=self.kernel_init, name="rate")(wide)
        )
        if valid is not None:  # padding leaves the state as it is
            log_gate, rate = (jnp.where(valid[..., None], p, 0) for p in (log_gate, rate))
        given = (q, k, v, log_gate, rate)
        read = self._decode(given) if decode else self._all(given, None)[0]
        read = RMSNorm(self.epsilon, name="read_norm")(read).reshape(batch, tokens, heads * head)
        gate = linear("gate", heads * head, self.kernel_init)(x).astype(jnp.float32)
        gated = (read * jax.nn.silu(gate)).astype(self.dtype)
        return linear("proj", width, self.output_init)(gated)

    def _all(self, given: tuple[Array, ...], state: Array | None) -> tuple[Array, Array]:
        q, k, v, log_gate, rate = given
        return gated_delta(q, k, v, log_gate, rate, state, implementation=self.implementation)

    def _decode(self, given: tuple[Array, ...]) -> Array:
        batch, tokens, heads, head = given[0].shape
        shape = (batch, heads, head, head)
        state = self.variable("cache", "state", jnp.zeros, shape, jnp.float32)
        if tokens == 1:
            q, k, v, log_gate, rate = (x[:, 0] for x in given)
            one, final = gated_delta_step(q, k, v, log_gate, rate, state.value)
            read = one[:, None]
        else:
            read, final = self._all(given, state.value)
        if not self.is_initializing():
            state.value = final
        return read

    def costs(self, call: Call) -> list[LayerCosts]:
        """The projections, convolutions and norm inside, and a step of the rule in float32.

        A head's step: the state faded, K^2 products; read under the key, K^2 products and
        additions; the correction, 2 K; added under the key, K^2 each; read under the query, K^2
        each. Before it q and k are brought to length 1 and q divided: 5 K products, 2 K additions,
        2 functions; gate and rate: softplus, two exponentials, a sigmoid. After it silu and the
        gate, 2 K products and K functions. The state is read and written.
        """
        heads = self.num_heads
        head = self.head_width or call.width // heads
        count, held = call.rows * heads, heads * head * head * BYTES[FLOAT]
        counts = Elementwise.of(
            FLOAT,
            count * (4 * head * head + 8 * head + 2),
            count * (3 * head * head + 3 * head + 1),
            functions=count * (head + 6),
        )
        rule = call.row(
            "recurrence",
            "delta",
            elementwise=counts,
            weights=2 * heads * BYTES[FLOAT],
            stored={FLOAT: 2 * heads * BYTES[FLOAT]},
            parameters=2 * heads,
            state=2 * held,
            state_bytes=held,
        )
        return call.inner("projection", after={"rate": [rule]})


def _unit(x: Array) -> Array:
    """Vectors of length 1 over the last axis."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)
