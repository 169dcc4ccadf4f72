"""Rotary positions (RoFormer, arXiv 2104.09864), and the ways to scale them to longer texts that
published checkpoints use.

Dimensions: B batch, T tokens, H heads, K width of a head, half K / 2.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int

from quweit_jax.errors import InputError, check_choice

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are scaled, by the names and rules of Hugging Face's programs.

    kind: 'default' for as they are; 'linear': all frequencies divided by `factor` (position
      interpolation, arXiv 2306.15595); 'dynamic': the base rises with the text's length beyond the
      original context (NTK-aware); 'llama3': frequencies slower than the original context divided,
      fast ones kept, a ramp between; 'yarn': a ramp by rotations (arXiv 2309.00071), and cosine and
      sine times `attention_factor`.
    factor: at least 1. original_context: tokens of the texts it was trained with before; 0 for the
      model's context.
    low_frequency, high_frequency: of 'llama3', where the ramp begins and ends, in wavelengths of
      the original context. beta_fast, beta_slow: of 'yarn', in rotations; truncate: whether its
      ramp's ends are rounded outwards. attention_factor: of 'yarn'; 0 for 0.1 ln factor + 1.
    """

    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0

    def __post_init__(self):
        check_choice("model.rope.kind", self.kind, SCALINGS)
        if not 1 <= self.factor < math.inf:
            raise InputError(f"model.rope.factor: expected at least 1, found {self.factor}.")
        if self.original_context < 0:
            raise InputError(
                "model.rope.original_context: expected a number of tokens, or 0 for the model's "
                f"context, found {self.original_context}."
            )
        for low, high in (("low_frequency", "high_frequency"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high) < math.inf:
                raise InputError(
                    f"model.rope.{high}: expected more than model.rope.{low}, and both positive, "
                    f"found {getattr(self, high)} and {getattr(self, low)}."
                )
        if not 0 <= self.attention_factor < math.inf:
            raise InputError(
                "model.rope.attention_factor: expected a positive number, or 0 for the rule's own, "
                f"found {self.attention_factor}."
            )

    def magnitude(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return self.attention_factor or 0.1 * math.log(self.factor) + 1


def frequencies(
    theta: float, half: int, scaling: RopeScaling, context: int
) -> Float32[np.ndarray, " half"]:
    """Radians a token of each pair, (half,) float32, but for what 'dynamic' does to long texts.

    context: the original one, in tokens.
    """
    plain = theta ** (-np.arange(half) / half)
    if scaling.kind == "linear":
        plain = plain / scaling.factor
    elif scaling.kind == "llama3":
        turns = context * plain / (2 * math.pi)  # in the original context
        low, high = scaling.low_frequency, scaling.high_frequency
        kept = np.clip((turns - low) / (high - low), 0, 1)
        plain = plain * (kept + (1 - kept) / scaling.factor)
    elif scaling.kind == "yarn":
        first, last = (
            half * math.log(context / (rotations * 2 * math.pi)) / math.log(theta)
            for rotations in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        last += 0.001 * (first == last)
        kept = 1 - np.clip((np.arange(half) - first) / (last - first), 0, 1)
        plain = plain * (kept + (1 - kept) / scaling.factor)
    return plain.astype(np.float32)


def rotate(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "#B T"],
    theta: float,
    scaling: RopeScaling | None = None,
    context: int = 0,
) -> Float[Array, "B T H K"]:
    """Turns queries or keys by their positions; pairs are the two halves of a head, as in Llama.

    x (B, T, H, K) with even K, positions (B or 1, T) -> the same shape and dtype. theta: the base.
    scaling: None for 'default'. context: tokens of the original one, where scaling says none. With
    'dynamic' the last of a row's positions is its length, so what was turned before stays as it
    was, as in the published program.
    """
    half, scaling = x.shape[-1] // 2, scaling or RopeScaling()
    context = scaling.original_context or context
    if scaling.kind == "default":
        speeds = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    elif scaling.kind == "dynamic":
        length = jnp.maximum(positions.max(-1) + 1, context).astype(jnp.float32)
        stretch = scaling.factor * length / context - (scaling.factor - 1)
        base = theta * stretch ** (half / max(1, half - 1))
        speeds = base[:, None, None, None] ** (-jnp.arange(half, dtype=jnp.float32) / half)
    else:
        speeds = jnp.asarray(frequencies(theta, half, scaling, context))
    angles = positions[..., None, None].astype(jnp.float32) * speeds
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    if (size := scaling.magnitude()) != 1:
        cosine, sine = cosine * size, sine * size
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], -1
    ).astype(x.dtype)
