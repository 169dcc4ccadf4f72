"""What the costs command puts together: the config of a run, and the memory of a training step, compiled without reading data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from quweit_jax import configs, models
from quweit_jax.analysis import costs, memory
from quweit_jax.data import tokenizers
from quweit_jax.data.augment import AugmentConfig
from quweit_jax.models.options import from_mapping
from quweit_jax.training import optimizers, run, sharding, state


def of_run(workdir: str, outputs: int | None = None) -> tuple[configs.Config, int | None]:
    """A run's config and, of a language model, the size of its vocabulary; `outputs` overrules it.

    Raises:
      InputError: there is no run.
    """
    folder = Path(workdir)
    config, tokenizer = run.read_config(folder), folder / "tokenizer.json"
    return config, tokenizers.load(tokenizer).vocab_size if outputs is None and tokenizer.exists() else outputs


def training_memory(config: configs.Config, outputs: int | None = None) -> dict[str, dict[str, int]]:
    """Bytes of a training step on this machine's first device: {'without remat': {'parameters': ..., 'total': ...}, 'with remat': ...}.

    A model that has no remat has one entry, 'as configured'. outputs: see `costs.data_shape`.
    """
    data, values = costs.data_shape(config, outputs=outputs), config.model.to_dict()
    shape = None if data.image_size is None else (data.image_size, data.image_size, data.channels)
    if "remat" not in values:
        return {"as configured": _bytes(config, values, data.outputs, shape)}
    forms = {"without remat": False, "with remat": True}
    return {name: _bytes(config, {**values, "remat": remat}, data.outputs, shape) for name, remat in forms.items()}


def _bytes(config: configs.Config, model_config: dict[str, Any], outputs: int, image_shape: tuple[int, ...] | None) -> dict[str, int]:
    model = models.build(model_config, outputs)
    options = from_mapping(optimizers.OptimizerConfig, config.optimizer.to_dict(), "optimizer")
    optimizer = optimizers.make_optimizer(options, config.steps)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    shape = (model_config["context"],) if image_shape is None else image_shape
    dtype = jnp.int32 if image_shape is None else jnp.float32
    inputs = jax.ShapeDtypeStruct((1, *shape), dtype)
    before = state.abstract_state(model, optimizer, config.seed, inputs, mesh, ema=options.ema > 0)
    where = sharding.batch_sharding(mesh)
    batch = {
        "inputs": jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=where),
        "targets": jax.ShapeDtypeStruct((config.batch_size, *(shape if image_shape is None else ())), jnp.int32, sharding=where),
    }
    augment = None if image_shape is None else from_mapping(AugmentConfig, config.data.augment.to_dict(), "data.augment")
    step = state.make_train_step(
        model,
        optimizer,
        ema=options.ema,
        grad_accum=config.grad_accum,
        state_shardings=jax.tree.map(lambda leaf: leaf.sharding, before),
        mesh=mesh,
        augment=augment,
    )
    needed = memory.of_training(before, batch, step.lower(before, batch).compile())  # type: ignore[attr-defined]
    return dataclasses.asdict(needed) | {"total": needed.total}
