"""A plain weightless classifier on scikit-learn's handwritten digits:
--config=experiments/configs/dwn_digits.py[:default][,key=value,...]

Shortcuts: luts, lut_inputs, mapping, steps, seed, lr, tau, bits, thermometer, alpha.
"""

from experiments.configs import published_classifier_rates
from quweit_jax.config import parse_argument
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config, with_shortcuts


def get_config(argument: str | None = None):
    """The config, with shortcuts applied."""
    _, shortcuts = parse_argument(argument, ("default",), default="default")
    config = base_config()
    config.data.source = "digits"  # 8 x 8 pixels; comes with scikit-learn
    config.model = defaults("dwn")
    config.model.thermometer = "uniform"  # pixels have 17 values, too few for quantiles
    config.steps = 400  # enough: the digits are few and small
    config.batch_size = 100  # a fourteenth of the training digits
    config.eval_every = 100  # four points a curve
    config.checkpoint_every = 200  # the run is short
    published_classifier_rates(config)
    return with_shortcuts(config, shortcuts)
