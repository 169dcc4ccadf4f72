"""How a block's circuit is folded over cycles, and how wide its numbers are.

A token's words come in one feature a cycle, its sums are made, and its results go out in order. A
LookupGLU makes `parallel` units a cycle, a dense conditional sum adds the vectors of `parallel`
bits; a grouped one makes a feature's sum when it is due. Fully parallel a block of width 128 would
take some 1,500 adders of hundreds of terms.

A result is requantized by shifts and additions, a bit of the multiplier a cycle, in `lanes` that
take turns; a result goes out every `every` cycles.
"""

from __future__ import annotations

import dataclasses

from quweit_jax.deploy.hardware.blocks.description import Block, GLUBlock, TableBlock
from quweit_jax.errors import InputError
from quweit_jax.layers.integer import ACTIVATION_BITS

_FEWEST = 4  # cycles from result to result: so long what a result is made of takes to be read
_USUAL = 8  # with more, fewer lanes do
_AROUND = 7  # cycles before the first sum, and behind the last bit of a multiplier
_WORD = 1 << (ACTIVATION_BITS - 1)  # no word nor entry is larger


@dataclasses.dataclass(frozen=True)
class Schedule:
    """parallel: units or bits a cycle. rows: cycles of sums; 0 of a grouped one. depth: registers
    between a row's address and its sums. sum_bits: of a sum. multipliers, shifts: of both branches,
    with one shift each; multiplier_bits: of the longest. every, lanes: see the module.
    """

    parallel: int
    rows: int
    depth: int
    sum_bits: int
    multipliers: tuple[list[int], list[int]]
    shifts: tuple[int, int]
    multiplier_bits: int
    every: int
    lanes: int
    features: int

    @property
    def latency(self) -> int:
        """Cycles from a token's last word to its first result."""
        return self.rows + self.depth + self.multiplier_bits + _AROUND

    @property
    def busy(self) -> int:
        """Cycles from a token's last word to when the next one may begin."""
        return self.rows + self.depth + 4 + (self.features - 1) * self.every

    @property
    def interval(self) -> int:
        """Cycles from token to token, at most."""
        return self.features + self.busy - 1


def signed_bits(low: int, high: int) -> int:
    """Bits of a number in two's complement that is anything from low to high."""
    return max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + 1


def levels(terms: int) -> int:
    """Levels of a tree of additions."""
    return max(0, (terms - 1).bit_length())


def glu_registers(block: GLUBlock, pipeline: int) -> tuple[int, int]:
    """Registers of a tree, and of all up to the codes; see `plan`."""
    tree = levels(block.features)
    every = tree + 1 + block.code_bits
    return (tree // pipeline, every // pipeline) if pipeline else (0, 0)


def plan(block: Block, parallel: int = 1, pipeline: int = 1) -> Schedule:
    """The schedule of a block.

    Args:
      pipeline: a register after every so many levels of a LookupGLU's trees, offsets and
        comparisons; 0 for none.

    Raises:
      InputError: numbers out of range, or more in parallel than there is.
    """
    if pipeline < 0:
        raise InputError(f"--pipeline: expected 0 or more levels, found {pipeline}.")
    grouped = isinstance(block, TableBlock) and block.vectors.ndim == 1
    terms = block.units if isinstance(block, GLUBlock) else len(block.vectors)
    most = 1 if grouped else terms
    if not 1 <= parallel <= most:
        what = "units" if isinstance(block, GLUBlock) else "tables"
        raise InputError(
            f"--parallel: expected 1 to {most} {what} a cycle, found {parallel}."
            + " A grouped sum makes one feature at a time." * grouped
        )
    rows = 0 if grouped else -(-terms // parallel)
    depth = (
        glu_registers(block, pipeline)[1] + 2 if isinstance(block, GLUBlock) else int(not grouped)
    )
    (ours, shift), (stream, stream_shift) = (branch.aligned() for branch in block.branches)
    bits = max(1, *(m.bit_length() for m in (*ours, *stream)))
    # a lane may not be asked for a token's first result before it is done with the last one's
    longest = min(bits + 1, block.features + 3 + rows + depth)
    every = max(_FEWEST, min(max(_USUAL, -(-rows // block.features)), longest))
    return Schedule(
        parallel,
        rows,
        depth,
        _sum_bits(block),
        (ours, stream),
        (shift, stream_shift),
        bits,
        every,
        -(-(bits + 1) // every),
        block.features,
    )


def _sum_bits(block: Block) -> int:
    """Bits that hold any of a block's sums, and all on the way to them."""
    bias = int(abs(block.bias).max())
    if isinstance(block, GLUBlock):
        return signed_bits(-(bias + (_WORD + 1) * block.units), bias + (_WORD + 1) * block.units)
    terms = len(block.vectors) // (1 if block.vectors.ndim == 2 else block.features)
    most = bias + (_WORD * terms << int(block.signed))
    return signed_bits(-most, most)
