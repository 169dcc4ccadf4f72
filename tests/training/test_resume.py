"""A run that is killed, stopped, damaged or out of disk goes on exactly where an uninterrupted one
would be.

'Exactly' is bit for bit: parameters, optimizer, averages, random key and the data iterator's place,
and every row of metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from quweit_jax.commands import cli, train
from quweit_jax.errors import RunError
from quweit_jax.training import loop, metrics, rundir, sharding, state
from quweit_jax.training.checkpoints import Checkpoints
from quweit_jax.training.setup import Setup, assemble
from tests.conftest import REPOSITORY, assert_same_checkpoint, read_checkpoint

SMALL = {"model.layers": 1, "log_every": 1, "keep": 3, "optimizer.ema": 0.9}
# Long enough to be killed several times, in the middle of saving too.
LONG = SMALL | {"model.dropout": 0.1, "steps": 60, "eval_every": 20, "checkpoint_every": 4}


def losses(workdir: Path) -> dict[tuple[int, str], float]:
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    found = {(row["step"], row["split"]): row["loss"] for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


def start(arguments: list[str], workdir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "quweit_jax.train", *arguments, f"--workdir={workdir}"]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Returns once the run has written a row of `step` or later."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        rows = path.read_bytes().split(b"\n") if path.exists() else []
        if len(rows) > 1 and int(rows[-2].split(b'"step": ')[1].split(b",")[0]) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended before step {step}: {process.communicate()}")


@pytest.fixture(scope="module")
def uninterrupted(tiny_arguments, tmp_path_factory) -> Path:
    """The long run, in a process of its own as the interrupted ones are."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(start(tiny_arguments(LONG), workdir))
    return workdir


def test_killed_run_ends_like_an_uninterrupted_one(uninterrupted, tiny_arguments, tmp_path):
    workdir, draw, reached = tmp_path / "run", random.Random(0), 0
    for _ in range(3):
        process = start(tiny_arguments(LONG), workdir)
        wait_for_step(process, workdir, reached + draw.randint(4, 12))
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        reached = max((s for s, _ in losses(workdir)), default=0)
    finish(start(tiny_arguments(LONG), workdir))
    assert_same_checkpoint(read_checkpoint(workdir), read_checkpoint(uninterrupted))
    assert losses(workdir) == losses(uninterrupted)
    assert not list((workdir / "checkpoints").glob("*tmp*")), (
        "what a kill left half written is cleaned up"
    )


def test_sigterm_saves_and_says_how_to_go_on(uninterrupted, tiny_arguments, tmp_path):
    workdir = tmp_path / "run"
    process = start(tiny_arguments(LONG), workdir)
    wait_for_step(process, workdir, 9)
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process)
    stopped = read_checkpoint(workdir)["step"]
    assert 9 <= stopped < 60
    assert (
        f"stopped at step {stopped} of 60, saved. To go on: python -m quweit_jax.train "
        f"--workdir={workdir}" in out
    )
    again = shlex.split(out.split("To go on: python ")[1].splitlines()[0])
    finish(
        subprocess.Popen(
            [sys.executable, *again],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    assert_same_checkpoint(read_checkpoint(workdir), read_checkpoint(uninterrupted))
    assert losses(workdir) == losses(uninterrupted)


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory) -> Path:
    """A finished run in this process, with checkpoints of steps 10, 15 and 20."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    loop.fit(tiny_config(SMALL), workdir)
    return workdir


def stop_at(step: int):
    """An `on_step` that asks for a stop as a scheduler does."""
    return lambda k: os.kill(os.getpid(), signal.SIGTERM) if k == step else None


def test_signals_are_handled_only_while_training(whole, tiny_config, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    result = loop.fit(tiny_config(SMALL), tmp_path / "run", on_step=stop_at(3))
    assert (result.step, result.complete) == (3, False)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert loop.fit(tiny_config(SMALL), tmp_path / "run").complete
    assert_same_checkpoint(read_checkpoint(tmp_path / "run"), read_checkpoint(whole))


def test_goes_on_with_other_numbers_of_devices(whole, tiny_config, tmp_path):
    workdir = tmp_path / "run"
    for shape, stop in (((2, 2, 2), 7), ((1, 2, 1), 13), ((1, 1, 1), None)):
        mesh = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), shape))
        result = loop.fit(
            tiny_config(SMALL | mesh), workdir, on_step=stop_at(stop) if stop else None
        )
        devices = {d for x in jax.tree.leaves(result.state) for d in x.sharding.device_set}
        assert len(devices) == np.prod(shape)
    expected = losses(whole)
    found = losses(workdir)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-4)


def wait_for_checkpoint(workdir: Path, step: int) -> None:
    """Saving goes on in the background; returns once it is done."""
    while not (workdir / "checkpoints" / str(step)).is_dir():
        time.sleep(0.01)


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder: Path) -> None:
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder: Path) -> None:
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def delete(folder: Path) -> None:
    largest_file(folder).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, r"has \d+ bytes instead of \d+"),
        (flip, "the content of .* has changed"),
        (delete, "is missing"),
    ],
)
def test_damaged_newest_checkpoint_falls_back(whole, tiny_config, tmp_path, caplog, damage, said):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    damage(workdir / "checkpoints" / "20")
    result = loop.fit(tiny_config(SMALL), workdir)
    assert result.complete
    text = " ".join(caplog.messages)
    assert "the checkpoint of step 20 is damaged" in text and "trying the one before" in text
    assert re.search(said, text)
    assert (workdir / "damaged" / "20").is_dir()
    assert_same_checkpoint(read_checkpoint(workdir), read_checkpoint(whole))
    assert losses(workdir) == losses(whole)


@pytest.fixture
def collected() -> Iterator[None]:
    """What a failed save or load leaves behind is finalised within the test that made it."""
    yield
    gc.collect()


def orbax_gives_up(test):
    """Orbax's own event loops and coroutines complain from their finalisers, now and then, when a
    save or a load under them fails.
    """
    warnings = (
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore::pytest.PytestUnhandledThreadExceptionWarning",
    )
    return pytest.mark.filterwarnings(*warnings)(pytest.mark.usefixtures("collected")(test))


@orbax_gives_up
def test_a_checkpoint_without_checksums_is_tried(whole, tiny_config, tmp_path, caplog):
    """A kill can come between a save and its checksums: a good one is used, a bad one noticed when
    it is loaded.
    """
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "checksums" / "20.json").unlink()
    assert loop.fit(tiny_config(SMALL), workdir).complete and not caplog.messages
    truncate(workdir / "checkpoints" / "20" / "state")
    assert loop.fit(tiny_config(SMALL), workdir).complete
    assert "the checkpoint of step 20 is damaged" in " ".join(caplog.messages)
    assert_same_checkpoint(read_checkpoint(workdir), read_checkpoint(whole))


def test_all_checkpoints_damaged(whole, tiny_config, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for folder in (workdir / "checkpoints").iterdir():
        truncate(folder)
    with pytest.raises(
        RunError,
        match=r"every checkpoint in .*checkpoints is damaged \(10, 15, 20\); start again in a new "
        r"--workdir",
    ):
        loop.fit(tiny_config(SMALL), workdir)


def test_damaged_checkpoint_asked_for(whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    flip(workdir / "checkpoints" / "15")
    with pytest.raises(
        RunError,
        match=r"the checkpoint of step 15 is damaged .*there are also 10, 20; choose one with "
        r"--step",
    ):
        rundir.open_run(workdir, 15)
    assert rundir.open_run(workdir, 10).step == 10
    assert (workdir / "checkpoints" / "15").is_dir(), "reading moves nothing"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 4 MB on `folder`."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@orbax_gives_up
@pytest.mark.skipif(not shutil.which("mount"), reason="needs mount")
def test_full_disk_keeps_the_checkpoint_before(whole, tiny_config, tmp_path):
    with small_disk(tmp_path / "disk"):
        workdir, ballast = tmp_path / "disk" / "run", tmp_path / "disk" / "ballast"

        def fill(step: int) -> None:
            if step == 12:
                wait_for_checkpoint(workdir, 10)
                free = shutil.disk_usage(tmp_path / "disk").free
                ballast.write_bytes(b"x" * (free - 30_000))

        with pytest.raises(
            RunError,
            match=r"the checkpoint of step 15 could not be written .*the checkpoint of step 10 is "
            r"whole. Free some space",
        ):
            loop.fit(tiny_config(SMALL), workdir, on_step=fill)
        assert rundir.open_run(workdir, 10).step == 10
        ballast.unlink()
        assert loop.fit(tiny_config(SMALL), workdir).complete
        assert_same_checkpoint(read_checkpoint(workdir), read_checkpoint(whole))
        assert losses(workdir) == losses(whole)


@orbax_gives_up
def test_refused_writes_keep_the_checkpoint_before(whole, tiny_config, tmp_path):
    """The same where nothing may be mounted: a limit on the size of files, which the large one of a
    checkpoint exceeds.
    """
    workdir, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(step: int) -> None:
        if step == 12:
            wait_for_checkpoint(workdir, 10)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.raises(
            RunError,
            match=r"the checkpoint of step 15 could not be written .*the checkpoint of step 10 is "
            r"whole",
        ):
            loop.fit(tiny_config(SMALL), workdir, on_step=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert loop.fit(tiny_config(SMALL), workdir).complete
    assert_same_checkpoint(read_checkpoint(workdir), read_checkpoint(whole))


def test_rows_that_cannot_be_written_end_the_run(whole, tiny_config, tmp_path, monkeypatch):
    write = metrics.MetricsWriter.write

    def full(self, row):
        if row["step"] == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, row)

    monkeypatch.setattr(metrics.MetricsWriter, "write", full)
    with pytest.raises(
        RunError,
        match=r"cannot go on in .*run \(No space left on device\); the checkpoint of step 10 is "
        r"whole. Free some space",
    ):
        loop.fit(tiny_config(SMALL), tmp_path / "run")
    monkeypatch.undo()
    assert loop.fit(tiny_config(SMALL), tmp_path / "run").complete
    assert_same_checkpoint(read_checkpoint(tmp_path / "run"), read_checkpoint(whole))
    assert losses(tmp_path / "run") == losses(whole)


def test_loss_that_is_not_finite_stops_the_run(whole, tiny_config, tmp_path, monkeypatch):
    make = state.make_train_step

    def poisoned(*args, **kwargs):
        step = make(*args, **kwargs)

        def poison(path, leaf):
            return leaf * np.nan if path[-1].key == "tables" else leaf

        def one(current, batch):
            if int(current.step) == 11:
                current = current.replace(
                    params=jax.tree_util.tree_map_with_path(poison, current.params)
                )
            return step(current, batch)

        return one

    monkeypatch.setattr(state, "make_train_step", poisoned)
    workdir = tmp_path / "run"
    with pytest.raises(
        RunError,
        match=r"step 12: .* not finite in the parameter group\(s\) .*Nothing of it was saved; the "
        r"last good .* step 10",
    ):
        loop.fit(tiny_config(SMALL), workdir)
    assert max(s for s, _ in losses(workdir)) == 11
    monkeypatch.undo()
    assert loop.fit(tiny_config(SMALL), workdir).complete
    assert_same_checkpoint(read_checkpoint(workdir), read_checkpoint(whole))


def test_absurd_learning_rate_ends_the_command_with_status_1(
    tiny_arguments, tmp_path, monkeypatch, capsys
):
    """The loss and gradients of step 1 are fine, its update isn't: nothing of it may reach a
    checkpoint.
    """
    arguments = tiny_arguments(
        SMALL
        | {
            "optimizer.learning_rate": 1e30,
            "optimizer.warmup": 0,
            "checkpoint_every": 1,
            "eval_every": 1,
        }
    )
    monkeypatch.setattr(sys, "argv", ["train", *arguments, f"--workdir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as exit:
        cli.run(train.main)
    assert exit.value.code == 1
    error = capsys.readouterr().err
    assert (
        "error: step 1: " in error and "decay" in error and "there was no checkpoint yet" in error
    )
    assert "--config.optimizer.learning_rate" in error and "Traceback" not in error
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def first_batches(parts: Setup, count: int) -> list:
    examples = [parts.data.train[i] for i in range(count * 8)]
    batches = [
        {k: np.stack([e[k] for e in examples[i * 8 : i * 8 + 8]]) for k in ("inputs", "targets")}
        for i in range(count)
    ]
    return [sharding.put_batch(b, sharding.batch_sharding(parts.mesh)) for b in batches]


def test_ema_is_the_moving_average_of_the_parameters(tiny_config):
    parts = assemble(tiny_config(SMALL))
    current = parts.init_state()
    expected = jax.device_get(current.params)
    step = state.make_train_step(parts.model, parts.optimizer, ema=0.9)
    for batch in first_batches(parts, 3):
        current, _ = step(current, batch)
        expected = jax.tree.map(
            lambda a, p: 0.9 * a + 0.1 * np.asarray(p), expected, jax.device_get(current.params)
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        jax.device_get(current.ema),
        expected,
    )
    difference = jax.tree.map(lambda a, p: float(abs(a - p).max()), current.ema, current.params)
    assert max(jax.tree.leaves(difference)) > 1e-4, "the average is not the parameters themselves"
    assert (
        current.variables()["params"] is current.ema
        and current.variables(averaged=False)["params"] is current.params
    )


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny_config):
    parts = assemble(tiny_config(SMALL))
    (batch,) = first_batches(parts, 1)
    sgd, found = optax.sgd(1.0), []  # Adam would divide rounding errors by themselves
    init = state.make_init(parts.model, sgd, 0, ema=False)
    for accumulate in (1, 4):
        first = state.init_state(init, parts.init_inputs, parts.mesh)
        found.append(state.make_train_step(parts.model, sgd, grad_accum=accumulate)(first, batch))
    (whole_state, whole_metrics), (parts_state, parts_metrics) = jax.device_get(found)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        parts_state.params,
        whole_state.params,
    )
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(parts_metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_newest_and_the_best_checkpoints_are_kept(tiny_config, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(
        loop, "evaluate", lambda *_: {"loss": next(scores), "accuracy": 0.0, "count": 1.0}
    )
    loop.fit(tiny_config(SMALL | {"eval_every": 5, "keep": 1}), tmp_path / "run")
    saved = Checkpoints(tmp_path / "run", read_only=True)
    assert saved.steps() == [10, 20]
    assert saved.best_step() == 10
    assert {p.stem for p in (tmp_path / "run" / "checksums").iterdir()} == {"10", "20"}
    assert rundir.open_run(tmp_path / "run").step == 10
