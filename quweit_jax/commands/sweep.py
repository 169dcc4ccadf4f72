"""python -m quweit_jax sweep --config=experiments/configs/compare_lm.py:cpu --workdir=runs/sweep

What is known of a point of a sweep is what its run directory holds, so a sweep that was interrupted
goes on by being started again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import hashlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quweit_jax.commands import cli
from quweit_jax.config import Config, load_module
from quweit_jax.errors import InputError

_POLL_SECONDS = 0.2
_LONGEST_NAME = 200  # file systems take 255 bytes, of which a log's name needs some more


def main(argv: Sequence[str]) -> int:
    """Trains every point of an experiment's sweep(add), goes on with an interrupted sweep, and
    writes one table.
    """
    args, overrides = cli.parse(_parser(), argv)
    if args.workers < 1:
        raise InputError(f"--workers: expected at least 1, found {args.workers}.")
    from quweit_jax.training import checkpoints, files, stopping

    root = Path(args.workdir).absolute()
    checkpoints.check_path(root)
    if root.exists() and not root.is_dir():
        raise InputError(f"--workdir: {root} is a file; give a folder.")
    points = enumerate_points(args.config, root, overrides)
    if args.launcher == "print":
        print("\n".join(point.line() for point in points))
        return 0
    if args.slurm and args.launcher != "slurm":
        raise InputError("--slurm: expected --launcher=slurm beside it; add that, or leave it out.")
    jobs = None
    if args.launcher == "slurm":
        from quweit_jax.commands import slurm

        jobs = slurm.executor(root, args.slurm, args.workers)
    files.make_workdir(root)
    # Two sweeps of the same points would each take the other's for failed.
    with files.exclusive(root), stopping.StopRequest() as stop:
        watched = (lambda text: print(text, flush=True), lambda: stop.signal is not None)
        if jobs is not None:
            failed = slurm.run_points(points, root, jobs, *watched)
        else:
            failed = run_points(points, root, args.workers, *watched)
    print(write_table(points, failed, root), end="")
    finished = sum(result_of(point)["state"] == "finished" for point in points)
    print(f"{finished} of {len(points)} points finished; the table is {root / 'sweep.md'}")
    if finished < len(points):
        print(f"what failed is in {root / 'logs'}; " * bool(failed) + "the same command goes on")
    if stop.signal == "SIGINT" and finished < len(points):
        return cli.INTERRUPTED
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "sweep",
        "Trains every point of an experiment's sweep; started again, it goes on where it ended.",
        "config",
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
        "--launcher",
        choices=["local", "print", "slurm"],
        default="local",
        help="local: here; print: only print one command a line, for a cluster's launcher; slurm: "
        "as jobs of SLURM's, queued again when they are ended early (needs submitit)",
    )
    parser.add_argument(
        "--print",
        action="store_const",
        const="print",
        dest="launcher",
        help="the same as --launcher=print",
    )
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what a job may use, such as timeout_min=600, gpus_per_node=1, slurm_partition=gpu",
    )
    parser.epilog = "--config.PATH=VALUE sets any key of the config, for every point."
    return parser


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep: its settings, and the command that trains it or goes on with it."""

    name: str
    settings: Mapping[str, object]
    config: Config
    workdir: Path
    command: tuple[str, ...]

    def line(self) -> str:
        """The command for a shell."""
        return shlex.join(self.command)


def enumerate_points(spec: str, root: Path, overrides: Mapping[str, str]) -> list[Point]:
    """The points of 'FILE.py:VARIANT,key=value', in the order in which the file's `sweep(add)` adds
    them.

    `add(mlp='dense', lr=1e-3)` or `add({'optimizer.clip': 0.5})` adds a point: shortcuts or full
    paths, applied after those of `spec`.

    Raises:
      InputError: the file has no sweep, or a point is wrong or there twice; nothing has been
        started then.
    """
    module, argument = load_module(spec)
    if not hasattr(module, "sweep"):
        raise InputError(
            f"--config: {spec.partition(':')[0]} has no sweep(add); define one that calls "
            "add(key=value, ...) for each point."
        )
    added: list[dict[str, object]] = []

    def add(*mappings: Mapping[str, object], **settings: object) -> None:
        if wrong := [given for given in mappings if not isinstance(given, Mapping)]:
            raise InputError(
                "--config: sweep(add): expected add(key=value, ...) or add({'a.key': value, ...}), "
                f"found {wrong[0]!r}; give each value its key."
            )
        added.append({k: v for mapping in (*mappings, settings) for k, v in mapping.items()})

    module.sweep(add)
    if not added:
        raise InputError(
            "--config: sweep(add) added no point; call add(key=value, ...) once for each."
        )
    points = [_point(spec, argument, root, overrides, settings) for settings in added]
    twice = {p.name for p in points if sum(p.name == q.name for q in points) > 1}
    if twice:
        raise InputError(
            f"--config: sweep(add) added a point twice: {min(twice)}; give each its own settings "
            "(a seed, say)."
        )
    return points


def _point(
    spec: str, argument: str, root: Path, overrides: Mapping[str, str], settings: dict[str, object]
) -> Point:
    from quweit_jax.training import setup

    shortcuts = [f"{key}={value}" for key, value in settings.items()]
    if bad := [text for text in shortcuts if "," in text]:
        raise InputError(
            f"--config: sweep(add): a value may hold no comma, found {bad[0]}; make it a shortcut "
            "or a variant of the experiment file."
        )
    if bad := [text for text in shortcuts if not text.isprintable()]:
        raise InputError(
            "--config: sweep(add): expected letters that can be written in a line, found "
            f"{bad[0]!r}."
        )
    file = spec.partition(":")[0]
    point_spec = f"{file}:{','.join([*filter(None, [argument]), *shortcuts])}"
    config = cli.load_config(point_spec, overrides)
    setup.check_numbers(config)
    name = _folder_name(",".join(shortcuts))
    workdir = root / name
    options = [f"--config.{path}={text}" for path, text in overrides.items()]
    command = (
        sys.executable,
        "-m",
        "quweit_jax.train",
        f"--config={point_spec}",
        f"--workdir={workdir}",
        "--progress=off",
        *options,
    )
    return Point(name, settings, config, workdir, command)


def _folder_name(settings: str) -> str:
    """The settings as a folder's name; very long ones are cut, and told apart by their digest."""
    name = re.sub(r"[^A-Za-z0-9_.=,+-]", "-", settings)
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    return f"{name[: _LONGEST_NAME - len(digest) - 1]}-{digest}"


def result_of(point: Point) -> dict[str, Any]:
    """What its run directory says: state ('new', 'unfinished', 'finished'), step, and losses and
    accuracy of its evaluations.
    """
    from quweit_jax.training import metrics, rundir

    rows = metrics.evaluations(point.workdir)
    if not rows:
        return {
            "state": "unfinished" if (point.workdir / "config.json").exists() else "new",
            "step": 0,
        }
    last, best = rows[-1], min(rows, key=lambda row: row["loss"])
    found = {
        "step": last["step"],
        "validation_loss": last["loss"],
        "accuracy": last.get("accuracy", ""),
        "best_loss": best["loss"],
        "best_step": best["step"],
    }
    finished = rundir.is_finished(point.workdir, point.config.steps)
    return {"state": "finished" if finished else "unfinished", **found}


def run_points(
    points: Sequence[Point],
    root: Path,
    workers: int,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> dict[str, str]:
    """Trains what is not finished, `workers` at a time; the others go on when one fails.

    Each process writes into ROOT/logs/NAME.txt; with several GPUs each worker has its own. When
    `stopped` says so, all are asked to save and stop, and none is begun.

    Returns:
      {name: the last line a failed run said}.
    """
    left = [point for point in points if result_of(point)["state"] != "finished"]
    say(
        f"{len(points)} points, {len(points) - len(left)} finished already; {workers} at a time, "
        f"into {root}"
    )
    running: dict[int, tuple[Point, subprocess.Popen[bytes]]] = {}
    failed: dict[str, str] = {}
    begun, done = time.monotonic(), 0
    try:
        while left or running:
            for slot in range(workers):
                if slot not in running and left and not stopped():
                    running[slot] = (point := left.pop(0)), _start(point, root, slot, workers)
                    say(f"begun: {point.name}")
            for slot, (point, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                done += 1
                result = result_of(point)
                if process.returncode or (result["state"] != "finished" and not stopped()):
                    log = root / "logs" / f"{point.name}.txt"
                    failed[point.name] = last_line(log, process.returncode)
                    say(f"failed: {point.name}: {failed[point.name]}")
                elif result["state"] == "finished":
                    rest = (time.monotonic() - begun) / done * (len(left) + len(running))
                    say(
                        f"finished: {point.name}: validation loss {result['validation_loss']:.4f}; "
                        f"about {rest:.0f} s left"
                    )
            if stopped():
                break
            time.sleep(_POLL_SECONDS)
    finally:
        for _, process in running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for _, process in running.values():
            process.wait()
    return failed


def _start(point: Point, root: Path, slot: int, workers: int) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    devices = [d for d in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    if workers > 1 and (devices or Path("/proc/driver/nvidia/gpus").is_dir()):
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)] if devices else str(slot)
    log = root / "logs" / f"{point.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(log) and not os.path.isfile(log):  # a pipe would wait for a reader
        raise InputError(
            f"--workdir: expected a file at {log}, found something else; take it away."
        )
    with log.open("ab") as out:
        # A session of its own: an interrupt in the terminal reaches this process alone, which then
        # asks each run once.
        return subprocess.Popen(
            point.command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_us,
        )


def _end_with_us() -> None:
    """On Linux, asks the kernel to stop a run (SIGTERM: it saves) should the sweep be killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def last_line(log: Path, status: object) -> str:
    """What a run said last; its status too where that is no error: it may have had no room to say
    one.
    """
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "it said nothing"
    return last if last.startswith("error: ") else f"status {status}; the last it said: {last}"


def write_table(points: Sequence[Point], failed: Mapping[str, str], root: Path) -> str:
    """sweep.md and sweep.csv in `root`: a row a point, in order; nothing in it depends on when or
    how often the sweep was interrupted.
    """
    from quweit_jax.training.files import replace_text

    columns = ["state", "step", "validation_loss", "best_loss", "best_step", "accuracy"]
    header = [*dict.fromkeys(key for point in points for key in point.settings), *columns]
    rows = []
    for point in points:
        known = {**point.settings, **result_of(point)}
        known |= {"state": "failed"} if point.name in failed else {}
        rows.append([known.get(name, "") for name in header])

    def cell(value: object) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value).replace("|", "\\|")

    shown = [[name.replace("_", " ") for name in header], ["---"] * len(header)]
    settings = len(header) - len(columns)
    shown += [[*map(cell, map(str, row[:settings])), *map(cell, row[settings:])] for row in rows]
    table = "".join(f"| {' | '.join(row)} |\n" for row in shown)
    out = io.StringIO()
    csv.writer(out).writerows([header, *rows])
    root.mkdir(parents=True, exist_ok=True)
    replace_text(root / "sweep.md", table)
    replace_text(root / "sweep.csv", out.getvalue())
    return table
