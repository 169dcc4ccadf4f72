"""python colabs/repository.py URL: says where the repository is, wherever that stands.

The notebooks' badges and install cells, pyproject.toml and mkdocs.yml have the address of the
repository. Whoever publishes it, or a fork of it, runs this once.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")


def places() -> list[Path]:
    """The files that have the address."""
    return [ROOT / "pyproject.toml", ROOT / "mkdocs.yml", *sorted(ROOT.glob("colabs/*.ipynb"))]


def replace(text: str, old: str, new: str) -> str:
    """A file's text with the new address: as it is, and as Colab's links have it."""
    opens = "https://colab.research.google.com/github/"
    short, wanted = (url.removeprefix("https://github.com/") for url in (old, new))
    return text.replace(f"{opens}{short}/", f"{opens}{wanted}/").replace(old, new)


def main() -> int:
    """Replaces the address."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="such as https://github.com/NAME/quweit_jax")
    new = parser.parse_args().url.rstrip("/").removesuffix(".git")
    if not _ADDRESS.fullmatch(new):
        parser.error(f"expected https://github.com/OWNER/NAME, which Colab can open, found {new}")
    with open(ROOT / "pyproject.toml", "rb") as file:
        old = tomllib.load(file)["project"]["urls"]["Repository"]
    for path in places():
        text = path.read_text(encoding="utf-8")
        path.write_text(replace(text, old, new), encoding="utf-8")
    print(f"{old} is now {new} in {len(places())} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
