"""Programs for accelerators that are not there."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from quweit_jax.commands import compile_tpu
from quweit_jax.errors import InputError
from quweit_jax.training import topologies
from tests.compilers import compiling_with
from tests.conftest import REPOSITORY

TINY = ["--config.model.layers=1", "--config.model.width=32", "--config.model.context=32"] + [
    "--config.batch_size=8",
    "--outputs=65",
    "--json",
]
GPT = "--config=experiments/configs/gpt_char.py:quick,mlp={}"
TERNARY = "--config=experiments/configs/matmulfree.py:tiny"


def test_topologies_of_gpus():
    assert topologies.gpu_of("h100:8") is topologies.gpu_of("h100:2x8") is topologies.GPUS["h100"]
    assert topologies.gpu_of("v5e:4x4") is None and topologies.gpu_of("h100") is None
    told = topologies.GPUS["a100"].described()
    assert "cuda_compute_capability { major: 8 minor: 0 }" in told and "core_count: 108 " in told


def test_what_cannot_be_compiled_for_is_a_sentence():
    with pytest.raises(InputError, match=r"--no-step: nothing is left to compile; add --decode"):
        compile_tpu.main([GPT.format("dense"), "--no-step"])
    with pytest.raises(InputError, match=r"--topology: .*v9z.*such as v5e:2x4, h100:8; GPUs known"):
        compile_tpu.main([GPT.format("dense"), "--outputs=65", "--topology=v9z:2x2"])
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        with pytest.raises(InputError, match=r"pip install --no-deps jax-cuda13-plugin==\d"):
            compile_tpu.main([GPT.format("dense"), "--outputs=65", "--topology=h100:8"])


def compiled_for_gpus(*arguments):
    """What the command says, or its error; in a process that has not asked for devices yet."""
    environment = compiling_with("jax_cuda13_plugin")
    command = [sys.executable, "-m", "quweit_jax", "compile_tpu", *TINY, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


@pytest.mark.parametrize("config", [GPT.format("lookup_glu"), GPT.format("weightless"), TERNARY])
def test_steps_compile_for_gpus(config):
    found = compiled_for_gpus(config, "--topology=h100:2x2", "--decode")
    assert (found["chips"], found["hosts"], found["outputs"]) == (4, 2, 65)
    assert found["all_reduce_bytes_per_chip"] >= 4 * found["parameters"]  # of the gradients
    assert found["decode_packed"] and found["decode_variable_bytes"] < 4 * found["parameters"]
    assert found["decode_argument_bytes_per_chip"] >= found["decode_variable_bytes"]


def test_what_a_gpu_cannot_hold_is_refused():
    size = ["--config.model.width=16384", "--config.model.layers=4", "--topology=l4:1"]
    said = compiled_for_gpus(GPT.format("dense"), *size)
    assert re.search(
        "error: --topology: l4:1 has too little memory: the step needs .* a chip", said
    )
