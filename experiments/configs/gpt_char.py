"""A character GPT with any channel mixer:
--config=experiments/configs/gpt_char.py[:VARIANT][,key=value,...]

Variants: quick (the default: minutes on 2 cores, text of the Python standard library, no download),
nanogpt_cpu and nanogpt (nanoGPT's settings for Tiny Shakespeare on a CPU and on a GPU). Shortcuts:
mlp, steps, seed, width, layers, luts, lut_inputs.
"""

from quweit_jax.config import parse_argument
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config, with_shortcuts

VARIANTS = ("quick", "nanogpt_cpu", "nanogpt")


def get_config(argument: str | None = None):
    """The config of a variant, with shortcuts applied."""
    variant, shortcuts = parse_argument(argument, VARIANTS, default="quick")
    config = base_config()
    config.model = defaults("gpt")  # nanoGPT's for a GPU: 6 layers of width 384, context 256
    if variant in ("quick", "nanogpt_cpu"):  # the size nanoGPT gives a CPU
        config.model.layers = 4
        config.model.heads = 4
        config.model.width = 128
        config.model.context = 64
    if variant == "quick":
        config.model.mlp = "lookup_glu"  # no multiplication, and the lowest loss
        config.steps = 1500  # minutes
        config.eval_batches = 8  # a look, not a measurement
        config.optimizer.learning_rate = 2e-3  # its best: results/blocks_notes.md
    else:
        config.data.source = "tfds"
        config.data.name = "tiny_shakespeare"  # nanoGPT's text for characters
        config.data.validation_split = "validation+test"  # together nanoGPT's last tenth
    if variant == "nanogpt_cpu":
        config.eval_batches = 10  # `evaluate` reads the whole validation text
    if variant == "nanogpt":
        config.model.dropout = 0.2  # nanoGPT's: 80 times through the text
        config.model.weightless.num_luts = 2688  # 7 a feature, as the default has at width 128
        config.steps = 5000  # nanoGPT's
        config.batch_size = 64  # nanoGPT's
    return with_shortcuts(config, shortcuts)
