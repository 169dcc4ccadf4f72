"""Transformer++, Llama's decoder: the dense baseline of MatMul-free LM, at its sizes and budgets.

--config=experiments/transformer_pp.py[:VARIANT][,key=value,...], variants and shortcuts as in
experiments/matmulfree.py.
"""

from experiments import matmulfree
from quweit_jax import config as configs
from quweit_jax.models.registry import defaults

sweep = matmulfree.sweep


def get_config(argument: str | None = None):
    """The config of a variant, with shortcuts applied."""
    variant, shortcuts = configs.parse_argument(argument, matmulfree.VARIANTS, default="tiny")
    config = matmulfree.language_model(defaults("transformer_pp"), variant, learning_rate=2e-3)
    return configs.apply_shortcuts(config, shortcuts, matmulfree.ALIASES)
