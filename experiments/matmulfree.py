"""The MatMul-free language model: --config=experiments/matmulfree.py[:VARIANT][,key=value,...]

Variants:
  tiny   (the default) minutes on 2 cores, text of the Python standard library, no download: 4
  layers of width 128. 370m, 1.3b, 2.7b   the published sizes and budgets (15, 100 and 100 billion
  tokens of 2,048; arXiv 2406.02528, section 4), on TFDS c4 with a tokenizer of one's own; add
  --config.data.tokenizer=file --config.data.tokenizer_path=FOLDER for the published one. 13b    the
  size of the paper's inference measurements.

Shortcuts: mlp (dense, weightless, none), width, layers, steps, seed, lr, luts, dataset, data_dir.
"""

from quweit_jax import config as configs
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config

VARIANTS = ("tiny", "370m", "1.3b", "2.7b", "13b")
ALIASES = {
    "mlp": "model.mlp",
    "width": "model.width",
    "layers": "model.layers",
    "context": "model.context",
    "luts": "model.weightless.num_luts",
    "dataset": "data.name",
    "data_dir": "data.data_dir",
    "lr": "optimizer.learning_rate",
}
TOKENS = {"370m": 15e9, "1.3b": 100e9, "2.7b": 100e9, "13b": 100e9}


def get_config(argument: str | None = None):
    """The config of a variant, with shortcuts applied."""
    variant, shortcuts = configs.parse_argument(argument, VARIANTS, default="tiny")
    return configs.apply_shortcuts(
        language_model(defaults("matmulfree"), variant, learning_rate=4e-3), shortcuts, ALIASES
    )


def language_model(model: configs.Config, variant: str, *, learning_rate: float):
    """The config of either decoder at a variant's size and budget.

    learning_rate: of `tiny`. Ternary weights move only once their float has crossed a threshold, so
    they take higher rates than dense ones.
    """
    config = base_config()
    config.model = model
    config.model.size = variant
    if variant == "tiny":
        config.data.source = "python_stdlib"
        config.steps, config.eval_every, config.checkpoint_every, config.eval_batches = (
            1500,
            250,
            250,
            8,
        )
        config.batch_size, config.model.context = 12, 64
        config.optimizer.learning_rate = learning_rate
        return config
    config.data.update(
        source="tfds", name="c4/en", tokenizer="bpe", bpe_vocab_size=32_000, limit_bytes=100_000_000
    )
    config.model.update(context=2048, dtype="bfloat16", remat=True)
    config.batch_size, config.eval_batch_size = 256, 64
    config.steps = int(TOKENS[variant] / (config.batch_size * config.model.context))
    config.eval_every = config.checkpoint_every = max(1, config.steps // 50)
    config.eval_batches = 32
    config.mesh.update(data=1, fsdp=-1)
    config.optimizer.update(
        learning_rate=1.5e-3 if learning_rate > 2e-3 else 3e-4,
        warmup=2000,
        weight_decay=0.01,
        beta2=0.95,
        min_ratio=0.1,
    )
    return config


def sweep(add):
    """The learning rates either model should be tried at: four-fold about the default."""
    for rate in (1e-3, 2e-3, 4e-3, 8e-3):
        add(lr=rate)
