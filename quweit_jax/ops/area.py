"""How many look-up tables of an FPGA a classifier made of tables takes: the rules by which circuits
are drawn and their costs counted.

A physical table has K inputs and one output. A count of bits is a tree of counters, then one
addition of two numbers (`ops.counters`).

Dimensions: K inputs of a physical table, n inputs of a logical one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from quweit_jax.errors import InputError
from quweit_jax.ops.counters import LUT_INPUTS, adder_luts, count_width, counted, counter_levels


def table_luts(inputs: int, lut_inputs: int = LUT_INPUTS) -> int:
    """Physical tables that one logical table of `inputs` takes: halves or quarters, and what
    chooses among them.
    """
    if inputs <= lut_inputs:
        return 1
    split = split_inputs(inputs, lut_inputs)
    return (1 << split) * table_luts(inputs - split, lut_inputs) + 1


def split_inputs(inputs: int, lut_inputs: int = LUT_INPUTS) -> int:
    """By how many inputs (1 or 2) a table that is too large is cut; choosing among 4 takes 6."""
    return 2 if inputs >= lut_inputs + 2 and lut_inputs >= 6 else 1


def comparator_chunks(bits: int, lut_inputs: int = LUT_INPUTS) -> list[int]:
    """Bits that each physical table of a comparison with a constant reads, lowest first; all but
    the first read the result before, too.
    """
    return _chunks(bits, lut_inputs, lut_inputs - 1)


def larger_chunks(bits: int, lut_inputs: int = LUT_INPUTS) -> list[int]:
    """Bits of both numbers that each physical table of `b > a` reads, lowest first."""
    return _chunks(bits, lut_inputs // 2, (lut_inputs - 1) // 2)


def _chunks(total: int, first: int, later: int) -> list[int]:
    sizes = [min(total, first)]
    while sum(sizes) < total:
        sizes.append(min(total - sum(sizes), later))
    return sizes


@dataclasses.dataclass(frozen=True)
class Area:
    """What a circuit takes. luts: physical tables of 6 inputs. flip_flops: of one bit. comparators:
    of an input with a constant.
    """

    luts: int = 0
    flip_flops: int = 0
    comparators: int = 0


def classifier_area(
    comparators: int,
    layers: Sequence[tuple[int, int]],
    classes: int,
    *,
    input_bits: int,
    pipeline: int = 1,
) -> dict[str, Area]:
    """The area of a classifier by part ('encoder', 'tables', 'reduction'), before anything is
    simplified.

    Args:
      comparators: that are wired. layers: of each, (tables, inputs of a table); the tables of the
        last are shared equally by the classes. input_bits: of a word. pipeline: registers after
        every so many stages and behind the last (0: none).

    Raises:
      InputError: no layer, no class, or tables that the classes cannot share.
    """
    if not layers or classes < 1 or layers[-1][0] % classes:
        raise InputError(
            f"classifier_area: expected layers whose last is shared by {classes} classes, found "
            f"{list(layers)}."
        )
    made = _Stages(pipeline)
    made.end("encoder", comparators * len(comparator_chunks(input_bits)), comparators)
    for tables, inputs in layers:
        made.end("tables", tables * table_luts(inputs), tables)
    columns = [layers[-1][0] // classes]
    width = count_width(columns)
    for level in counter_levels(columns):
        columns = counted(columns, level)
        made.end("reduction", classes * sum(c.outputs for c in level), classes * sum(columns))
    if max(columns, default=0) > 1:
        made.end("reduction", classes * adder_luts(columns, width), classes * width)
    _argmax(made, classes, width)
    return made.finish()


def _argmax(made: _Stages, classes: int, width: int) -> None:
    """A tournament: pairs are compared, and the winner's count and number go on."""
    remaining, index = classes, 0
    while remaining > 1:
        pairs, remaining = remaining // 2, remaining - remaining // 2
        luts = len(larger_chunks(width)) + width + index
        index += 1
        made.end("reduction", pairs * luts, remaining * (width + index))


class _Stages:
    """Sums of the stages of a circuit, with registers after every so many."""

    def __init__(self, every: int):
        self.every, self.count, self.registers = every, 0, 0
        self.area = {part: Area() for part in ("encoder", "tables", "reduction")}
        self.live = ("encoder", 0)

    def end(self, part: str, luts: int, live: int) -> None:
        """A stage of a part is complete, and so many bits leave it."""
        self.count += 1
        comparators = live if part == "encoder" else 0
        self._add(part, luts, 0, comparators)
        self.live = (part, live)
        if self.every and not self.count % self.every:
            self._register()

    def finish(self) -> dict[str, Area]:
        """The parts; whatever leaves the last stage is registered."""
        if self.every and self.count % self.every:
            self._register()
        return self.area

    def _register(self) -> None:
        self.registers += 1
        self._add(self.live[0], 0, self.live[1], 0)

    def _add(self, part: str, luts: int, flip_flops: int, comparators: int) -> None:
        before = self.area[part]
        self.area[part] = Area(
            before.luts + luts, before.flip_flops + flip_flops, before.comparators + comparators
        )
