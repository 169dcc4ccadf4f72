"""Transformer++, Llama's decoder: the dense baseline of MatMul-free LM, at its sizes and budgets.

--config=experiments/configs/transformer_pp.py[:VARIANT][,key=value,...], variants and shortcuts as
in experiments/configs/matmulfree.py.
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
    config.model = defaults("transformer_pp")
    if variant == "tiny":
        config.model.context = 64  # as MatMul-free's `tiny`, beside which it is trained
        config.steps = 1500  # minutes
        config.eval_batches = 8  # a look, not a measurement
        config.optimizer.learning_rate = 2e-3  # dense weights follow every step
    else:
        published_budget(config, variant)
        config.optimizer.learning_rate = 3e-4  # a fifth of MatMul-free's
    return with_shortcuts(config, shortcuts)


def sweep(add):
    """The learning rates the model should be tried at, the same as MatMul-free's."""
    for rate in (1e-3, 2e-3, 4e-3, 8e-3):
        add(lr=rate)
