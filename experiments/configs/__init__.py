"""Configs as code. Each file here has `get_config(argument)`, the config of
'FILE.py:VARIANT,key=value,...': a line for every key that differs from the defaults, and why.

The defaults are those of `training.defaults.base_config` and of the model; the shorter names of
keys are `training.defaults.SHORTCUTS`. What several files share is said here.
"""

from quweit_jax.config import Config

# Sizes and training tokens of MatMul-free LM and of its baseline, Transformer++ (arXiv 2406.02528,
# section 4); 13b is the size of its inference measurements, with the budget of the next smaller.
PUBLISHED_TOKENS = {"370m": 15e9, "1.3b": 100e9, "2.7b": 100e9, "13b": 100e9}


def published_budget(config: Config, size: str) -> None:
    """Sets what both decoders of MatMul-free LM share at a published size, all but the rate."""
    config.model.size = size
    config.model.context = 2048  # the published models'
    config.model.dtype = "bfloat16"  # half the bytes, and what accelerators multiply fastest
    config.model.remat = True  # activations are computed twice rather than kept
    config.model.scan_layers = True  # a block is compiled once
    config.data.source = "tfds"
    config.data.name = "c4/en"  # the paper's SlimPajama is not in TFDS
    config.data.tokenizer = "bpe"  # of one's own; the published one needs its file
    config.data.bpe_vocab_size = 32_000  # as many pieces as the published one has
    config.data.limit_bytes = 100_000_000  # of text from which the tokenizer learns its pieces
    config.batch_size = 256  # half a million tokens a step
    config.steps = int(PUBLISHED_TOKENS[size] / (config.batch_size * config.model.context))
    config.eval_every = max(1, config.steps // 50)  # 50 points a curve
    config.checkpoint_every = config.eval_every  # at most 2 % of the work is lost
    config.eval_batches = 32  # up to 4 million tokens
    config.mesh.data = 1  # parameters do not fit on every device,
    config.mesh.fsdp = -1  # so all devices share them
    config.optimizer.warmup = 2000  # of tens of thousands of steps
    config.optimizer.weight_decay = 0.01  # little: hardly any text is read twice
    config.optimizer.beta2 = 0.95  # usual for language models of these sizes


def published_classifier_rates(config: Config, rate: float = 1e-2) -> None:
    """Sets how plain weightless classifiers (DWN, arXiv 2410.11112) are trained. rate: of tables
    and scores, which are all that they have, as published.
    """
    config.optimizer.learning_rate = rate
    config.optimizer.tables_learning_rate = None  # that one
    config.optimizer.scores_learning_rate = None
    config.optimizer.warmup = 0  # nothing here is deep enough to need one
    config.optimizer.clip = 0.0  # nor to clip gradients


def mnist_tau(tables: int) -> float:
    """By what the group sums of a classifier of ten classes are divided: half the square root of
    the tables of a class, the ratio that digits has, too.
    """
    return round((tables / 10) ** 0.5 / 2, 2)
