"""The notebooks as they lie in the repository; `make colabs` runs them. And that its checks find
what they are for.
"""

import ast
import importlib.util
import io
import json
import re

import pytest
from matplotlib.figure import Figure

from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "colabs").glob("*.ipynb"))


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location(
        "colabs_check", REPOSITORY / "colabs" / "check.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_of(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def test_there_are_six():
    assert [path.stem for path in NOTEBOOKS] == [
        "convert",
        "deploy",
        "lm_comparison",
        "quickstart",
        "quweit_vit_cifar10",
        "tpu",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_in_the_repository(path, check):
    assert check.file_faults(path) == []
    everything = "\n".join(map(source, code_of(path)))
    assert (
        'os.environ.get("QUWEIT_COLAB_SMALL") == "1"' in everything and "plt.show()" in everything
    )
    assert "assert " in everything.partition("import matplotlib")[2], "it claims nothing"
    paths = re.search(r"""(?<!split\()["'](/|~|\.\.)\w*""", everything)
    assert not paths, "a cell needs a path"


def test_the_address_is_one_everywhere_and_can_be_set(check):
    spec = importlib.util.spec_from_file_location(
        "colabs_repository", REPOSITORY / "colabs" / "repository.py"
    )
    address = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(address)
    old, new = check.repository(), "https://github.com/somebody/other"
    for path in address.places():
        text = path.read_text(encoding="utf-8")
        assert old in text
        assert "/quweit_jax/blob/" in text or path.suffix != ".ipynb"
        moved = address.replace(text, old, new)
        assert old not in moved and old.removeprefix("https://github.com/") not in moved
        assert moved.count("somebody/other") >= (2 if path.suffix == ".ipynb" else 1)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_a_notebook_imports_is_there(path):
    for cell in code_of(path)[1:]:
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("quweit_jax"):
                for name in node.names:
                    module = importlib.import_module(node.module)
                    assert hasattr(module, name.name) or importlib.util.find_spec(
                        f"{node.module}.{name.name}"
                    ), name.name


def png(draw):
    figure = Figure(figsize=(4, 3))
    draw(figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def test_plots_without_anything_in_them_are_found(check):
    assert check.is_empty(png(lambda axes: axes.set_title("nothing")))
    assert not check.is_empty(png(lambda axes: axes.plot([1, 2, 3])))
    assert not check.is_empty(png(lambda axes: axes.imshow([[1, 2], [3, 4]])))


def test_faults_of_an_executed_notebook_are_found(check):
    def cell(*outputs, count=1):
        return {
            "cell_type": "code",
            "source": ["x"],
            "execution_count": count,
            "outputs": list(outputs),
        }

    def shown(data):
        return {
            "output_type": "display_data",
            "data": {"image/png": check.base64.b64encode(data).decode()},
        }

    good, empty = shown(png(lambda axes: axes.plot([1, 2, 3]))), shown(png(lambda axes: None))
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no"}
    assert check.faults_of({"cells": [cell(good), cell()]}) == []
    assert check.faults_of({"cells": [cell()]}) == ["it shows no plot"]
    assert check.faults_of({"cells": [cell(good, empty)]}) == ["plot 2 of 2 is empty"]
    assert check.faults_of({"cells": [cell(good, error)]}) == ["cell 0: ValueError: no"]
    assert check.faults_of({"cells": [cell(good), cell(count=None)]}) == ["not every cell was run"]


def test_faults_of_a_file_are_found(check, tmp_path):
    """Each in a copy of a notebook that has none."""

    def faults(change):
        notebook = json.loads((REPOSITORY / "colabs" / "quickstart.ipynb").read_text("utf-8"))
        change(notebook["cells"])
        path = tmp_path / "quickstart.ipynb"
        path.write_text(json.dumps(notebook), encoding="utf-8")
        return " ".join(check.file_faults(path))

    def other(cells, index, old, new):
        cells[index]["source"] = source(cells[index]).replace(old, new)

    def last_code(cells):
        return [cell for cell in cells if cell["cell_type"] == "code"][-1]

    assert faults(lambda cells: None) == ""
    assert "badge" in faults(lambda cells: other(cells, 0, "Open in Colab", "Open"))
    assert "REPOSITORY" in faults(lambda cells: other(cells, 1, "git+{REPOSITORY}", "quweit_jax"))
    assert "not of its code" in faults(lambda cells: other(cells, 2, "jax", "jaxx"))
    assert "no plot" in faults(
        lambda cells: [c.update(outputs=[]) for c in cells if "outputs" in c]
    )
    assert "not every" in faults(lambda cells: last_code(cells).update(execution_count=None))
    big = {"output_type": "stream", "name": "stdout", "text": "x" * 1_000_000}
    assert "bytes" in faults(lambda cells: last_code(cells).update(outputs=[big]))
    home = {"output_type": "stream", "name": "stdout", "text": "read /root/x"}
    assert "/root/" in faults(lambda cells: last_code(cells).update(outputs=[home]))
    wrong = {"output_type": "error", "ename": "ValueError", "evalue": "no"}
    assert "ValueError" in faults(lambda cells: last_code(cells).update(outputs=[wrong]))
