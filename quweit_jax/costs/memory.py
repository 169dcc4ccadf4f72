"""Bytes of memory: of a training step as it is compiled, of inference from counted costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jaxtyping import PyTree

from quweit_jax.errors import InputError
from quweit_jax.ops.counts import Costs, stored_bytes


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device while a training step runs.

    parameters; constants: wiring and ranges; optimizer: its moments; average: of parameters, where
    there is one; batch: the inputs and targets.
    working: what the compiled step holds beside them at its peak: activations, gradients,
    workspace. activations: what the backward pass needs of the forward pass, as traced, before a
    compiler changes it; a part of `working`, or more than it where the compiler saved some.
    """

    parameters: int
    constants: int
    optimizer: int
    average: int
    batch: int
    working: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, the activations as a part of what works."""
        return sum(dataclasses.astuple(self)) - self.activations


@dataclasses.dataclass(frozen=True)
class InferenceMemory:
    """Bytes of inference. weights: as deployed. state: of all texts' caches or recurrent states.
    activations: what the busiest layer reads and writes.
    """

    weights: int
    state: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.state + self.activations


def device_bytes(tree: PyTree) -> int:
    """Of one device's part of all arrays (or shapes and dtypes of arrays) in a tree."""

    def part(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = getattr(leaf, "sharding", None)
        shape = leaf.shape if where is None else where.shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return stored_bytes(jax.tree.map(part, tree))


def kept_for_backward(loss: Callable[..., Array], params: PyTree, *inputs: PyTree) -> int:
    """Bytes of what the gradient of loss(params, *inputs) keeps from the forward to the backward
    pass, parameters and inputs not counted.

    Traced only, so that shapes will do, and the same on every platform. With rematerialization it
    is what the policy keeps.
    """

    def forward(params: PyTree, *inputs: PyTree) -> list[jax.Array]:
        return jax.tree.leaves(jax.vjp(lambda p: loss(p, *inputs), params)[1])

    jaxpr = jax.make_jaxpr(forward)(params, *inputs).jaxpr
    given = {id(variable) for variable in jaxpr.invars}
    kept = {
        id(variable): variable.aval
        for variable in jaxpr.outvars
        if id(variable) not in given and not hasattr(variable, "val")
    }  # constants have one
    return stored_bytes(list(kept.values()))


def of_training(
    state: Any, batch: PyTree, compiled: jax.stages.Compiled, activations: int
) -> TrainingMemory:
    """What a compiled training step needs.

    Args:
      state: a training state (or its shapes) with `params`, `constants`, `opt_state` and `ema`.
        batch: what the step reads.
      compiled: the step, `jit(step).lower(state, batch).compile()`. activations: see
        `kept_for_backward`.

    Raises:
      InputError: the platform's compiler doesn't tell.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise InputError(
            "memory: this platform's compiler does not tell what a program needs; try "
            "JAX_PLATFORMS=cpu."
        )
    return TrainingMemory(
        parameters=device_bytes(state.params),
        constants=device_bytes(state.constants),
        optimizer=device_bytes(state.opt_state),
        average=device_bytes(state.ema),
        batch=device_bytes(batch),
        working=int(analysis.temp_size_in_bytes),
        activations=activations,
    )


def of_inference(costs: Costs, batch: int = 1) -> InferenceMemory:
    """What inference of `batch` images, or of one more token of `batch` texts, needs.

    Raises:
      InputError: a batch of nothing.
    """
    if batch < 1:
        raise InputError(f"batch: expected at least 1, found {batch}.")
    largest = max(layer.bytes_moved.get("activations", 0) for layer in costs.layers)
    weights = sum(costs.bytes_stored.values())
    return InferenceMemory(weights, batch * costs.state_bytes, batch * largest)
