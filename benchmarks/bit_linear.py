"""Fused BitLinear against its plain composition at 1.3B's layer shapes: activation memory between
forward and backward pass, and time.

python benchmarks/bit_linear.py [--tokens=512] [--dtype=float32] [--out=FILE]

Two figures a layer: what the forward pass keeps for the backward pass beside its parameters
(counted from the residuals of `jax.vjp`), and the time of forward + backward. 'block' is the whole
channel mixer of 1.3B (GLU of 2,048 x 5,632), where one input feeds several layers; 'step' a
training step of a MatMul-free model of that width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import timing

from quweit_jax.models import build
from quweit_jax.ops import ternary

SHAPES = {
    "mixer 2048 x 2048": (2048, 2048),
    "gate 2048 x 11264": (2048, 11264),
    "down 5632 x 2048": (5632, 2048),
}
FORMS = {"fused": ternary.bit_linear, "plain": ternary.bit_linear_reference}


def kept_bytes(function, arguments, parameters) -> int:
    """Bytes a forward pass hands to the backward pass, beside the parameters."""
    pullback = jax.tree.leaves(
        jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *arguments)
    )
    known = sorted((p.shape, str(p.dtype)) for p in parameters)
    total = 0
    for leaf in pullback:
        entry = (leaf.shape, str(leaf.dtype))
        if entry in known:
            known.remove(entry)
        else:
            total += int(np.prod(leaf.shape)) * leaf.dtype.itemsize
    return total


def layer(inputs: int, outputs: int, tokens: int, dtype, rounds: int) -> str:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, tokens, inputs), dtype)
    parameters = (jax.random.normal(keys[1], (inputs, outputs)) * 0.02, jnp.ones(inputs))
    gradient = jax.random.normal(keys[2], (1, tokens, outputs), dtype)
    calls, kept, temporaries = {}, {}, {}
    for name, form in FORMS.items():
        function = jax.jit(lambda x, w, s, g, form=form: jax.vjp(form, x, w, s)[1](g))
        compiled = function.lower(x, *parameters, gradient).compile()
        calls[name] = functools.partial(_finished, compiled, x, *parameters, gradient)
        kept[name] = kept_bytes(form, (x, *parameters), parameters)
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
    return report(timing.side_by_side(calls, rounds), kept, temporaries)


def _finished(compiled, *arguments):
    return jax.block_until_ready(compiled(*arguments))


def report(medians, kept, temporaries) -> str:
    saved = [1 - one["fused"] / one["plain"] for one in (kept, temporaries)]
    lines = [
        timing.table(medians, "plain"),
        f"kept for the backward pass: fused {kept['fused']:,} plain {kept['plain']:,} bytes: "
        f"{saved[0]:.1%} less",
        f"XLA's temporaries, forward + backward: fused {temporaries['fused']:,} plain "
        f"{temporaries['plain']:,}: {saved[1]:.1%} less",
    ]
    return "\n".join(lines)


def whole_step(tokens: int, dtype: str, width: int, depth: int, rounds: int) -> str:
    """Loss and gradients of a MatMul-free model, its BitLinear layers in either form."""
    calls, temporaries, kept = {}, {}, {}
    ids = jax.random.randint(jax.random.key(0), (1, tokens), 0, 1000)
    for name, form in FORMS.items():
        sizes = {"size": "1.3b", "layers": depth, "width": width, "dtype": dtype}
        model = build({"name": "matmulfree", **sizes}, 1000)
        variables = jax.jit(model.init)(jax.random.key(1), ids)
        loss = functools.partial(_loss, model, form, ids)
        compiled = jax.jit(jax.grad(loss)).lower(variables).compile()
        calls[name] = functools.partial(_finished, compiled, variables)
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
        kept[name] = kept_bytes(loss, (variables,), jax.tree.leaves(variables))
    return report(timing.side_by_side(calls, rounds), kept, temporaries)


def _loss(model, form, ids, variables):
    before = ternary.bit_linear
    ternary.bit_linear = form  # traced here and now: each compiled function has its own form
    try:
        return -jax.nn.log_softmax(model.apply(variables, ids))[..., 0].mean()
    finally:
        ternary.bit_linear = before


def main() -> None:
    parser = timing.parser(__doc__, rounds=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--depth", type=int, default=2, help="blocks of the model whose whole step is measured"
    )
    args = parser.parse_args()
    lines = [
        f"bit_linear, {args.tokens} tokens, {args.dtype}, {jax.default_backend()}",
        timing.machine(),
    ]
    for name, (inputs, outputs) in SHAPES.items():
        lines += [
            f"\n{name}",
            layer(inputs, outputs, args.tokens, jnp.dtype(args.dtype), args.rounds),
        ]
        print("\n".join(lines[-2:]), flush=True)
    lines += [
        f"\nloss and gradients, {args.depth} blocks of width 2048",
        whole_step(args.tokens, args.dtype, 2048, args.depth, args.rounds),
    ]
    print("\n".join(lines[-2:]))
    timing.write(args.out, lines)


if __name__ == "__main__":
    main()
