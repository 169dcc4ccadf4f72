"""What the documentation shows is true: its Python runs, its commands are taken, and its pictures
are there in both schemes.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from quweit_jax.commands import cli
from quweit_jax.config import load_file, set_value
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("compile_quickly")

DOCS = REPOSITORY / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.parent.name != "api")
README = REPOSITORY / "README.md"
# A fenced block and the line above it, where a reason may stand for not running it.
_BLOCK = re.compile(
    r"^(?P<above>[^\n]*)\n```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page that are meant to be run."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [
        match["code"]
        for match in found
        if match["language"] == language and not match["above"].startswith("<!-- not run: ")
    ]


def commands(page: Path) -> list[list[str]]:
    """Every `python -m quweit_jax.NAME ...` of a page, as its words from NAME on."""
    found = []
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            for call in re.findall(r"python -m quweit_jax\.([^\"|#]*)", line):
                found.append(shlex.split(call))
    return found


def test_blocks_are_found():
    assert len([code for page in PAGES for code in blocks(page, "python")]) > 10
    assert len([call for page in PAGES for call in commands(page)]) > 20
    assert len([line for line in blocks(README, "python")[0].splitlines() if line]) <= 12


@pytest.mark.parametrize(
    "page",
    [page for page in [README, *PAGES] if blocks(page, "python")],
    ids=lambda page: page.stem,
)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page, one after another, as a reader would."""
    monkeypatch.chdir(tmp_path)
    code = "\n\n".join(blocks(page, "python"))
    exec(compile(code, str(page), "exec", dont_inherit=True), {"__name__": "docs"})


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem
)
def test_commands_are_taken(page, monkeypatch):
    """Each names a command and options that are there; its config is made, with its shortcuts and
    overrides.
    """
    monkeypatch.chdir(REPOSITORY)

    class Taken(Exception):
        pass

    def parse(parser, argv):
        parser.parse_args(cli.split_overrides(argv)[0])
        raise Taken

    monkeypatch.setattr(cli, "parse", parse)
    for name, *arguments in commands(page):
        name = {"export_model": "export", "aot": "compile_tpu"}.get(name, name)
        with pytest.raises(Taken):
            importlib.import_module(f"quweit_jax.commands.{name}").main(arguments)
        rest, overrides = cli.split_overrides(arguments)
        spec = next(
            (argument.partition("=")[2] for argument in rest if argument.startswith("--config=")),
            None,
        )
        config = load_file(spec or "experiments/configs/gpt_char.py:quick")
        for path, value in overrides.items():
            set_value(config, path, value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pictures_have_both_schemes(page):
    for path, scheme in re.findall(
        r"\]\(([^)]*\.svg)#only-(light|dark)\)", page.read_text(encoding="utf-8")
    ):
        assert (page.parent / path).is_file() and path.endswith("-dark.svg") == (
            scheme == "dark"
        ), path
        other = (
            path.replace("-dark.svg", ".svg")
            if scheme == "dark"
            else path.replace(".svg", "-dark.svg")
        )
        assert other in page.read_text(encoding="utf-8")


def test_every_module_is_in_the_reference():
    modules = {
        "quweit_jax."
        + file.relative_to(REPOSITORY / "quweit_jax")
        .with_suffix("")
        .as_posix()
        .replace("/", ".")
        .removesuffix(".__init__")
        for file in (REPOSITORY / "quweit_jax").rglob("*.py")
        if file.parent != REPOSITORY / "quweit_jax" or file.stem in ("errors", "config", "reading")
        if not file.stem.startswith("__")
        or re.search(r"^def [a-z]", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    listed = [
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sorted(listed) == sorted(modules), "docs/api lists each module once"
