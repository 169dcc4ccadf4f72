"""python -m quweit_jax.report RUN_DIR... --out=report/ [--technology=7nm] [--batches=N]
[--config.data.data_dir=FOLDER]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quweit_jax.commands import cli


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
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="run directories, or folders that hold some (a sweep's, a study's)",
    )
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
    parser.epilog = (
        "--config.data.data_dir=FOLDER (or another key of data and mesh) says for all runs where "
        "their data are on this machine."
    )
    args, overrides = cli.parse(parser, argv)
    from quweit_jax.costs import technologies
    from quweit_jax.report import collect as gathering
    from quweit_jax.report import owned_folder as folder
    from quweit_jax.report import page

    folder.check(args.out)
    technology = technologies.technology_of(args.technology).name

    def say(record: Any) -> None:
        print(
            f"{record.label}: {record.state}{f' ({record.reason})' if record.reason else ''}",
            flush=True,
        )

    records, skipped = gathering.gather(
        args.runs, overrides, batches=args.batches, technology=args.technology, say=say
    )
    files = page.write(records, skipped, technology=technology, title=args.title)
    folder.write(args.out, files)
    for path, reason in skipped:
        print(f"no run in {path}: {reason}")
    print(f"{len(records)} runs, {len(files)} files: {args.out / 'index.html'}")
    return 0
