"""What goes into a block of a packed integer-only ViT and what comes out, for real images: golden
vectors of its circuit.

Dimensions: N tokens, d features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from quweit_jax.deploy.hardware.blocks.description import Block, evaluate
from quweit_jax.deploy.tables import Tree
from quweit_jax.layers.integer import ACTIVATION_BITS, RESIDUAL_BITS

_BATCH = 64  # images at a time


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A block's inputs x and residual, and its outputs y: int64 (N, d). real: how many of the first
    are of images.
    """

    x: np.ndarray
    residual: np.ndarray
    y: np.ndarray
    real: int


def record(model: nn.Module, packed: Tree, images: np.ndarray, block: int) -> Tokens:
    """What the packed model computes in a block on images (B, H, W, C), every token of them."""
    apply = jax.jit(lambda part: _recorded(model, packed, part, block))
    parts = [apply(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]
    x, residual, y = (
        np.concatenate(
            [np.asarray(part[k], np.int64).reshape(-1, part[k].shape[-1]) for part in parts]
        )
        for k in range(3)
    )
    return Tokens(x, residual, y, len(x))


def _recorded(model: nn.Module, packed: Tree, images: Array, block: int) -> tuple[Array, ...]:
    found: dict[str, Array] = {}

    def watch(
        call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], context: Any
    ) -> Any:
        out = call(*args, **options)
        path = context.module.path
        if context.method_name == "__call__" and path == (f"block_{block}", "mlp"):
            found["x"] = args[0].ints
        if context.method_name == "__call__" and path == (f"block_{block}", "quant_mlp"):
            found.update(residual=args[1].ints, y=out.ints)
        return out

    with nn.intercept_methods(watch):
        model.apply(packed, images)
    return found["x"], found["residual"], found["y"]


def with_extremes(block: Block, tokens: Tokens, count: int, seed: int = 0) -> Tokens:
    """`count` of the tokens drawn at random (0: all), and behind them a few that no image has: all
    words at their ends and at 0, and random ones.
    """
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(tokens.x))[: count or None]
    given = tokens.x[chosen], tokens.residual[chosen]
    others = []
    for words, bits in zip(given, (ACTIVATION_BITS, RESIDUAL_BITS)):
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        rows = [np.full(words.shape[1], level) for level in (low, high, 0, low, high, -1)]
        rows += list(draw.integers(low, high + 1, (6, words.shape[1])))
        others.append(np.stack(rows))
    others[1][3:5] = others[1][4:2:-1]  # the ends against each other
    made = evaluate(block, *others)
    x, residual, y = (
        np.concatenate(pair) for pair in zip((*given, tokens.y[chosen]), (*others, made))
    )
    return Tokens(x, residual, y, len(chosen))
