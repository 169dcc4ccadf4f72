"""Compiling a training step for TPUs that are not there."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from quweit_jax.config import Config
from quweit_jax.errors import InputError
from quweit_jax.training import run


def compile_step(config: Config, topology: str) -> dict[str, Any]:
    """Bytes and FLOPs of a chip's part of the compiled training step.

    Raises:
      InputError: libtpu isn't installed, or it knows no such topology.
    """
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise InputError(
            f"--topology: cannot compile for TPU topology '{topology}' ({reason}); pip install "
            "libtpu, or give one such as v5e:2x4."
        ) from None
    parts = run.assemble(config, devices=devices)
    state, batch = parts.abstract_state(), parts.abstract_batch()
    step = parts.train_step(jax.tree.map(lambda leaf: leaf.sharding, state))
    since = time.monotonic()
    compiled = step.lower(state, batch).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "topology": topology,
        "chips": len(devices),
        "batch_size": config.batch_size,
        "compile_seconds": round(time.monotonic() - since),
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params)),
        "argument_bytes_per_chip": memory.argument_size_in_bytes,  # type: ignore[union-attr]
        "temporary_bytes_per_chip": memory.temp_size_in_bytes,  # type: ignore[union-attr]
        "code_bytes": memory.generated_code_size_in_bytes,  # type: ignore[union-attr]
        "flops_per_chip": cost.get("flops") if cost else None,
    }
