"""The costs of the layers that several models share, in floats (or with int8 products among
floats).

Dimensions: R rows (tokens, or patches) that one inference sends through a layer, I inputs, O
outputs, d width, T tokens attended to, H heads, K width of a head, L look-up tables, n inputs a
table, z thermometer bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from quweit_jax.errors import check_choice
from quweit_jax.models.options import WeightlessOptions
from quweit_jax.ops.counts import BYTES, Elementwise, LayerCosts

PRECISIONS = ("float32", "bfloat16", "float16", "int8")
FLOAT = "float32"  # of statistics, scales, thresholds and gates, whatever the model's type


@dataclasses.dataclass(frozen=True)
class Types:
    """operands: of matrix products, and of their weights where they are stored. activations: of
    what flows between layers.
    """

    operands: str
    activations: str

    @property
    def accumulator(self) -> str:
        """Of sums of products: int32 for integers, float32 for floats of any width, as matrix units
        do.
        """
        return "int32" if self.operands.startswith("int") else FLOAT


def types_of(dtype: str, precision: str | None) -> Types:
    """A float model's types: its own dtype, or other operands of its products."""
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
    operands = precision or dtype
    return Types(operands, dtype if operands == "int8" else operands)


def packed_bits(count: int) -> int:
    """Bytes of bits, eight a byte."""
    return -(-count // 8)


def matrix(rows: int, columns: int, types: Types) -> dict[str, int]:
    """Bytes of a stored matrix; an int8 one has a float32 scale a column."""
    stored = {types.operands: rows * columns * BYTES[types.operands]}
    return stored | {FLOAT: columns * BYTES[FLOAT]} if types.operands == "int8" else stored


def add_bytes(stored: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Sums by format."""
    return {key: stored.get(key, 0) + more.get(key, 0) for key in {**stored, **more}}


def product(
    name: str,
    kind: str,
    rows: int,
    inputs: int,
    outputs: int,
    types: Types,
    *,
    bias: bool = False,
    shares_weights: bool = False,
) -> LayerCosts:
    """A dense layer (R, I) -> (R, O). shares_weights: the matrix is stored with another layer (a
    tied head).

    With int8 operands each input is rounded (a multiplication, two comparisons) and each result
    rescaled (a multiplication) in float32.
    """
    count = rows * inputs * outputs
    stored = matrix(inputs, outputs, types)
    if bias:
        stored = add_bytes(stored, {FLOAT: outputs * BYTES[FLOAT]})
    rounds = types.operands == "int8"
    biased = {FLOAT: rows * outputs} if bias and rounds else {}
    return LayerCosts(
        name,
        kind,
        multiplications={types.operands: count},
        additions={types.accumulator: count},
        elementwise=Elementwise({FLOAT: rows * (inputs + outputs)}, biased)
        if rounds
        else Elementwise(),
        comparisons=2 * rows * inputs if rounds else 0,
        bytes_moved={
            "weights": sum(stored.values()),
            "activations": rows
            * (inputs * BYTES[types.operands] + outputs * BYTES[types.activations]),
        },
        bytes_stored={} if shares_weights else stored,
        parameters=0 if shares_weights else inputs * outputs + (outputs if bias else 0),
    )


def embedding(
    name: str, vocabulary: int, width: int, types: Types, *, positions: int = 0
) -> LayerCosts:
    """A token's row of a table and, if there are `positions` learned ones, its position's, added."""
    stored = matrix(vocabulary, width, types)
    size = BYTES[types.activations]
    row = width * BYTES[types.operands] + (width * size if positions else 0)
    if positions:
        stored = add_bytes(stored, {types.activations: positions * width * size})
    return LayerCosts(
        name,
        "embedding",
        elementwise=Elementwise(
            {FLOAT: width} if types.operands == "int8" else {},
            {types.activations: width} if positions else {},
        ),
        bytes_moved={"weights": row, "activations": width * size},
        bytes_stored=stored,
        parameters=(vocabulary + positions) * width,
    )


def layer_norm(name: str, rows: int, width: int, activations: str, *, bias: bool) -> LayerCosts:
    """Mean and mean square, a factor a feature (inverse deviation times scale), subtract, multiply,
    perhaps add; in float32.
    """
    return _norm(name, rows, width, activations, 1 + bias, Elementwise(
        {FLOAT: rows * (3 * width + 1)}, {FLOAT: rows * ((3 + bias) * width + 2)}, {FLOAT: 2 * rows}, {FLOAT: rows}
    ))  # fmt: skip


def rms_norm(name: str, rows: int, width: int, activations: str) -> LayerCosts:
    """Mean square, times inverse root, times scale; in float32."""
    return _norm(name, rows, width, activations, 1, Elementwise(
        {FLOAT: rows * 3 * width}, {FLOAT: rows * (width + 1)}, {FLOAT: rows}, {FLOAT: rows}
    ))  # fmt: skip


def _norm(
    name: str, rows: int, width: int, activations: str, vectors: int, elementwise: Elementwise
) -> LayerCosts:
    stored = vectors * width * BYTES[FLOAT]
    return LayerCosts(
        name,
        "norm",
        elementwise=elementwise,
        bytes_moved={"weights": stored, "activations": 2 * rows * width * BYTES[activations]},
        bytes_stored={FLOAT: stored},
        parameters=vectors * width,
    )


def attention(
    name: str,
    rows: int,
    attended: int,
    heads: int,
    kv_heads: int,
    head: int,
    types: Types,
    *,
    cached: bool,
) -> list[LayerCosts]:
    """Scores, softmax and mix of R queries that attend to T tokens each.

    cached: keys and values come from a cache of T tokens, to which each query's own are added; else
    they are activations.
    """
    scores, mixed, held = rows * heads * attended, rows * heads * head, attended * kv_heads * head
    operand, act = BYTES[types.operands], BYTES[types.activations]
    count = scores * head
    written = rows * kv_heads * head
    where = {"state": (held + written) * operand} if cached else {}
    kept = held * operand if cached else 0
    loaded = 0 if cached else held * operand
    rounds = types.operands == "int8"

    def one(part: str, read: int, rescaled: int, wrote: int) -> LayerCosts:
        return LayerCosts(
            f"{name}/{part}",
            "attention",
            multiplications={types.operands: count},
            additions={types.accumulator: count},
            elementwise=Elementwise({FLOAT: rescaled + read + written} if rounds else {}),
            comparisons=2 * (read + written) if rounds else 0,
            bytes_moved={"activations": read * operand + loaded + wrote * act, **where},
            state_bytes=kept,
        )

    softmax = LayerCosts(
        f"{name}/softmax",
        "attention",
        # Times 1 / sqrt(K); less the largest, exponential, sum, division.
        elementwise=Elementwise(
            {FLOAT: scores}, {FLOAT: 2 * scores}, {FLOAT: scores}, {FLOAT: scores}
        ),
        comparisons=scores,
        bytes_moved={"activations": 2 * scores * act},
    )
    return [one("scores", mixed, scores, scores), softmax, one("mix", scores, mixed, mixed)]


def activation(name: str, values: int, function: str) -> LayerCosts:
    """GELU ('exact' or 'tanh') or SiLU ('silu', and 'gated_silu' with the product by the other
    branch), in float32.
    """
    multiplications, additions = {
        "exact": (3, 0),
        "tanh": (6, 2),
        "silu": (1, 0),
        "gated_silu": (2, 0),
    }[function]
    added = {FLOAT: additions * values} if additions else {}
    return LayerCosts(
        name,
        "activation",
        elementwise=Elementwise({FLOAT: multiplications * values}, added, {}, {FLOAT: values}),
    )


def residual(name: str, values: int, activations: str) -> LayerCosts:
    """A branch's result added to the stream, which is read."""
    return LayerCosts(
        name,
        "residual",
        elementwise=Elementwise({}, {activations: values}),
        bytes_moved={"activations": values * BYTES[activations]},
    )


def weightless_block(
    name: str,
    rows: int,
    width: int,
    options: WeightlessOptions,
    activations: str,
    *,
    norm: bool,
    norm_bias: bool = False,
) -> list[LayerCosts]:
    """A weightless block as deployed: thermometer, tables of one bit an entry, int8 vectors added
    in int32, one float32 scale an output.
    """
    layers = [layer_norm(f"{name}/norm", rows, width, FLOAT, bias=norm_bias)] if norm else []
    bits = width * options.thermometer_bits
    layers.append(
        LayerCosts(
            f"{name}/thermometer",
            "thermometer",
            comparisons=rows * bits,
            bytes_moved={
                "weights": bits * BYTES[FLOAT],
                "activations": rows * (width * BYTES[FLOAT] + packed_bits(bits)),
            },
            bytes_stored={FLOAT: bits * BYTES[FLOAT]},
            parameters=bits if options.learn_thresholds else 0,
        )
    )
    tables, last = lookups(name, rows, bits, options)
    vectors = last * width if options.sum == "dense" else last
    scales = width if options.sum == "dense" else 1
    stored = {"int8": vectors, FLOAT: (scales + width) * BYTES[FLOAT]}
    total = LayerCosts(
        f"{name}/conditional_sum",
        "conditional_sum",
        additions={"int32": rows * vectors},
        elementwise=Elementwise({FLOAT: rows * width}, {FLOAT: rows * width}),  # scale and bias
        bytes_moved={
            "weights": sum(stored.values()),
            "activations": rows * (packed_bits(last) + width * BYTES[activations]),
        },
        bytes_stored=stored,
        parameters=vectors + width,
    )
    return [*layers, *tables, total]


def lookups(
    name: str, rows: int, bits: int, options: WeightlessOptions
) -> tuple[list[LayerCosts], int]:
    """The look-up layers of a block on `bits` input bits, and the number of bits that come out."""
    counts = (options.num_luts,) if isinstance(options.num_luts, int) else tuple(options.num_luts)
    layers = []
    for i, count in enumerate(counts):
        candidates = options.candidates if options.mapping == "candidates" else None
        learned = options.mapping in ("learnable", "candidates")
        layers.append(
            lookup_layer(
                f"{name}/luts_{i}",
                rows,
                bits,
                count,
                options.lut_inputs,
                learned=learned,
                candidates=candidates,
            )
        )
        bits = count
    return layers, bits


def lookup_layer(
    name: str,
    rows: int,
    bits: int,
    count: int,
    inputs: int,
    *,
    learned: bool = False,
    candidates: int | None = None,
    real: bool = False,
) -> LayerCosts:
    """L tables of n inputs wired to `bits` bits. learned: the wiring is, among all bits or some
    candidates. real: tables of float32 values.
    """
    slots, entries = count * inputs, 2**inputs
    stored: dict[str, Any] = {"wiring": slots * (1 if bits <= 2**8 else 2 if bits <= 2**16 else 4)}
    stored |= (
        {FLOAT: count * entries * BYTES[FLOAT]} if real else {"1-bit": count * packed_bits(entries)}
    )
    wrote = count * BYTES[FLOAT] if real else packed_bits(count)
    scores = (min(candidates, bits) if candidates else bits) * slots if learned else 0
    return LayerCosts(
        name,
        "lookup",
        lookups={inputs: rows * count * (32 if real else 1)},
        bytes_moved={
            "weights": sum(stored.values()),
            "activations": rows * (packed_bits(bits) + wrote),
        },
        bytes_stored=stored,
        parameters=count * entries + scores,
    )
