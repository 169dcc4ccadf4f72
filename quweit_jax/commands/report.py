"""python -m quweit_jax.report RUN_DIR... [--model=FOLDER ...] --out=report/ [--technology=7nm]
[--precision=int8] [--batches=N] [--config.data.data_dir=FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quweit_jax.commands import cli
from quweit_jax.commands.opening import add_model, open_setup

if TYPE_CHECKING:
    from quweit_jax.report.collect import NamedModel
    from quweit_jax.report.summary import RunSummary


def main(argv: Sequence[str]) -> int:
    """Compares runs in one page: losses, accuracy, energy, memory, samples, and what look-up tables
    learned.
    """
    parser = cli.parser(
        "report",
        "Compares runs in one self-contained HTML page, its plots as PNGs and its numbers as CSV.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN_DIR",
        help="run directories, or folders that hold some (a sweep's, a study's)",
    )
    add_model(parser, action="append", default=[])
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="a folder for the report; an earlier report in it is replaced",
    )
    parser.add_argument("--title", default="", help="the page's heading")
    parser.add_argument(
        "--technology",
        default="45nm",
        help="of the energies: 45nm, 7nm, or a JSON file (default: 45nm)",
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=8,
        help="validation batches on which look-up tables are watched (default: 8; 0: all)",
    )
    parser.add_argument(
        "--precision",
        help="of dense products, float32, bfloat16, float16 or int8, in the runs and in the dense "
        "models beside them (default: a run's own type, and int8 beside it)",
    )
    parser.epilog = (
        "--config.data.data_dir=FOLDER (or another key of data and mesh) says for all runs where "
        "their data are on this machine."
    )
    args, overrides = cli.parse(parser, argv)
    from quweit_jax.costs import technologies
    from quweit_jax.reading import check_local, shown
    from quweit_jax.report import owned_folder, page
    from quweit_jax.report.collect import collect

    for what, path in (("--out", args.out), *(("report", run) for run in args.runs)):
        check_local(path, what, "copy runs here, write the report here, and copy that")
    owned_folder.check(args.out)
    technology = technologies.technology_of(args.technology).name

    def say(run: RunSummary) -> None:
        print(f"{run.label}: {run.state}{f' ({run.reason})' if run.reason else ''}", flush=True)

    runs, skipped = collect(
        args.runs,
        overrides,
        batches=args.batches,
        technology=args.technology,
        precision=args.precision,
        models=[_model(given) for given in args.model],
        say=say,
    )
    files = page.write(
        runs, skipped, technology=technology, title=args.title, precision=args.precision
    )
    owned_folder.write(args.out, files)
    for path, reason in skipped:
        print(f"no run in {shown(path)}: {reason}")
    print(f"{len(runs)} runs, {len(files)} files: {args.out / 'index.html'}")
    return 0


def _model(given: str) -> NamedModel:
    """A model in a folder of its own, for a report; without data."""
    from quweit_jax.report.collect import NamedModel
    from quweit_jax.training import rundir

    args = argparse.Namespace(model=given, workdir=None)
    opened, setup = open_setup(args, {}, data=False)
    run = rundir.OpenRun(setup, opened.variables, opened.about.get("training_step") or 0)
    return NamedModel(Path(given).name, given, run, opened.about, opened.init_inputs)
