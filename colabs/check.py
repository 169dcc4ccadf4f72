"""python colabs/check.py: runs the notebooks, small, in a fresh environment.

Builds the wheel, installs it and what it asks for into a temporary folder, and runs each notebook
there from top to bottom. Fails on an error in a cell, on a notebook without a plot, and on an empty
plot.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
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


def main() -> int:
    """Runs the notebooks named, or all."""
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
    args = parser.parse_args()
    notebooks = args.notebooks or sorted(FOLDER.glob("*.ipynb"))
    failed = []
    with tempfile.TemporaryDirectory(prefix="quweit_colabs_") as temporary:
        place, since = Path(temporary), time.monotonic()
        programs = Path(sys.executable).parent if args.here else prepare(place)
        print(f"environment ready after {time.monotonic() - since:.0f} s", flush=True)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MPLBACKEND")}
        environment |= {
            "QUWEIT_COLAB_SMALL": "0" if args.full else "1",
            "PYTHONPATH": str(FOLDER.parent) if args.here else "",
        }
        for notebook in notebooks:
            # A copy elsewhere: the repository is not beside it.
            copy, since = Path(shutil.copy(notebook, place)), time.monotonic()
            command = [str(programs / "jupyter-execute"), "--inplace", "--timeout=1800", copy.name]
            result = subprocess.run(
                command, cwd=place, env=environment, capture_output=True, text=True
            )
            executed = json.loads(copy.read_text(encoding="utf-8"))
            said = f"{time.monotonic() - since:.0f} s, {len(plots_of(executed))} plots"
            faults = [result.stderr.strip()[-3000:]] if result.returncode else faults_of(executed)
            print(f"{notebook.name}: {said}", *faults, sep="\n  ", flush=True)
            failed += [notebook.name] if faults else []
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                shutil.copy(copy, args.out)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
