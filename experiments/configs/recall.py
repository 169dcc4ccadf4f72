"""Associative recall (MQAR): which token mixer can look up what it has read.

--config=experiments/configs/recall.py[:VARIANT][,kind=KIND][,pairs=N][,key=value,...]

Variants: small (the default: two blocks of width 64, minutes on a core). 'accuracy' is the share of
answers that are right; a guess among all values is right in 1 of 128. experiments/studies/recall.py
trains every kind at 4, 16 and 64 pairs of key and value, each from the one before; `sweep` trains
every one of them by itself.
"""

from quweit_jax.config import parse_argument
from quweit_jax.errors import InputError, check_choice
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config, with_shortcuts

VARIANTS = ("small",)
HYBRID = "gated_delta+attention"  # half each: there are two blocks
PAIRS = (4, 16, 64)
# kind -> (model, its token mixers, its projections)
KINDS = {
    "attention": ("transformer_pp", "attention", "dense"),
    "ternary_attention": ("transformer_pp", "attention", "ternary"),
    "gated_delta": ("transformer_pp", "gated_delta", "dense"),
    "ternary_gated_delta": ("transformer_pp", "gated_delta", "ternary"),
    "hybrid": ("transformer_pp", HYBRID, "dense"),
    "matmulfree": ("matmulfree", "", ""),
}


def get_config(argument: str | None = None):
    """The config of a variant, `kind=...` (gated_delta if not given) and `pairs=...` (4)."""
    _, shortcuts = parse_argument(argument, VARIANTS, default="small")
    kind, said = shortcuts.pop("kind", "gated_delta"), shortcuts.pop("pairs", "4")
    check_choice("recall: kind", kind, KINDS)
    if not said.isdigit() or not (pairs := int(said)):
        raise InputError(f"recall: pairs: expected a positive whole number, found '{said}'.")
    model, mixer, linear = KINDS[kind]
    config = base_config()
    config.model = defaults(model)
    config.model.width = 64  # small: what is asked for is a mechanism, not capacity
    config.model.layers = 2  # a look-up by attention takes two
    config.model.hidden = 128  # twice the width: the task is the token mixer's
    config.model.context = 8 * pairs  # a quarter keys and values, the rest to ask
    if model == "transformer_pp":
        config.model.heads = 2  # states of 32 x 32 numbers
        config.model.mixer = mixer
        config.model.linear = linear
        config.model.sub_norms = linear == "ternary"  # as BitNet has them
    config.data.source = "recall"
    config.data.recall_pairs = pairs
    config.data.recall_symbols = 256  # as many keys as values, enough for 64 pairs
    config.batch_size = max(16, min(64, 512 // pairs))  # 256 to 1,024 answers a step
    config.steps = 300 if pairs > 32 else 1000 if pairs > 8 else 2000  # minutes of a core each
    config.eval_every = 100  # when it is learned shows as a step of the curve
    config.eval_batches = 0  # all 1,000 texts
    config.sample_tokens = 0  # nothing to read
    config.optimizer.learning_rate = 2e-3  # as `tiny` of transformer_pp.py
    return with_shortcuts(config, shortcuts)


def sweep(add):
    """Every kind at every number of pairs."""
    for kind in KINDS:
        for pairs in PAIRS:
            add(kind=kind, pairs=pairs)
