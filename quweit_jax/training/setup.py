"""What a config describes, made: data, model, optimizer and mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from jaxtyping import PyTree

from quweit_jax import models
from quweit_jax.config import Config, from_mapping
from quweit_jax.data.pipeline import Dataset, load
from quweit_jax.data.registry import DataConfig
from quweit_jax.data.tokenizers import Tokenizer
from quweit_jax.errors import InputError, first_line
from quweit_jax.models import stack
from quweit_jax.training import distill, profiling, sharding, solve, state, stores, tracking
from quweit_jax.training.defaults import check_types
from quweit_jax.training.distill import DistillConfig
from quweit_jax.training.optimizers import OptimizerConfig, make_optimizer
from quweit_jax.training.teacher import Teacher

Variables = Mapping[str, PyTree]
_AT_LEAST = {
    1: ("steps", "batch_size", "grad_accum", "log_every", "eval_every", "eval_batch_size")
    + ("checkpoint_every", "keep"),
    0: ("eval_batches", "prefetch", "sample_tokens", "loss_pieces"),
}
_LOGIT_BYTES = 2**28
_NEEDS_TEACHER = (
    "teacher: expected it to be read, as the train command does; give loop.fit "
    "teacher=quweit_jax.commands.train.teacher(config.teacher). Elsewhere go without it, by "
    "--config.teacher= --config.distill.blocks=0 --config.distill.fit_steps=0 "
    "--config.distill.solve_batches=0."
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Data, model, optimizer and mesh of a config, and what needs all of them.

    data: of a language model opened without its corpus, there are a tokenizer but no examples.
    teacher: of a run that has one and is trained, placed on the mesh.
    """

    config: Config
    data: Dataset
    model: nn.Module
    optimizer_config: OptimizerConfig
    optimizer: optax.GradientTransformation
    mesh: Mesh
    data_config: DataConfig
    distill_config: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    teacher: Teacher | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of a language model, None of a classifier."""
        return self.data.tokenizer

    @functools.cached_property
    def init_inputs(self) -> np.ndarray:
        """Inputs to initialize the model on; zeros unless it fits something to them."""
        if self.tokenizer is not None:
            return np.zeros((1, self.config.model.context), np.int32)
        if self.data.image_shape is not None and not getattr(self.model, "fits_inputs", False):
            return np.zeros((1, *self.data.image_shape), np.float32)
        return self.data.fit_batch()

    def loss_pieces(self, batch_size: int) -> int:
        """The pieces in which the logits of so many texts are made: as configured, or the fewest
        that keep a device's within 256 MB.
        """
        context = self.config.model.get("context")
        if self.config.get("loss_pieces") or self.tokenizer is None or context is None:
            return self.config.get("loss_pieces") or 1
        texts = max(1, batch_size // sharding.batch_shards(self.mesh))
        most = max(1, _LOGIT_BYTES // (4 * texts * self.data.outputs))  # tokens of a piece
        return next(n for n in range(1, context + 1) if context % n == 0 and context // n <= most)

    @property
    def eval_batch_size(self) -> int:
        """The configured evaluation batch, rounded up to what the mesh divides."""
        shards = sharding.batch_shards(self.mesh)
        return -(-self.config.eval_batch_size // shards) * shards

    def init_state(
        self, initial: Callable[[Variables], Variables] | None = None
    ) -> state.TrainState:
        """A first state on the mesh; `initial` may replace its freshly drawn {'params': ...,
        'wiring': ...} by others. Mixers that are to be solved for take the place of both.
        """
        fresh = self._state(state.init_state)
        if initial is not None:
            given = initial(stack.unstacked(fresh.variables()))
            if stack.is_scanned(self.model):
                given = stack.stacked(given, stack.kinds_of_blocks(self.model))
            fresh = state.replace_variables(fresh, given)
        if self.teacher is None or not self.distill_config.solve_batches:
            return fresh
        return state.replace_variables(fresh, solve.solved(self, fresh.variables()))

    def unscanned(self) -> Setup:
        """The same for variables that `models.stack.unstacked` gave: what reads a trained model."""
        return dataclasses.replace(self, model=stack.unscanned(self.model))

    def abstract_state(self) -> state.TrainState:
        """Shapes, dtypes and shardings of `init_state`."""
        return self._state(state.abstract_state)

    def with_teacher(self, teacher: Teacher | None) -> Setup:
        """The same with the teacher that the config names, checked and placed.

        Raises:
          InputError: the config names one and none is given, or see `Teacher.placed`.
        """
        if not self.config.get("teacher"):
            return self
        if teacher is None:
            raise InputError(_NEEDS_TEACHER)
        return dataclasses.replace(self, teacher=teacher.placed(self))

    def train_step(self, current: state.TrainState, *, fitting: bool = False) -> state.TrainStep:
        """The jitted training step for a state (or an abstract one) that lies as `current` does,
        which with a teacher reads that one's variables as a third argument.

        fitting: that of the first `distill.fit_steps`.

        Raises:
          InputError: the config names a teacher, and this setup has none.
        """
        pieces = self.loss_pieces(self.config.batch_size // self.config.grad_accum)
        learns: dict[str, Any] = {"objective": state.cross_entropy(self.model, pieces)}
        if self.teacher is not None and fitting:
            new = distill.new_mixers(current.params, self.teacher.variables["params"])
            learns["objective"] = distill.fitted(self.model, self.teacher.model)
            learns["trains"] = distill.trains_in_fit(new)
        elif self.teacher is not None:
            learns["objective"] = distill.distilled(
                self.model, self.teacher.model, self.distill_config
            )
        elif self.config.get("teacher"):
            raise InputError(_NEEDS_TEACHER)
        return state.make_train_step(
            self.model,
            self.optimizer,
            state_shardings=jax.tree.map(lambda leaf: leaf.sharding, current),
            mesh=self.mesh,
            pack_ternary=self.config.mesh.get("pack_ternary", True),
            ema=self.optimizer_config.ema,
            grad_accum=self.config.grad_accum,
            spectral_penalty=self.optimizer_config.spectral_penalty,
            comparator_penalty=self.optimizer_config.comparator_penalty,
            augment=self.data_config.augment if self.data.image_shape is not None else None,
            **learns,
        )

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a training batch."""
        size, where = self.config.batch_size, sharding.batch_sharding(self.mesh)

        def batched(value: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size, *value.shape), value.dtype, sharding=where)

        return {key: batched(np.asarray(value)) for key, value in self.data.train[0].items()}

    @functools.cached_property
    def _init(self) -> Callable[[Array], state.TrainState]:
        """One function for all calls: tracing a large model takes seconds."""
        ema = self.optimizer_config.ema > 0
        return state.make_init(self.model, self.optimizer, self.config.seed, ema)

    def _state(self, make: Callable[..., state.TrainState]) -> state.TrainState:
        limit = self.config.mesh.fsdp_size_limit
        return make(self._init, self.init_inputs, self.mesh, size_limit=limit)


def assemble(
    config: Config,
    tokenizer: Tokenizer | None = None,
    *,
    read_data: bool = True,
    data: Dataset | None = None,
    training: bool = True,
    devices: Sequence[object] | None = None,
    mesh: sharding.MeshConfig | None = None,
) -> Setup:
    """Makes what a config describes; every mistake in it shows here, before any work.

    Args:
      tokenizer: a trained run's. read_data: False leaves the corpus of such a run unread.
      data: instead of what the config names. training: False leaves the training batch unchecked,
        which need not divide over the devices on which a trained run is read back.
      devices: others than this process's, to compile for, all of which the batch has to divide.
      mesh: instead of the config's, which stays the run's.

    Raises:
      InputError: a value is wrong, or the data cannot be read or don't fit the model.
    """
    check_numbers(config)
    optimizer_config = from_mapping(OptimizerConfig, config.optimizer.to_dict(), "optimizer")
    distill_config = _distill_config(config)
    mesh_config = mesh or from_mapping(sharding.MeshConfig, config.mesh.to_dict(), "mesh")
    at_a_time = config.batch_size // config.grad_accum
    fits = at_a_time if training and devices is None else 0
    made_mesh = sharding.make_mesh(mesh_config, devices, fits)
    if config.batch_size % config.grad_accum:
        raise InputError(
            f"grad_accum: batch_size {config.batch_size} cannot be cut into {config.grad_accum} "
            "equal parts."
        )
    if training:
        what = "batch_size / grad_accum" if config.grad_accum > 1 else "batch_size"
        sharding.check_batch(at_a_time, made_mesh, what)
    model_config = config.model.to_dict()
    models.build(model_config, 1)  # a wrong model key shows before the data is read
    reads = data is None and (tokenizer is None or read_data)
    values = stores.brought(config.data.to_dict(), reads=reads)
    data_config = from_mapping(DataConfig, values, "data")
    if data is None and tokenizer is not None and not read_data:
        data = Dataset([], [], tokenizer.vocab_size, "", tokenizer=tokenizer)
    elif data is None:
        data = load(data_config, model_config.get("context"), tokenizer)
        if data.tokenizer is None and "context" in model_config:
            raise InputError(
                f"data.source: {data_config.name or data_config.source} has labelled examples, but "
                f"model {model_config['name']} reads text; use a text source, or another "
                "experiment file."
            )
    made = Setup(
        config,
        data,
        models.build(model_config, data.outputs),
        optimizer_config,
        make_optimizer(optimizer_config, config.steps),
        made_mesh,
        data_config,
        distill_config,
    )
    _check_dtype(made)
    _check_layout(made)
    return made


def _distill_config(config: Config) -> DistillConfig:
    """The section `distill`; InputError if it asks a teacher for something, and there is none."""
    values = config.distill.to_dict() if "distill" in config else {}
    made = from_mapping(DistillConfig, values, "distill")
    asked = [name for name in ("blocks", "fit_steps", "solve_batches") if getattr(made, name)]
    if asked and not config.get("teacher"):
        raise InputError(
            f"distill.{asked[0]}: expected a teacher to learn from, found none; set "
            "--config.teacher, or leave it at 0."
        )
    return made


def _check_layout(setup: Setup) -> None:
    """Checks that pieces divide a text, and that a student's blocks have the teacher's names."""
    config, context = setup.config, setup.config.model.get("context")
    if (pieces := config.get("loss_pieces", 0)) > 1 and (context is None or context % pieces):
        what = f"a text has {context} tokens" if context else "only language models have texts"
        raise InputError(
            f"loss_pieces: expected a number that divides a text, found {pieces}; {what}. "
            "0 chooses."
        )
    if config.get("teacher") and stack.is_scanned(setup.model):
        raise InputError(
            "teacher: a student's blocks are compared one by one; set "
            "--config.model.scan_layers=false."
        )


def _check_dtype(setup: Setup) -> None:
    """Checks that the devices compute in the model's dtype; CPUs have no attention in float16."""
    dtype, platform = setup.config.model.get("dtype"), setup.mesh.devices.flat[0].platform
    if dtype != "float16" or platform != "cpu":
        return
    try:
        jax.jit(setup.model.init_with_output).lower(jax.random.key(0), setup.init_inputs)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"model.dtype: {dtype} cannot be computed on a CPU ({first_line(error)}); use bfloat16 "
            "or float32 here, or a GPU."
        ) from None


def check_numbers(config: Config) -> None:
    """Raises InputError if a number that every experiment has is out of its range."""
    check_types(config)
    for least, names in _AT_LEAST.items():
        for name in names:
            if config[name] < least:
                expected = f"at least {least}" if least else "0 or more"
                raise InputError(f"{name}: expected {expected}, found {config[name]}.")
    tracking.check(config)
    profiling.parse(config.get("profile_steps", ""))
    if not 0 <= config.seed < 2**32:
        raise InputError(
            f"seed: expected a whole number from 0 to {2**32 - 1}, found {config.seed}."
        )
