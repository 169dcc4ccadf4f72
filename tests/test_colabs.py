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


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == [
        "deploy",
        "lm_comparison",
        "quickstart",
        "quweit_vit_cifar10",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_in_the_repository(path):
    cells = code_of(path)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells), (
        "strip the outputs"
    )
    assert "%pip install --quiet {QUWEIT_SOURCE}" in source(
        cells[0]
    ) and 'QUWEIT_SOURCE = "' in source(cells[0])
    everything = "\n".join(map(source, cells))
    assert (
        'os.environ.get("QUWEIT_COLAB_SMALL") == "1"' in everything and "plt.show()" in everything
    )
    assert not re.search(r"""["'](/|~|\.\.)\w*""", everything), "a cell needs a path"


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
