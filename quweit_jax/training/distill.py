"""What a student learns from a teacher: its logits, its hidden states, and, block by block, what
its channel mixers make of the same input.

Dimensions: B batch, T tokens (absent for classifiers), V vocabulary or classes, d model width.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from quweit_jax.config import SECTIONS
from quweit_jax.errors import InputError, check_above_zero
from quweit_jax.layers.integer import Quantized
from quweit_jax.training import losses, state

# How every model calls its blocks and, inside of one, the channel mixer and the norm before it.
_BLOCK = re.compile(r"block_\d+")
_MIXER, _NORM = "mlp", "mlp_norm"


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How much a student heeds its teacher (`config.teacher`).

    weight: w of the loss (1 - w) * cross-entropy + w * divergence of the logits, 0 to 1.
    temperature: by which both logits are divided; the divergence is multiplied by its square.
    blocks: times the mean squared error of the hidden states after each block, added over blocks; 0
      for none.
    fit_steps: the first steps, in which nothing but new channel mixers is trained, each to do what
      the teacher's does with the teacher's own hidden states; 0 for none.
    solve_batches: the first batches, on which new LookupGLUs and ternary projections are computed
      before the first step, see `training.solve` and `training.solve_ternary`; 0 for none.
    """

    weight: float = 0.5
    temperature: float = 1.0
    blocks: float = 0.0
    fit_steps: int = 0
    solve_batches: int = 0

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise InputError(f"distill.weight: expected 0 <= weight <= 1, found {self.weight}.")
        check_above_zero("distill.temperature", self.temperature)
        if not 0 <= self.blocks < math.inf:
            raise InputError(f"distill.blocks: expected 0 or more, found {self.blocks}.")
        for name in ("fit_steps", "solve_batches"):
            if getattr(self, name) < 0:
                raise InputError(
                    f"distill.{name}: expected 0 (none) or more, found {getattr(self, name)}."
                )


SECTIONS["distill"] = lambda _: DistillConfig


def divergence(logits: Array, taught: Array, temperature: float = 1.0) -> Array:
    """T^2 KL(softmax(taught / T) || softmax(logits / T)), the mean over targets, float32.

    logits, taught: (B, ..., V), of the student and the teacher.
    """
    ours, theirs = (
        jax.nn.log_softmax(values.astype(jnp.float32) / temperature) for values in (logits, taught)
    )
    each = optax.losses.kl_divergence_with_log_targets(ours, theirs)
    return temperature**2 * each.mean()


def mean_error(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> Array:
    """The mean squared error of the hidden states after each block, added over blocks, float32."""
    squares = [jnp.square(_float(ours[name]) - _float(theirs[name])).mean() for name in theirs]
    return sum(squares, jnp.zeros(()))


def normalized_error(ours: Array, theirs: Array) -> Array:
    """The squared error in units of the teacher's own squares, float32: 1 for an answer of 0."""
    ours, theirs = _float(ours), _float(theirs)
    squares = jnp.maximum(jnp.square(theirs).sum(), jnp.finfo(jnp.float32).tiny)
    return jnp.square(ours - theirs).sum() / squares


def _float(values: Array) -> Array:
    return values.astype(jnp.float32)


def hidden_states(seen: Mapping[str, Any]) -> dict[str, Array]:
    """{'block_0': what it gave, (B, T, d)} of the collection that `watch_blocks` fills."""
    last = {name: seen[name]["__call__"][-1] for name in seen if _BLOCK.fullmatch(name)}
    return {name: x.real if isinstance(x, Quantized) else x for name, x in last.items()}


def watch_blocks(module: nn.Module, method: str) -> bool:
    """For `capture_intermediates` of `model.apply`: the outputs of blocks."""
    path = module.path
    return method == "__call__" and len(path) == 1 and bool(_BLOCK.fullmatch(path[0]))


def branches(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    inputs: Array | np.ndarray,
    given: Mapping[str, Array] | None = None,
) -> dict[str, tuple[Array, Array]]:
    """What each block's channel mixer reads, before its norm, and what it answers, both (B, T, d).

    given: what those of some blocks read instead. Under `jax.jit` nothing else is computed then.
    """
    params, given = variables["params"], given or {}

    def watch(
        call: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], context: Any
    ) -> Any:
        block, _, part = "/".join(context.module.path).partition("/")
        if context.method_name != "__call__" or part not in (_MIXER, _NORM):
            return call(*args, **kwargs)
        if part == _NORM or _NORM not in params[block]:
            if block in given:
                args = (given[block].astype(args[0].dtype), *args[1:])
            context.module.sow("intermediates", "branch_reads", args[0])
        answer = call(*args, **kwargs)
        if part == _MIXER:
            context.module.sow("intermediates", "branch_answers", answer)
        return answer

    with nn.intercept_methods(watch):
        _, moved = model.apply(variables, inputs, mutable=["intermediates"])
    seen: Any = moved.get("intermediates", {})
    found: dict[str, tuple[Array, Array]] = {}
    for block in (name for name in seen if _MIXER in seen[name] and _BLOCK.fullmatch(name)):
        first = seen[block][_NORM if _NORM in params[block] else _MIXER]
        answer = seen[block][_MIXER]["branch_answers"]
        found[block] = first["branch_reads"][-1], answer[-1]
    return found


def new_mixers(params: PyTree, taught: PyTree) -> tuple[str, ...]:
    """The blocks in which student and teacher both have a channel mixer, and of other shapes."""

    def shapes(tree: PyTree) -> PyTree:
        return jax.tree.map(jnp.shape, tree)

    both = [name for name in params if _BLOCK.fullmatch(name) and name in taught]
    both = [name for name in both if _MIXER in params[name] and _MIXER in taught[name]]
    return tuple(
        name for name in both if shapes(params[name][_MIXER]) != shapes(taught[name][_MIXER])
    )


def distilled(model: nn.Module, teacher: nn.Module, config: DistillConfig) -> state.Objective:
    """(1 - w) cross-entropy + w divergence, and the error of hidden states; reads the teacher's
    variables as its last argument.

    Metrics beside those of the cross-entropy: 'distill/kl' and, if asked for, 'distill/blocks'.
    """
    watched: dict[str, Any] = {"capture_intermediates": watch_blocks} if config.blocks else {}

    def objective(
        variables: PyTree, inputs: Array, targets: Array, key: Array, taught: PyTree
    ) -> tuple[Array, dict[str, Array], PyTree]:
        answer, seen = teacher.apply(taught, inputs, mutable=[], **watched)
        logits, moved = state.apply_training(model, variables, inputs, key, **watched)
        moved = dict(moved)
        ours = moved.pop("intermediates", {})
        metrics = losses.means(logits, targets)
        metrics["distill/kl"] = divergence(logits, answer, config.temperature)
        loss = (1 - config.weight) * metrics["loss"] + config.weight * metrics["distill/kl"]
        if config.blocks:
            theirs = hidden_states(seen["intermediates"])
            metrics["distill/blocks"] = mean_error(hidden_states(ours), theirs)
            loss = loss + config.blocks * metrics["distill/blocks"]
        return loss, metrics, moved

    return objective


def fitted(model: nn.Module, teacher: nn.Module) -> state.Objective:
    """The normalized errors of new channel mixers, added over blocks, each on what the teacher's
    own reads; reads the teacher's variables as its last argument.

    Metrics beside those of the cross-entropy: 'distill/fit'.
    """

    def objective(
        variables: PyTree, inputs: Array, targets: Array, key: Array, taught: PyTree
    ) -> tuple[Array, dict[str, Array], PyTree]:
        lesson = branches(teacher, taught, inputs)
        blocks = new_mixers(variables["params"], taught["params"])
        given = {block: lesson[block][0] for block in blocks}
        ours = branches(model, variables, inputs, given)
        each = [normalized_error(ours[block][1], lesson[block][1]) for block in blocks]
        loss = sum(each, jnp.zeros(()))
        # told beside it, so that a row's loss means the same in every step
        logits = model.apply(jax.lax.stop_gradient(variables), inputs)
        metrics = losses.means(logits, targets)  # type: ignore[arg-type]
        return loss, metrics | {"distill/fit": loss}, {}

    return objective


def trains_in_fit(blocks: Sequence[str]) -> Callable[[KeyPath], bool]:
    """Whether the parameter at a path is one of the channel mixers in `blocks`."""
    return lambda path: (
        [getattr(part, "key", "") for part in path[:2]] in ([block, _MIXER] for block in blocks)
    )
