"""`jax.jit` for small test functions: most of a test's time is compiling, and the compiler's costly
passes change no result that matters.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def quick_jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit(function, **options)`, compiled fast rather than to run fast."""
    return jax.jit(function, compiler_options=CHEAP, **options)


def decoded(module: Any, params: Any, x: Any, pieces: Iterable[int]) -> tuple[Any, Any, Any]:
    """A mixer's outputs for x (B, T, d), read in pieces of so many tokens with a cache; the cache
    as it was at the start, and as it is at the end.
    """
    begin = quick_jit(functools.partial(module.init, decode=True))
    cache = start = jax.device_get(begin(jax.random.key(0), x[:, :1])["cache"])
    step = quick_jit(
        lambda cache, x: module.apply(
            {"params": params, "cache": cache}, x, decode=True, mutable=["cache"]
        )
    )
    found, at = [], 0
    for size in pieces:
        out, changed = step(cache, x[:, at : at + size])
        found, cache, at = [*found, out], changed["cache"], at + size
    return np.concatenate(found, 1), start, cache
