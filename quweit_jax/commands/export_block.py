"""python -m quweit_jax export --to=verilog|c --workdir=RUN [--block=N]: channel-mixing blocks of
integer-only transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quweit_jax.errors import InputError, RunError

if TYPE_CHECKING:
    from quweit_jax.deploy.hardware.blocks.description import Block
    from quweit_jax.deploy.hardware.blocks.verilog import Circuit
    from quweit_jax.training.setup import Setup

_FEWEST = 64  # images whose tokens are recorded, so that golden ones are of many


def run(
    setup: Setup,
    packed: dict[str, Any],
    out: Path,
    kind: str,
    options: Mapping[str, Any],
    about: Mapping[str, Any],
    overwrite: bool,
) -> Circuit:
    """Writes a block of a packed run as Verilog or C; the circuit, to be synthesized.

    Args:
      options: the command's, by name. about: further facts for block.json.

    Raises:
      InputError: see `description.choices` and `schedule.plan`.
    """
    from quweit_jax.deploy.hardware.blocks import activations, description, folder, verilog

    model = setup.model
    found, number = description.choices(model), chosen(model, options["block"])
    block = description.from_packed(model, packed, setup.init_inputs, number)
    made = verilog.build(block, options["parallel"], options["pipeline"])
    images = _images(setup, options["examples"])
    recorded = activations.record(model, packed, images, number)
    _check(block, recorded)
    tokens = activations.with_extremes(block, recorded, options["examples"])
    agreed = {"activations_checked": len(recorded.x)}
    export = folder.Export(kind, made, tokens, number, {**about, **agreed})
    names = folder.write(export, out, overwrite=overwrite)
    print(f"wrote {out}: {', '.join(names)}")
    others = [f"{i} ({name})" for i, name in found.items() if i != number]
    print(
        f"block {number}, {found[number]}, of {block.features} features; exact on "
        f"{len(recorded.x):,} tokens of {len(images):,} validation images"
        + f"; there are {', '.join(others)}, too (--block)"
        * bool(others)
    )
    if kind == "verilog":
        schedule = made.schedule
        print(
            f"first result {schedule.latency:,} cycles behind a token's last word, then one every "
            f"{schedule.every}; a token takes {schedule.interval:,} cycles; "
            f"{made.memory_bits:,} bits of read-only memory"
        )
    return made


def chosen(model: object, number: int | None) -> int:
    """The block that is asked for, or the first that can be exported.

    Raises:
      InputError: see `description.check_block`.
    """
    from quweit_jax.deploy.hardware.blocks import description

    first = next(iter(description.choices(model)))
    number = first if number is None else number
    description.check_block(model, number)
    return number


def _images(setup: Setup, count: int) -> Any:
    """Enough validation images for so many tokens; all for 0."""
    import numpy as np

    from quweit_jax.data.pipeline import eval_batches

    wanted, found, have = max(count, _FEWEST), [], 0
    for batch in eval_batches(setup.data.validation, _FEWEST):
        found.append(batch["inputs"][batch["weights"] > 0])
        have += len(found[-1])
        if count and have >= wanted:
            break
    return np.concatenate(found)


def _check(block: Block, recorded: Any) -> None:
    from quweit_jax.deploy.hardware.blocks.description import evaluate

    wrong = int((evaluate(block, recorded.x, recorded.residual) != recorded.y).sum())
    if wrong:
        raise RunError(
            f"export: {wrong} results differ from the packed model's; this is a fault of "
            "quweit_jax, please report it."
        )


def synthesize(made: Circuit) -> None:
    """Prints what a block takes by yosys."""
    from quweit_jax.costs.table import table
    from quweit_jax.deploy.hardware.blocks import synthesis

    report = synthesis.synthesize(made)
    print(f"\nby {report.tool} for Xilinx 7, each module by itself:")
    print("\n".join(table(*synthesis.rows(report))))


def check_options(options: Mapping[str, Any], block: bool) -> None:
    """Raises InputError for options of blocks where a classifier is exported, and the other way
    around.
    """
    names = ("input_bits", "word") if block else ("block", "parallel")
    given = [name for name in names if options[name] is not None]
    if given:
        what = "a transformer's block" if block else "a classifier"
        raise InputError(f"--{given[0]}: does not go with {what}; leave it out.")
