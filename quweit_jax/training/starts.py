"""The starts of a run, for the record: when, by which command, from which commit, on what."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from quweit_jax.errors import InputError
from quweit_jax.reading import read_json


def git_commit() -> str | None:
    """The commit of this package's source, with '-dirty' where it was changed since; None where it
    is no part of a git repository, or git is not there.
    """
    file = Path(__file__)

    def git(*arguments: str) -> str:
        # A repository that an installed package only happens to lie in does not track it.
        return subprocess.run(
            ["git", "-C", str(file.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            stdin=subprocess.DEVNULL,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


def entry(step: int, environment: dict[str, Any]) -> dict[str, Any]:
    """One start: 'time' (UTC), 'step' it goes on from, 'command', 'commit', and of the environment
    what may be another at each start.
    """
    now = datetime.datetime.now(datetime.UTC)
    found = {"time": now.isoformat(timespec="seconds"), "step": step}
    found |= {"command": sys.argv, "folder": os.getcwd(), "commit": git_commit()}
    kept = ("python", "versions", "backend", "devices", "device_kind", "processes")
    return found | {name: environment[name] for name in kept if name in environment}


def earlier(path: Path) -> list[dict[str, Any]]:
    """The starts that an environment.json holds; [] where it cannot be read, or there is none."""
    if not os.path.lexists(path):
        return []
    try:
        found = read_json(path, "--workdir").get("starts")
    except InputError:  # `rundir` has warned
        return []
    return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []
