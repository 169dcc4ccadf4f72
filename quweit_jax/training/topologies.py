"""Accelerators that are not there, to compile for: TPUs by libtpu, NVIDIA's GPUs by JAX's plugin
for CUDA."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from quweit_jax.errors import InputError, first_line

_GPUS = re.compile(r"([a-z]+\d+[a-z0-9_]*):(?:(\d+)x)?(\d+)")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler asks of a GPU, as its maker publishes it and its driver tells.

    name: the driver's. capability: compute capability. cores: multiprocessors. fpus: float32 units
    of each. threads: of a multiprocessor. shared, shared_block: bytes of shared memory of a
    multiprocessor, and of a block that asks for more than 48 KB. cache: bytes of the L2 cache.
    memory: bytes. bandwidth: of the memory, bytes a second. clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    threads: int
    shared: int
    shared_block: int
    cache: int
    memory: int
    bandwidth: int
    clock: float

    def described(self) -> str:
        """The same as XLA reads it, a GpuTargetConfigProto in text form."""
        major, minor = self.capability
        values = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 * 1024,
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared_block,
            "threads_per_core_limit": self.threads,
            "core_count": self.cores,
            "fpus_per_core": self.fpus,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
            "memory_bandwidth": self.bandwidth,
            "l2_cache_size": self.cache,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
        }
        told = " ".join(f"{key}: {value}" for key, value in values.items())
        capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
        return (
            f'gpu_device_info {{ {capability} {told} }} platform_name: "CUDA" '
            f'device_description_str: "{self.name}"'
        )


_HOPPER = {"capability": (9, 0), "cores": 132, "fpus": 128, "threads": 2048, "clock": 1.98} | {
    "shared": 233_472,
    "shared_block": 232_448,
}
# Of the chips in `training.chips`, those that can be compiled for.
GPUS: dict[str, Gpu] = {
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        fpus=64,
        threads=2048,
        shared=167_936,
        shared_block=166_912,
        cache=41_943_040,
        memory=85_100_000_000,
        bandwidth=2_039_000_000_000,
        clock=1.41,
    ),
    "h100": Gpu(
        **_HOPPER,  # type: ignore[arg-type]
        name="NVIDIA H100 80GB HBM3",
        cache=52_428_800,
        memory=85_045_477_376,
        bandwidth=3_352_320_000_000,
    ),
    "h200": Gpu(
        **_HOPPER,  # type: ignore[arg-type]
        name="NVIDIA H200",
        cache=62_914_560,
        memory=150_000_000_000,
        bandwidth=4_800_000_000_000,
    ),
    "l4": Gpu(
        name="NVIDIA L4",
        capability=(8, 9),
        cores=58,
        fpus=128,
        threads=1536,
        shared=102_400,
        shared_block=101_376,
        cache=50_331_648,
        memory=23_600_000_000,
        bandwidth=300_000_000_000,
        clock=2.04,
    ),
}


def gpu_of(topology: str) -> Gpu | None:
    """The GPU of a topology such as 'h100:8'; None where it names no known GPU."""
    found = _GPUS.fullmatch(topology)
    return GPUS.get(found[1]) if found else None


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of TPUs such as 'v5e:4x4', or of GPUs: 'h100:8', 'h100:2x8' on two hosts. They
    can be compiled for, and nothing else. Without a GPU at hand JAX knows its plugin for CUDA only
    where JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 was set before it first asked for devices.

    Raises:
      InputError: libtpu or JAX's plugin for CUDA isn't there, or knows no such topology.
    """
    import jax
    from jax.experimental import topologies

    gpu = gpu_of(topology)
    options: dict[str, Any] = {"topology_name": topology}
    if gpu is not None:
        found = _GPUS.fullmatch(topology)
        assert found is not None
        shape = f"1x{found[2] or 1}x{found[3]}"
        options = {"topology_name": "", "target_config": gpu.described(), "topology": shape}
    platform = "tpu" if gpu is None else "cuda"
    try:
        return topologies.get_topology_desc(platform=platform, **options).devices
    except Exception as error:
        wanted = "libtpu"
        if gpu is not None:
            version = jax.__version__
            wanted = f"--no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
        raise InputError(
            f"--topology: cannot compile for '{topology}' ({first_line(error)}); pip install "
            f"{wanted}, or give one such as v5e:2x4, h100:8; GPUs known: {', '.join(GPUS)}."
        ) from None
