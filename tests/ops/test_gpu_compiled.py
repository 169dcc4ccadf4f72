"""The kernels for GPUs compile for a Hopper GPU that is not there, and spill no registers."""

import json
import shutil
import subprocess
import sys

from tests.compilers import compiling_with
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
    on_path = shutil.which("ptxas")
    environment = compiling_with("jax_cuda13_plugin", *([] if on_path else ["nvidia.cu13"]))
    subprocess.run(
        [
            sys.executable,
            REPOSITORY / "benchmarks" / "gpu_kernels.py",
            "--compile",
            "--small",
            f"--out={tmp_path / 'kernels.txt'}",
        ],
        env=environment,
        check=True,
    )
    found = json.loads((tmp_path / "kernels.json").read_text())["found"].values()
    assert {name for piece in found for name in piece} >= KERNELS
    for piece in found:
        for name, needed in piece.items():
            assert needed["spilled_bytes"] == needed["stack_bytes"] == 0, name
            assert 0 < needed["registers"] <= 255, name
