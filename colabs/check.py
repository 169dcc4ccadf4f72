"""python colabs/check.py: runs the notebooks, small, in a fresh environment.

Builds the wheel, installs it and what it asks for into a temporary folder, and runs each notebook
there from top to bottom. Fails on an error in a cell, on a notebook without a plot, on an empty
plot, and on a file that shows nothing unrun: without badge, or with no outputs of its own code.

python colabs/check.py --full --here --save NOTEBOOK runs one at its default size, and keeps what it
showed in the file.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

FOLDER = Path(__file__).resolve().parent
TOOLS = ("nbclient", "ipykernel")
# Colored pixels that a plot has at least: axes, ticks and labels alone are gray.
COLORED = 150
LARGEST = 1_000_000  # bytes of a file that are still shown where repositories are read
INSTALL = 1  # the cell that installs
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
# Places of a machine that have no business in a file.
_OF_MACHINE = ("/tmp/", "/root/", "/home/", "/content/", str(FOLDER.parent))

Notebook: TypeAlias = dict[str, Any]  # JSON


def plots_of(notebook: Notebook) -> list[bytes]:
    """The PNGs that the cells show."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return [
        base64.b64decode(output["data"]["image/png"])
        for output in outputs
        if "image/png" in output.get("data", {})
    ]


def is_empty(png: bytes) -> bool:
    """Whether a plot shows nothing but axes."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int16)
    return int((pixels.max(-1) - pixels.min(-1) > 40).sum()) < COLORED


def faults_of(notebook: Notebook) -> list[str]:
    """What is wrong with an executed notebook."""
    faults = []
    for number, cell in enumerate(notebook["cells"]):
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                faults.append(f"cell {number}: {output['ename']}: {output['evalue']}")
    if any(
        cell["cell_type"] == "code"
        and cell["execution_count"] is None
        and "".join(cell["source"]).strip()
        for cell in notebook["cells"]
    ):
        faults.append("not every cell was run")
    plots = plots_of(notebook)
    if not plots:
        faults.append("it shows no plot")
    return faults + [
        f"plot {i + 1} of {len(plots)} is empty" for i, png in enumerate(plots) if is_empty(png)
    ]


def repository() -> str:
    """The repository's address, from pyproject.toml."""
    with open(FOLDER.parent / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]["urls"]["Repository"]


def source_of(cell: dict[str, Any]) -> str:
    """A cell's text."""
    return "".join(cell["source"])


def code_digest(notebook: Notebook) -> str:
    """Of the code that the outputs are of; not of the cell that installs."""
    cells = [cell for i, cell in enumerate(notebook["cells"]) if i != INSTALL]
    code = [source_of(cell) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def file_faults(path: Path) -> list[str]:
    """What is wrong with a notebook as it lies in the repository, unrun."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first, install, *_ = notebook["cells"]
    where = f"{repository().removeprefix('https://github.com/')}/blob/main/colabs/{path.name}"
    faults = []
    opens = f"[![Open in Colab]({BADGE})](https://colab.research.google.com/github/{where})"
    if not source_of(first).startswith(opens):
        faults.append(f"its first cell has to begin with the badge: {opens}")
    code = source_of(install)
    if code.count(f'REPOSITORY = "{repository()}"') != 1 or "git+{REPOSITORY}" not in code:
        faults.append(f"cell {INSTALL} has to install from REPOSITORY = {repository()}")
    if code.count("https://") != 1:
        faults.append(f"cell {INSTALL} names more than one address")
    if notebook["metadata"].get("outputs_of") != code_digest(notebook):
        faults.append("its outputs are not of its code; run it with --full --here --save")
    size = path.stat().st_size
    if size >= LARGEST:
        faults.append(f"expected less than {LARGEST:,} bytes, found {size:,}")
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    shown = json.dumps(outputs)
    faults += [f"an output tells of {place}" for place in _OF_MACHINE if place in shown]
    return faults + faults_of(notebook)


def save(executed: Notebook, path: Path) -> None:
    """Keeps what an executed notebook showed in its file, without what depends on the machine."""
    number = 0
    for cell in executed["cells"]:
        cell["metadata"].pop("execution", None)
        if cell["cell_type"] == "code" and source_of(cell).strip():
            number += 1
            cell["execution_count"] = number
            cell["outputs"] = [out for out in cell["outputs"] if out.get("name") != "stderr"]
    executed["metadata"] |= {
        "language_info": {"name": "python"},
        "outputs_of": code_digest(executed),
    }
    text = json.dumps(executed, indent=1, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def prepare(place: Path) -> Path:
    """Installs the wheel and what it asks for below `place`; returns the folder of programs."""
    # From a copy: what an earlier build has left behind would be packed as well.
    source, pip = place / "source", ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    shutil.copytree(
        FOLDER.parent / "quweit_jax",
        source / "quweit_jax",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(FOLDER.parent / name, source)
    paths = [path for path in (source / "quweit_jax").rglob("*") if path.is_file()]
    files = {path.relative_to(source).as_posix() for path in paths}
    build = ["wheel", "--no-deps", f"--wheel-dir={place}", str(source)]
    subprocess.run([sys.executable, *pip, *build], check=True)
    (wheel,) = place.glob("*.whl")
    if missing := files - set(zipfile.ZipFile(wheel).namelist()):
        sys.exit(
            f"the wheel lacks {', '.join(sorted(missing))}; add them to package-data in "
            "pyproject.toml"
        )
    venv.create(place / "venv", with_pip=True)
    programs = place / "venv" / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([str(programs / "python"), *pip, "install", f"{wheel}[all]", *TOOLS], check=True)
    return programs


def run(
    notebook: Path, place: Path, programs: Path, environment: dict[str, str], keep: bool
) -> tuple[str, list[str], Path]:
    """Runs a notebook in `place`: (what to say of it, its faults, the executed copy). keep: what it
    showed goes into its file, if it has no faults.
    """
    # A copy elsewhere: the repository is not beside it.
    folder = place / notebook.stem
    folder.mkdir()
    copy, since = Path(shutil.copy(notebook, folder)), time.monotonic()
    start = "import sys; from nbclient.cli import main; sys.exit(main())"
    options = ["--inplace", "--timeout=1800", copy.name]
    command = [str(programs / "python"), "-c", start, *options]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    executed = json.loads(copy.read_text(encoding="utf-8"))
    said = f"{time.monotonic() - since:.0f} s, {len(plots_of(executed))} plots"
    faults = [result.stderr.strip()[-3000:]] if result.returncode else faults_of(executed)
    if keep and not faults:
        save(executed, notebook)
    return said, faults + [f"in the file: {fault}" for fault in file_faults(notebook)], copy


def main() -> int:
    """Runs the notebooks named, or all; small ones two at a time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "notebooks", nargs="*", type=Path, help="which (default: all in this folder)"
    )
    parser.add_argument("--full", action="store_true", help="at their default size, minutes each")
    parser.add_argument("--out", type=Path, help="a folder to keep the executed notebooks in")
    parser.add_argument(
        "--here",
        action="store_true",
        help="in the running environment, which must have nbclient and ipykernel",
    )
    parser.add_argument(
        "--save", action="store_true", help="keep what the notebooks show in their files"
    )
    args = parser.parse_args()
    if args.save and not args.full:
        parser.error("--save: expected --full beside it; files keep what the default size shows")
    notebooks = args.notebooks or sorted(FOLDER.glob("*.ipynb"))
    with tempfile.TemporaryDirectory(prefix="quweit_colabs_") as temporary:
        place, since = Path(temporary), time.monotonic()
        programs = Path(sys.executable).parent if args.here else prepare(place)
        print(f"environment ready after {time.monotonic() - since:.0f} s", flush=True)
        beside = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MPLBACKEND")}
        environment |= {
            "QUWEIT_COLAB_SMALL": "0" if args.full else "1",
            # most of a small run is compiling
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0" if args.full else "1",
            "PYTHONPATH": os.pathsep.join(beside) if args.here else "",
        }

        def checked(notebook: Path) -> bool:
            said, faults, copy = run(notebook, place, programs, environment, args.save)
            print(f"{notebook.name}: {said}", *faults, sep="\n  ", flush=True)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                shutil.copy(copy, args.out)
            return not faults

        at_once = 1 if args.full else min(2, os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            passed = list(pool.map(checked, notebooks))
    failed = [notebook.name for notebook, well in zip(notebooks, passed) if not well]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
