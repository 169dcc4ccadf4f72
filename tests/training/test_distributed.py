"""Two processes, each with half of every batch, train what one process trains; one process goes on
with their checkpoint.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from quweit_jax.training import loop, metrics
from tests.conftest import REPOSITORY, read_checkpoint

VALUES = {"model.layers": 1, "mesh.data": 2, "log_every": 1, "checkpoint_every": 10}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(arguments: list[str], workdir: Path, count: int) -> list[subprocess.Popen]:
    """A training command on each of `count` processes of one CPU device."""
    shared = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    command = [sys.executable, "-m", "quweit_jax.train", *arguments, f"--workdir={workdir}"]
    return [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | shared | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


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
    rows = tmp_path / "run" / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size) and all(
        process.poll() is None for process in processes
    ):
        try:
            processes[0].wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    step = read_checkpoint(tmp_path / "run")["step"]
    assert 1 <= step < 100_000
    assert (
        f"stopped at step {step} of 100000, saved. To go on: python -m quweit_jax.train --workdir="
        in outputs[0][0]
    )
