"""`jax.jit` for small test functions: most of a test's time is compiling, and the compiler's costly
passes change no result that matters.
"""

from collections.abc import Callable
from typing import Any

import jax

CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def quick_jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit(function, **options)`, compiled fast rather than to run fast."""
    return jax.jit(function, compiler_options=CHEAP, **options)
