"""Two processes, each with half of every batch, train what one process trains; one process goes on
with their checkpoint.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from quweit_jax.training import loop, metrics
from tests.conftest import REPOSITORY, read_checkpoint, write_text

VALUES = {"model.layers": 1, "mesh.data": 2, "log_every": 1, "checkpoint_every": 10}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(
    arguments: list[str],
    workdir: Path,
    count: int,
    apart: bool = False,
    folders: Sequence[Path] = (REPOSITORY, REPOSITORY),
) -> list[subprocess.Popen]:
    """A training command on each of `count` processes of one CPU device.

    apart: each with a folder of its own in place of `workdir`. folders: where each is started.
    """
    shared = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    command = [sys.executable, "-m", "quweit_jax.train", *arguments]
    workdirs = [workdir / str(i) if apart else workdir for i in range(count)]
    return [
        subprocess.Popen(
            [*command, f"--workdir={workdirs[i]}"],
            cwd=folders[i],
            env=os.environ | shared | {"JAX_PROCESS_ID": str(i), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def wait_for_rows(workdir: Path, processes: list[subprocess.Popen]) -> None:
    """Until the first row is written, or a process has ended."""
    rows = workdir / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size) and all(
        process.poll() is None for process in processes
    ):
        try:
            processes[0].wait(0.05)
        except subprocess.TimeoutExpired:
            continue


def losses(workdir: Path) -> dict[tuple[int, str], float]:
    return {
        (row["step"], row["split"]): row["loss"]
        for row in metrics.read_rows(workdir / "metrics.jsonl")
    }


def test_two_processes_train_what_one_does(tiny_config, tiny_arguments, tmp_path):
    processes = start(tiny_arguments(VALUES), tmp_path / "two", 2)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "step 20: validation loss" in outputs[0][0] and "step" not in outputs[1][0], (
        "only the first process speaks"
    )

    loop.fit(tiny_config(VALUES | {"mesh.data": 1}), tmp_path / "one")
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert two.keys() == one.keys() and len(one) == 22
    np.testing.assert_allclose(list(two.values()), list(one.values()), atol=1e-5)
    found, expected = read_checkpoint(tmp_path / "two"), read_checkpoint(tmp_path / "one")
    assert found.keys() == expected.keys() and found["data"] == expected["data"]
    for name in expected:
        if name.startswith("state/params"):
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)

    # Halfway, as if it had ended there: what two processes wrote, one goes on with.
    halfway = tmp_path / "two" / "checkpoints" / "20"
    halfway.rename(tmp_path / "twenty")
    result = loop.fit(tiny_config(VALUES | {"mesh.data": 1}), tmp_path / "two")
    assert (result.step, result.complete) == (20, True)
    after = losses(tmp_path / "two")
    assert after.keys() == one.keys()
    np.testing.assert_allclose(list(after.values()), list(one.values()), atol=1e-5)


def test_processes_stop_together(tiny_arguments, tmp_path):
    """A scheduler's SIGTERM may reach one process first; they agree on the step to stop at, and
    save.
    """
    processes = start(
        tiny_arguments(
            VALUES | {"steps": 100_000, "checkpoint_every": 100_000, "eval_every": 100_000}
        ),
        tmp_path / "run",
        2,
    )
    wait_for_rows(tmp_path / "run", processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "SIGTERM: all processes save step" in outputs[0][1], (
        "JAX's notice, not that of log_every"
    )
    step = read_checkpoint(tmp_path / "run")["step"]
    assert 1 <= step < 100_000
    assert (
        f"stopped at step {step} of 100000, saved. To go on: python -m quweit_jax.train --workdir="
        in outputs[0][0]
    )


def test_folders_that_are_not_shared_are_told_by_every_process(tiny_arguments, tmp_path):
    processes = start(tiny_arguments(VALUES), tmp_path, 2, apart=True)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    said = [
        next(line for line in text.splitlines() if line.startswith("error: "))
        for _, text in outputs
    ]
    assert said[0].replace(f"{tmp_path}/0", f"{tmp_path}/1") == said[1]
    assert said[0].startswith("error: --workdir: process 1 of 2 does not see at ")
    assert not (tmp_path / "1").exists()
    assert [path.name for path in (tmp_path / "0").iterdir()] in ([], [".lock"])


def test_what_one_process_lacks_ends_all(tiny_arguments, tmp_path):
    """The second one's data are missing; the first one's folder is left as it is."""
    (tmp_path / "here").mkdir()
    write_text(tmp_path / "here" / "text.txt")
    values = VALUES | {"data.path": "text.txt"}
    processes = start(
        tiny_arguments(values), tmp_path / "run", 2, folders=(tmp_path / "here", tmp_path)
    )
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert all("error: data.path: no file at text.txt" in text for _, text in outputs)
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_killed_ends_the_other(tiny_arguments, tmp_path):
    values = VALUES | {"steps": 100_000, "checkpoint_every": 100_000, "eval_every": 100_000}
    processes = start(tiny_arguments(values), tmp_path / "run", 2)
    wait_for_rows(tmp_path / "run", processes)
    processes[1].kill()
    _, said = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1, said
    assert "error: another process of this run has died" in said and "Traceback" not in said
    processes[1].communicate()


WAITS = """
import sys, time
from quweit_jax.training import hosts
hosts.join(sys.argv[1], 2, int(sys.argv[2]))
print("joined", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize(("silent", "other"), [(1, 0), (0, 1)])
def test_a_process_that_falls_silent_ends_the_others(silent, other, monkeypatch):
    """Stopped, not killed: no connection breaks. Of process 0 all others hear of each other."""
    monkeypatch.setenv("QUWEIT_HEARTBEAT_TIMEOUT", "6")
    command = [sys.executable, "-c", WAITS, f"localhost:{free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(i)], cwd=REPOSITORY, **pipes) for i in range(2)]
    try:
        for process in processes:
            assert process.stdout.readline() == "joined\n"
        processes[silent].send_signal(signal.SIGSTOP)
        _, said = processes[other].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
        processes[silent].communicate()
    assert processes[other].returncode == 1, said
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    assert f"reached (process {silent} was silent for 6 s); see what it said last" in error
