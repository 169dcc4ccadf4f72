"""A run that is interrupted, or whose folder or clock changes while it trains: a sentence, a proper
exit status, and what was saved stays.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quweit_jax.commands import cli, train
from quweit_jax.errors import InputError, RunError
from quweit_jax.training import checksums, loop, metrics, rundir, state
from quweit_jax.training.checkpoints import Checkpoints
from tests.conftest import assert_same_checkpoint, read_checkpoint

SMALL = {"model.layers": 1, "model.width": 16, "model.mlp": "none", "log_every": 1, "steps": 8} | {
    "eval_every": 4,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory) -> Path:
    """A run that was left alone."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    loop.fit(tiny_config(SMALL), workdir, progress=False)
    return workdir


def assert_goes_on(workdir: Path, whole: Path, config: Any) -> None:
    """To the end, where it is what the undisturbed run is."""
    assert loop.fit(config, workdir, progress=False).complete
    assert rundir.is_finished(workdir, 8)
    assert_same_checkpoint(read_checkpoint(workdir), read_checkpoint(whole))
    found, expected = (metrics.read_rows(d / "metrics.jsonl") for d in (workdir, whole))
    assert [(r["step"], r["loss"]) for r in found] == [(r["step"], r["loss"]) for r in expected]


@pytest.fixture(autouse=True)
def interruptible():
    """A shell's background jobs, and what they start, ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


def interrupting(call: Callable[..., Any], times: int, skip: int = 0) -> Callable[..., Any]:
    """A function that is interrupted while it works, after so many calls that are not."""
    calls = iter(range(10**6))

    def wrapped(*args: Any, **options: Any) -> Any:
        if next(calls) == skip:
            interrupt(times)
        return call(*args, **options)

    return wrapped


def in_a_compilation(monkeypatch, times: int) -> int:
    make = state.make_train_step
    monkeypatch.setattr(
        state, "make_train_step", lambda *args, **kw: interrupting(make(*args, **kw), times)
    )
    return 1


def in_a_checkpoint(monkeypatch, times: int) -> int:
    monkeypatch.setattr(Checkpoints, "save", interrupting(Checkpoints.save, times, 1))
    return 5


def in_the_wait_for_a_checkpoint(monkeypatch, times: int) -> int:
    monkeypatch.setattr(checksums, "note", interrupting(checksums.note, times, 0))
    return 5


def in_an_evaluation(monkeypatch, times: int) -> int:
    monkeypatch.setattr(loop, "evaluate", interrupting(loop.evaluate, times))
    return 4


MOMENTS = [in_a_compilation, in_a_checkpoint, in_the_wait_for_a_checkpoint, in_an_evaluation]


@pytest.mark.parametrize("moment", MOMENTS)
def test_one_interrupt_saves_whenever_it_comes(whole, tiny_config, tmp_path, monkeypatch, moment):
    with monkeypatch.context() as patch:
        expected = moment(patch, 1)
        result = loop.fit(tiny_config(SMALL), tmp_path / "run", progress=False)
    assert not result.complete and result.step == expected
    assert checksums.is_whole(tmp_path / "run", result.step)
    assert_goes_on(tmp_path / "run", whole, tiny_config(SMALL))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_second_interrupt_ends_it_with_a_sentence(
    whole, tiny_config, tiny_arguments, tmp_path, monkeypatch, capsys, moment
):
    before = signal.getsignal(signal.SIGINT)
    arguments = [*tiny_arguments(SMALL), f"--workdir={tmp_path / 'run'}", "--progress=off"]
    with monkeypatch.context() as patch:
        moment(patch, 2)
        patch.setattr(sys, "argv", ["train", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run(train.main)
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 130 and said[-1].startswith("error: interrupted")
    assert signal.getsignal(signal.SIGINT) is before
    assert_goes_on(tmp_path / "run", whole, tiny_config(SMALL))


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_command_says_so_at_once_and_is_no_success(
    tiny_arguments, tmp_path, monkeypatch, capsys, moment
):
    arguments = [*tiny_arguments(SMALL), f"--workdir={tmp_path / 'run'}", "--progress=off"]
    with monkeypatch.context() as patch:
        moment(patch, 1)
        assert train.main(arguments) == 130
    said = capsys.readouterr()
    assert said.err.count("SIGINT: ") == 1 and "To go on: " in said.out


def test_an_interrupt_after_the_last_step_leaves_a_complete_run(
    tiny_arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(checksums, "note", interrupting(checksums.note, 1, 3))
    arguments = [*tiny_arguments(SMALL), f"--workdir={tmp_path / 'run'}", "--progress=off"]
    assert train.main(arguments) == 0
    assert rundir.is_finished(tmp_path / "run", 8) and "SIGINT: " in capsys.readouterr().err


@pytest.mark.parametrize("value", ["optimizer.learning_rate=-1", "mesh.data=3", "keep=0"])
def test_nothing_is_announced_before_it_is_sure_to_begin(tiny_arguments, tmp_path, capsys, value):
    arguments = [*tiny_arguments(SMALL), f"--workdir={tmp_path / 'run'}", f"--config.{value}"]
    with pytest.raises(InputError):
        train.main(arguments)
    assert not capsys.readouterr().out and not (tmp_path / "run" / "config.json").exists()


def remove(workdir: Path) -> None:
    shutil.rmtree(workdir)


def move(workdir: Path) -> None:
    workdir.rename(workdir.with_name("moved"))


def remove_rows(workdir: Path) -> None:
    (workdir / "metrics.jsonl").unlink()


@pytest.mark.parametrize("loss", [remove, move, remove_rows])
def test_a_folder_that_goes_while_it_trains_ends_the_run(
    whole, tiny_config, tmp_path, loss, monkeypatch, capsys
):
    """Before it trains on into what nobody will find; the same command then begins, or goes on."""
    workdir = tmp_path / "run"

    def lose(step: int) -> None:
        if step == 5:
            while not (workdir / "checkpoints" / "4").is_dir():
                time.sleep(0.01)
            loss(workdir)

    with pytest.raises(RunError, match=r"run.*the same command again"):
        loop.fit(tiny_config(SMALL), workdir, progress=False, on_step=lose)
    kept = workdir.with_name("moved") if loss is move else workdir
    assert loop.fit(tiny_config(SMALL), kept, progress=False).complete
    assert_same_checkpoint(read_checkpoint(kept), read_checkpoint(whole))


def test_a_clock_that_is_set_back_changes_nothing(whole, tiny_config, tmp_path, monkeypatch):
    now, back = time.time, 0.0

    def set_back(step: int) -> None:
        nonlocal back
        if step in (3, 7):
            back += 10**8

    monkeypatch.setattr(time, "time", lambda: now() - back)
    monkeypatch.setattr(time, "time_ns", lambda: int((now() - back) * 1e9))

    def stop(step: int) -> None:
        set_back(step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    assert loop.fit(tiny_config(SMALL), tmp_path / "run", progress=False, on_step=stop).step == 5
    back += 10**8
    assert_goes_on(tmp_path / "run", whole, tiny_config(SMALL))
    seconds = [row["seconds"] for row in metrics.read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert seconds == sorted(seconds) and min(seconds) >= 0


def test_what_the_system_refuses_ends_a_command_with_a_sentence(monkeypatch, capsys):
    def refused(_):
        raise OSError(30, "Read-only file system", "/x/y")

    with pytest.raises(SystemExit) as ended:
        cli.run(refused)
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 1 and len(said) == 1
    assert said[0].startswith("error: ") and "/x/y" in said[0]
