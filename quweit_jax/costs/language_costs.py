"""One token of a decoder: GPT, Transformer++ and MatMul-free LM, from their configs.

The token is the newest of `context` tokens: attention reads the keys and values of all of them from
a cache, the MatMul-free model a state of fixed size.
"""

from __future__ import annotations

from quweit_jax.costs.parts import (
    FLOAT,
    Types,
    activation,
    attention,
    embedding,
    layer_norm,
    product,
    residual,
    rms_norm,
    types_of,
    weightless_block,
)
from quweit_jax.errors import InputError
from quweit_jax.models.gpt import GPTConfig
from quweit_jax.models.matmulfree import MatMulFreeConfig
from quweit_jax.models.options import kinds_of_mlp
from quweit_jax.models.transformer_pp import TransformerPPConfig
from quweit_jax.ops.counts import BYTES, Elementwise, LayerCosts
from quweit_jax.ops.ternary import WEIGHTS_PER_BYTE


def attended_tokens(
    context: int | None, config: GPTConfig | TransformerPPConfig | MatMulFreeConfig
) -> int:
    """The tokens a token attends to: the model's whole context unless fewer are asked for.

    Raises:
      InputError: more than an attention can see, or fewer than the token itself.
    """
    limit = None if isinstance(config, MatMulFreeConfig) else config.context
    asked = config.context if context is None else context
    if asked < 1 or (limit is not None and asked > limit):
        raise InputError(
            f"context: expected 1 to {limit or 'any number of'} tokens, found {asked}; a longer "
            "one is --config.model.context."
        )
    return asked


def gpt(config: GPTConfig, context: int, precision: str | None) -> list[LayerCosts]:
    """nanoGPT's architecture; the head reads the embedding's matrix where they are tied."""
    c, types = config, types_of(config.dtype, precision)
    act = types.activations
    layers = [embedding("token_embedding", c.vocab_size, c.width, types, positions=c.context)]
    for i, kind in enumerate(c.mlps()):
        block = f"block_{i}"
        layers += [
            layer_norm(f"{block}/attention_norm", 1, c.width, act, bias=c.bias),
            product(
                f"{block}/attention/qkv", "projection", 1, c.width, 3 * c.width, types, bias=c.bias
            ),
            *attention(
                f"{block}/attention",
                1,
                context,
                c.heads,
                c.heads,
                c.width // c.heads,
                types,
                cached=True,
            ),
            product(
                f"{block}/attention/proj", "projection", 1, c.width, c.width, types, bias=c.bias
            ),
            residual(f"{block}/attention/residual", c.width, act),
        ]
        if kind == "dense":
            layers += [
                layer_norm(f"{block}/mlp_norm", 1, c.width, act, bias=c.bias),
                *_mlp(f"{block}/mlp", c, types),
            ]
        elif kind == "weightless":
            layers += weightless_block(
                f"{block}/mlp", 1, c.width, c.weightless, act, norm=True, norm_bias=c.bias
            )
        if kind != "none":
            layers.append(residual(f"{block}/mlp/residual", c.width, act))
    head = product("head", "head", 1, c.width, c.vocab_size, types, shares_weights=c.tie_embeddings)
    return [*layers, layer_norm("final_norm", 1, c.width, act, bias=c.bias), head]


def _mlp(name: str, c: GPTConfig, types: Types) -> list[LayerCosts]:
    hidden = 4 * c.width
    return [
        product(f"{name}/up", "mlp", 1, c.width, hidden, types, bias=c.bias),
        activation(f"{name}/gelu", hidden, c.gelu),
        product(f"{name}/down", "mlp", 1, hidden, c.width, types, bias=c.bias),
    ]


def transformer_pp(
    config: TransformerPPConfig, context: int, precision: str | None
) -> list[LayerCosts]:
    """Llama's decoder: RMSNorm, rotary positions, perhaps fewer heads of keys and values, SwiGLU,
    an untied head.
    """
    c, types = config, types_of(config.dtype, precision)
    width, depth, heads = c.sizes()
    act, head = types.activations, c.head_width or width // heads
    kv_heads, hidden = c.kv_heads or heads, c.hidden_width()
    layers = [embedding("token_embedding", c.vocab_size, width, types)]
    for i, kind in enumerate(kinds_of_mlp(c.mlp, depth)):
        block = f"block_{i}"
        layers += [
            rms_norm(f"{block}/mixer_norm", 1, width, act),
            product(
                f"{block}/mixer/qkv", "projection", 1, width, (heads + 2 * kv_heads) * head, types
            ),
            _rotary(f"{block}/mixer/rotary", heads + kv_heads, head),
            *attention(f"{block}/mixer", 1, context, heads, kv_heads, head, types, cached=True),
            product(f"{block}/mixer/proj", "projection", 1, heads * head, width, types),
            residual(f"{block}/mixer/residual", width, act),
        ]
        if kind == "dense":
            layers += [
                rms_norm(f"{block}/mlp_norm", 1, width, act),
                product(f"{block}/mlp/gate", "mlp", 1, width, 2 * hidden, types),
                activation(f"{block}/mlp/silu", hidden, "gated_silu"),
                product(f"{block}/mlp/down", "mlp", 1, hidden, width, types),
            ]
        elif kind == "weightless":
            layers += weightless_block(f"{block}/mlp", 1, width, c.weightless, act, norm=True)
        if kind != "none":
            layers.append(residual(f"{block}/mlp/residual", width, act))
    return [
        *layers,
        rms_norm("final_norm", 1, width, act),
        product("head", "head", 1, width, c.vocab_size, types),
    ]


def _rotary(name: str, heads: int, head: int) -> LayerCosts:
    """Cosine and sine of half a head's angles, then two multiplications and an addition a number,
    in float32.
    """
    values = heads * head
    return LayerCosts(
        name,
        "attention",
        elementwise=Elementwise(
            {FLOAT: 2 * values + head // 2}, {FLOAT: values}, {}, {FLOAT: head}
        ),
    )


def matmulfree(config: MatMulFreeConfig, context: int, precision: str | None) -> list[LayerCosts]:
    """Ternary weights throughout, a gated recurrence for tokens; only the embedding, norms and
    gates' bounds are floats.

    Whatever the context, the cost is the same.
    """
    c, types = config, types_of(config.dtype, precision)
    act, hidden = types.activations, c.hidden_width()
    width, depth = c.sizes()
    layers = [embedding("token_embedding", c.vocab_size, width, types)]
    for i, kind in enumerate(kinds_of_mlp(c.mlp, depth)):
        block = f"block_{i}"
        layers.append(rms_norm(f"{block}/mixer_norm", 1, width, act))
        for name in ("forget", "input", "gate"):
            layers += bit_linear(f"{block}/mixer/{name}", "projection", width, width, act)
        layers += [
            _recurrence(f"{block}/mixer/recurrence", width),
            rms_norm(f"{block}/mixer/gate_norm", 1, width, act),
        ]
        layers += bit_linear(f"{block}/mixer/output", "projection", width, width, act)
        layers.append(residual(f"{block}/mixer/residual", width, act))
        if kind == "dense":
            layers += [
                rms_norm(f"{block}/mlp_norm", 1, width, act),
                *bit_linear(f"{block}/mlp/gate", "mlp", width, 2 * hidden, act),
                activation(f"{block}/mlp/silu", hidden, "gated_silu"),
                *bit_linear(f"{block}/mlp/down", "mlp", hidden, width, act),
            ]
        elif kind == "weightless":
            layers += weightless_block(f"{block}/mlp", 1, width, c.weightless, act, norm=True)
        if kind != "none":
            layers.append(residual(f"{block}/mlp/residual", width, act))
    return [
        *layers,
        rms_norm("final_norm", 1, width, act),
        *bit_linear("head", "head", width, c.vocab_size, act),
    ]


def bit_linear(
    name: str, kind: str, inputs: int, outputs: int, activations: str
) -> list[LayerCosts]:
    """Norm, rounding to int8 by the largest value, additions of int8 into int32 (at most one a
    weight), one rescaling an output.
    """
    stored = {"2-bit": -(-inputs // WEIGHTS_PER_BYTE) * outputs, FLOAT: BYTES[FLOAT]}
    rounding = LayerCosts(
        f"{name}/round",
        "requantize",
        elementwise=Elementwise({FLOAT: inputs}, {}, {FLOAT: 1}),
        comparisons=3 * inputs,
    )  # the largest magnitude, and clamping on both sides
    total = LayerCosts(
        name,
        kind,
        additions={"int32": inputs * outputs},
        elementwise=Elementwise({FLOAT: outputs + 1}),
        bytes_moved={
            "weights": sum(stored.values()),
            "activations": inputs * BYTES["int8"] + outputs * BYTES[activations],
        },
        bytes_stored=stored,
        parameters=inputs * outputs,
    )
    return [rms_norm(f"{name}/norm", 1, inputs, activations), rounding, total]


def _recurrence(name: str, width: int) -> LayerCosts:
    """Gates, one step of h = f h + c, and the output gate, in float32; the state is read and
    written.

    f = sigmoid(.) d functions; lower + (1 - lower) f: d multiplications, 2 d additions; c = silu(.)
    (1 - f): 2 d multiplications, d additions, d functions; the step: d and d; gate * silu(h): 2 d
    multiplications and d functions.
    """
    counts = Elementwise({FLOAT: 6 * width}, {FLOAT: 4 * width}, {}, {FLOAT: 3 * width})
    held = width * BYTES[FLOAT]
    return LayerCosts(
        name,
        "recurrence",
        elementwise=counts,
        bytes_moved={"weights": held, "state": 2 * held},
        bytes_stored={FLOAT: held},
        state_bytes=held,
        parameters=width,
    )
