"""`python -m quweit_jax COMMAND`: every command is there, and a wrong one is named."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import quweit_jax
from quweit_jax import __main__
from quweit_jax.errors import InputError
from tests.conftest import REPOSITORY

PACKAGE = Path(quweit_jax.__file__).parent
# The spellings of commands as modules of their own, and what they are short for.
DOORS = {
    "aot": "compile_tpu",
    "costs": "costs",
    "evaluate": "evaluate",
    "export_model": "export",
    "generate": "generate",
    "report": "report",
    "sweep": "sweep",
    "train": "train",
}


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_without_a_command_it_lists_them(arguments, capsys):
    assert __main__.command(arguments) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in __main__.COMMANDS)


def test_the_list_is_that_of_the_commands_there_are():
    there = {path.stem for path in (PACKAGE / "commands").glob("*.py")} - {
        "__init__",
        "cli",
        "export_block",
        "export_gguf",
        "export_hardware",
        "opening",
        "slurm",
    }
    assert there == set(__main__.COMMANDS)


@pytest.mark.parametrize("name", ["trane", "", "cli", "__init__", "--workdir=x"])
def test_a_wrong_command_is_named(name):
    with pytest.raises(InputError, match=f"found '{name}'"):
        __main__.command([name])


def test_the_nearest_command_is_named():
    with pytest.raises(InputError, match="Did you mean 'train'"):
        __main__.command(["trane"])


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_every_command_tells_its_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quweit", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m quweit_jax {name} ")


@pytest.mark.parametrize("door", DOORS)
def test_older_spellings_are_the_same_commands(door, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [door, "--help"])
    monkeypatch.delitem(sys.modules, f"quweit_jax.{door}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"quweit_jax.{door}", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m quweit_jax {DOORS[door]} ")


def test_a_mistake_is_a_sentence_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quweit", "trane"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.err.startswith("error: ") and not said.out


def test_the_list_is_given_without_importing_jax():
    code = (
        "import sys; from quweit_jax.__main__ import command; command([]); "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("training.loop", "tqdm", "train"),
        ("training.checkpoints", "orbax", "train"),
        ("data.pipeline", "grain", "train"),
        ("data.images", "PIL", "data"),
        ("report.page", "jinja2", "report"),
        ("report.insight", "scipy", "report"),
    ],
)
def test_a_notebook_is_told_the_extra_it_lacks(module, package, extra):
    """And may still catch it as the ImportError it is."""
    code = f"import sys; sys.modules[{package!r}] = None\ntry: import quweit_jax.{module}\n"
    code += "except ImportError as error: print(type(error).__name__, error)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("MissingPackageError") and package in done.stdout
    assert f"quweit_jax[{extra}]" in done.stdout


@pytest.mark.parametrize("command", ["train", "costs", "sweep"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{}"),
        ("a.py", "def get_config(:"),
        ("b.py", "def get_config(_): return {}"),
        ("c.py", "get_config = 3"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(tmp_path, command, name, content):
    (tmp_path / name).write_text(content)
    options = [f"--config={tmp_path / name}"]
    options += [f"--workdir={tmp_path / 'run'}"] * (command != "costs")
    with pytest.raises(InputError, match=name):
        __main__.command([command, *options])
    assert not (tmp_path / "run").exists()
