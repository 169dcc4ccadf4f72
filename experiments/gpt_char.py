"""A character GPT, dense or weightless: --config=experiments/gpt_char.py[:VARIANT][,key=value,...]

Variants: quick (the default: minutes on 2 cores, text of the Python standard library, no download),
nanogpt_cpu and nanogpt (nanoGPT's settings for Tiny Shakespeare on a CPU and on a GPU). Shortcuts:
mlp, steps, seed, width, layers, luts, lut_inputs.
"""

from quweit_jax import config as configs
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config

VARIANTS = ("quick", "nanogpt_cpu", "nanogpt")
ALIASES = {
    "mlp": "model.mlp",
    "width": "model.width",
    "layers": "model.layers",
    "context": "model.context",
    "dropout": "model.dropout",
    "luts": "model.weightless.num_luts",
    "lut_inputs": "model.weightless.lut_inputs",
    "data_dir": "data.data_dir",
    "lr": "optimizer.learning_rate",
}


def get_config(argument: str | None = None):
    """The config of a variant, with shortcuts applied."""
    variant, shortcuts = configs.parse_argument(argument, VARIANTS, default="quick")
    config = base_config()
    config.model = defaults("gpt")
    if variant == "quick":
        config.data.source = "python_stdlib"
        config.steps, config.eval_every, config.checkpoint_every, config.eval_batches = (
            1500,
            250,
            250,
            8,
        )
        config.optimizer.learning_rate = 4e-3
        config.model.update(layers=4, heads=4, width=128, context=64, mlp="weightless")
        config.batch_size = 12
    else:
        config.data.update(
            source="tfds", name="tiny_shakespeare", validation_split="validation+test"
        )
        config.model.mlp = "dense"
    if variant == "nanogpt_cpu":
        config.model.update(layers=4, heads=4, width=128, context=64, dropout=0.0)
        config.steps, config.batch_size, config.eval_every, config.checkpoint_every = (
            2000,
            12,
            250,
            250,
        )
        config.eval_batches = 10  # `evaluate` reads the whole validation text
        config.optimizer.learning_rate = 1e-3  # nanoGPT's own
    if variant == "nanogpt":
        config.model.update(layers=6, heads=6, width=384, context=256, dropout=0.2)
        config.model.weightless.num_luts = 2688
        config.steps, config.batch_size, config.eval_every, config.checkpoint_every = (
            5000,
            64,
            250,
            250,
        )
    return configs.apply_shortcuts(config, shortcuts, ALIASES)
