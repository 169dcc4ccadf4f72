"""The channel mixers that `blocks` compares, and what a config changes for each."""

from __future__ import annotations

from collections.abc import Mapping

Kind = tuple[str, dict[str, object]]  # what the table calls it, what its config changes
_TERNARY_ATTENTION = {"model.linear": "ternary"}
_SHIFTS = {"model.gates": "shift"}


def _kind(name: str, mlp: str, model: Mapping[str, object] = {}, **options: object) -> Kind:
    """A kind of the mixer `mlp`. model: other keys. options: the mixer's own."""
    own = {f"model.{mlp}.{key}": value for key, value in options.items()}
    return name, {"model.mlp": mlp, **own, **model}


def _lookup_glus(deviation: float, ending: str) -> dict[str, Kind]:
    """The kinds with a LookupGLU. deviation: with which the floats behind its first ternary weights
    are drawn, 0 for 2 / sqrt(width). ending: of their names.
    """

    def kind(name: str, model: Mapping[str, object] = {}, **options: object) -> Kind:
        return _kind(name + ending, "lookup_glu", model, mix_init=deviation, **options)

    return {
        "lookup_glu": kind("LookupGLU, 4 units a feature"),
        "lookup_glu_640": kind("LookupGLU, 5 units a feature", hidden=640),
        "lookup_glu_320": kind("LookupGLU, 2.5 units a feature", hidden=320),
        "lookup_glu_368": kind("LookupGLU, 2.9 units a feature", hidden=368),
        "lookup_glu_320_5bit": kind(
            "LookupGLU, 2.5 units a feature, codes of 5 bits",
            hidden=320,
            code_bits=5,
            code_step=0.125,
        ),
        "lookup_glu_320_shift": kind(
            "LookupGLU, 2.5 units a feature; token mixer of shifts", _SHIFTS, hidden=320
        ),
        "lookup_glu_trained": kind(
            "LookupGLU, 4 units a feature, trained table", train_tables=True
        ),
        "lookup_glu_wide": kind("LookupGLU, 10 units a feature", hidden=1280),
        "lookup_glu_wide_5bit": kind(
            "LookupGLU, 10 units a feature, codes of 5 bits over twice the range",
            hidden=1280,
            code_bits=5,
        ),
        "lookup_glu_368_5bit": kind(
            "LookupGLU, 2.9 units a feature, codes of 5 bits over twice the range",
            hidden=368,
            code_bits=5,
        ),
        "lookup_glu_336_5bit_normed": kind(
            "LookupGLU, 2.6 units, 5-bit codes over twice the range, normed outputs",
            hidden=336,
            code_bits=5,
            output_norm=0.3,
        ),
        "lookup_glu_ternary_attention": kind(
            "LookupGLU, 4 units a feature, ternary projections in attention", _TERNARY_ATTENTION
        ),
        "lookup_glu_256_ternary_attention": kind(
            "LookupGLU, 2 units a feature, ternary projections in attention",
            _TERNARY_ATTENTION,
            hidden=256,
        ),
        "one_bit_tables": kind("one-bit tables behind ternary sums", sum="int8", hidden=800),
        "lookup_glu_integer": kind("LookupGLU, integers alone", {"model.integer": True}),
    }


_UNIT = {"model.mlp_init": 0.0}  # 1 / sqrt(width)
KINDS: dict[str, Kind] = {
    "dense": _kind("dense MLP (GELU), nanoGPT's start", "dense"),
    "swiglu": _kind("dense SwiGLU, nanoGPT's start", "swiglu"),
    "dense_unit": _kind("dense MLP (GELU), unit variance at the start", "dense", _UNIT),
    "swiglu_unit": _kind("dense SwiGLU, unit variance at the start", "swiglu", _UNIT),
    "weightless": _kind("published weightless block", "weightless"),
    **_lookup_glus(0.02, ", drawn with 0.02"),
    **{f"{name}_drawn": kind for name, kind in _lookup_glus(0.0, "").items()},
    # 4 / sqrt(width)
    "lookup_glu_wide_5bit_wider": _lookup_glus(0.354, ", drawn with 0.354")["lookup_glu_wide_5bit"],
    "vector_tables": _kind(
        "vector tables on thermometer bits", "weightless", sum="vector", num_luts=62
    ),
    "bitglu": _kind("ternary GLU (BitGLU)", "bitglu"),
    "bitglu_shift": _kind("ternary GLU (BitGLU); token mixer of shifts", "bitglu", _SHIFTS),
    "bitglu_wide": _kind("ternary GLU (BitGLU), 10 units a feature", "bitglu", hidden=1280),
    "bitglu_drawn": _kind("ternary GLU (BitGLU), drawn with 1 / sqrt(d)", "bitglu", _UNIT),
    "bitglu_wide_drawn": _kind(
        "ternary GLU (BitGLU), 10 units a feature, drawn with 1 / sqrt(d)",
        "bitglu",
        _UNIT,
        hidden=1280,
    ),
    "none": _kind("none (attention alone)", "none"),
    "dense_integer": _kind("dense MLP, integers alone", "dense", {"model.integer": True}),
}

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
