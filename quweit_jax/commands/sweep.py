"""python -m quweit_jax.sweep --config=experiments/compare_lm.py:cpu --workdir=runs/sweep
[--workers=N] [--print] [--config.a.b=v]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quweit_jax.commands import cli
from quweit_jax.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Trains every point of an experiment's sweep(add), goes on with an interrupted sweep, and
    writes one table.
    """
    rest, overrides = cli.split_overrides(argv)
    parser = cli.parser(
        "sweep",
        "Trains every point of an experiment's sweep; started again, it goes on where it ended.",
    )
    parser.add_argument(
        "--config",
        required=True,
        help="FILE.py[:VARIANT,key=value,...], a file with get_config and sweep(add)",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        help="a folder for the points' run directories and the table, sweep.md and sweep.csv",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="points trained at a time; with several GPUs each has one (default: 1)",
    )
    parser.add_argument(
        "--print",
        action="store_true",
        dest="show",
        help="only print one command a line, for a cluster's launcher",
    )
    parser.epilog = "--config.PATH=VALUE sets any key of the config, for every point."
    args = parser.parse_args(rest)
    if args.workers < 1:
        raise InputError(f"--workers: expected at least 1, found {args.workers}.")
    from quweit_jax.commands import sweeps
    from quweit_jax.training import loop

    root = Path(args.workdir).absolute()
    if root.exists() and not root.is_dir():
        raise InputError(f"--workdir: {root} is a file; give a folder.")
    points = sweeps.enumerate_points(args.config, root, overrides)
    if args.show:
        print("\n".join(point.line() for point in points))
        return 0
    with loop.StopRequest() as stop:
        failed = sweeps.run_points(
            points,
            root,
            args.workers,
            lambda text: print(text, flush=True),
            lambda: stop.signal is not None,
        )
    print(sweeps.write_table(points, failed, root), end="")
    finished = sum(sweeps.result_of(point)["state"] == "finished" for point in points)
    print(f"{finished} of {len(points)} points finished; the table is {root / 'sweep.md'}")
    if finished < len(points):
        print(f"what failed is in {root / 'logs'}; " * bool(failed) + "the same command goes on")
    return 1 if failed else 0
