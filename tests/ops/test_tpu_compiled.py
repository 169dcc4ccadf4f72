"""The kernels for TPUs compile for one that is not there, and their schedules can be read."""

import json
import subprocess
import sys

import pytest

from tests.compilers import compiling_with
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


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_all_kernels_compile(chip, tmp_path):
    # what is read from a cache of compiled programs leaves no schedule
    environment = compiling_with("libtpu") | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    subprocess.run(
        [
            sys.executable,
            REPOSITORY / "benchmarks" / "tpu_kernels.py",
            f"--chip={chip}",
            "--small",
            "--ours",
            f"--out={tmp_path / 'kernels.txt'}",
        ],
        env=environment,
        check=True,
    )
    found = json.loads((tmp_path / "kernels.json").read_text())["found"].values()
    assert {name for piece in found for name in piece["kernels"]} >= KERNELS
    assert all(cycles > 0 for piece in found for cycles in piece["kernels"].values())
