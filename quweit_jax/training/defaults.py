"""The keys that every experiment has, their shorter names, and today's defaults for runs that older
versions began.
"""

from __future__ import annotations

import dataclasses

import ml_collections

from quweit_jax.config import Config, apply_shortcuts, checked, flat, with_defaults
from quweit_jax.data.registry import DataConfig
from quweit_jax.errors import InputError
from quweit_jax.models import registry
from quweit_jax.reading import kind_of
from quweit_jax.training.distill import DistillConfig
from quweit_jax.training.optimizers import OptimizerConfig
from quweit_jax.training.sharding import MeshConfig

# A key's shorter name, which may stand after the colon; a full path may, too.
SHORTCUTS = {
    "data.name": "dataset",
    "data.data_dir": "data_dir",
    "data.image_size": "res",
    "optimizer.learning_rate": "lr",
    "model.mlp": "mlp",
    "model.width": "width",
    "model.layers": "layers",
    "model.depth": "depth",
    "model.context": "context",
    "model.dropout": "dropout",
    "model.variant": "variant",
    "model.integer": "integer",
    "model.weightless.num_luts": "luts",
    "model.weightless.lut_inputs": "lut_inputs",
    # of a plain weightless classifier, which has no section `weightless`
    "model.num_luts": "luts",
    "model.lut_inputs": "lut_inputs",
    "model.mapping": "mapping",
    "model.thermometer": "thermometer",
    "model.thermometer_bits": "bits",
    "model.tau": "tau",
    "model.alpha": "alpha",
}


def base_config() -> Config:
    """The keys that every experiment has; the experiment adds those of its `model`."""
    values = {
        "seed": 0,  # of parameters, dropout and the order of examples
        "steps": 2000,  # optimizer steps in all
        "batch_size": 12,  # examples a step, over all devices
        "grad_accum": 1,  # equal parts in which a step's batch is computed
        "loss_pieces": 0,  # in which the logits of a text are made; 0: as few as fit into 256 MB
        "log_every": 10,  # steps between rows of metrics
        "eval_every": 250,  # steps between evaluations
        "eval_batches": 0,  # batches an evaluation reads; 0: the whole validation split
        "eval_batch_size": 64,  # examples a batch, in evaluation
        "checkpoint_every": 250,  # steps between checkpoints
        "keep": 2,  # checkpoints that stay, besides the best
        "prefetch": 4,  # batches made ahead
        "sample_tokens": 200,  # tokens of a language model's sample at the end; 0: none
        "track": "",  # where metrics go besides the run directory: wandb
        "profile_steps": "",  # the first and the last step to trace, such as 10:15
        "init_from": "",  # a run directory or a published checkpoint to begin from
        "teacher": "",  # a run directory or a published checkpoint to learn from
        "data": dataclasses.asdict(DataConfig()),  # what to read
        "optimizer": dataclasses.asdict(OptimizerConfig()),  # how parameters move
        "distill": dataclasses.asdict(DistillConfig()),  # how much is learned from the teacher
        "mesh": dataclasses.asdict(MeshConfig()),  # how the devices share the work
        "model": {},  # `models.registry.defaults(name)`, changed by the experiment
    }
    return ml_collections.ConfigDict(values, convert_dict=True, type_safe=False)


def with_shortcuts(config: Config, shortcuts: dict[str, str]) -> Config:
    """The config with what stood after the variant, locked.

    Raises:
      InputError: a key that this config does not have; names the nearest.
    """
    known = flat(config)
    aliases = {name: key for key, name in SHORTCUTS.items() if key in known}
    return apply_shortcuts(config, shortcuts, aliases)


def check_types(config: Config) -> None:
    """Raises InputError if a key that every experiment has is of another type than it should be;
    those inside of sections are checked where the sections are read.
    """
    for key, value in base_config().items():
        if key not in config:
            continue
        if isinstance(value, ml_collections.ConfigDict):
            if not isinstance(config[key], ml_collections.ConfigDict):
                raise InputError(f"{key}: expected an object, found {kind_of(config[key])}.")
        else:
            checked(config[key], type(value), key)


def complete(saved: Config) -> Config:
    """A saved config with today's default for each key it lacks, so that a new key locks no run.

    Raises:
      InputError: it names no model, or a value is of another type than it should be.
    """
    expected = base_config()
    check_types(saved)
    if "model" not in saved or not isinstance(name := saved.model.get("name"), str):
        raise InputError("model.name: expected the name of a model, found none.")
    if name in registry.MODELS:
        expected.model = registry.defaults(name)
    return with_defaults(saved, expected)
