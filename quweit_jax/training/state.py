"""What a run carries from step to step, and the two compiled functions that move it.

Dimensions: B batch, A accumulation steps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from quweit_jax.data.augment import AugmentConfig
from quweit_jax.layers.placement import placing
from quweit_jax.layers.readout import Pieces
from quweit_jax.models import stack
from quweit_jax.ops.kernels.choice import divided
from quweit_jax.training import losses, mixing, optimizers, sharding

# Collections that a model changes while it is trained: the running ranges of integer models.
MUTABLE = ("ranges",)


@flax.struct.dataclass
class TrainState:
    """Everything that is trained or needed to go on bit for bit (the data iterator's state is saved
    beside it).

    constants: the model's collections other than params (wiring, and ranges, which training moves
    on). ema: averaged parameters, or None. rng: uint32 key data.
    """

    step: Array
    params: PyTree
    constants: PyTree
    opt_state: PyTree
    ema: PyTree
    rng: Array

    def variables(self, averaged: bool = True) -> dict[str, PyTree]:
        """For `model.apply`: the averaged parameters if there are any (and they are wanted)."""
        return {
            "params": self.ema if averaged and self.ema is not None else self.params,
            **self.constants,
        }


Batch = dict[str, Array]
TrainStep = Callable[..., tuple[TrainState, Batch]]
# (variables, inputs, targets, a key for dropout, what else the step is given) -> (the loss, metrics
# with 'loss' and 'accuracy', the collections that were moved)
Objective = Callable[..., tuple[Array, dict[str, Array], PyTree]]
EvalStep = Callable[[Mapping[str, PyTree], Batch], Batch]


def make_init(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int, ema: bool
) -> Callable[[Array], TrainState]:
    """A function from example inputs to a first state; parameters and dropout draw from different
    streams of the seed.
    """

    def init(inputs: Array) -> TrainState:
        init_key, step_key = jax.random.split(jax.random.key(seed))
        variables = dict(initialize(model, init_key, inputs))
        params = variables.pop("params")
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            constants=variables,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema else None,
            rng=jax.random.key_data(step_key),
        )

    return init


def initialize(model: nn.Module, key: Array, inputs: Array) -> dict[str, PyTree]:
    """`model.init`; a model that scans its blocks starts where one with a module a block does."""
    drawn = dict(stack.unscanned(model).init(key, inputs))
    if not stack.is_scanned(model):
        return drawn
    return stack.stacked(drawn, stack.kinds_of_blocks(model))


def init_state(
    init: Callable[[Array], TrainState],
    inputs: Array | np.ndarray | jax.ShapeDtypeStruct,
    mesh: Mesh,
    *,
    size_limit: int = 2**18,
) -> TrainState:
    """A first state, made in place on the mesh: no host ever holds a whole large model. `inputs`
    also fits the thermometers. init: of `make_init`, traced once for this and `abstract_state`.
    """
    abstract = abstract_state(init, inputs, mesh, size_limit=size_limit)
    where = jax.tree.map(lambda s: s.sharding, abstract)
    return jax.jit(init, out_shardings=where)(inputs)


def abstract_state(
    init: Callable[[Array], TrainState],
    inputs: Array | np.ndarray | jax.ShapeDtypeStruct,
    mesh: Mesh,
    *,
    size_limit: int = 2**18,
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`, without making it: what a restore needs."""
    shapes = jax.eval_shape(init, inputs)
    shardings = sharding.shardings_for(shapes, mesh, size_limit)
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
    )


def replace_variables(state: TrainState, variables: Mapping[str, PyTree]) -> TrainState:
    """The state with other variables of the same shapes, placed as the old ones are; the
    optimizer's state stays.
    """

    def place(old: PyTree, new: PyTree) -> PyTree:
        return jax.tree.map(
            lambda o, n: jax.device_put(jnp.asarray(n, o.dtype), o.sharding), old, new
        )

    params = place(state.params, variables["params"])
    constants = {name: place(old, variables[name]) for name, old in state.constants.items()}
    ema = None if state.ema is None else place(state.ema, variables["params"])
    return state.replace(params=params, constants=constants, ema=ema)  # type: ignore[attr-defined]


def _mean_gradients(grad_fn: Callable[..., PyTree], grad_accum: int) -> Callable[..., PyTree]:
    """`grad_fn` of (params, constants, batch, key, ...), a batch in `grad_accum` parts in turn.

    What it gives are means over the parts, of the ranges too: each part moves them on from where
    the step began.
    """
    if grad_accum == 1:
        return grad_fn

    def gradients(
        params: PyTree, constants: PyTree, batch: Batch, key: Array, *more: PyTree
    ) -> PyTree:
        micro = {
            k: v.reshape(-1, grad_accum, *v.shape[1:]).swapaxes(0, 1) for k, v in batch.items()
        }

        def add(total: PyTree, part: tuple[Batch, Array]) -> tuple[PyTree, None]:
            found = grad_fn(params, constants, *part, *more)
            return jax.tree.map(lambda t, g: t + g / grad_accum, total, found), None

        first = jax.tree.map(lambda v: v[0], micro)
        shapes = jax.eval_shape(grad_fn, params, constants, first, key, *more)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (micro, jax.random.split(key, grad_accum)))[0]

    return gradients


def apply_training(
    model: nn.Module, variables: Mapping[str, PyTree], inputs: Array, key: Array, **options: Any
) -> tuple[Array, PyTree]:
    """The logits of a training step, with dropout drawn from `key`, and the collections moved;
    options: of `model.apply`.
    """
    mutable = [name for name in MUTABLE if name in variables]
    return model.apply(  # type: ignore[return-value]
        variables, inputs, train=True, mutable=mutable, rngs={"dropout": key}, **options
    )


def cross_entropy(model: nn.Module, pieces: int = 1) -> Objective:
    """What is learned without a teacher: the mean cross-entropy.

    pieces: in which the logits of a language model are made and read, see `layers.readout`.
    """

    def objective(
        variables: PyTree, inputs: Array, targets: Array, key: Array
    ) -> tuple[Array, dict[str, Array], PyTree]:
        if pieces == 1:
            logits, moved = apply_training(model, variables, inputs, key)
            metrics = losses.means(logits, targets)
        else:
            wanted = Pieces(pieces, targets, losses.cross_entropy)
            sums, moved = apply_training(model, variables, inputs, key, pieces=wanted)
            metrics = losses.means_of(sums)  # type: ignore[arg-type]
        return metrics["loss"], metrics, moved

    return objective


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    ema: float = 0.0,
    grad_accum: int = 1,
    state_shardings: PyTree = None,
    mesh: Mesh | None = None,
    pack_ternary: bool = False,
    augment: AugmentConfig | None = None,
    spectral_penalty: float = 0.0,
    comparator_penalty: float = 0.0,
    objective: Objective | None = None,
    trains: Callable[[KeyPath], bool] | None = None,
) -> TrainStep:
    """The jitted step: (state, batch) -> (state, metrics). The state's buffers are reused
    (donated).

    pack_ternary: see `MeshConfig`. augment: for classifiers, how batches are mixed and labels
    smoothed. spectral_penalty, comparator_penalty: see `OptimizerConfig`; the metrics are without
    them. objective: what is made small, the cross-entropy if None; what else it reads the step is
    given after the batch. trains: says of a parameter's path whether it may move (None: all).

    metrics: 'loss' and 'accuracy' (means over the batch), what else the objective tells,
    'grad_norm', 'grad_norm/<group>' and 'update_norm/<group>', float32 scalars. Finite metrics mean
    a finite new state.
    """
    objective = objective or cross_entropy(model)

    def loss_fn(
        params: PyTree, constants: PyTree, batch: Batch, key: Array, *more: PyTree
    ) -> tuple[Array, tuple[dict[str, Array], PyTree]]:
        inputs, targets = batch["inputs"], batch["targets"]
        if augment is not None and mixing.mixes(augment):
            key, mix_key = jax.random.split(key)
            inputs, targets = mixing.mix(
                inputs, targets, model.config.num_classes, augment, mix_key
            )  # type: ignore[attr-defined]
        variables = {"params": params, **constants}
        with _placed(mesh, pack_ternary):
            loss, metrics, moved = objective(variables, inputs, targets, key, *more)
        if spectral_penalty:
            loss = loss + spectral_penalty * optimizers.spectral_penalty(params)
        if comparator_penalty:
            loss = loss + comparator_penalty * optimizers.comparator_penalty(params, constants)
        return loss, (metrics, moved)

    gradients = _mean_gradients(jax.grad(loss_fn, has_aux=True), grad_accum)

    def step(state: TrainState, batch: Batch, *more: PyTree) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        grads, (metrics, moved) = gradients(state.params, state.constants, batch, key, *more)
        norms = optimizers.group_norms(grads)
        metrics |= {"grad_norm": jnp.sqrt(sum(n**2 for n in norms.values()))} | {
            f"grad_norm/{g}": n for g, n in norms.items()
        }
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        if trains is not None:
            updates = _only(updates, trains)
        metrics |= {f"update_norm/{g}": n for g, n in optimizers.group_norms(updates).items()}
        params = optax.apply_updates(state.params, updates)
        average = (
            None
            if state.ema is None
            else jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, state.ema, params)
        )
        constants = {**state.constants, **moved}
        after = dict(params=params, constants=constants, opt_state=opt_state, ema=average)
        return state.replace(step=state.step + 1, **after), metrics  # type: ignore[attr-defined]

    if state_shardings is None or mesh is None:
        return jax.jit(step, donate_argnums=0)
    placed = (state_shardings, NamedSharding(mesh, P()))
    return jax.jit(step, donate_argnums=0, out_shardings=placed)


def _only(updates: PyTree, trains: Callable[[KeyPath], bool]) -> PyTree:
    """The updates of parameters that may move, and zeros for the others, which then do not
    decay.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, update: update if trains(path) else jnp.zeros_like(update), updates
    )


@contextlib.contextmanager
def _placed(mesh: Mesh | None, pack_ternary: bool) -> Iterator[None]:
    """What is traced inside divides its activations as a mesh of several devices divides batches,
    kernels too, and ternary weights travel packed.
    """
    if mesh is None:
        yield
        return
    place = packed = None
    if sharding.batch_shards(mesh) > 1:
        place = sharding.hand_over(mesh)
        if pack_ternary and mesh.shape["fsdp"] > 1 and mesh.shape["tensor"] == 1:
            packed = sharding.packed_gather(mesh)
    with placing(place, packed), divided(mesh, *sharding.BATCH_AXES):
        yield


def make_eval_step(
    apply: Callable[..., Any], mesh: Mesh | None = None, pieces: int = 1
) -> EvalStep:
    """The jitted evaluation of one batch with `weights`: (variables, batch) -> the sums of
    `losses.cross_entropy`.

    apply: (variables, inputs) -> logits, such as `model.apply`. mesh: on which batches are divided.
    pieces: in which the logits of a language model are made, see `layers.readout`.
    """

    def step(variables: Mapping[str, PyTree], batch: Batch) -> Batch:
        inputs, targets, weights = batch["inputs"], batch["targets"], batch["weights"]
        summed = functools.partial(losses.cross_entropy, weights=weights)
        with _placed(mesh, False):
            if pieces > 1:
                return apply(variables, inputs, pieces=Pieces(pieces, targets, summed))
            return summed(apply(variables, inputs), targets)

    return jax.jit(step)


def mean_of_sums(sums: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """Adds up batches' sums and divides: {'loss', 'accuracy', 'count'}, in double precision."""
    totals = {"loss": 0.0, "correct": 0.0, "count": 0.0}
    for one in sums:
        for key in totals:
            totals[key] += float(one[key])
    loss, correct, count = totals.values()
    return {"loss": loss / max(count, 1), "accuracy": correct / max(count, 1), "count": count}
