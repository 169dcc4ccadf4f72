"""Sweeps: the points an experiment's `sweep(add)` lists, each a run directory of its own, trained
side by side and put in one table.

What is known of a point is what its run directory holds, so a sweep that was interrupted goes on by
being started again.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import dataclasses
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

from quweit_jax import config as configs
from quweit_jax.errors import InputError
from quweit_jax.training import files, metrics

_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep: its settings, and the command that trains it or goes on with it."""

    name: str
    settings: Mapping[str, Any]
    config: configs.Config
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
    module, argument = configs.load_module(spec)
    if not hasattr(module, "sweep"):
        raise InputError(
            f"--config: {spec.partition(':')[0]} has no sweep(add); define one that calls "
            "add(key=value, ...) for each point."
        )
    added: list[dict[str, Any]] = []
    module.sweep(
        lambda *mappings, **settings: added.append(
            {k: v for mapping in (*mappings, settings) for k, v in mapping.items()}
        )
    )
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
    spec: str, argument: str, root: Path, overrides: Mapping[str, str], settings: dict[str, Any]
) -> Point:
    shortcuts = [f"{key}={value}" for key, value in settings.items()]
    if bad := [text for text in shortcuts if "," in text]:
        raise InputError(
            f"--config: sweep(add): a value may hold no comma, found {bad[0]}; make it a shortcut "
            "or a variant of the experiment file."
        )
    file = spec.partition(":")[0]
    point_spec = f"{file}:{','.join([*filter(None, [argument]), *shortcuts])}"
    config = configs.load_file(point_spec)
    for path, text in overrides.items():
        configs.set_value(config, path, text)
    name = re.sub(r"[^A-Za-z0-9_.=,+-]", "-", ",".join(shortcuts))
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


def result_of(point: Point) -> dict[str, Any]:
    """What its run directory says: state ('new', 'unfinished', 'finished'), step, and losses and
    accuracy of its evaluations.
    """
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
        "accuracy": last["accuracy"],
        "best_loss": best["loss"],
        "best_step": best["step"],
    }
    return {"state": "finished" if last["step"] == point.config.steps else "unfinished", **found}


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
                    failed[point.name] = _last_line(root / "logs" / f"{point.name}.txt")
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


def _last_line(log: Path) -> str:
    lines = (
        [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if log.exists()
        else []
    )
    return lines[-1][:300] if lines else "it said nothing"


def write_table(points: Sequence[Point], failed: Mapping[str, str], root: Path) -> str:
    """sweep.md and sweep.csv in `root`: a row a point, in order; nothing in it depends on when or
    how often the sweep was interrupted.
    """
    keys = list(dict.fromkeys(key for point in points for key in point.settings))
    results = [
        {**result_of(point), **({"state": "failed"} if point.name in failed else {})}
        for point in points
    ]
    columns = ["state", "step", "validation_loss", "best_loss", "best_step", "accuracy"]

    def cell(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    rows = [
        [str(p.settings.get(k, "")) for k in keys] + [cell(r.get(c, "")) for c in columns]
        for p, r in zip(points, results)
    ]
    header = [*keys, *columns]
    table = (
        "\n".join(
            "| " + " | ".join(row) + " |"
            for row in [[h.replace("_", " ") for h in header], ["---"] * len(header), *rows]
        )
        + "\n"
    )
    out = io.StringIO()
    csv.writer(out).writerows(
        [
            header,
            *(
                [str(p.settings.get(k, "")) for k in keys] + [r.get(c, "") for c in columns]
                for p, r in zip(points, results)
            ),
        ]
    )
    root.mkdir(parents=True, exist_ok=True)
    files.replace_text(root / "sweep.md", table)
    files.replace_text(root / "sweep.csv", out.getvalue())
    return table
