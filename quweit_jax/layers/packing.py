"""The packed form: what a layer that deploys differently from how it trains has in common with
others.

A packable layer computes from `params` while it is trained. Applied with `mutable=["packed"]` it
also writes the constants of its deployed form into the `packed` collection; applied to variables
that have them it computes from those alone. `quweit_jax.deploy.pack` does the first, `model.apply`
the second.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from quweit_jax.ops.packed_lut import Bits


class Packable(nn.Module):
    """A layer with a packed form: writes its constants with `write`, reads them with `read`."""

    @property
    def is_packing(self) -> bool:
        """Whether the constants of the packed form are being written down."""
        return self.is_mutable_collection("packed") and not self.is_initializing()

    @property
    def is_packed(self) -> bool:
        """Whether the layer has its packed form and is to compute from it."""
        held = self.variables.get("packed", {}) if not self.is_packing else {}
        return any(not isinstance(value, Mapping) for value in held.values())

    def write(self, **constants: Array) -> None:
        """Writes constants of the packed form down, if it is being made."""
        if self.is_packing:
            for name, value in constants.items():
                self.put_variable("packed", name, value)

    def read(self, *names: str) -> list[Array]:
        """The constants of these names in the packed form."""
        return [jnp.asarray(self.get_variable("packed", name)) for name in names]

    @property
    def is_showing(self) -> bool:
        """Whether bits are put into the collection `intermediates`."""
        return not self.is_initializing() and self.is_mutable_collection("intermediates")

    def show(self, **bits: Array | Bits) -> None:
        """Puts bits, unpacked, into the collection `intermediates`, if that is mutable."""
        if self.is_showing:
            for name, value in bits.items():
                unpacked = value.unpack() if isinstance(value, Bits) else value
                self.sow("intermediates", name, unpacked)
