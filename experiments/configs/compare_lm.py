"""Language models of one size on the same text, tokens and steps: GPT and QuWeiT GPT, Transformer++
and a ternary one as BitNet b1.58, MatMul-free and MatMul-free + weightless, the gated delta rule in
attention's place (dense and ternary projections), and hybrids, three blocks of it to one of
attention.

--config=experiments/configs/compare_lm.py[:VARIANT][,kind=KIND][,key=value,...]; `sweep` trains
every kind at every rate, and experiments/studies/compare_lm.py compares them.

Variants: cpu (the default; Tiny Shakespeare by characters, 4 layers of width 128, 2,000 steps of 12
x 64 tokens), stdlib (the same models on 20 MB of the Python standard library in 4,096 byte pairs,
3,000 steps) and gpu (6 layers of width 384, context 256).

Parameters are matched: an MLP of 4 d and a gated one of 8 d / 3 both hold 8 d^2 weights; the
weightless blocks have the default number of tables for the width. Each kind has the learning rate
of RATES that was best for it at the cpu size (experiments/results/compare_lm_notes.md).
"""

from quweit_jax.config import parse_argument
from quweit_jax.errors import check_choice
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config, with_shortcuts

VARIANTS = ("cpu", "stdlib", "gpu")
BITNET = {"linear": "ternary", "sub_norms": True, "activation": "relu2"}
DELTA = "gated_delta"
HYBRID = f"{DELTA}+{DELTA}+{DELTA}+attention"
# kind -> (model, its options, learning rate)
KINDS: dict[str, tuple[str, dict[str, object], float]] = {
    "gpt": ("gpt", {}, 4e-3),
    "quweit": ("gpt", {"mlp": "weightless"}, 4e-3),
    "transformer_pp": ("transformer_pp", {}, 1e-3),
    "matmulfree": ("matmulfree", {}, 1e-3),
    "matmulfree_weightless": ("matmulfree", {"mlp": "weightless"}, 4e-3),
    "bitnet": ("transformer_pp", BITNET, 1e-3),
    "gated_delta": ("transformer_pp", {"mixer": DELTA}, 1e-3),
    "ternary_gated_delta": ("transformer_pp", {**BITNET, "mixer": DELTA}, 1e-3),
    "hybrid": ("transformer_pp", {"mixer": HYBRID}, 1e-3),
    "ternary_hybrid": ("transformer_pp", {**BITNET, "mixer": HYBRID}, 2e-3),
}
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def get_config(argument: str | None = None):
    """The config of a variant and `kind=...` (gpt if not given), with shortcuts applied."""
    variant, shortcuts = parse_argument(argument, VARIANTS, default="cpu")
    kind = shortcuts.pop("kind", "gpt")
    check_choice("compare_lm: kind", kind, KINDS)
    model, options, rate = KINDS[kind]
    on_gpu = variant == "gpu"
    config = base_config()
    config.model = defaults(model)
    config.model.update(options)  # what makes it the kind that it is
    config.model.width = 384 if on_gpu else 128  # nanoGPT's sizes for a GPU and for a CPU
    config.model.layers = 6 if on_gpu else 4  # likewise
    config.model.context = 256 if on_gpu else 64  # likewise
    if model != "matmulfree":  # which has no attention
        config.model.heads = 6 if on_gpu else 4
    if model != "gpt":  # whose MLP has four times the width
        config.model.hidden = 8 * config.model.width // 3  # as many weights as the GPT's
    config.model.weightless.num_luts = 7 * config.model.width  # the default has as many a feature
    config.optimizer.learning_rate = rate  # its own best
    config.eval_batches = 10  # the study reads the whole validation text once, at the end
    if variant == "stdlib":
        config.data.tokenizer = "bpe"  # a larger vocabulary than characters
        config.data.limit_bytes = 20_000_000  # ten times the default: no text is read twice
        config.steps = 3000  # a vocabulary this large takes longer
        config.eval_every = 500  # six points a curve
    else:
        config.data.source = "tfds"
        config.data.name = "tiny_shakespeare"  # nanoGPT's text for characters
        config.data.validation_split = "validation+test"  # together nanoGPT's last tenth
    if on_gpu:
        config.steps = 5000  # nanoGPT's
        config.batch_size = 64  # nanoGPT's
        config.checkpoint_every = 500  # ten in all
    return with_shortcuts(config, shortcuts)


def sweep(add):
    """Every kind at every learning rate."""
    for kind in KINDS:
        for rate in RATES:
            add(kind=kind, lr=rate)
