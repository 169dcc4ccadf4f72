"""What a classifier made of tables takes of an FPGA: physical tables of 6 inputs, flip-flops and
comparators, encoder included, by the rules that `export --to=verilog` draws by (`ops.area`).

An upper bound before training: which comparators are wired, and what can be simplified (constant
tables, equal thresholds), is only known afterwards, when the export says it exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from quweit_jax.costs.count import data_shape
from quweit_jax.errors import InputError
from quweit_jax.models.dwn import DWN
from quweit_jax.models.registry import build
from quweit_jax.ops.area import Area, classifier_area

MAX_INPUT_BITS = 16


def of_config(
    config: Any, outputs: int | None = None, *, input_bits: int = 8, pipeline: int = 1
) -> dict[str, Area] | None:
    """The area of a config's classifier by part: 'encoder', 'tables' and 'reduction'; None for a
    model that is not made of tables and counts alone.

    Args:
      outputs: see `costs.count.data_shape`. input_bits: of a word, 1 to 16. pipeline: registers
        after every so many stages; 0 for none.

    Raises:
      InputError: a number out of range, or see `costs.count.data_shape`.
    """
    if not 1 <= input_bits <= MAX_INPUT_BITS:
        raise InputError(f"--input_bits: expected 1 to {MAX_INPUT_BITS}, found {input_bits}.")
    if pipeline < 0:
        raise InputError(f"--pipeline: expected 0 or more stages, found {pipeline}.")
    if config["model"].get("name") != "dwn":
        return None
    data = data_shape(config, outputs=outputs)
    values = config["model"]
    model = build(values.to_dict() if hasattr(values, "to_dict") else dict(values), data.outputs)
    if not isinstance(model, DWN) or model.config.reduction != "group_sum":
        return None
    c = model.config
    bits = (data.image_size or 1) ** 2 * data.channels * c.thermometer_bits
    return classifier_area(
        min(bits, c.num_luts[0] * c.lut_inputs),
        [(count, c.lut_inputs) for count in c.num_luts],
        c.num_classes,
        input_bits=input_bits,
        pipeline=pipeline,
    )


def statement(parts: Mapping[str, Area], input_bits: int, pipeline: int) -> dict[str, Any]:
    """The area in plain values, by part and in total: what `--json` prints."""
    every = {part: dataclasses.asdict(area) for part, area in parts.items()}
    total = {name: sum(part[name] for part in every.values()) for name in vars(Area())}
    assumed = {"input_bits": input_bits, "pipeline": pipeline, "lut_inputs": 6}
    return {**every, "total": total, "assumed": assumed}


def lines(stated: Mapping[str, Any]) -> list[str]:
    """The object of `statement` as a person reads it."""
    assumed = stated["assumed"]
    how = f"every {assumed['pipeline']} stages" if assumed["pipeline"] else "nowhere"
    each = ", ".join(
        f"{part} {area['luts']:,}"
        for part, area in stated.items()
        if part not in ("total", "assumed")
    )
    total = stated["total"]
    return [
        f"on an FPGA at most: {total['luts']:,} LUT6 ({each}), {total['flip_flops']:,} flip-flops, "
        f"{total['comparators']:,} comparators; words of {assumed['input_bits']} bits, registers "
        f"{how}"
    ]
