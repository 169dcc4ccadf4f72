"""The house keeps its shape: imports only point down, and files stay short."""

import ast
from pathlib import Path

import pytest

import quweit_jax

PACKAGE = Path(quweit_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# What each room may import of ours, besides itself: what lies below it. `data` is for whoever reads
# examples, but knows no model; costs and deploy see no training.
GROUND = {"errors", "config", "reading"}
MODELS = {*GROUND, "ops", "layers", "models"}
BELOW = {
    "errors": set(),
    "config": {"errors", "reading"},
    "reading": {"errors"},
    "ops": {"errors"},
    "data": GROUND,
    "layers": {"errors", "ops"},
    "models": {*GROUND, "ops", "layers"},
    **{room: {*MODELS, "data"} for room in ("costs", "deploy", "pretrained", "training")},
    "report": {*MODELS, "data", "costs", "deploy", "pretrained", "training"},
    "commands": {*MODELS, "data", "costs", "deploy", "pretrained", "training", "report"},
}


def room_of(module: str) -> str:
    """'quweit_jax.ops.lut' -> 'ops'."""
    return module.split(".")[1] if "." in module else ""


def imported_modules(file: Path) -> set[str]:
    """Every module of ours that a file imports, wherever in the file."""
    name = "quweit_jax." + file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    package = (
        name.removesuffix(".__init__").split(".")
        if file.name == "__init__.py"
        else name.split(".")[:-1]
    )
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {module for module in found if module.split(".")[0] == "quweit_jax"}


def test_imports_are_found():
    assert any(
        module.startswith("quweit_jax.ops")
        for module in imported_modules(PACKAGE / "layers" / "weightless.py")
    )
    # inside a function
    assert "quweit_jax.training.loop" in imported_modules(PACKAGE / "commands" / "train.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_arrows_point_down(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    imported = {room_of(module) for module in imported_modules(file)} - {room}
    if room in BELOW and file.name != "__main__.py":
        assert imported <= BELOW[room], (
            f"{room} may import {sorted(BELOW[room])} of quweit_jax, not "
            f"{sorted(imported - BELOW[room])}"
        )
    elif file.name != "__main__.py":  # the doors: __init__ and the older spellings of commands
        assert file.parent == PACKAGE, f"{file}: a new room needs a line in BELOW"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_files_stay_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) < 400
