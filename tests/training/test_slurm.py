"""Sweeps as jobs of submitit's: queued once, waited for, ended early and queued again."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import types

import pytest

from quweit_jax.commands import slurm, sweep
from quweit_jax.errors import InputError

# Stands for a training run: it ends by itself once the file GO is there, and saves at SIGTERM.
RUN = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
here.mkdir(exist_ok=True)
def save(*_):
    (here / "saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
print("error: begun", flush=True)
(here / "begun").touch()
while not (here / "go").exists() and not (here / "saved").exists():
    time.sleep(0.02)
(here / "done").touch()
"""


@pytest.fixture
def points(tmp_path, monkeypatch):
    """Two points whose runs are RUN; one is finished once it is done."""

    def result(point):
        done = (point.workdir / "done").exists()
        return {"state": "finished", "validation_loss": 1.0} if done else {"state": "new"}

    monkeypatch.setattr(slurm.sweep, "result_of", result)
    made = []
    for name in ("a", "b"):
        command = (sys.executable, "-c", RUN, str(tmp_path / name))
        made.append(sweep.Point(name, {}, None, tmp_path / name, command))
    return made


def test_a_job_that_is_ended_early_saves_and_is_queued_again(points, tmp_path):
    submitit = pytest.importorskip("submitit", reason="the extra slurm is not installed")
    job, statuses = slurm.Job(points[0].command, tmp_path / "log.txt"), []
    running = threading.Thread(target=lambda: statuses.append(job()))
    running.start()
    while not (points[0].workdir / "begun").exists():
        running.join(0.02)
    again = job.checkpoint()
    running.join()
    assert (points[0].workdir / "saved").exists() and statuses == [0]
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function() == 0 and (points[0].workdir / "done").exists(), "it goes on"


def test_points_are_queued_once_and_waited_for(points, tmp_path):
    submitit = pytest.importorskip("submitit", reason="the extra slurm is not installed")
    jobs, said = submitit.AutoExecutor(tmp_path / "logs" / "slurm", cluster="local"), []
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "done").touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "go").touch()
    failed = slurm.run_points(points, tmp_path, jobs, said.append, lambda: False, poll=0.1)
    assert failed == {} and said[-1] == "finished: a: validation loss 1.0000"
    assert "1 finished already, 1 queued" in said[0]
    assert list(json.loads((tmp_path / "slurm.json").read_text())) == ["a"]


def test_what_is_queued_is_not_queued_twice_and_what_fails_is_told(points, tmp_path):
    """By an executor that only counts: submitit's own asks SLURM."""
    submitted, done = [], set()

    class Executor:
        folder = tmp_path
        batch = staticmethod(contextlib.nullcontext)

        @staticmethod
        def job_class(folder, job_id):
            made = types.SimpleNamespace(job_id=job_id, state="FAILED")
            made.done = lambda force_check=False: job_id in done
            return made

        def submit(self, job):
            submitted.append(job.command)
            return self.job_class(None, f"7_{len(submitted) - 1}")

    said = []
    given = (points, tmp_path, Executor(), said.append)
    assert slurm.run_points(*given, lambda: True) == {}
    assert len(submitted) == 2 and said[-1] == "2 points stay queued; scancel 7 takes them back"
    done |= {"7_0"}
    slurm.run_points(*given, lambda: True)
    assert [command[-1] for command in submitted] == [str(tmp_path / n) for n in ("a", "b", "a")]
    done |= {"7_1", "7_2"}
    (tmp_path / "logs" / "a.txt").write_text("error: the disk is full")
    asked = []

    def stopped():  # once the first of the two new jobs has ended
        done.add("7_3")
        return len(asked) == 1 or asked.append(None) is not None

    failed = slurm.run_points(points, tmp_path, Executor(), said.append, stopped, poll=0)
    assert len(submitted) == 5, "what failed is tried again by the same command"
    assert failed == {"a": "error: the disk is full"} and said[-1].startswith(
        "1 points stay queued"
    )


def test_without_slurm_it_says_so(tmp_path):
    with pytest.raises(InputError, match=r"^--slurm: expected KEY=VALUE|package submitit"):
        slurm.executor(tmp_path, ["timeout"], 1)
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    with pytest.raises(InputError, match=r"^--launcher: expected SLURM on this machine"):
        slurm.executor(tmp_path, ["timeout_min=3"], 1)
