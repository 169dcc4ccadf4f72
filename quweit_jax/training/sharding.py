"""One mesh, ('data', 'fsdp', 'tensor'), and a small table of rules that says how each parameter
lies on it.

Layers don't mention devices. Optimizer moments and averages follow their parameter: the rules look
at the end of a path.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from quweit_jax.config import SECTIONS
from quweit_jax.errors import InputError
from quweit_jax.ops.ternary import from_bytes, to_bytes

# Where the variables of scanned blocks are, with an axis of layers in front.
_SCANNED = re.compile(r"(^|/)blocks_\d+/")

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # over which examples are divided
# The first rule whose pattern is found in 'path/to/leaf' wins; dims that a mesh axis does not
# divide stay whole.
RULES: tuple[tuple[str, P], ...] = (
    (r"token_embedding/embedding$", P("tensor", "fsdp")),
    (r"position_embedding$", P(None, "fsdp")),
    (r"head/kernel$", P("fsdp", "tensor")),
    (r"(qkv|up|gate|input|forget)/kernel$", P("fsdp", "tensor")),
    (r"(proj|down|output)/kernel$", P("tensor", "fsdp")),
    (r"tables$", P(("tensor", "fsdp"), None)),
    (r"vectors$", P("tensor", "fsdp")),
    (r"scores$", P("fsdp", "tensor")),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes; -1 takes the devices that are left. Parameters of more than
    `fsdp_size_limit` elements never stay whole. pack_ternary: whether ternary weights that are
    divided over fsdp travel at 2 bits each (where tensor is 1).
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    fsdp_size_limit: int = 2**18
    pack_ternary: bool = True

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
            raise InputError(
                "mesh: expected positive sizes and at most one -1 (what is left), found "
                f"data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}."
            )


SECTIONS["mesh"] = lambda _: MeshConfig


def make_mesh(
    config: MeshConfig, devices: Sequence[Any] | None = None, batch_size: int = 0
) -> Mesh:
    """The mesh over all devices (or the first of them, if the sizes are given and need fewer).

    batch_size: an axis of -1 takes as many of the devices as divide so many examples; 0: all.

    Raises:
      InputError: the sizes need more devices than there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    if free := -1 in sizes:
        known = math.prod(s for s in sizes if s != -1)
        at = sizes.index(-1)
        sizes[at] = max(1, len(devices) // known)
        shards = known // max(1, config.tensor) if AXES[at] != "tensor" else 0
        sizes[at] = _dividing(sizes[at], known, batch_size, shards)
    needed = math.prod(sizes)
    if free and needed < len(devices):
        devices = _first_of_each_process(devices, needed)
    if needed > len(devices) or (jax.process_count() > 1 and needed != len(devices)):
        raise InputError(
            f"mesh: {' x '.join(f'{a}={s}' for a, s in zip(AXES, sizes))} needs {needed} devices, "
            f"found {len(devices)}; change --config.mesh.*."
        )
    return Mesh(np.asarray(devices[:needed]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def _dividing(most: int, others: int, batch_size: int, shards: int) -> int:
    """The largest size of an axis, up to `most`, with which the mesh divides a batch and takes as
    many devices of every process; `most` if there is none.

    others: devices beside this axis. shards: parts of the batch beside it, 0: it divides none.
    """
    for size in range(most, 0, -1) if batch_size and shards else ():
        if batch_size % (size * shards) == 0 and size * others % jax.process_count() == 0:
            return size
    return most


def _first_of_each_process(devices: Sequence[Any], count: int) -> list[Any]:
    """So many devices, equally many of each process where that is possible."""
    own: dict[int, list[Any]] = {}
    for device in devices:
        own.setdefault(device.process_index, []).append(device)
    return [device for found in own.values() for device in found[: max(1, count // len(own))]]


def mesh_for_reading(config: MeshConfig, given: Collection[str] = ()) -> MeshConfig:
    """The mesh on which a saved run is read back, or goes on: its own where the devices suffice,
    else the largest shares of its axes that divide the devices; sizes in `given` stay as they are.
    """
    try:
        make_mesh(config)
        return config
    except InputError:
        pass
    sizes = {axis: getattr(config, axis) for axis in AXES}
    left = max(1, jax.device_count() // math.prod(max(1, sizes[axis]) for axis in given))
    for axis in ("tensor", "fsdp"):
        if axis not in given:
            sizes[axis] = math.gcd(max(1, sizes[axis]), left)
            left //= sizes[axis]
    if "data" not in given:
        sizes["data"] = 1 if -1 in (sizes["fsdp"], sizes["tensor"]) else -1
    return dataclasses.replace(config, **sizes)


def path_name(path: KeyPath) -> str:
    """'params/block_0/mlp/tables' for a tree path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh, size_limit: int) -> P:
    """How an array lies on the mesh.

    Raises:
      InputError: it has more than `size_limit` elements, the mesh has an fsdp axis, and no
        dimension can be divided by it.
    """
    rule = next((spec for pattern, spec in RULES if re.search(pattern, name)), P())
    layers = int(bool(_SCANNED.search(name) and shape))  # an axis that is never divided
    dims: list[str | tuple[str, ...] | None] = [None] * len(shape)
    for i, axes in enumerate(rule[: len(shape) - layers], layers):
        kept: list[str] = []
        for axis in axes if isinstance(axes, tuple) else (axes,):
            if (
                axis is not None
                and mesh.shape[axis] > 1
                and shape[i] % (math.prod(mesh.shape[a] for a in kept) * mesh.shape[axis]) == 0
            ):
                kept.append(axis)
        dims[i] = tuple(kept) if len(kept) > 1 else (kept[0] if kept else None)
    if any(dims) or math.prod(shape[layers:]) <= size_limit or mesh.shape["fsdp"] == 1:
        return P(*dims)
    for i in sorted(range(layers, len(shape)), key=lambda i: -shape[i]):
        if shape[i] % mesh.shape["fsdp"] == 0:
            dims[i] = "fsdp"
            return P(*dims)
    raise InputError(
        f"mesh: {name} {list(shape)} is above mesh.fsdp_size_limit = {size_limit} but no dimension "
        f"divides by fsdp = {mesh.shape['fsdp']}; "
        "change the sizes or raise the limit."
    )


def shardings_for(tree: PyTree, mesh: Mesh, size_limit: int) -> PyTree:
    """A NamedSharding for every leaf of a tree of arrays or shapes."""

    def place(path: KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh, size_limit))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are divided over the data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def hand_over(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """For `layers.placement.placing`: activations (B, T, d) are divided as examples are, in the
    backward pass as well.
    """
    where = batch_sharding(mesh)

    def place(x: jax.Array) -> jax.Array:
        if x.shape[0] % batch_shards(mesh):
            return x
        return jax.lax.with_sharding_constraint(x, where)

    return place


@functools.cache
def packed_gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """For `layers.placement.placing`: ternary weights, int8 (I, O), are packed where they lie, sent
    to every device at 2 bits each, and unpacked there.
    """

    def gather(weights: jax.Array) -> jax.Array:
        if weights.shape[0] % (4 * mesh.shape["fsdp"]):
            return weights  # a byte would hold weights of two devices
        whole = jax.lax.with_sharding_constraint(to_bytes(weights), NamedSharding(mesh, P()))
        return from_bytes(whole)

    return gather


def put_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's share of a batch, (B / processes, ...), as global arrays (B, ...)."""
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }


def batch_shards(mesh: Mesh) -> int:
    """The number of parts a batch is divided into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, mesh: Mesh, what: str = "batch_size") -> None:
    """Raises InputError unless the batch divides over the mesh."""
    shards = batch_shards(mesh)
    if batch_size % shards:
        raise InputError(
            f"{what}: {batch_size} cannot be divided over {shards} devices (mesh.data x "
            "mesh.fsdp); "
            f"use {batch_size - batch_size % shards or shards} or "
            f"{batch_size + shards - batch_size % shards}, or a smaller --config.mesh.data."
        )
