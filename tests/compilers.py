"""The compilers for TPUs and NVIDIA's GPUs that `make compilers` puts into build/compilers, or that
are installed.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys

import pytest

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "build" / "compilers"


def compiling_with(*modules: str) -> dict[str, str]:
    """The environment of a process that can import the modules; skips the test without them."""
    for name in modules:
        path, parent = [str(FOLDER), *sys.path], ""
        for part in name.split("."):
            parent = f"{parent}.{part}".strip(".")
            spec = importlib.machinery.PathFinder.find_spec(parent, path)
            if spec is None:
                pytest.skip(f"compiling for chips that are not here needs {name}: make compilers")
            path = list(spec.submodule_search_locations or [])
    # libtpu ends a process in whose XLA_FLAGS it finds one of another platform's
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    places = [str(REPOSITORY), str(FOLDER), environment.get("PYTHONPATH", "")]
    return environment | {
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "JAX_PLATFORMS": "cpu",  # the one that is here
        "TPU_SKIP_MDS_QUERY": "1",  # no server knows of a TPU
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by the tests beside this one
    }
