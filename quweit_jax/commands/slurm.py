"""A sweep's points as jobs of SLURM's, by submitit: `sweep --launcher=slurm`."""

from __future__ import annotations

import ast
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quweit_jax.commands import sweep
from quweit_jax.errors import InputError, first_line, require
from quweit_jax.reading import read_json
from quweit_jax.training import files

_POLL_SECONDS = 5.0


class Job:
    """A point's command, on whatever host SLURM chooses. Ended before its time, by preemption or at
    its limit, it lets the run save, and is queued again to go on.
    """

    def __init__(self, command: Sequence[str], log: Path):
        self.command, self.log, self.folder = tuple(command), log, os.getcwd()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Trains; the command's status."""
        environment = dict(os.environ)
        if int(environment.get("SLURM_NTASKS", "1")) > 1:
            environment["JAX_DISTRIBUTED"] = "1"
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                env=environment,
            )
        return self._wait(self._process)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        # `wait` would keep a lock that `checkpoint`, called by a signal in between, needs.
        while (status := process.poll()) is None:
            time.sleep(0.2)
        return status

    def checkpoint(self) -> Any:
        """What submitit calls when SLURM gives notice: the job to queue again."""
        submitit: Any = require("submitit", "for --launcher=slurm")
        if self._process is not None:
            self._process.terminate()
            self._wait(self._process)
        again = Job(self.command, self.log)
        again.folder = self.folder
        return submitit.helpers.DelayedSubmission(again)


def executor(root: Path, options: Sequence[str], workers: int) -> Any:
    """submitit's executor for SLURM.

    options: 'KEY=VALUE' of submitit's `update_parameters`: timeout_min=600, slurm_partition=gpu.

    Raises:
      InputError: submitit or SLURM is not there, or an option is none of submitit's.
    """
    submitit: Any = require("submitit", "for --launcher=slurm")
    given: dict[str, object] = {"slurm_array_parallelism": workers, "name": root.name}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise InputError(
                f"--slurm: expected KEY=VALUE such as timeout_min=600, found '{option}'."
            )
        try:
            given[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[key] = text
    try:
        made = submitit.AutoExecutor(folder=root / "logs" / "slurm", cluster="slurm")
        made.update_parameters(**given)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"--launcher: expected SLURM on this machine, found none ({first_line(error)}); use "
            "--launcher=print and a launcher of your own, or local."
        ) from None
    except (NameError, TypeError, AssertionError) as error:
        raise InputError(f"--slurm: {first_line(error)}") from None
    return made


def run_points(
    points: Sequence[sweep.Point],
    root: Path,
    jobs: Any,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
    poll: float = _POLL_SECONDS,
) -> dict[str, str]:
    """Queues what is neither finished nor queued, and waits for all that is; see
    `sweep.run_points`.

    jobs: of `executor`. What is queued is kept in ROOT/slurm.json: when `stopped`, it stays queued,
    and the same command waits on.
    """
    known = root / "slurm.json"
    numbers = read_json(known, "--workdir") if known.exists() else {}
    left = [point for point in points if sweep.result_of(point)["state"] != "finished"]
    waiting = {}
    for point in left:
        if isinstance(number := numbers.get(point.name), str):
            waiting[point.name] = jobs.job_class(jobs.folder, number)
    new = [p for p in left if p.name not in waiting or waiting[p.name].done(force_check=True)]
    (root / "logs").mkdir(exist_ok=True)
    with jobs.batch():  # one array, of which SLURM runs as many as --workers at a time
        made = [jobs.submit(Job(p.command, root / "logs" / f"{p.name}.txt")) for p in new]
    waiting |= {point.name: job for point, job in zip(new, made)}
    numbers |= {point.name: job.job_id for point, job in zip(new, made)}
    files.replace_json(known, numbers)
    say(
        f"{len(points)} points, {len(points) - len(left)} finished already, {len(new)} queued; "
        f"what each says is in {root / 'logs'}"
    )
    failed = {}
    while left and not stopped():
        for point in list(left):
            if not waiting[point.name].done():
                continue
            left.remove(point)
            result = sweep.result_of(point)
            if result["state"] == "finished":
                say(f"finished: {point.name}: validation loss {result['validation_loss']:.4f}")
                continue
            log = root / "logs" / f"{point.name}.txt"
            failed[point.name] = sweep.last_line(log, waiting[point.name].state)
            say(f"failed: {point.name}: {failed[point.name]}")
        time.sleep(poll if left else 0)
    if left:
        queued = " ".join(sorted({numbers[point.name].partition("_")[0] for point in left}))
        say(f"{len(left)} points stay queued; scancel {queued} takes them back")
    return failed
