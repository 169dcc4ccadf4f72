"""Commands of this project as processes that benchmarks start, kill and wait for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def start(command: str, *arguments: str) -> subprocess.Popen[str]:
    """python -m quweit_jax.COMMAND ARGUMENTS..."""
    return subprocess.Popen(
        [sys.executable, "-m", f"quweit_jax.{command}", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; ends this program if it failed."""
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{process.args}: failed with status {process.returncode}:\n{said}")
    return said
