"""Tokens a second of a packed MatMul-free model (random weights), decoding one at a time and
reading a text at once, with native code and with XLA alone; and of a Transformer++ of the same size
decoding in float32 and in bfloat16:
PYTHONPATH=. taskset -c 0 python benchmarks/decode_packed.py [--size=370m] [--layers=4]

All in one process, in turn, medians. The models are made as in `decode_13b.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import roofline
import timing
from decode_13b import dense_variables, packed_variables

from quweit_jax.deploy.generate import decode_step, empty_cache
from quweit_jax.deploy.pack import stored_bytes
from quweit_jax.models import build
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.kernels.native import library

NATIVE, IN_XLA = "native", "XLA"
PRECISIONS = ("float32", "bfloat16")


def decoding(model, variables):
    """A call that decodes one token behind those before it; compiled here, so that it keeps to
    the implementations that are chosen now.
    """
    held = [empty_cache(model), jnp.zeros((1, 1), jnp.int32)]

    def call():
        logits, held[0] = run(variables, *held)
        held[1] = jnp.argmax(logits[:, -1:], -1).astype(jnp.int32)
        return held[1].block_until_ready()

    step = functools.partial(decode_step.__wrapped__, model)
    run = jax.jit(step).lower(variables, *held).compile()
    return call


def transformer(options, precision: str, rng: np.random.Generator):
    """Transformer++ with random weights, and those, in a precision."""
    model = build(options | {"name": "transformer_pp", "dtype": precision}, 32000)
    variables = dense_variables(model, rng)
    return model, jax.tree.map(lambda leaf: leaf.astype(precision), variables)


def main() -> None:
    parser = timing.parser(__doc__, rounds=15)
    parser.add_argument("--size", default="370m", help="of the model")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the size's")
    parser.add_argument("--tokens", type=int, default=128, help="of the text that is read at once")
    args = parser.parse_args()
    options = {"name": "matmulfree", "size": args.size, "layers": args.layers, "context": 2048}
    model = build(options, 32000)
    variables = packed_variables(model, np.random.default_rng(0))
    text = jnp.ones((1, args.tokens), jnp.int32)

    def reading():
        run = jax.jit(lambda v, ids: model.apply(v, ids)[:, -1]).lower(variables, text).compile()
        return lambda: run(variables, text).block_until_ready()

    calls = roofline.contenders()
    for name in (NATIVE, IN_XLA):
        with choice.compiling_for("cpu", portable=name == IN_XLA):
            calls[f"a token, {name}"] = decoding(model, variables)
            calls[f"{args.tokens} tokens, {name}"] = reading()
    sizes = []
    for precision in PRECISIONS:
        dense, weights = transformer(options, precision, np.random.default_rng(0))
        calls[f"a token, Transformer++ {precision}"] = decoding(dense, weights)
        sizes.append(f"{precision} {stored_bytes(weights):,} bytes")
    with library.using(library.LEVELS[-1]) as level:
        found = timing.summary(timing.samples(calls, args.rounds, warmup=1))
    limits = roofline.rates({k: found.pop(k)["median_ms"] / 1e3 for k in roofline.LIMITS})
    ms = {name: of["median_ms"] for name, of in found.items()}
    token = ms[f"a token, {NATIVE}"]
    facts = {
        f"decoding, times Transformer++ {precision}": ms[f"a token, Transformer++ {precision}"]
        / token
        for precision in PRECISIONS
    } | {
        "decoding, times XLA": ms[f"a token, {IN_XLA}"] / token,
        "reading, times XLA": ms[f"{args.tokens} tokens, {IN_XLA}"]
        / ms[f"{args.tokens} tokens, {NATIVE}"],
        "reading, times a token's rate": token
        * args.tokens
        / ms[f"{args.tokens} tokens, {NATIVE}"],
    }
    lines = [
        f"MatMul-free {args.size}, {model.config.sizes()[1]} layers, packed, "
        f"{stored_bytes(variables):,} bytes, native: {level}; Transformer++ of as many layers: "
        + ", ".join(sizes),
        timing.machine(),
        timing.cores(),
        timing.spread_table(found, f"a token, {IN_XLA}"),
        *(f"{name}: {value:.2f}" for name, value in facts.items()),
        "roofline: " + ", ".join(f"{k} {v:.1f}" for k, v in limits.items()),
    ]
    print("\n".join(lines))
    timing.write(args.out, lines)
    said = dict(zip(("model", "machine", "timed"), lines))
    timing.write_json(args.out, said | {"contenders": found, **facts, "roofline": limits})


if __name__ == "__main__":
    main()
