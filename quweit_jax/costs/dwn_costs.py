"""One example through a plain weightless classifier (DWN), from its config.

Dimensions: F features, L tables, C classes.
"""

from __future__ import annotations

from quweit_jax.costs.parts import FLOAT, lookup_layer, packed_bits
from quweit_jax.layers.lookup import LearnableReduction
from quweit_jax.models.dwn import DWNConfig
from quweit_jax.ops.counts import BYTES, Elementwise, LayerCosts


def dwn(config: DWNConfig, features: int) -> list[LayerCosts]:
    """Thermometer of float32 inputs, tables of one bit an entry, sums of bits (or a pyramid of
    tables whose top holds float32 scores).
    """
    c = config
    bits, held = (
        features * c.thermometer_bits,
        (features if c.per_feature else 1) * c.thermometer_bits * BYTES[FLOAT],
    )
    layers = [
        LayerCosts(
            "thermometer",
            "thermometer",
            comparisons=bits,
            bytes_moved={
                "weights": held,
                "activations": features * BYTES[FLOAT] + packed_bits(bits),
            },
            bytes_stored={FLOAT: held},
        )
    ]
    for i, count in enumerate(c.num_luts):
        learned = i == 0 and c.mapping in ("learnable", "candidates")
        candidates = c.candidates if c.mapping == "candidates" else None
        layers.append(
            lookup_layer(
                f"luts_{i}", 1, bits, count, c.lut_inputs, learned=learned, candidates=candidates
            )
        )
        bits = count
    if c.reduction == "group_sum":
        return [*layers, _group_sum(bits, c.num_classes)]
    widths = LearnableReduction(c.num_classes, c.lut_inputs).widths(bits)
    for i, count in enumerate(widths):
        layers.append(
            lookup_layer(
                f"reduction/luts_{i}", 1, bits, count, c.lut_inputs, real=i == len(widths) - 1
            )
        )
        bits = count
    return layers


def _group_sum(bits: int, classes: int) -> LayerCosts:
    """Bits counted in the smallest integers that hold a group's count; the scores divided by tau, a
    constant, in float32.
    """
    integer = "int8" if -(-bits // classes) < 2**8 else "int16"
    return LayerCosts(
        "reduction",
        "head",
        additions={integer: bits},
        elementwise=Elementwise({FLOAT: classes}),
        bytes_moved={"activations": packed_bits(bits) + classes * BYTES[FLOAT]},
    )
