"""Sweeps: points and their errors, a sweep killed half-way that ends with the table of one left
alone, and what fails.
"""

import functools
import os
import signal
import subprocess
import sys
import time

import pytest

from quweit_jax.commands import sweep
from quweit_jax.errors import InputError
from quweit_jax.training import files
from tests.conftest import REPOSITORY

EXPERIMENT = """
from experiments.configs import dwn_digits
from quweit_jax.config import parse_argument
from quweit_jax.training.defaults import with_shortcuts


def get_config(argument=None):
    config = dwn_digits.get_config(None)
    with config.unlocked():
        config.steps, config.eval_every, config.checkpoint_every, config.log_every = 60, 20, 20, 10
        config.mesh.data = 1
    return with_shortcuts(config, parse_argument(argument, ("small",), "small")[1])


def sweep(add):
"""
GOOD = """\
    for luts in (20, 40):
        for seed in (0, 1):
            add({'seed': seed}, luts=luts)
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))

    def write(points=GOOD):
        path = tmp_path / "experiment.py"
        path.write_text(EXPERIMENT + points)
        return path

    return write


def command(file, root, *extra):
    return [
        sys.executable,
        "-m",
        "quweit_jax.sweep",
        f"--config={file}",
        f"--workdir={root}",
        *extra,
    ]


def environment():
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(REPOSITORY),
    }


def test_points(experiment, tmp_path):
    points = sweep.enumerate_points(
        f"{experiment()}:small,steps=7", tmp_path / "sweep", {"optimizer.clip": "0.5"}
    )
    assert [p.name for p in points] == [
        f"seed={seed},luts={luts}" for luts in (20, 40) for seed in (0, 1)
    ]
    assert (
        points[2].config.steps == 7
        and points[2].config.seed == 0
        and points[2].config.optimizer.clip == 0.5
    )
    assert (
        points[2]
        .line()
        .endswith(f"--workdir={points[2].workdir} --progress=off --config.optimizer.clip=0.5")
    )
    assert all(sweep.result_of(point) == {"state": "new", "step": 0} for point in points)


def test_print_only_says_the_commands(experiment, tmp_path, capsys):
    assert (
        sweep.main([f"--config={experiment()}", f"--workdir={tmp_path / 'sweep'}", "--print"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 4
        and all("-m quweit_jax.train --config=" in line for line in lines)
        and not (tmp_path / "sweep").exists()
    )


@pytest.mark.parametrize(
    "points, said",
    [
        ("    pass\n", "sweep.add. added no point"),
        ("    add(seed=1)\n    add(seed=1)\n", "added a point twice: seed=1; give each"),
        ("    add(sede=1)\n", "unknown key 'sede'.*seed"),
        ("    add(seed='1,2')\n", "a value may hold no comma, found seed=1,2"),
        ("    add(steps='many')\n", "expected a whole number"),
        ("    pass\ndel sweep\n", "has no sweep.add.; define one"),
    ],
)
def test_errors_before_anything_starts(experiment, tmp_path, points, said):
    with pytest.raises(InputError, match=said):
        sweep.main([f"--config={experiment(points)}", f"--workdir={tmp_path / 'sweep'}"])
    assert not (tmp_path / "sweep").exists()


def test_killed_half_way_ends_with_the_same_table(experiment, tmp_path):
    """kill -9 once two of four are finished; its runs end with it, and the same command goes on to
    the table of a sweep left alone.
    """
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    file = experiment()
    subprocess.run(
        command(file, alone, "--workers=2"),
        env=environment(),
        check=True,
        capture_output=True,
        timeout=300,
    )
    process = subprocess.Popen(
        command(file, killed, "--workers=2"), env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    finished = 0
    for line in process.stdout:
        finished += line.startswith("finished:")
        if finished == 2:
            time.sleep(1)
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    again = subprocess.run(
        command(file, killed, "--workers=2"),
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout
    begun = [
        line.removeprefix("begun: ") for line in again.splitlines() if line.startswith("begun:")
    ]
    assert (
        "4 points, 2 finished already" in again
        and len(begun) == 2
        and "4 of 4 points finished" in again
    )
    for name in ("sweep.md", "sweep.csv"):
        assert (killed / name).read_text() == (alone / name).read_text()
    assert (alone / "sweep.md").read_text().count("finished") == 4


def test_a_failing_point_does_not_stop_the_others(experiment, tmp_path):
    file = experiment("    add({'mesh.data': 3})\n    add(seed=1)\n")
    done = subprocess.run(
        command(file, tmp_path / "sweep"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    table = (tmp_path / "sweep" / "sweep.md").read_text().splitlines()
    assert done.returncode == 1 and "failed: mesh.data=3: error: mesh" in done.stdout
    assert (
        "| failed |" in table[2]
        and "| finished |" in table[3]
        and "1 of 2 points finished" in done.stdout
    )


@pytest.mark.parametrize(
    "point", ["3", "'seed'", "[('seed', 1)]", "{'data.path': '\\ud800'}", "seed=-1", "seed=10**40"]
)
def test_a_point_that_cannot_be_trained_is_refused_before_any_is_begun(experiment, tmp_path, point):
    file = experiment(f"    add(seed=0)\n    add({point})\n")
    with pytest.raises(InputError, match=r"sweep\(add\)|seed: expected"):
        sweep.main([f"--config={file}", f"--workdir={tmp_path / 'sweep'}"])
    assert not (tmp_path / "sweep").exists()


def test_a_second_sweep_of_a_folder_waits_its_turn_or_is_refused(experiment, tmp_path, monkeypatch):
    """It would take the points that the first one trains for failed, and write so."""
    root = tmp_path / "sweep"
    root.mkdir()
    soon = functools.partial(files.exclusive, patience=0.1)
    with files.exclusive(root):
        monkeypatch.setattr(files, "exclusive", soon)
        with pytest.raises(InputError, match="another process"):
            sweep.main([f"--config={experiment()}", f"--workdir={root}"])
    assert [path.name for path in root.iterdir()] == [files.LOCK]
