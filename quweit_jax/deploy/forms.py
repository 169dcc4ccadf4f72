"""The deployed form of any trained model: which of the packed forms is its."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from quweit_jax.deploy import integer, packed

Tree = dict[str, Any]


def pack(
    model: nn.Module, variables: Tree, input_shape: tuple[int, ...] = ()
) -> tuple[Tree, dict[str, Any]]:
    """Trained variables -> (those of the deployed form, for `packed.apply`; what they take, by
    name).

    Weightless blocks read 1-bit tables and add int8 vectors, ternary weights have 2 bits, integer
    models compute in integers alone.

    Args:
      input_shape: of one image, (H, W, C), for integer models.

    Raises:
      InputError: an integer model whose activation ranges were never set.
    """
    if integer.is_integer(model):
        constants = integer.pack(model, variables, input_shape)  # type: ignore[arg-type]
        return constants, {"form": "integer", "model_bytes": integer.packed_bytes(constants)}
    small = packed.pack(jax.device_get(variables))
    facts = {}
    if blocks := small["blocks"].values():
        facts = {
            "block_bytes": sum(map(packed.block_bytes, blocks)),
            "dense_mlp_bytes_int8": sum(map(packed.dense_bytes, blocks)),
        }
    return small, {"form": "packed", **facts, "model_bytes": packed.block_bytes(small)}
