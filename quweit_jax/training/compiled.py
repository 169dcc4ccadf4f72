"""What a compiled program says of itself: the compiler's estimate of its time, and what devices
send each other, loops counted as often as they run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute") + (
    "collective-broadcast",
    "ragged-all-to-all",
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?[\]})]) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BOUND = re.compile(r"[us]32\[\][^=]* constant\((\d+)\)")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Program:
    """cycles: the compiler's estimate of one device's, 0 where it gives none. collectives: bytes
    that a device receives, by kind.
    """

    cycles: int
    collectives: dict[str, int]


def read_program(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    bodies, entry = _computations(text)

    @functools.cache
    def count(name: str) -> Counter[str]:
        total: Counter[str] = Counter()
        for line in bodies.get(name, ()):
            if found := _CYCLES.search(line):
                total["cycles"] += int(found[1])
            for kind, size in _sent(line):
                total[kind] += size
            if loop := _LOOP.search(line):
                times = _times(bodies.get(loop[1], []))
                for key, value in count(loop[2]).items():
                    total[key] += times * value
            elif found := _BRANCHES.search(line):
                names = [name.strip().lstrip("%") for name in found[1].split(",")]
                total += max((count(name) for name in names), key=lambda c: c["cycles"])
            elif " call(" in line or " conditional(" in line or "async-start(" in line:
                for called in _CALLED.findall(line):
                    total += count(called)
        return total

    found = count(entry)
    return Program(found["cycles"], {kind: found[kind] for kind in COLLECTIVES if found[kind]})


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and the name of the first one that runs."""
    bodies: dict[str, list[str]] = {}
    entry, now = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            now = bodies.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            now = None
        elif now is not None:
            now.append(line)
    return bodies, entry


def _times(condition: list[str]) -> int:
    """How often a loop runs, by the number that its condition compares with; 1 if there is none."""
    bounds = [int(found[1]) for line in condition if (found := _BOUND.search(line))]
    return max(bounds, default=1)


def _sent(line: str) -> Iterator[tuple[str, int]]:
    """The kind and the bytes of what a line receives from other devices."""
    found = _OPERATION.match(line)
    kind = found[2].removesuffix("-start") if found else ""
    if found and kind in COLLECTIVES:
        sizes = [_bytes(*shape) for shape in _SHAPE.findall(found[1])]
        # one that is begun here and ended later gives its operand, too: the result is the larger
        yield kind, max(sizes, default=0) if found[2].endswith("-start") else sum(sizes)


def _bytes(kind: str, dims: str) -> int:
    bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])  # type: ignore[index]
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def flops(program: ClosedJaxpr) -> int:
    """Operations of a traced program's matrix products, over all devices, two a multiply-add; what
    is computed again for the backward pass counts again, and loops count as often as they run.
    """
    return _flops(program.jaxpr)


def _flops(jaxpr: Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(_shape(eqn.invars[0])[d] for d in contracted)
            total += 2 * depth * math.prod(_shape(eqn.outvars[0]))
        elif eqn.primitive.name == "cond":
            total += max(_flops(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            total += times * sum(map(_flops, _inner(eqn)))
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda v: isinstance(v, ClosedJaxpr | Jaxpr)
    ):
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def largest(program: ClosedJaxpr, count: int = 3) -> list[tuple[int, str, str]]:
    """The largest values a traced program computes: (bytes over all devices, type and shape, the
    layer that does), one a layer and shape, before any compiler has fused or dropped some.
    """
    found: dict[tuple[str, str], int] = {}

    def look(jaxpr: Jaxpr, above: str) -> None:
        for eqn in jaxpr.eqns:
            own = str(eqn.source_info.name_stack)
            where = "/".join(part for part in (above, own) if part)
            for out in eqn.outvars:
                shape, dtype = getattr(out.aval, "shape", ()), getattr(out.aval, "dtype", None)
                if isinstance(dtype, np.dtype) and all(isinstance(d, int) for d in shape):
                    size = math.prod(shape) * dtype.itemsize
                    found[(f"{dtype} {list(shape)}", _layer(where))] = size
            for inner in _inner(eqn):
                look(inner, where)

    look(program.jaxpr, "")
    order = sorted(found.items(), key=lambda item: -item[1])
    return [(size, what, where) for (what, where), size in order[:count]]


def _layer(stack: str) -> str:
    """'block_3/mlp/up' of a stack of names, without what JAX and Flax put between."""
    names = re.split(r"[/()]", stack)
    ours = [name for name in names if re.fullmatch(r"[a-z][a-z_]*(_\d+)?", name)]
    skip = ("jit", "jvp", "transpose", "step", "while", "body", "cond", "closed_call", "vmap")
    skip += ("checkpoint", "rematted_computation", "scan", "branch")
    kept = [n for i, n in enumerate(ours) if n not in skip and n not in ours[:i]]
    return "/".join(kept) or "the step itself"
