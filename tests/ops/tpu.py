"""What tests of kernels for TPUs share."""

import os

import jax
import jax.numpy as jnp
import pytest

from quweit_jax.ops.kernels import choice

# Drawn shapes of a kernel; a few hundred where there is time: QUWEIT_KERNEL_DRAWS=300.
DRAWS = int(os.environ.get("QUWEIT_KERNEL_DRAWS", 6))


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def compiled_for_tpu(function, *shapes, topology="v5e:2x2"):
    """The text of a function compiled for one chip that is not there; skips without libtpu."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install libtpu")
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    where = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes)
    mesh = jax.sharding.Mesh([device], ("data",))
    with choice.compiling_for("tpu", portable=True), choice.divided(mesh, "data"):
        return jax.jit(function).lower(*placed).compile().as_text()
