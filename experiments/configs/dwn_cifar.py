"""A plain weightless classifier on CIFAR-10, two layers of tables:
--config=experiments/configs/dwn_cifar.py[:small or 8000][,key=value,...]

The variants differ in tables: small, for minutes on two cores, or 8,000 a layer. Reads TFDS's
prepared `cifar10`; give data_dir=FOLDER. Shortcuts: luts, lut_inputs, mapping, steps, seed, lr,
tau, bits, thermometer, alpha, data_dir.
"""

from experiments.configs import published_classifier_rates
from quweit_jax.config import parse_argument
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config, with_shortcuts

SIZES = {"small": (2000, 1000), "8000": (8000, 8000)}


def get_config(argument: str | None = None):
    """The config, with shortcuts applied."""
    variant, shortcuts = parse_argument(argument, tuple(SIZES), default="small")
    config = base_config()
    config.data.source = "tfds"
    config.data.name = "cifar10"
    config.data.augment.crop = "pad"
    config.data.augment.pad = 2  # less than networks have it: these read fixed pixels
    config.data.augment.flip = True
    config.model = defaults("dwn")
    config.model.num_luts = SIZES[variant]
    # Among a few bits a slot: a score for each of 9,216 bits would be a hundred million of them.
    config.model.mapping = "candidates"
    config.model.candidates = 32
    config.model.thermometer_bits = 3  # of each of 3,072 colors
    config.model.tau = round((SIZES[variant][-1] / 10) ** 0.5 / 2, 2)  # as digits and MNIST have it
    config.steps = 6_000  # 12 passes over 50,000 images
    config.batch_size = 100
    config.eval_every = 1200
    config.checkpoint_every = 1200
    published_classifier_rates(config)
    return with_shortcuts(config, shortcuts)
