"""A model of ternary matrices on eight devices, whose weights travel at two bits."""

from __future__ import annotations

import re

import jax
import pytest

from quweit_jax.config import set_value
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config
from quweit_jax.training.setup import assemble

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; tests make them"),
    pytest.mark.usefixtures("compile_quickly"),
]
SMALL = {
    "model.layers": 3,
    "model.width": 32,
    "model.hidden": 64,
    "model.context": 16,
    "data.source": "text_file",
    "batch_size": 8,
    "steps": 20,
    "log_every": 1,
    "eval_every": 20,
    "eval_batches": 1,
    "eval_batch_size": 8,
    "checkpoint_every": 20,
    "sample_tokens": 0,
    "optimizer.warmup": 2,
    "mesh.data": 1,
}
DEEP = {"model.scan_layers": True, "model.remat": True}


@pytest.fixture(scope="module")
def config_of(tiny_text):
    def make(changes):
        config = base_config()
        config.model = defaults("matmulfree")
        for path, value in (SMALL | {"data.path": tiny_text} | changes).items():
            set_value(config.lock(), path, str(value))
        return config.lock()

    return make


def gathered(setup):
    """[(dtype, shape)] of what the compiled step's devices gather from all others."""
    state = setup.abstract_state()
    step = setup.train_step(state).lower(state, setup.abstract_batch()).compile()
    found = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* all-gather(?:-start)?\(", step.as_text())
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in found]


def test_a_step_gathers_ternary_matrices_at_two_bits(config_of):
    """In bfloat16 each of them would be two bytes a weight, eight times as much."""
    setup = assemble(config_of(DEEP | {"mesh.fsdp": 8}))
    kernels = {
        jax.tree_util.keystr(path): leaf.shape[-2:]
        for path, leaf in jax.tree_util.tree_leaves_with_path(setup.abstract_state().params)
        if "kernel" in str(path)
    }
    received = gathered(setup)
    packed = {(4 * shape[0], shape[1]) for kind, shape in received if kind == "u8"}
    assert packed == set(kernels.values()) and len(packed) >= 4
    inner = {shape for name, shape in kernels.items() if "blocks" in name}
    wide = [
        (kind, shape)
        for kind, shape in received
        if kind != "u8" and {shape[-2:], shape[-2:][::-1]} & inner
    ]
    assert not wide, "the same matrices in another type, in one of the passes"
    whole = assemble(config_of(DEEP | {"mesh.fsdp": 8, "mesh.pack_ternary": False}))
    assert not [shape for kind, shape in gathered(whole) if kind == "u8"]
