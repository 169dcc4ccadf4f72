"""AdamW with a group for each kind of parameter, warm-up and cosine decay, clipping, and the
projection of tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jax.tree_util import FlattenedIndexKey, KeyPath
from jaxtyping import PyTree

from quweit_jax.config import SECTIONS
from quweit_jax.errors import InputError, check_choice
from quweit_jax.layers.groups import group_of, name_of
from quweit_jax.models import registry  # noqa: F401 - models declare groups of their own
from quweit_jax.ops import sums, wiring


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer's settings.

    name: one of OPTIMIZERS.
    learning_rate: the peak, reached after `warmup` steps and followed by a cosine down to min_ratio
      of it (or 'constant').
    tables_learning_rate, scores_..., thresholds_..., vectors_...: of those groups (None:
      learning_rate), same schedule.
    tables_min_ratio: where the cosine of tables and scores ends. Tables, scores and thresholds have
      no weight decay.
    spectral_penalty: times the tables' squared spectral norm (arXiv 2410.11112), added to the loss.
    comparator_penalty: times the inputs that one slot of a learned wiring reads alone, each a
      comparator in hardware (`ops.wiring.marginal_inputs`), added to the loss.
    clip: of the global gradient norm, 0 for none. ema: decay of the parameters' moving average, 0
    for none.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup: int = 100
    schedule: str = "cosine"
    min_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    ema: float = 0.0
    tables_learning_rate: float | None = 3e-2
    tables_min_ratio: float = 0.1
    tables_beta2: float = 0.999
    scores_learning_rate: float | None = 3e-2
    thresholds_learning_rate: float | None = None
    vectors_learning_rate: float | None = 4e-3
    spectral_penalty: float = 0.0
    comparator_penalty: float = 0.0

    def __post_init__(self):
        check_choice("optimizer.name", self.name, OPTIMIZERS)
        check_choice("optimizer.schedule", self.schedule, ("cosine", "constant"))
        if not self.learning_rate > 0:
            raise InputError(
                f"optimizer.learning_rate: expected a positive number, found {self.learning_rate}."
            )
        for name in ("beta1", "beta2", "tables_beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"optimizer.{name}: expected 0 <= {name} < 1, found {getattr(self, name)}."
                )
        for name in ("tables", "scores", "thresholds", "vectors"):
            rate = getattr(self, f"{name}_learning_rate")
            if rate is not None and not rate >= 0:
                raise InputError(
                    f"optimizer.{name}_learning_rate: expected 0 or more, or none for "
                    f"learning_rate, found {rate}."
                )
        for name in (
            "warmup",
            "min_ratio",
            "tables_min_ratio",
            "eps",
            "weight_decay",
            "clip",
            "spectral_penalty",
            "comparator_penalty",
        ):
            if not getattr(self, name) >= 0:
                raise InputError(
                    f"optimizer.{name}: expected 0 or more, found {getattr(self, name)}."
                )


SECTIONS["optimizer"] = lambda _: OptimizerConfig


def groups_of(params: PyTree) -> PyTree:
    """The group of each parameter, as a tree of the same structure: dicts, an nnx.State, or either
    with Flax's boxes around the arrays.

    Raises:
      InputError: there is something that cannot be trained, such as whole numbers or random keys,
        or a tree without names, such as NNX's flat states.
    """

    def group(path: KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> str:
        dtype = getattr(leaf, "dtype", jnp.float32)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise InputError(
                f"optimizer: expected parameters of real numbers, found {dtype} at "
                f"{jax.tree_util.keystr(path)}; give variables['params'] alone, of NNX "
                "nnx.state(model, nnx.Param)."
            )
        if any(isinstance(key, FlattenedIndexKey) for key in path) and not name_of(path):
            raise InputError(
                f"optimizer: expected parameters with names, found a {type(params).__name__} with "
                "numbers alone, of which none can be told to be a table; give the nnx.State, or a "
                "dict."
            )
        return group_of(path, leaf)

    return jax.tree_util.tree_map_with_path(group, params)


def make_schedule(
    config: OptimizerConfig, peak: float, steps: int, min_ratio: float
) -> optax.Schedule:
    """Linear warm-up to `peak`, then a cosine to min_ratio * peak (or constant)."""
    warmup = min(config.warmup, max(0, steps - 1))
    rise = optax.linear_schedule(peak / (warmup + 1), peak, max(1, warmup))
    fall = (
        optax.cosine_decay_schedule(peak, max(1, steps - warmup), min_ratio)
        if config.schedule == "cosine"
        else optax.constant_schedule(peak)
    )
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then for each group its own Adam(W); tables stay in [-1, 1]."""
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    transforms = OPTIMIZERS[config.name](config, steps)
    by_group = optax.multi_transform(transforms, groups_of)
    return optax.chain(clip, by_group, keep_tables_in_range(required=False))


def adamw(config: OptimizerConfig, steps: int) -> dict[Hashable, optax.GradientTransformation]:
    """AdamW with a rate, a decay and an end of the schedule for each group."""

    def adam(
        rate: float | None,
        decay: float,
        beta2: float = config.beta2,
        min_ratio: float = config.min_ratio,
    ) -> optax.GradientTransformation:
        peak = config.learning_rate if rate is None else rate
        schedule = make_schedule(config, peak, steps, min_ratio)
        return optax.adamw(schedule, config.beta1, beta2, config.eps, weight_decay=decay)

    table_like = {"beta2": config.tables_beta2, "min_ratio": config.tables_min_ratio}
    return {
        "tables": adam(config.tables_learning_rate, 0.0, **table_like),
        "scores": adam(config.scores_learning_rate, 0.0, **table_like),
        "thresholds": adam(config.thresholds_learning_rate, 0.0),
        "vectors": adam(config.vectors_learning_rate, config.weight_decay),
        "decay": adam(None, config.weight_decay),
        "no_decay": adam(None, 0.0),
    }


# By `optimizer.name`: (config, steps) -> a transformation for each of `groups.GROUPS`.
OPTIMIZERS = {"adamw": adamw}


def keep_tables_in_range(*, required: bool = True) -> optax.GradientTransformation:
    """Changes updates so that look-up tables stay in [-1, 1] (arXiv 2410.11112); put it last in a
    chain.

    Tables are the parameters that layers declare as such, those named 'tables', in any tree: dicts,
    an nnx.State, with Flax's boxes around arrays, or stacked by `nn.scan`. After
    `optax.apply_updates` they are what clipping the sum would have made them, or the number next to
    that.

    Args:
      required: whether parameters without any table are an error.

    Raises:
      InputError: from `init`, no parameter is a table; from `update`, no `params` were given.
    """

    def init(params: PyTree) -> optax.EmptyState:
        paths = jax.tree_util.tree_leaves_with_path(params)
        if required and not any(group_of(*leaf) == "tables" for leaf in paths):
            raise InputError(
                "keep_tables_in_range: expected parameters named 'tables', as look-up layers have, "
                "found none; leave it out for a model without look-up tables."
            )
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        if params is None:
            raise InputError(
                "keep_tables_in_range: pass the parameters, update(grads, state, params)."
            )

        def keep(path: KeyPath, u: jax.Array, p: jax.Array) -> jax.Array:
            if group_of(path, p) != "tables":
                return u
            # p + (1 - p) rounds to 1 or to the number below it, never beyond
            inside = jnp.abs(p + u) <= 1
            return jnp.where(inside, u, jnp.sign(p + u) - p)

        return jax.tree_util.tree_map_with_path(keep, updates, params), state

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def spectral_penalty(params: PyTree) -> jax.Array:
    """The squared norm of all tables' Walsh-Hadamard coefficients, a scalar; 0 without tables."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    tables = [leaf for path, leaf in leaves if group_of(path, leaf) == "tables"]
    return sum(map(sums.spectral_penalty, tables), jnp.zeros(()))


def comparator_penalty(params: PyTree, constants: PyTree) -> jax.Array:
    """`ops.wiring.marginal_inputs` of all learned wirings, a scalar; 0 without any.

    params: with their names. constants: the collections beside them, of which 'wiring' has the
    candidates; of layers that are scanned both have a leading dimension.
    """
    trained: dict[tuple[str, ...], Any] = flatten_dict(dict(params))
    held: dict[tuple[str, ...], Any] = flatten_dict(dict(constants.get("wiring", {})))
    total = jnp.zeros(())
    for path, scores in trained.items():
        if path[-1] == "scores":
            given = (scores, held.get((*path[:-1], "candidates")))
            count = wiring.marginal_inputs
            for _ in range(scores.ndim - 2):
                count = jax.vmap(count)
            total = total + jnp.sum(count(*given))
    return total


def group_norms(tree: PyTree) -> dict[str, jax.Array]:
    """The Euclidean norm of each group that has members, float32."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        group = group_of(path, leaf)
        squares[group] = squares.get(group, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {group: jnp.sqrt(total) for group, total in squares.items()}
