"""A run directory: config.json, environment.json, tokenizer.json, metrics.jsonl, checkpoints/,
plots/.

Everything downstream (evaluate, generate, report) needs only that directory: `open_run`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from quweit_jax import config as configs
from quweit_jax import models
from quweit_jax.data import pipeline, tokenizers
from quweit_jax.data.registry import DataConfig
from quweit_jax.errors import InputError
from quweit_jax.training import defaults, files, optimizers, sharding, state
from quweit_jax.training.checkpoints import Checkpoints

# What may change when a run goes on; anything else makes it another run.
MAY_CHANGE = (
    "steps",
    "log_every",
    "eval_every",
    "eval_batches",
    "eval_batch_size",
    "checkpoint_every",
    "keep",
    "prefetch",
    "sample_tokens",
)
MAY_CHANGE_UNDER = (
    "mesh.",
    "data.data_dir",
    "data.path",
    "data.tokenizer_path",
    "data.download",
    "data.threads",
    "data.cache_megabytes",
)
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a config describes, made: data, model, optimizer, mesh, and the functions that need all
    of them.
    """

    config: configs.Config
    data: pipeline.Dataset | None
    tokenizer: tokenizers.Tokenizer | None
    model: nn.Module
    optimizer_config: optimizers.OptimizerConfig
    optimizer: Any
    mesh: Mesh
    data_config: DataConfig

    @property
    def dataset(self) -> pipeline.Dataset:
        """The data; a run opened without them has none."""
        assert self.data is not None, "opened with data=False"
        return self.data

    @functools.cached_property
    def init_inputs(self) -> np.ndarray:
        """What the model is initialized on; read once, as images have to be decoded. Models with
        nothing to fit get zeros.
        """
        if self.tokenizer is not None:
            return np.zeros((1, self.config.model.context), np.int32)
        if self.dataset.image_shape is not None and not getattr(self.model, "fits_inputs", False):
            return np.zeros((1, *self.dataset.image_shape), np.float32)
        return self.dataset.fit_batch()

    def init_state(
        self, initial: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    ) -> state.TrainState:
        """A first state on the mesh; `initial` may replace its freshly drawn variables, {'params':
        ..., 'wiring': ...}, by others.
        """
        fresh = self._state(state.init_state)
        return (
            fresh if initial is None else state.replace_variables(fresh, initial(fresh.variables()))
        )

    def abstract_state(self) -> state.TrainState:
        """Its shapes and shardings."""
        return self._state(state.abstract_state)

    def train_step(self, shardings: Any) -> Callable[..., Any]:
        """The jitted training step for a state that lies as `shardings` say."""
        augment = self.data_config.augment if self.dataset.image_shape is not None else None
        settings = {
            "ema": self.optimizer_config.ema,
            "grad_accum": self.config.grad_accum,
            "augment": augment,
        }
        return state.make_train_step(
            self.model, self.optimizer, state_shardings=shardings, mesh=self.mesh, **settings
        )

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a training batch."""
        example, where = self.dataset.train[0], sharding.batch_sharding(self.mesh)
        return {
            k: jax.ShapeDtypeStruct(
                (self.config.batch_size, *np.shape(v)), np.asarray(v).dtype, sharding=where
            )
            for k, v in example.items()
        }

    def _state(self, make: Callable[..., state.TrainState]) -> state.TrainState:
        ema, size_limit = self.optimizer_config.ema > 0, self.config.mesh.fsdp_size_limit
        return make(
            self.model,
            self.optimizer,
            self.config.seed,
            self.init_inputs,
            self.mesh,
            ema=ema,
            size_limit=size_limit,
        )


def assemble(
    config: configs.Config,
    tokenizer: tokenizers.Tokenizer | None = None,
    *,
    read_data: bool = True,
    training: bool = True,
    devices: Sequence[Any] | None = None,
) -> Parts:
    """Makes the parts; every mistake in the config shows here, before any work.

    tokenizer: a trained run's; without data it decides the vocabulary. training: False leaves the
    training batch unchecked, which need not divide over the devices a trained run is read back on.
    devices: other ones than this process's, to compile for.

    Raises:
      InputError: see the parts.
    """
    for name in (
        "steps",
        "batch_size",
        "grad_accum",
        "log_every",
        "eval_every",
        "eval_batch_size",
        "checkpoint_every",
        "keep",
    ):
        if config[name] < 1:
            raise InputError(f"{name}: expected at least 1, found {config[name]}.")
    for name in ("eval_batches", "prefetch", "sample_tokens"):
        if config[name] < 0:
            raise InputError(f"{name}: expected 0 or more, found {config[name]}.")
    if not 0 <= config.seed < 2**32:
        raise InputError(
            f"seed: expected a whole number from 0 to {2**32 - 1}, found {config.seed}."
        )
    optimizer_config = configs.from_mapping(
        optimizers.OptimizerConfig, config.optimizer.to_dict(), "optimizer"
    )
    mesh = sharding.make_mesh(
        configs.from_mapping(sharding.MeshConfig, config.mesh.to_dict(), "mesh"), devices
    )
    if config.batch_size % config.grad_accum:
        raise InputError(
            f"grad_accum: batch_size {config.batch_size} cannot be cut into {config.grad_accum} "
            "equal parts."
        )
    if training:
        sharding.check_batch(
            config.batch_size // config.grad_accum,
            mesh,
            "batch_size / grad_accum" if config.grad_accum > 1 else "batch_size",
        )
    model_config = config.model.to_dict()
    models.build(model_config, 2)  # a wrong model key shows before the data is read
    data_config = configs.from_mapping(DataConfig, config.data.to_dict(), "data")
    data = (
        pipeline.load(data_config, model_config.get("context"), tokenizer)
        if read_data or tokenizer is None
        else None
    )
    if data is not None and data.tokenizer is None and "context" in model_config:
        raise InputError(
            f"data.source: {data_config.name or data_config.source} has labelled examples, but "
            f"model {model_config['name']} reads text; "
            "use a text source, or another experiment file."
        )
    tokenizer = data.tokenizer if data is not None else tokenizer
    outputs = data.outputs if data is not None else tokenizer.vocab_size  # type: ignore[union-attr]
    optimizer = optimizers.make_optimizer(optimizer_config, config.steps)
    return Parts(
        config,
        data,
        tokenizer,
        models.build(model_config, outputs),
        optimizer_config,
        optimizer,
        mesh,
        data_config,
    )


def eval_batch_size(config: configs.Config, mesh: Mesh) -> int:
    """The configured evaluation batch, rounded up to what the mesh divides."""
    shards = sharding.batch_shards(mesh)
    return -(-config.eval_batch_size // shards) * shards


def prepare(workdir: Path, config: configs.Config) -> tokenizers.Tokenizer | None:
    """Checks that the directory is this config's, or new or empty; returns the tokenizer of a run
    that has one.

    Raises:
      InputError: the directory belongs to another config (names the keys), or isn't a run directory
        but isn't empty.
    """
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir: {workdir} is a file; give a folder.")
    if path.exists():
        check_same(read_config(workdir), config, workdir)
    elif workdir.exists() and any(
        p.name not in ("checkpoints", "config.tmp") for p in workdir.iterdir()
    ):
        raise InputError(
            f"--workdir: {workdir} holds files but no config.json, so it is no run directory; give "
            "a new or empty folder."
        )
    tokenizer = workdir / "tokenizer.json"
    return tokenizers.load(tokenizer) if tokenizer.exists() else None


def record(workdir: Path, parts: Parts) -> None:
    """Writes config.json, tokenizer.json and environment.json (process 0 only).

    Raises:
      InputError: the data is not what the run began with.
    """
    if jax.process_index():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--workdir: cannot make {workdir} ({error.strerror}); give a folder you can write to."
        ) from None
    environment = workdir / "environment.json"
    if environment.exists():
        before = json.loads(environment.read_text()).get("data_fingerprint")
        if before != parts.dataset.fingerprint:
            raise InputError(
                f"--workdir: the data has changed since this run began (fingerprint {before}, now "
                f"{parts.dataset.fingerprint}); "
                "give it the same data (the same Python, for python_stdlib), or a new --workdir."
            )
    # config.json first, and each file whole or not at all: whenever this is killed, the same
    # command goes on.
    files.replace_json(workdir / "config.json", configs.to_dict(parts.config))
    if parts.dataset.tokenizer is not None and not (workdir / "tokenizer.json").exists():
        files.replace_json(workdir / "tokenizer.json", parts.dataset.tokenizer.to_json())
    files.replace_json(
        environment, describe_environment() | {"data_fingerprint": parts.dataset.fingerprint}
    )


def describe_environment() -> dict[str, Any]:
    """Versions and devices, for the record."""
    packages = (
        "quweit_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "source tree"
    return {
        "format": FORMAT,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "command": sys.argv[1:],
    }


def read_config(workdir: Path) -> configs.Config:
    """The config a run was started with."""
    path = workdir / "config.json"
    if not path.exists():
        raise InputError(
            f"--workdir: no run in {workdir} (no config.json); start one with "
            "--config=experiments/FILE.py."
        )
    try:
        return defaults.complete(configs.from_dict(json.loads(path.read_text())))
    except json.JSONDecodeError as error:
        raise InputError(f"--workdir: {path} is damaged ({error}).") from None


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run has saved anything yet."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(folder.iterdir())


def check_same(saved: configs.Config, config: configs.Config, workdir: Path) -> None:
    """Raises InputError naming the keys in which a directory's config differs from the one given."""
    before, now = configs.flat(configs.to_dict(saved)), configs.flat(configs.to_dict(config))
    missing = object()
    changed = [
        f"{key} (there {before.get(key, 'nothing')!r}, now {now.get(key, 'nothing')!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, missing) != now.get(key, missing)
        and key not in MAY_CHANGE
        and not key.startswith(MAY_CHANGE_UNDER)
    ]
    if changed:
        raise InputError(
            f"--workdir: {workdir} belongs to another config: "
            f"{'; '.join(changed[:6])}{' ...' if len(changed) > 6 else ''}. "
            "Give a new --workdir, or leave --config out to go on with the run that is there."
        )


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A trained run, read back."""

    parts: Parts
    variables: dict[str, Any]
    step: int


def open_run(
    workdir: Path,
    step: int | None = None,
    overrides: Mapping[str, str] | None = None,
    *,
    data: bool = True,
) -> OpenRun:
    """Reads a run back: its best checkpoint, or a given step.

    overrides: config paths (of the data, say) to text values. data: False leaves a language model's
    corpus unread.
    """
    config = read_config(workdir)
    for path, text in (overrides or {}).items():
        configs.set_value(config, path, text)
    tokenizer = (
        tokenizers.load(workdir / "tokenizer.json")
        if (workdir / "tokenizer.json").exists()
        else None
    )
    parts = assemble(config, tokenizer, read_data=data, training=False)
    saved = Checkpoints(workdir, read_only=True)
    wanted = saved.best_step() if step is None else step
    if wanted is None:
        raise InputError(
            f"--workdir: {workdir} has no checkpoint yet; let it train past checkpoint_every = "
            f"{config.checkpoint_every} steps."
        )
    restored = saved.restore(parts.abstract_state(), wanted)
    saved.close()
    assert restored is not None
    return OpenRun(parts, restored[0].variables(), wanted)
