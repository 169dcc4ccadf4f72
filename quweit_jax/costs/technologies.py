"""Energies of single operations and memory accesses by technology: two named tables, or a user's
own file.

A file is JSON, in picojoules:

    {"name": "my 22 nm", "source": "measured by us",
     "add": {"int8": 0.01, "int32": 0.04, "float16": 0.2, "float32": 0.5},
     "multiply": {"int8": 0.1, "int32": 2.0, "float16": 0.5, "float32": 2.0},
     "memory": {"sram_32kb": 12, "dram": 1000}}

`memory` is for an access of 64 bits, its levels may have any names; `bfloat16` may be given beside
the four types that must be.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quweit_jax.errors import InputError, check_choice, nearest
from quweit_jax.reading import place, read_json

REQUIRED = ("int8", "int32", "float16", "float32")
_KEYS = ("name", "source", "add", "multiply", "memory")
_WIDTHS = {"int8": 8, "int16": 16, "int32": 32}


@dataclasses.dataclass(frozen=True)
class Technology:
    """add, multiply: picojoules of an operation by operand type. memory: of an access of 64 bits,
    by level. source: of the numbers.
    """

    name: str
    source: str
    add: Mapping[str, float]
    multiply: Mapping[str, float]
    memory: Mapping[str, float]

    def adding(self, operands: str) -> float:
        """Picojoules of an addition or a comparison."""
        return self._energy(self.add, operands)

    def multiplying(self, operands: str) -> float:
        """Picojoules of a multiplication; 'int16xint8' has two different operands."""
        return self._energy(self.multiply, operands)

    def _energy(self, table: Mapping[str, float], operands: str) -> float:
        if operands in table:
            return table[operands]
        if operands == "bfloat16":
            return table["float16"]
        widths = [_WIDTHS[operand] for operand in operands.split("x")]
        # A power of the width through the energies at 8 and 32 bits; a x b bits cost what the
        # square of the same area does.
        share = (math.log2(math.prod(widths)) / len(widths) - 3) / 2
        return table["int8"] ** (1 - share) * table["int32"] ** share


TECHNOLOGIES = {
    "45nm": Technology(
        "45nm",
        "Horowitz, ISSCC 2014",
        {"int8": 0.03, "int32": 0.1, "float16": 0.4, "float32": 0.9},
        {"int8": 0.2, "int32": 3.1, "float16": 1.1, "float32": 3.7},
        {
            "sram_8kb": 10.0,
            "sram_32kb": 20.0,
            "sram_1mb": 100.0,
            "dram": 1300.0,
            "dram_high": 2600.0,
        },
    ),
    "7nm": Technology(
        "7nm",
        "Jouppi et al., ISCA 2021, table 2 (the arithmetic also as used for BitNet)",
        {"int8": 0.007, "int32": 0.03, "float16": 0.16, "bfloat16": 0.11, "float32": 0.38},
        {"int8": 0.07, "int32": 1.48, "float16": 0.34, "bfloat16": 0.21, "float32": 1.31},
        {"sram_8kb": 7.5, "sram_32kb": 8.5, "sram_1mb": 14.0, "dram": 1300.0, "hbm": 350.0},
    ),
}


def technology_of(technology: str | Path | Technology) -> Technology:
    """A named table, or one read from a JSON file.

    Raises:
      InputError: neither a name nor a file; or a file that isn't such a table, naming what is wrong
        in it.
    """
    if isinstance(technology, Technology):
        return technology
    if str(technology) in TECHNOLOGIES:
        return TECHNOLOGIES[str(technology)]
    path = place(str(technology))
    if not os.path.lexists(path):
        raise InputError(
            f"technology: expected one of {list(TECHNOLOGIES)} or a JSON file, found "
            f"{str(technology)!r}, which is no file."
        )
    return _checked(read_json(path, "technology"), path)


def _checked(values: dict[str, Any], path: Path) -> Technology:
    for key in values:
        if key not in _KEYS:
            raise InputError(f"technology: {path} has an unknown key '{key}'.{nearest(key, _KEYS)}")
    tables = {}
    for key in ("add", "multiply", "memory"):
        table = values.get(key)
        if not isinstance(table, dict) or not table:
            raise InputError(
                f"technology: {path} needs '{key}', an object of picojoules by "
                f"{'level' if key == 'memory' else 'type'}."
            )
        for name, value in table.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise InputError(
                    f"technology: {path}: {key}.{name} should be a positive number of picojoules, "
                    f"found {value!r}."
                )
            if key != "memory":
                check_choice(
                    f"technology: {path}: a type in '{key}'", name, (*REQUIRED, "int16", "bfloat16")
                )
        if key != "memory" and (missing := [name for name in REQUIRED if name not in table]):
            raise InputError(f"technology: {path}: '{key}' lacks {', '.join(missing)}.")
        tables[key] = {name: float(value) for name, value in table.items()}
    return Technology(str(values.get("name", path.stem)), str(values.get("source", path)), **tables)
