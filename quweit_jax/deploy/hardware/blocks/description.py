"""What a channel-mixing block of a packed integer-only ViT computes, in integers and plain NumPy:
the one thing that its Verilog, its C and their checks are made from.

A block takes a token's 8-bit words, those behind the norm, and its 16-bit words of the residual
stream, and gives the stream's words behind the block: sums of the 8-bit words (by tables of bits,
or by a LookupGLU), requantized and added to the stream.

Dimensions: N tokens, d features, H units, C codes, G tables of codes, L tables of bits, z
thresholds a feature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from quweit_jax.deploy.hardware.description import Classifier, Layer, Scaling, look_up
from quweit_jax.deploy.tables import Tree, at, find_blocks
from quweit_jax.errors import InputError
from quweit_jax.layers.integer import ACTIVATION_BITS, RESIDUAL_BITS
from quweit_jax.models.vit import ViT
from quweit_jax.ops.packed_ternary import unpack_ternary

KINDS = ("lookup_glu", "weightless")  # of channel mixers that become circuits
BRANCH_LIMIT = 1 << 29  # what a requantized branch is clamped to before both are added
_WORDS = Scaling(ACTIVATION_BITS, True, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Branch:
    """Numbers at another scale: round(x multiplier / 2**shift), halves to even.

    multiplier, shift: int64 (d,), the first from 0 to 2**31 - 1, the second from 0 to 63.
    """

    multiplier: np.ndarray
    shift: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """int (N, d), of at most 32 bits -> int64 (N, d), clamped."""
        product = x.astype(np.int64) * self.multiplier
        whole = product >> self.shift
        rest = product - (whole << self.shift)
        half = np.where(self.shift > 0, 1 << np.maximum(self.shift - 1, 0), 1)
        up = (rest > half) | ((rest == half) & (whole & 1 > 0))
        return np.clip(whole + np.where(self.shift > 0, up, 0), -BRANCH_LIMIT, BRANCH_LIMIT)

    def aligned(self) -> tuple[list[int], int]:
        """Multipliers (d,) that have one shift in common, and that shift."""
        used = self.multiplier > 0
        shift = int(self.shift[used].max(initial=0))
        found = [
            int(m) << (shift - int(s)) if m else 0 for m, s in zip(self.multiplier, self.shift)
        ]
        spare = shift
        for value in found:
            spare = min(spare, (value & -value).bit_length() - 1) if value else spare
        return [value >> spare for value in found], shift - spare


@dataclasses.dataclass(frozen=True)
class GLUBlock:
    """A LookupGLU. mix: int8 (d, 2 H), -1, 0 or 1; offsets: int64 (2 H,), taken from its sums;
    halfway: int64 (C - 1,), the smallest number of each code but the lowest; tables: int8 (G, C,
    C); total: int8 (H, d), ternary; bias: int64 (d,). branches: of the sums, and of the stream.
    """

    mix: np.ndarray
    offsets: np.ndarray
    halfway: np.ndarray
    tables: np.ndarray
    total: np.ndarray
    bias: np.ndarray
    branches: tuple[Branch, Branch]

    @property
    def features(self) -> int:
        """d."""
        return len(self.bias)

    @property
    def units(self) -> int:
        """H."""
        return len(self.total)

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return len(self.halfway).bit_length()

    def groups(self) -> np.ndarray:
        """The table that each unit reads, int64 (H,)."""
        return np.arange(self.units) // (self.units // len(self.tables))

    def sums(self, x: np.ndarray) -> np.ndarray:
        """Words (N, d) -> int64 (N, d)."""
        mixed = x.astype(np.int64) @ self.mix.astype(np.int64) - self.offsets
        codes = np.searchsorted(self.halfway, mixed, side="right")
        read = self.tables[self.groups(), codes[:, : self.units], codes[:, self.units :]]
        return read.astype(np.int64) @ self.total.astype(np.int64) + self.bias


@dataclasses.dataclass(frozen=True)
class TableBlock:
    """The published weightless block. encoder: its comparators and tables, as of a classifier.
    vectors: int8 (L, d), or (L,), of which each feature has L / d; signed: the sum counts twice;
    bias: int64 (d,). branches: of the sums, and of the stream.
    """

    encoder: Classifier
    vectors: np.ndarray
    signed: bool
    bias: np.ndarray
    branches: tuple[Branch, Branch]

    @property
    def features(self) -> int:
        """d."""
        return len(self.bias)

    def sums(self, x: np.ndarray) -> np.ndarray:
        """Words (N, d) -> int64 (N, d)."""
        bits = look_up(self.encoder.layers, x[:, self.encoder.feature] > self.encoder.threshold)
        vectors = self.vectors.astype(np.int64)
        if vectors.ndim == 2:
            total = bits.astype(np.int64) @ vectors
        else:
            total = np.where(bits, vectors, 0).reshape(len(bits), self.features, -1).sum(2)
        return (total << int(self.signed)) + self.bias


Block = GLUBlock | TableBlock


def evaluate(block: Block, x: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """Words (N, d) and words of the stream (N, d) -> words of the stream (N, d), int64."""
    ours, stream = block.branches
    limit = 1 << (RESIDUAL_BITS - 1)
    return np.clip(ours(block.sums(x)) + stream(residual), -limit, limit - 1)


def choices(model: object) -> dict[int, str]:
    """The kinds of a model's channel mixers that become circuits, by the number of their block.

    Raises:
      InputError: a model that is no integer-only ViT, or has none.
    """
    if not isinstance(model, ViT) or not model.config.integer:
        form = " in floats" if isinstance(model, ViT) else ""
        raise InputError(
            "--to: expected a classifier made of tables (model dwn) or an integer-only ViT (model "
            f"vit with integer=true), found {type(model).__name__}{form}; other models export as "
            "StableHLO (leave --to out)."
        )
    kinds = model.config.mlps()
    found = {i: kind for i, kind in enumerate(kinds) if kind in KINDS}
    if not found:
        raise InputError(
            f"--to: expected a block whose mlp is one of {', '.join(KINDS)}, found "
            f"{', '.join(kinds)}; train a model with --config.model.mlp={KINDS[0]}."
        )
    return found


def check_block(model: object, block: int) -> str:
    """The kind of a block's channel mixer; InputError names the blocks that there are."""
    found = choices(model)
    if block not in found:
        named = ", ".join(f"{i} ({kind})" for i, kind in found.items())
        raise InputError(f"--block: expected one of {named}, found {block}.")
    return found[block]


def from_packed(model: Any, packed: Tree, images: np.ndarray, block: int) -> Block:
    """The integer description of a block of a packed integer-only ViT.

    Args:
      images: any that the model takes; only their shape matters.

    Raises:
      InputError: there is no such block, or a scale is not positive.
    """
    kind = check_block(model, block)
    place = f"block_{block}"
    held = at(packed["packed"], f"{place}/mlp")
    bias = np.asarray(held["bias"], np.int64)
    requantizer = at(packed["packed"], f"{place}/quant_mlp")
    branches = (_branch(requantizer, "", len(bias)), _branch(requantizer, "identity_", len(bias)))
    if kind == "lookup_glu":
        units = len(held["offsets"]) // 2
        return GLUBlock(
            unpack_ternary(np.asarray(held["mix"]), len(bias), 2 * units),
            np.asarray(held["offsets"], np.int64),
            np.asarray(held["halfway"], np.int64),
            np.asarray(held["tables"], np.int8),
            unpack_ternary(np.asarray(held["sum"]), units, len(bias)),
            bias,
            branches,
        )
    tables = find_blocks(model, packed, images)[f"{place}/mlp"]
    vectors = np.asarray(held["vectors"], np.int8)
    signed = bool(model.config.weightless.signed)
    return TableBlock(_encoder(held, tables.tables, tables.wiring), vectors, signed, bias, branches)


def _branch(requantizer: Mapping[str, Any], name: str, features: int) -> Branch:
    both = [
        np.broadcast_to(np.asarray(requantizer[f"{name}{part}"], np.int64).reshape(-1), features)
        for part in ("multiplier", "shift")
    ]
    if both[0].min() < 0:
        raise InputError("hardware: expected scales above 0; is the run damaged?")
    return Branch(*both)


def _encoder(
    held: Mapping[str, Any], tables: tuple[np.ndarray, ...], wiring: tuple[np.ndarray, ...]
) -> Classifier:
    """Distinct comparators that are wired, and layers of tables, as of a classifier."""
    thresholds = np.asarray(held["thresholds"], np.int64)
    wired, places = np.unique(wiring[0], return_inverse=True)
    feature, rank = np.divmod(wired, thresholds.shape[1])
    pairs, same = np.unique(
        np.stack([feature, thresholds[feature, rank]]), axis=1, return_inverse=True
    )
    first = same.reshape(-1)[places.reshape(wiring[0].shape)]
    layers = tuple(Layer(t, w) for t, w in zip(tables, (first, *wiring[1:])))
    group = np.zeros(len(tables[-1]), np.int64)
    return Classifier(
        len(thresholds), _WORDS, pairs[0], pairs[1], layers, group, np.zeros(1, np.int64)
    )
