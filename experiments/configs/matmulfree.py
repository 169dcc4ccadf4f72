"""The MatMul-free language model (arXiv 2406.02528):
--config=experiments/configs/matmulfree.py[:VARIANT][,key=value,...]

Variants:
  tiny   (the default) minutes on 2 cores, text of the Python standard library, no download: 4
  layers of width 128. 370m, 1.3b, 2.7b   the published sizes and budgets (15, 100 and 100 billion
  tokens of 2,048), on TFDS c4 with a tokenizer of one's own; add
  --config.data.tokenizer=file --config.data.tokenizer_path=FOLDER for the published one. 13b    the
  size of the paper's inference measurements.

Shortcuts: mlp (dense, weightless, none), width, layers, steps, seed, lr, luts, dataset, data_dir.
"""

from experiments.configs import PUBLISHED_TOKENS, published_budget
from quweit_jax.config import parse_argument
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config, with_shortcuts

VARIANTS = ("tiny", *PUBLISHED_TOKENS)


def get_config(argument: str | None = None):
    """The config of a variant, with shortcuts applied."""
    variant, shortcuts = parse_argument(argument, VARIANTS, default="tiny")
    config = base_config()
    config.model = defaults("matmulfree")
    # Ternary weights move only once their float has crossed a threshold, so their rates are higher
    # than a dense decoder's.
    if variant == "tiny":
        config.model.context = 64  # short, for 2 cores
        config.steps = 1500  # minutes
        config.eval_batches = 8  # a look, not a measurement
        config.optimizer.learning_rate = 4e-3  # twice Transformer++'s
    else:
        published_budget(config, variant)
        config.optimizer.learning_rate = 1.5e-3  # five times Transformer++'s
    return with_shortcuts(config, shortcuts)


def sweep(add):
    """The learning rates the model should be tried at, about the default of `tiny`."""
    for rate in (1e-3, 2e-3, 4e-3, 8e-3):
        add(lr=rate)
