"""One image through a vision transformer, in floats or in integers only (I-ViT), from its config.

Dimensions: N patches, T tokens (patches and, with pool='cls', the class token), d width, H heads, K
width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

from quweit_jax.costs.parts import (
    FLOAT,
    Types,
    activation,
    attention,
    layer_norm,
    lookups,
    packed_bits,
    product,
    residual,
    types_of,
    weightless_block,
)
from quweit_jax.errors import InputError, check_choice
from quweit_jax.models.options import WeightlessOptions
from quweit_jax.models.vit import ViTConfig
from quweit_jax.ops.counts import BYTES, Elementwise, LayerCosts
from quweit_jax.ops.integer import LAYER_NORM_ITERATIONS

INT = "int32"
_BRANCH = 2 * BYTES[INT]  # a branch's multiplier and shift


def patches_of(config: ViTConfig, image_size: int) -> int:
    """N of square images.

    Raises:
      InputError: the side is no multiple of the patch.
    """
    if image_size < 1 or image_size % config.patch:
        raise InputError(
            f"image_size: expected a multiple of the patch size {config.patch}, found {image_size}."
        )
    return (image_size // config.patch) ** 2


def vit(
    config: ViTConfig, image_size: int, channels: int, precision: str | None
) -> list[LayerCosts]:
    """All layers of either form. precision: of the integer form None (16-bit attention weights
    times 8-bit values, as it is) or 'int8'.
    """
    patches = patches_of(config, image_size)
    if config.integer:
        if precision is not None:
            check_choice("precision of an integer model", precision, ("int8",))
        return _integer(config, patches, channels, "int8" if precision else "int16xint8")
    return _float(config, patches, channels, types_of(config.dtype, precision))


def _float(c: ViTConfig, patches: int, channels: int, types: Types) -> list[LayerCosts]:
    (width, _, heads), act, extra = c.sizes(), types.activations, int(c.pool == "cls")
    tokens = patches + extra
    layers = [
        product(
            "patch_embed", "embedding", patches, c.patch**2 * channels, width, types, bias=True
        ),
        _positions(tokens, extra, width, act),
    ]
    for i, kind in enumerate(c.mlps()):
        block = f"block_{i}"
        layers += [
            layer_norm(f"{block}/attention_norm", tokens, width, act, bias=True),
            product(
                f"{block}/attention/qkv", "projection", tokens, width, 3 * width, types, bias=True
            ),
            *attention(
                f"{block}/attention",
                tokens,
                tokens,
                heads,
                heads,
                width // heads,
                types,
                cached=False,
            ),
            product(
                f"{block}/attention/proj", "projection", tokens, width, width, types, bias=True
            ),
            residual(f"{block}/attention/residual", tokens * width, act),
        ]
        if kind == "none":
            continue
        layers.append(layer_norm(f"{block}/mlp_norm", tokens, width, act, bias=True))
        if kind == "dense":
            hidden = c.mlp_ratio * width
            layers += [
                product(f"{block}/mlp/up", "mlp", tokens, width, hidden, types, bias=True),
                activation(f"{block}/mlp/gelu", tokens * hidden, "exact"),
                product(f"{block}/mlp/down", "mlp", tokens, hidden, width, types, bias=True),
            ]
        else:
            layers += weightless_block(f"{block}/mlp", tokens, width, c.weightless, act, norm=False)
        layers.append(residual(f"{block}/mlp/residual", tokens * width, act))
    rows = 1 if c.pool == "cls" else tokens
    layers.append(layer_norm("final_norm", rows, width, act, bias=True))
    if c.pool == "mean":
        mean = Elementwise({}, {act: tokens * width}, {act: width})
        layers.append(
            LayerCosts(
                "pool",
                "activation",
                elementwise=mean,
                bytes_moved={"activations": (tokens + 1) * width * BYTES[act]},
            )
        )
    return [*layers, product("head", "head", 1, width, c.num_classes, types, bias=True)]


def _positions(tokens: int, extra: int, width: int, activations: str) -> LayerCosts:
    """Positions added to every token, the class token put in front."""
    stored = (tokens + extra) * width * BYTES[activations]
    return LayerCosts(
        "position_embedding",
        "embedding",
        elementwise=Elementwise({}, {activations: tokens * width}),
        bytes_moved={"weights": stored},
        bytes_stored={activations: stored},
        parameters=(tokens + extra) * width,
    )


def _integer(c: ViTConfig, patches: int, channels: int, mixed: str) -> list[LayerCosts]:
    width, _, heads = c.sizes()
    tokens, pixels = patches + 1, c.patch**2 * channels
    values = tokens * width
    layers = [
        _round_input("quant_input", patches * pixels),
        _dense("patch_embed", "embedding", patches, pixels, width, out=2),
        _requantize("quant_patches", patches * width, [width]),
        LayerCosts(  # int32 as it is packed; the scale of the positions is kept beside them
            "position_embedding",
            "embedding",
            bytes_moved={"weights": (tokens + 1) * width * BYTES[INT]},
            bytes_stored={INT: (tokens + 1) * width * BYTES[INT], FLOAT: BYTES[FLOAT]},
            parameters=(tokens + 1) * width,
        ),
        _requantize("quant_embedding", values, [1, 1]),
    ]
    for i, kind in enumerate(c.mlps()):
        block = f"block_{i}"
        layers += [
            _norm(f"{block}/attention_norm", tokens, width),
            _requantize(f"{block}/quant_attention_norm", values, [width]),
            *_attention(f"{block}/attention", tokens, width, heads, mixed),
            _requantize(f"{block}/quant_attention", values, [1, 1], reads=2 * values),
        ]
        if kind == "none":
            continue
        layers += [
            _norm(f"{block}/mlp_norm", tokens, width),
            _requantize(f"{block}/quant_mlp_norm", values, [width]),
        ]
        if kind == "dense":
            layers += _mlp(f"{block}/mlp", tokens, width, c.mlp_ratio * width)
        else:
            layers += _weightless(f"{block}/mlp", tokens, width, c.weightless)
        scales = [1 if kind == "dense" else width, 1]
        layers.append(_requantize(f"{block}/quant_mlp", values, scales, reads=2 * values))
    return [
        *layers,
        _norm("final_norm", 1, width),
        _requantize("quant_final", width, [width]),
        _dense("head", "head", 1, width, c.num_classes, out=4),
        LayerCosts(  # the class scores' scales
            "logit_scale",
            "requantize",
            elementwise=Elementwise({FLOAT: c.num_classes}),
            bytes_moved={"weights": c.num_classes * BYTES[FLOAT]},
            bytes_stored={FLOAT: c.num_classes * BYTES[FLOAT]},
        ),
    ]


def _round_input(name: str, values: int) -> LayerCosts:
    """The image, rounded to int8 with one scale: the only floats before the logits."""
    elementwise = Elementwise({FLOAT: values})
    moved = {"weights": BYTES[FLOAT], "activations": values * (BYTES[FLOAT] + 1)}
    stored = {FLOAT: BYTES[FLOAT]}
    return LayerCosts(
        name,
        "requantize",
        elementwise=elementwise,
        comparisons=2 * values,
        bytes_moved=moved,
        bytes_stored=stored,
    )


def _dense(name: str, kind: str, rows: int, inputs: int, outputs: int, *, out: int) -> LayerCosts:
    """int8 times int8 into int32, an int32 bias. out: bytes of a result after the requantization
    that follows on the way.
    """
    count, stored = rows * inputs * outputs, {"int8": inputs * outputs, INT: outputs * BYTES[INT]}
    return LayerCosts(
        name,
        kind,
        multiplications={"int8": count},
        additions={INT: count},
        bytes_moved={
            "weights": sum(stored.values()),
            "activations": rows * (inputs + outputs * out),
        },
        bytes_stored=stored,
        parameters=inputs * outputs + outputs,
    )


def _requantize(name: str, values: int, scales: Sequence[int], *, reads: int = 0) -> LayerCosts:
    """A dyadic multiplication (32 bits by 31, 64 bits of product), a shift and a rounding addition
    a value and branch; clamped.

    scales: for each branch how many it has, one or one a feature; two branches are added. reads:
    bytes of the second branch.
    """
    branches, stored = len(scales), sum(scales) * _BRANCH
    return LayerCosts(
        name,
        "requantize",
        elementwise=Elementwise(
            {INT: branches * values},
            {INT: (2 * branches - 1) * values},
            {},
            {},
            {INT: branches * values},
        ),
        comparisons=(2 * branches + 2) * values,
        comparison_type=INT,
        bytes_moved={"weights": stored, "activations": reads},
        bytes_stored={INT: stored},
    )


def _norm(name: str, rows: int, width: int) -> LayerCosts:
    """I-LayerNorm: integer mean, sum of squares, Newton's square root, one factor a token; 16 bits
    in, 8 out after requantization.
    """
    stored = 2 * width * BYTES[INT]
    return LayerCosts(
        name,
        "norm",
        elementwise=Elementwise(
            multiplications={INT: rows * 2 * width},
            additions={INT: rows * (4 * width + LAYER_NORM_ITERATIONS)},
            divisions={INT: rows * (2 + LAYER_NORM_ITERATIONS)},
            shifts={INT: rows * (width + LAYER_NORM_ITERATIONS)},
        ),
        bytes_moved={"weights": stored, "activations": rows * width * (2 + 1)},
        bytes_stored={INT: stored},
        parameters=2 * width,
    )


def _attention(name: str, tokens: int, width: int, heads: int, mixed: str) -> list[LayerCosts]:
    """8-bit queries, keys, values and scores; Shiftmax's 16-bit weights times 8-bit values, or
    `mixed` operands.
    """
    values, scores = tokens * width, heads * tokens * tokens
    count = scores * (width // heads)
    shiftmax = LayerCosts(
        f"{name}/shiftmax",
        "attention",
        # Less the largest; x + x / 2 - x / 16; quotient and rest by the constant for 1; shifted,
        # summed, times the sum's inverse, shifted.
        elementwise=Elementwise(
            multiplications={INT: 2 * scores},
            additions={INT: 6 * scores},
            divisions={INT: scores + heads * tokens},
            shifts={INT: 6 * scores},
        ),
        comparisons=4 * scores,
        comparison_type=INT,
        bytes_moved={"weights": BYTES[INT], "activations": scores * (1 + 2)},
        bytes_stored={INT: BYTES[INT]},
    )

    def product_of(part: str, operands: str, moved: int) -> LayerCosts:
        return LayerCosts(
            f"{name}/{part}",
            "attention",
            {operands: count},
            {INT: count},
            bytes_moved={"activations": moved},
        )

    return [
        _dense(f"{name}/qkv", "projection", tokens, width, 3 * width, out=1),
        _requantize(f"{name}/quant_qkv", 3 * values, [3 * width]),
        product_of("scores", "int8", 2 * values + scores),
        _requantize(f"{name}/quant_scores", scores, [1]),
        shiftmax,
        product_of("mix", mixed, 2 * scores + 2 * values),
        _requantize(f"{name}/quant_mixed", values, [1]),
        _dense(f"{name}/proj", "projection", tokens, width, width, out=2),
        _requantize(f"{name}/quant_proj", values, [width]),
    ]


def _mlp(name: str, tokens: int, width: int, hidden: int) -> list[LayerCosts]:
    """Linear, ShiftGELU (an exponential of each value and of each token's largest, a division, two
    products), linear.
    """
    values = tokens * hidden
    gelu = LayerCosts(
        f"{name}/gelu",
        "activation",
        elementwise=Elementwise(
            multiplications={INT: 3 * values + tokens},
            additions={INT: 6 * values + 4 * tokens},
            divisions={INT: 2 * values + tokens},
            shifts={INT: 5 * values + 4 * tokens},
        ),
        comparisons=4 * values + 3 * tokens,
        comparison_type=INT,
        bytes_moved={"weights": BYTES[INT]},
        bytes_stored={INT: BYTES[INT]},
    )
    return [
        _dense(f"{name}/up", "mlp", tokens, width, hidden, out=1),
        _requantize(f"{name}/quant_up", values, [hidden]),
        gelu,
        _requantize(f"{name}/quant_gelu", values, [1]),
        _dense(f"{name}/down", "mlp", tokens, hidden, width, out=2),
        _requantize(f"{name}/quant_down", tokens * width, [width]),
    ]


def _weightless(name: str, tokens: int, width: int, options: WeightlessOptions) -> list[LayerCosts]:
    """8-bit integers compared, one-bit tables read, int8 vectors added in int32 (and doubled where
    bits are signed): no multiplication.
    """
    bits = width * options.thermometer_bits
    thresholds = bits * BYTES["int16"]
    tables, last = lookups(name, tokens, bits, options)
    vectors = last * width if options.sum == "dense" else last
    stored = {"int8": vectors, INT: width * BYTES[INT]}
    return [
        LayerCosts(
            f"{name}/thermometer",
            "thermometer",
            comparisons=tokens * bits,
            comparison_type="int8",
            bytes_moved={
                "weights": thresholds,
                "activations": tokens * (width + packed_bits(bits)),
            },
            bytes_stored={"int16": thresholds},
            parameters=bits if options.learn_thresholds else 0,
        ),
        *tables,
        LayerCosts(
            f"{name}/conditional_sum",
            "conditional_sum",
            additions={INT: tokens * vectors},
            elementwise=Elementwise(
                {}, {}, {}, {}, {INT: tokens * width} if options.signed else {}
            ),
            bytes_moved={
                "weights": sum(stored.values()),
                "activations": tokens * (packed_bits(last) + 2 * width),
            },
            bytes_stored=stored,
            parameters=vectors + width,
        ),
    ]
