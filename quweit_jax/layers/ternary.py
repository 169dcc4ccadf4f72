"""The layers of MatMul-free language models (Zhu et al. 2024, arXiv 2406.02528): BitLinear, MLGRU
and the gated linear unit.

Each BitLinear has two forms: from `params`, a float kernel that is made ternary as it is used, and
from `packed` (see `layers.packing`), two bits a weight.

Dimensions: B batch, T tokens, d model width, I inputs, O outputs.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from quweit_jax.errors import check_choice
from quweit_jax.layers import groups, placement
from quweit_jax.layers.costs import Call, activation, rms_norm
from quweit_jax.layers.norms import Initializer, RMSNorm, normal
from quweit_jax.layers.packing import Packable
from quweit_jax.ops import packed_ternary, ternary
from quweit_jax.ops.counts import BYTES, FLOAT, INT, Elementwise, LayerCosts
from quweit_jax.ops.recurrence import gated_recurrence, gated_recurrence_step
from quweit_jax.ops.shifts import round_to_shifts

groups.declare("no_decay", "norm_scale")
# As published: Xavier uniform with gain 2**-2.5.
MIXER_INIT = nn.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")
GATES = ("exact", "shift")
_SLOWEST = -10  # the smallest power of two that a gate of shifts can be


class BitLinear(Packable):
    """RMSNorm, 8-bit activations, ternary weights: x (..., I) -> (..., features). No bias.

    Args:
      features: O. kernel_init: of the float kernel (I, O). epsilon: of the norm. dtype: of input
        and output; the product is exact. use_norm: False for what is normalized already, as in
        BitNet b1.58 (arXiv 2402.17764), where matrices share a norm.
    """

    features: int
    kernel_init: Initializer = normal(0.02)
    epsilon: float = ternary.EPSILON
    dtype: DTypeLike = jnp.float32
    use_norm: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens I"]) -> Float[Array, "*tokens O"]:
        """x (..., I) -> (..., features)."""
        x = x.astype(self.dtype)
        if self.is_packed:
            kernel, scale = self.read("kernel", "scale")
            wide = x.astype(jnp.float32)
            if self.use_norm:
                wide = ternary.rms_norm(wide, *self.read("norm_scale"), eps=self.epsilon)
            x_int, x_scale = ternary.quantize_activations(wide)
            product = packed_ternary.packed_matmul(
                x_int, kernel, x_scale * scale, num_outputs=self.features
            )
            return product.astype(self.dtype)
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        if self.is_packing:
            weights, scale = ternary.quantize_weights(kernel)
            self.write(kernel=packed_ternary.pack_ternary(weights), scale=scale)
        gather = placement.weights()
        if not self.use_norm:
            return ternary.ternary_linear(x, kernel, gather=gather)
        norm_scale = self.param("norm_scale", nn.initializers.ones, shape[:1], jnp.float32)
        self.write(norm_scale=norm_scale)
        return ternary.bit_linear(x, kernel, norm_scale, eps=self.epsilon, gather=gather)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Norm, rounding to int8 by the largest value, additions of int8 into int32 (at most one a
        weight), one rescaling an output.
        """
        inputs, outputs, act = call.width, self.features, call.types.activations
        # The largest magnitude, and clamping on both sides.
        counts = Elementwise.of(FLOAT, call.size, divisions=call.rows)
        rounding = call.row("requantize", "round", elementwise=counts, comparisons=3 * call.size)
        packed = packed_ternary.packed_bytes(inputs, outputs)
        total = call.row(
            call.kind,
            additions={"int32": call.size * outputs},
            elementwise=Elementwise.of(FLOAT, call.rows * (outputs + 1)),
            stored={"2-bit": packed, FLOAT: BYTES[FLOAT]},
            activations=call.size + call.rows * outputs * BYTES[act],
            parameters=inputs * outputs,
        )
        return [*([rms_norm(call, act, "norm")] if self.use_norm else []), rounding, total]


class MLGRU(nn.Module):
    """The token mixer: a gated linear recurrence whose gates don't see the state, so that time runs
    in parallel (equations 4 to 8).

    With decode=True it goes on from the state in its `cache`, (B, d) float32, whatever came before.

    Args:
      kernel_init: of all four projections. implementation: of `ops.recurrence.gated_recurrence`.
      gates: 'exact' as published, or 'shift' (not published): what is forgotten, 1 - f, and
        silu(h), by which the output gate is multiplied, are rounded to two binary digits, so that
        each product takes two shifts and an addition.
    """

    kernel_init: Initializer = MIXER_INIT
    epsilon: float = ternary.EPSILON
    implementation: str = "auto"
    gates: str = "exact"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T d"],
        lower_bound: Float[Array, " d"],
        valid: Bool[Array, "B T"] | None = None,
        *,
        decode: bool = False,
    ) -> Float[Array, "B T d"]:
        """x (B, T, d), lower_bound (d,) of the forget gate, valid (B, T) bool: tokens that are not
        padding -> (B, T, d).
        """

        def linear(name: str) -> BitLinear:
            return BitLinear(x.shape[-1], self.kernel_init, self.epsilon, self.dtype, name=name)

        check_choice("MLGRU: gates", self.gates, GATES)
        forget = jax.nn.sigmoid(linear("forget")(x).astype(jnp.float32))
        forget = lower_bound + (1 - lower_bound) * forget
        if self.gates == "shift":
            forget = 1 - round_to_shifts(1 - forget, digits=2, smallest=_SLOWEST)
        candidate = jax.nn.silu(linear("input")(x).astype(jnp.float32)) * (1 - forget)
        if valid is not None:  # padding leaves the state as it is
            forget, candidate = (
                jnp.where(valid[..., None], forget, 1),
                jnp.where(valid[..., None], candidate, 0),
            )
        states = (
            self._decode(forget, candidate)
            if decode
            else gated_recurrence(forget, candidate, implementation=self.implementation)[0]
        )
        gate = RMSNorm(self.epsilon, name="gate_norm")(linear("gate")(x))
        activated = jax.nn.silu(states)
        if self.gates == "shift":
            activated = round_to_shifts(activated, digits=2, smallest=_SLOWEST)
        return linear("output")((gate * activated).astype(self.dtype))

    def _decode(self, forget: Array, candidate: Array) -> Array:
        state = self.variable("cache", "state", jnp.zeros, forget.shape[::2], jnp.float32)
        if forget.shape[1] == 1:
            final = gated_recurrence_step(forget[:, 0], candidate[:, 0], state.value)
            states = final[:, None]
        else:
            states, final = gated_recurrence(
                forget, candidate, state.value, implementation=self.implementation
            )
        if not self.is_initializing():
            state.value = final
        return states

    def costs(self, call: Call) -> list[LayerCosts]:
        """Four ternary layers; gates, a step of h = f h + c and the output gate in float32, the
        state read and written.

        f = sigmoid(.) d functions; lower + (1 - lower) f: d multiplications, 2 d additions; c =
        silu(.) (1 - f): 2 d multiplications, d additions, d functions; the step: d and d; gate *
        silu(h): 2 d multiplications and d functions. With gates='shift' the exponent of 1 - f comes
        from comparisons of its logit; the step is 3 d additions and 2 d shifts, the output d and
        2 d; both silu are functions of one value (a float's shift is an addition to its exponent).
        """
        n, held = call.size, call.width * BYTES[FLOAT]
        if self.gates == "shift":
            operations = Elementwise(
                additions={FLOAT: 4 * n}, functions={FLOAT: 2 * n}, shifts={INT: 4 * n}
            )
            comparisons = (2 - 2 * _SLOWEST).bit_length() * n  # by halving the values left
        else:
            operations = Elementwise.of(FLOAT, 6 * n, 4 * n, functions=3 * n)
            comparisons = 0
        recurrence = call.row(
            "recurrence",
            "recurrence",
            elementwise=operations,
            comparisons=comparisons,
            weights=held,  # the forget gate's bound
            state=2 * held,
            state_bytes=held,
        )
        norm = rms_norm(call, call.types.activations, "gate_norm")
        return call.inner("projection", after={"gate": [recurrence]}, instead={"gate_norm": [norm]})


def gated_width(hidden: int, width: int) -> int:
    """Units of a gated linear unit: `hidden`, or if that is 0 as many as give it the parameters of
    an MLP four times as wide, 8 d / 3, in multiples of 8.
    """
    return hidden or 8 * -(-width // 3)


class BitGLU(nn.Module):
    """The channel mixer: BL_down(silu(a) * b) with [a, b] = BL_gate(x) (equation 9).

    hidden: 0 for 8 d / 3 in multiples of 8.
    """

    features: int
    hidden: int = 0
    kernel_init: Initializer = normal(0.02)
    output_init: Initializer = normal(0.02)
    epsilon: float = ternary.EPSILON
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens d"]) -> Float[Array, "*tokens features"]:
        """x (..., d) -> (..., features)."""
        hidden, shared = gated_width(self.hidden, x.shape[-1]), (self.epsilon, self.dtype)
        both = BitLinear(2 * hidden, self.kernel_init, *shared, name="gate")(x)
        gate, up = jnp.split(both, 2, axis=-1)
        down = BitLinear(self.features, self.output_init, *shared, name="down")
        return down(jax.nn.silu(gate) * up)

    def costs(self, call: Call) -> list[LayerCosts]:
        """Two layers and a SiLU, times the other branch, of what is between them."""
        hidden = gated_width(self.hidden, call.width)
        return call.inner("mlp", after={"gate": [activation(call, "silu", hidden)]})
