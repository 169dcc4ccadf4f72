"""The kernels for TPUs compile for one that is not there, and their schedules can be read."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

KERNELS = {
    "lut_pack",
    "lut_look_up",
    "lut_table_gradient",
    "lut_bit_gradient",
    "recurrence_forward",
    "recurrence_backward",
    "thermometer_encode",
    "thermometer_gradients",
    "ternary_sums",
    "packed_look_up",
}


def test_all_kernels_compile(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPUs needs libtpu: pip install libtpu")
    # libtpu ends a process in whose XLA_FLAGS it finds one of another platform's
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    path = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
    settings = {
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is read from it leaves no schedule
    }
    subprocess.run(
        [
            sys.executable,
            REPOSITORY / "benchmarks" / "tpu_kernels.py",
            "--small",
            "--ours",
            f"--out={tmp_path / 'kernels.txt'}",
        ],
        env=environment | settings,
        check=True,
    )
    found = json.loads((tmp_path / "kernels.json").read_text())["found"].values()
    assert {name for piece in found for name in piece["kernels"]} >= KERNELS
    assert all(cycles > 0 for piece in found for cycles in piece["kernels"].values())
