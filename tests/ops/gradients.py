"""Values and every gradient of a function in one compiled call."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from tests.compiled import quick_jit


def value_and_vjp(
    function: Callable[..., Any], inputs: Sequence[Any], grad: Any
) -> tuple[Any, ...]:
    """(function(*inputs), the gradient to each input for the upstream gradient `grad`)."""

    def run(inputs, grad):
        out, pullback = jax.vjp(function, *inputs)
        return out, *pullback(grad)

    return quick_jit(run)(tuple(inputs), grad)
