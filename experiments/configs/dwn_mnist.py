"""A plain weightless classifier on MNIST, to become hardware:
--config=experiments/configs/dwn_mnist.py[:692,2055,4082 or 500][,key=value,...]

The variants are the tables in all: those of the published sizes, rounded to ten classes. Reads
TFDS's prepared `mnist`; give data_dir=FOLDER. Shortcuts: luts, lut_inputs, mapping, steps, seed,
lr, tau, bits, thermometer, alpha, data_dir.
"""

from experiments.configs import mnist_tau, published_classifier_rates
from quweit_jax.config import parse_argument
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config, with_shortcuts

SIZES = {"500": 500, "692": 690, "2055": 2050, "4082": 4080}


def get_config(argument: str | None = None):
    """The config, with shortcuts applied."""
    variant, shortcuts = parse_argument(argument, tuple(SIZES), default="692")
    config = base_config()
    config.data.source = "tfds"
    config.data.name = "mnist"
    config.model = defaults("dwn")
    config.model.num_luts = (SIZES[variant],)
    config.model.mapping = "learnable"  # among all pixels, which is worth a point of accuracy
    config.model.thermometer = "uniform"  # most pixels are 0, so that quantiles say little
    # Strokes are black or white, and a pixel's comparison with a half is free in hardware: it is
    # the word's upper bit.
    config.model.thermometer_bits = 1
    config.model.tau = mnist_tau(SIZES[variant])
    # A stroke one pixel beside is the same digit: half a point of accuracy, on images never seen.
    config.data.augment.crop = "pad"
    config.data.augment.pad = 1
    config.steps = 18_000  # 30 passes over 60,000 images
    config.batch_size = 100
    config.eval_every = 1800
    config.checkpoint_every = 1800
    published_classifier_rates(config, 2e-2)  # twice as much suits tables that are averaged
    config.optimizer.ema = 0.999  # over half a pass; worth a seventh of a point by itself
    return with_shortcuts(config, shortcuts)
