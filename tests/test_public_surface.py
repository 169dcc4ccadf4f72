"""`import quweit_jax as qj`: quick, and everything it lists is there; dependencies are what the
code says they are.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import quweit_jax as qj
from quweit_jax import errors
from quweit_jax.commands import cli
from tests.conftest import REPOSITORY

SOURCE = Path(qj.__file__).read_text(encoding="utf-8")
CORE = {"absl-py", "flax", "jax", "jaxtyping", "ml-collections", "numpy", "optax"}


@pytest.mark.parametrize("name", qj.__all__)
def test_every_name_is_there(name):
    assert getattr(qj, name) is getattr(qj, name) is not None
    assert name in dir(qj)


def test_what_a_notebook_needs():
    needed = "WeightlessBlock LUTLayer BitLinear BitGLU MLGRU GroupSum SwiGLU lut_lookup build pack"
    needed += " pretrained keep_tables_in_range count InputError RunError __version__"
    assert set(needed.split()) <= set(qj.__all__) and callable(qj.pretrained.load)
    with pytest.raises(AttributeError, match="'quweit_jax' has no attribute 'WeightlesBlock'"):
        _ = qj.WeightlesBlock  # pyright: ignore[reportAttributeAccessIssue]


def test_editors_see_the_same_names():
    (block,) = (node for node in ast.parse(SOURCE).body if isinstance(node, ast.If))
    imported = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported.keys() | {"__version__"} == set(qj.__all__)
    assert all(
        module == f"quweit_jax.{qj._HOME[name]}" if name in qj._HOME else module == "quweit_jax"
        for name, module in imported.items()
    )


def test_every_name_is_documented():
    page = (REPOSITORY / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    listed = {
        name
        for row in page.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`qj\.(\w+)`", row.split("|")[1])
    }
    assert listed == set(qj.__all__)


def modules_of(code: str) -> set[str]:
    """The packages that running this code imports, in a fresh interpreter."""
    tail = "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code + tail]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_importing_it_is_quick():
    loaded = modules_of("import quweit_jax; dir(quweit_jax)")
    assert "quweit_jax" in loaded
    assert not loaded & {"jax", "flax", "numpy", "optax", "tensorflow", "orbax", *errors.EXTRAS}


def test_the_core_does_without_the_extras():
    """Layers, models, ops, costs, packing and the optimizers import nothing that the core lacks."""
    rooms = "layers.weightless models costs.count deploy.pack training.optimizers pretrained"
    code = "\n".join(f"import quweit_jax.{name}" for name in rooms.split())
    missing = sorted(set(errors.EXTRAS) - {"scipy", "filelock"})  # what the core needs has these
    blocked = f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
    assert "jax" in modules_of(blocked + code)


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=~ ]", requirement)[0]


def test_requirements_are_those_of_pyproject():
    """requirements.txt is the core and the extra `all`, with the same versions."""
    extras = project()["optional-dependencies"]
    assert {name_of(line) for line in project()["dependencies"]} == CORE
    inside = re.fullmatch(r"quweit_jax\[(.*)\]", extras["all"][0])
    assert inside
    everything = {*project()["dependencies"], *extras["all"][1:]}
    for name in inside[1].split(","):
        everything |= set(extras[name])
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    assert sorted(everything) == sorted(found), "copy pyproject.toml's lines"
    versions = {line for lines in extras.values() for line in lines} | everything
    names = [name_of(line) for line in versions if name_of(line) not in ("quweit_jax", "jax")]
    assert len(set(names)) == len(names), "one version for each package"


def test_a_missing_package_names_its_extra(monkeypatch):
    assert set(errors.EXTRAS.values()) <= project()["optional-dependencies"].keys()
    for package, extra in errors.EXTRAS.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            errors.InputError,
            match=rf"expected the package {package} for this, found none; pip install "
            rf"'quweit_jax\[{extra}\]'",
        ):
            errors.require(package, "for this")
    assert errors.require("json", "for this").dumps({}) == "{}"


def test_a_command_names_the_extra_it_lacks(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "grain", None)

    def main(argv):
        import grain  # noqa: F401

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 2
    assert "error: expected the package grain for this command" in capsys.readouterr().err
