"""What the costs command puts together: the config of a run, and the memory of a training step,
compiled without reading data.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from quweit_jax import config as configs
from quweit_jax import models
from quweit_jax.costs import count as costs
from quweit_jax.costs import memory
from quweit_jax.data import pipeline, tokenizers
from quweit_jax.training import losses, optimizers, run, sharding, state


def of_run(workdir: str, outputs: int | None = None) -> tuple[configs.Config, int | None]:
    """A run's config and, of a language model, the size of its vocabulary; `outputs` overrules it.

    Raises:
      InputError: there is no run.
    """
    folder = Path(workdir)
    config, tokenizer = run.read_config(folder), folder / "tokenizer.json"
    return config, tokenizers.load(
        tokenizer
    ).vocab_size if outputs is None and tokenizer.exists() else outputs


def training_memory(
    config: configs.Config,
    outputs: int | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> dict[str, dict[str, int]]:
    """Bytes of a training step on this machine's first device: {'without remat': {'parameters':
    ..., 'total': ...}, 'with remat': ...}.

    See `analysis.memory.TrainingMemory`. XLA for a CPU doesn't order what is computed again so that
    memory is saved: there only 'activations' tells what remat is worth. A model without remat has
    one entry, 'as configured'. outputs: see `costs.data_shape`.
    """
    data, values = costs.data_shape(config, outputs=outputs), config.model.to_dict()
    shape = None if data.image_size is None else (data.image_size, data.image_size, data.channels)
    forms = (
        {"without remat": {"remat": False}, "with remat": {"remat": True}}
        if "remat" in values
        else {"as configured": {}}
    )
    return {
        name: _bytes(config, {**values, **form}, data.outputs, shape, compiler_options)
        for name, form in forms.items()
    }


def _bytes(
    config: configs.Config,
    model_config: dict[str, Any],
    outputs: int,
    image_shape: tuple[int, int, int] | None,
    compiler_options: dict[str, Any] | None,
) -> dict[str, int]:
    shape = (model_config["context"],) if image_shape is None else image_shape
    dtype, targets = (np.int32, shape) if image_shape is None else (np.float32, ())
    example = {"inputs": np.zeros(shape, dtype), "targets": np.zeros(targets, np.int32)}
    data = pipeline.Dataset([example], [], outputs, "", image_shape=image_shape)
    options = configs.from_mapping(
        optimizers.OptimizerConfig, config.optimizer.to_dict(), "optimizer"
    )
    parts = run.Parts(
        config,
        data,
        tokenizer=None,
        model=models.build(model_config, outputs),
        optimizer_config=options,
        optimizer=optimizers.make_optimizer(options, config.steps),
        mesh=sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1]),
        data_config=configs.from_mapping(pipeline.DataConfig, config.data.to_dict(), "data"),
    )
    before, batch = parts.abstract_state(), parts.abstract_batch()
    step = parts.train_step(jax.tree.map(lambda leaf: leaf.sharding, before))
    compiled = step.lower(before, batch).compile(compiler_options=compiler_options)  # type: ignore[attr-defined]
    needed = memory.of_training(
        before, batch, compiled, _activations(parts.model, before, batch, config.grad_accum)
    )
    return dataclasses.asdict(needed) | {"total": needed.total}


def _activations(model: Any, before: state.TrainState, batch: dict[str, Any], parts: int) -> int:
    """Of one of the `parts` that a batch is read in."""
    part = {
        k: jax.ShapeDtypeStruct((leaf.shape[0] // parts, *leaf.shape[1:]), leaf.dtype)
        for k, leaf in batch.items()
    }
    moving = [name for name in state.MOVING if name in before.constants]

    def loss(params: Any, constants: Any, batch: Any, key: Any) -> Any:
        variables, rngs = (
            {"params": params, **constants},
            {"dropout": jax.random.wrap_key_data(key)},
        )
        logits, _ = model.apply(variables, batch["inputs"], train=True, mutable=moving, rngs=rngs)
        return losses.cross_entropy(logits, batch["targets"])["loss"]

    return memory.kept_for_backward(loss, before.params, before.constants, part, before.rng)
