"""A plain weightless classifier on scikit-learn's handwritten digits:
--config=experiments/dwn_digits.py[:default][,key=value,...]

Shortcuts: luts, lut_inputs, mapping, steps, seed.
"""

from quweit_jax import config as configs
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config

VARIANTS = ("default",)
ALIASES = {
    "luts": "model.num_luts",
    "lut_inputs": "model.lut_inputs",
    "mapping": "model.mapping",
    "lr": "optimizer.learning_rate",
    "tau": "model.tau",
    "bits": "model.thermometer_bits",
    "thermometer": "model.thermometer",
    "alpha": "model.alpha",
}


def get_config(argument: str | None = None):
    """The config, with shortcuts applied."""
    _, shortcuts = configs.parse_argument(argument, VARIANTS, default="default")
    config = base_config()
    config.data.source = "digits"
    config.model = defaults("dwn")
    config.model.update(
        num_luts=(500,),
        lut_inputs=6,
        mapping="learnable",
        thermometer="uniform",
        thermometer_bits=8,
        tau=3.3,
    )
    config.steps, config.batch_size, config.eval_every, config.checkpoint_every = 400, 100, 100, 200
    config.optimizer.update(
        learning_rate=1e-2, tables_learning_rate=1e-2, scores_learning_rate=1e-2, warmup=0, clip=0.0
    )
    return configs.apply_shortcuts(config, shortcuts, ALIASES)
