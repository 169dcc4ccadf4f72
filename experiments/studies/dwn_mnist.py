"""Weightless classifiers of MNIST as circuits: accuracy against size, the encoder counted, beside
published ones (experiments/configs/dwn_mnist.py).

    python -m experiments.studies.dwn_mnist --data_dir=FOLDER [--kinds 360 690-plain ...]
    [--seeds 0 1 2] [--table]

A kind is a number of tables, trained as the config says or ('-plain') at the published rate and
without the average. Runs go into RUNS/KIND-SEED; what NAME.json knows is not repeated, and
interrupted ones go on. Each becomes a circuit (RUNS/KIND-SEED/verilog), which Icarus checks on all
10,000 test images and Yosys counts: both have to be installed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.configs import mnist_tau
from experiments.studies import common
from quweit_jax.commands import cli, export_hardware
from quweit_jax.deploy.hardware import folder, synthesis, tools
from quweit_jax.deploy.pack import packed_or_trained
from quweit_jax.errors import InputError
from quweit_jax.training import looks, rundir

# Tables whose circuits are about as large as published ones, and one below 2,000 LUT6.
SIZES = (360, 690, 940, 1000, 1060, 1100, 1550)
KINDS = [f"{tables}{how}" for tables in SIZES for how in ("-plain", "")]
_PLAIN = {"optimizer.learning_rate": 1e-2, "optimizer.ema": 0.0}
OPTIONS = export_hardware.DEFAULTS | {"examples": 0}  # all test images among the golden vectors
# (LUT6, accuracy) with the encoder counted, arXiv 2410.11112 on an Artix-7.
PUBLISHED = ((845, 0.9298), (1597, 0.9677), (2246, 0.9770), (3464, 0.9776))


def config_of(args: Any, kind: str, seed: int) -> Any:
    """A run's config."""
    tables, _, plain = kind.partition("-")
    changes = {"model.num_luts": (int(tables),), "model.tau": mnist_tau(int(tables))}
    changes |= {"seed": seed, **(_PLAIN if plain else {})}
    return common.run_config(args, "dwn_mnist.py:692", changes)


def as_circuit(workdir: Path) -> dict[str, Any]:
    """A finished run as a circuit: what it takes, by module, and on how many test images Icarus
    and its integer description decide as the packed model.

    Raises:
      RunError: Icarus finds an output that differs. InputError: it or Yosys is not installed.
    """
    run = rundir.open_run(workdir, step=rundir.read_config(workdir).steps)
    model, inputs = run.setup.model, run.setup.init_inputs
    packed = packed_or_trained(model, jax.device_get(run.variables), inputs)
    export = export_hardware.exported(run.setup, packed, "verilog", OPTIONS)
    folder.write(export, workdir / "verilog", overwrite=True)
    tools.check(tools.verify(workdir / "verilog", "verilog", ["iverilog"]))
    made = export.circuit
    report = synthesis.synthesize(made)
    modules = report.modules[6]
    return {
        **export.about,
        "vectors": len(export.words),
        "comparators": len(made.classifier.feature),
        "input_bits": made.classifier.scaling.bits,
        "latency": made.latency,
        "lut6": {name: module.luts for name, module in modules.items()},
        "flip_flops": sum(module.flip_flops for module in modules.values()),
        "counted_by": report.tool,
    }


def total(found: Mapping[str, Any]) -> int:
    """The LUT6 of a circuit, all of its modules."""
    return sum(found["lut6"].values())


def row(kind: str, seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table's row of a number of tables."""

    def each(values: Sequence[int]) -> str:
        return f"{statistics.mean(values):,.0f} ({', '.join(f'{v:,}' for v in values)})"

    accuracies = [found["accuracy_deployed"] for found in seeds]
    agree = sum(found["validation_agree"] for found in seeds)
    return [
        f"{int(kind.partition('-')[0]):,}",
        "published" if kind.endswith("plain") else "twice that, averaged",
        common.shares(accuracies, 2),
        each([total(found) for found in seeds]),
        each([found["comparators"] for found in seeds]),
        each([found["flip_flops"] for found in seeds]),
        f"{agree:,} of {sum(found['validation_examples'] for found in seeds):,}",
    ]


def draw(found: common.Results, path: Path) -> None:
    """A PNG of accuracy against LUT6, each seed and the means, and the published circuits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    series = {"-plain": ("published rate", "white"), "": ("twice that, averaged", None)}
    style: dict[str, Any] = {"color": looks.style("dwn", 0)["color"]}
    for ending, (how, face) in series.items():
        kinds = [kind for kind in found if kind.partition("-")[0] + ending == kind]
        means = []
        for seeds in (found[kind].values() for kind in kinds):
            sizes = [total(of) for of in seeds]
            shares = [100 * of["accuracy_deployed"] for of in seeds]
            axes.plot(sizes, shares, "o", alpha=0.35, markersize=5, **style)
            means.append((statistics.mean(sizes), statistics.mean(shares)))
        if means:
            label = f"here, {how}, by Yosys; seeds pale"
            axes.plot(
                *zip(*sorted(means)), "D-", markersize=7, label=label, markerfacecolor=face, **style
            )
    sizes, shares = zip(*PUBLISHED)
    published = [100 * share for share in shares]
    label = "DWN as published (arXiv 2410.11112), Artix-7"
    axes.plot(sizes, published, "s--", color=looks.style("none", 0)["color"], label=label)
    axes.set_xlabel("LUT6, the encoder among them")
    axes.set_ylabel("accuracy on 10,000 test images, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path)


def check_tools() -> None:
    """Raises InputError unless Icarus and Yosys are installed."""
    for tool in ("iverilog", "yosys"):
        if not tools.installed(tool):
            raise InputError(
                f"dwn_mnist: expected {tool}, found none; install it ({tools.PACKAGES[tool]}), or "
                "take --table."
            )


def train_all(args: Any) -> None:
    """Trains what NAME.json does not know, a run at a time, and makes circuits of it."""
    path = args.out / f"{args.name}.json"
    for seed in args.seeds:
        for kind in args.kinds:
            if path.exists() and seed in common.known(args).get(kind, {}):
                continue
            workdir = common.finish(config_of(args, kind, seed), args.runs / f"{kind}-{seed}")
            made = common.score(workdir) | as_circuit(workdir)
            common.note(args, kind, seed, made)
            print(f"{kind}, seed {seed}: {json.dumps(made)}", flush=True)


def main() -> None:
    """Trains what is missing, then writes table and plot."""
    args = common.arguments(
        __doc__, variant="", kinds=KINDS, seeds=[0, 1, 2], runs="dwn_mnist", name="dwn_mnist"
    )
    if not args.table:
        check_tools()
        train_all(args)
    results = common.known(args)
    header = ["tables", "rate", "accuracy", "LUT6 with the encoder", "comparators", "flip-flops"]
    header.append("decisions as the packed model's")
    rows = [row(kind, list(seeds.values())) for kind, seeds in results.items()]
    common.write_lines(args.out / f"{args.name}.md", common.markdown(header, rows))
    draw(results, args.out / f"{args.name}.png")


if __name__ == "__main__":
    cli.run(lambda _: main())
