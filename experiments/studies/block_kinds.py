"""The channel mixers that `blocks` compares, and what a config changes for each."""

from __future__ import annotations

# kind -> (what the table calls it, what its config changes)
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "dense": ("dense MLP (GELU), nanoGPT's start", {"model.mlp": "dense"}),
    "swiglu": ("dense SwiGLU, nanoGPT's start", {"model.mlp": "swiglu"}),
    "dense_unit": (
        "dense MLP (GELU), unit variance at the start",
        {"model.mlp": "dense", "model.mlp_init": 0.0},
    ),
    "swiglu_unit": (
        "dense SwiGLU, unit variance at the start",
        {"model.mlp": "swiglu", "model.mlp_init": 0.0},
    ),
    "weightless": ("published weightless block", {"model.mlp": "weightless"}),
    "lookup_glu": ("LookupGLU, 4 units a feature", {"model.mlp": "lookup_glu"}),
    "lookup_glu_640": (
        "LookupGLU, 5 units a feature",
        {"model.mlp": "lookup_glu", "model.lookup_glu.hidden": 640},
    ),
    "lookup_glu_320": (
        "LookupGLU, 2.5 units a feature",
        {"model.mlp": "lookup_glu", "model.lookup_glu.hidden": 320},
    ),
    "lookup_glu_368": (
        "LookupGLU, 2.9 units a feature",
        {"model.mlp": "lookup_glu", "model.lookup_glu.hidden": 368},
    ),
    "lookup_glu_320_5bit": (
        "LookupGLU, 2.5 units a feature, codes of 5 bits",
        {
            "model.mlp": "lookup_glu",
            "model.lookup_glu.hidden": 320,
            "model.lookup_glu.code_bits": 5,
            "model.lookup_glu.code_step": 0.125,
        },
    ),
    "lookup_glu_320_shift": (
        "LookupGLU, 2.5 units a feature; token mixer of shifts",
        {"model.mlp": "lookup_glu", "model.lookup_glu.hidden": 320, "model.gates": "shift"},
    ),
    "bitglu_shift": (
        "ternary GLU (BitGLU); token mixer of shifts",
        {"model.mlp": "bitglu", "model.gates": "shift"},
    ),
    "lookup_glu_trained": (
        "LookupGLU, 4 units a feature, trained table",
        {"model.mlp": "lookup_glu", "model.lookup_glu.train_tables": True},
    ),
    "lookup_glu_wide": (
        "LookupGLU, 10 units a feature",
        {"model.mlp": "lookup_glu", "model.lookup_glu.hidden": 1280},
    ),
    "lookup_glu_wide_5bit": (
        "LookupGLU, 10 units a feature, codes of 5 bits over twice the range",
        {
            "model.mlp": "lookup_glu",
            "model.lookup_glu.hidden": 1280,
            "model.lookup_glu.code_bits": 5,
        },
    ),
    "lookup_glu_368_5bit": (
        "LookupGLU, 2.9 units a feature, codes of 5 bits over twice the range",
        {
            "model.mlp": "lookup_glu",
            "model.lookup_glu.hidden": 368,
            "model.lookup_glu.code_bits": 5,
        },
    ),
    "lookup_glu_ternary_attention": (
        "LookupGLU, 4 units a feature, ternary projections in attention",
        {"model.mlp": "lookup_glu", "model.linear": "ternary"},
    ),
    "lookup_glu_256_ternary_attention": (
        "LookupGLU, 2 units a feature, ternary projections in attention",
        {"model.mlp": "lookup_glu", "model.lookup_glu.hidden": 256, "model.linear": "ternary"},
    ),
    "one_bit_tables": (
        "one-bit tables behind ternary sums",
        {"model.mlp": "lookup_glu", "model.lookup_glu.sum": "int8", "model.lookup_glu.hidden": 800},
    ),
    "vector_tables": (
        "vector tables on thermometer bits",
        {
            "model.mlp": "weightless",
            "model.weightless.sum": "vector",
            "model.weightless.num_luts": 62,
        },
    ),
    "bitglu": ("ternary GLU (BitGLU)", {"model.mlp": "bitglu"}),
    "bitglu_wide": (
        "ternary GLU (BitGLU), 10 units a feature",
        {"model.mlp": "bitglu", "model.bitglu.hidden": 1280},
    ),
    "bitglu_drawn": (
        "ternary GLU (BitGLU), drawn with 1 / sqrt(d)",
        {"model.mlp": "bitglu", "model.mlp_init": 0.0},
    ),
    "bitglu_wide_drawn": (
        "ternary GLU (BitGLU), 10 units a feature, drawn with 1 / sqrt(d)",
        {"model.mlp": "bitglu", "model.bitglu.hidden": 1280, "model.mlp_init": 0.0},
    ),
    "none": ("none (attention alone)", {"model.mlp": "none"}),
    "dense_integer": ("dense MLP, integers alone", {"model.mlp": "dense", "model.integer": True}),
    "lookup_glu_integer": (
        "LookupGLU, integers alone",
        {"model.mlp": "lookup_glu", "model.integer": True},
    ),
}


def _drawn(deviation: float, mark: str, ending: str) -> dict[str, tuple[str, dict[str, object]]]:
    """The kinds with a LookupGLU, its first ternary weights' floats drawn with a standard deviation
    (0 for 2 / sqrt(width)).
    """
    return {
        kind + mark: (name + ending, {**changes, "model.lookup_glu.mix_init": deviation})
        for kind, (name, changes) in KINDS.items()
        if changes["model.mlp"] == "lookup_glu"
    }


KINDS |= _drawn(0.0, "_drawn", "") | _drawn(0.02, "", ", drawn with 0.02")


# for the default config
DEFAULT = [
    "dense",
    "swiglu",
    "dense_unit",
    "swiglu_unit",
    "weightless",
    "lookup_glu_drawn",
    "lookup_glu_640_drawn",
    "lookup_glu_trained_drawn",
    "lookup_glu_wide_drawn",
    "lookup_glu_ternary_attention_drawn",
    "one_bit_tables_drawn",
    "vector_tables",
    "bitglu_drawn",
    "bitglu",
    "none",
]
