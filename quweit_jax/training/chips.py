"""What accelerators can do at most, as their makers publish it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """kind: how JAX's `device_kind` begins. peak: dense bfloat16 operations a second. clock: in Hz,
    the peak over what a TPU's matrix units do a cycle; 0 where nothing here needs it.
    """

    kind: str
    peak: float
    clock: float = 0.0


CHIPS = {
    "v4": Chip("TPU v4", 275e12, 1.05e9),
    "v5e": Chip("TPU v5 lite", 197e12, 1.5e9),
    "v5p": Chip("TPU v5", 459e12, 1.75e9),
    "v6e": Chip("TPU v6 lite", 918e12, 1.75e9),
    "a100": Chip("NVIDIA A100", 312e12),
    "h100": Chip("NVIDIA H100", 989e12),
    "h100_pcie": Chip("NVIDIA H100 PCIe", 756e12),
    "h100_nvl": Chip("NVIDIA H100 NVL", 835e12),
    "h200": Chip("NVIDIA H200", 989e12),
    "b200": Chip("NVIDIA B200", 2250e12),
    "l4": Chip("NVIDIA L4", 121e12),
}


def peak_of(device_kind: str) -> float | None:
    """The bfloat16 operations a second of a device by JAX's `device_kind`, None where unknown."""
    known = [chip for chip in CHIPS.values() if f"{device_kind} ".startswith(f"{chip.kind} ")]
    return max(known, key=lambda chip: len(chip.kind)).peak if known else None
