"""The kernels for GPUs compile for a Hopper GPU that is not there, and spill no registers."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

KERNELS = {
    "lut_look_up",
    "lut_table_gradient",
    "lut_bit_gradient",
    "recurrence_ends",
    "recurrence_forward",
    "recurrence_backward",
    "ternary_sums",
    "packed_look_up",
}


def test_all_kernels_compile(tmp_path):
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs jax-cuda13-plugin and jax-cuda13-pjrt, --no-deps")
    if not (shutil.which("ptxas") or importlib.util.find_spec("nvidia.cu13")):
        pytest.skip("needs ptxas: CUDA, or pip install nvidia-cuda-nvcc")
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [
            sys.executable,
            REPOSITORY / "benchmarks" / "gpu_kernels.py",
            "--compile",
            "--small",
            f"--out={tmp_path / 'kernels.txt'}",
        ],
        env=os.environ | {"PYTHONPATH": path},
        check=True,
    )
    found = json.loads((tmp_path / "kernels.json").read_text())["found"].values()
    assert {name for piece in found for name in piece} >= KERNELS
    for piece in found:
        for name, needed in piece.items():
            assert needed["spilled_bytes"] == needed["stack_bytes"] == 0, name
            assert 0 < needed["registers"] <= 255, name
