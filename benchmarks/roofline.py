"""What the machine can do at most, measured in the process that measures the rest: bandwidth of
reading and of copying from memory, and the rate of float32 matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

BYTES = 2**28  # of float32, well beyond any cache
SIDE = 1536
LIMITS = ("read", "copy", "product")


def contenders() -> dict[str, Callable[[], object]]:
    """Calls to time beside others; see `rates`."""
    numbers = jnp.ones(BYTES // 4, jnp.float32)
    matrix = jnp.ones((SIDE, SIDE), jnp.float32)
    read, copy = jax.jit(jnp.sum), jax.jit(lambda x: x + 1)
    product = jax.jit(lambda a: a @ a)
    return {
        "read": lambda: jax.block_until_ready(read(numbers)),
        "copy": lambda: jax.block_until_ready(copy(numbers)),
        "product": lambda: jax.block_until_ready(product(matrix)),
    }


def rates(seconds: dict[str, float]) -> dict[str, float]:
    """GB/s read, GB/s read and written, and GFLOP/s, of seconds that `contenders` took."""
    return {
        "read_GB_per_s": BYTES / seconds["read"] / 1e9,
        "copy_GB_per_s": 2 * BYTES / seconds["copy"] / 1e9,
        "float32_GFLOP_per_s": 2 * SIDE**3 / seconds["product"] / 1e9,
    }
