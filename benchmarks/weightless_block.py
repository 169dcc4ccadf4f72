"""The packed weightless block against the dense MLP it replaces and against a token at a time:
taskset -c 0 python benchmarks/weightless_block.py

Blocks of the default GPT on a CPU (width 128, 896 tables of 4 inputs, 768 tokens) and of a larger
one (width 192, 1,536 tables of 6 inputs, 4,096 tokens). The dense MLP is two float32 products, 4
times wider inside, with a ReLU, which costs next to nothing; GPT's has a GELU. The parts are XLA's.
All forms of a sum give the same integers, which is checked before anything is timed. Shares of the
roofline count the operations of the dense MLP, 16 width**2 a token, and of the block's dense sum, 2
L width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import roofline
import timing
from jax import Array

from quweit_jax.layers.mlp import MLP
from quweit_jax.layers.weightless import WeightlessBlock, above
from quweit_jax.ops import packed_lut
from quweit_jax.ops.kernels import choice

BLOCKS = {
    "d 128, L 896, n 4, 768 tokens": (128, 896, 4, 768),
    "d 192, L 1536, n 6, 4096 tokens": (192, 1536, 6, 4096),
}
MLP_NAME, BLOCK, BEFORE = "dense MLP", "packed block", "packed block, a token at a time"
IN_XLA = "packed block, XLA"


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """A call that runs a compiled function to the end."""
    run = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(run(*arguments))


def token_at_a_time(packed: dict[str, Any], x: Array) -> Array:
    """The block as the references compute it: bits as booleans, an address for every table and
    token, an int8 product.
    """
    layer = packed["luts_0"]
    bits = above(x.T, packed["thresholds"])
    bits_LT = packed_lut.look_up(bits, layer["wiring"], layer["tables"], implementation="reference")
    counted = 2 * bits_LT.astype(jnp.int8) - 1
    total = jax.lax.dot_general(
        counted, packed["vectors"], (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32
    )
    return total * packed["scale"] + packed["bias"]


def contenders(width: int, luts: int, inputs: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """The block, its parts, the MLP and what is before, of one size."""
    x = jax.random.normal(jax.random.key(0), (tokens, width))
    block = WeightlessBlock(
        width, num_luts=luts, lut_inputs=inputs, vector_init=0.5, use_norm=False
    )
    variables = jax.jit(block.init)(jax.random.key(1), x)
    packed = jax.jit(lambda v: block.apply(v, x, mutable=["packed"])[1])(variables)["packed"]
    mlp = MLP()
    weights = jax.jit(mlp.init)(jax.random.key(2), x)
    up, down = (weights["params"][name]["kernel"] for name in ("up", "down"))
    layer = packed["luts_0"]
    bits = above(x.T, packed["thresholds"])
    words = packed_lut.pack_bits(bits)
    read = packed_lut.look_up_words(words, layer["wiring"], layer["tables"])
    with choice.compiling_for("cpu", portable=True):  # without native code
        in_xla = compiled(lambda p, x: block.apply({"packed": p}, x), packed, x)
    made: dict[str, Callable[[], Any]] = {
        MLP_NAME: compiled(lambda x, up, down: jax.nn.relu(x @ up) @ down, x, up, down),
        "dense MLP with an exact GELU": compiled(mlp.apply, weights, x),
        BEFORE: compiled(token_at_a_time, packed, x),
        BLOCK: compiled(lambda p, x: block.apply({"packed": p}, x), packed, x),
        IN_XLA: in_xla,
        "  comparing and packing": compiled(
            lambda x, t: packed_lut.pack_above(x.T, t), x, packed["thresholds"]
        ),
        "  looking up": compiled(packed_lut.look_up_words, words, layer["wiring"], layer["tables"]),
        "  adding": compiled(packed_lut.add_vectors, read, packed["vectors"]),
        "  adding, a vector at a time": compiled(
            lambda b, v: packed_lut.add_vectors(b, v, implementation="reference"),
            read,
            packed["vectors"],
        ),
        "  adding, an int8 product": compiled(
            lambda b, v: jax.lax.dot_general(
                b.unpack().astype(jnp.int8),
                v,
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.int32,
            ),
            read,
            packed["vectors"],
        ),
        "  adding, a float32 product": compiled(
            lambda b, v: b.unpack().astype(jnp.float32).T @ v.astype(jnp.float32),
            read,
            packed["vectors"],
        ),
    }
    for name in (BLOCK, IN_XLA):
        np.testing.assert_array_equal(made[name](), made[BEFORE]())
    sums = [made[name]() for name in made if name.startswith("  adding")]
    for other in sums[1:]:
        np.testing.assert_array_equal(sums[0], other)
    return made


def main() -> None:
    args = timing.parser(__doc__, rounds=15).parse_args()
    lines = [timing.machine(), timing.cores()]
    facts: dict[str, Any] = {"machine": timing.machine(), "timed": timing.cores()}
    for name, (width, luts, inputs, tokens) in BLOCKS.items():
        found = timing.summary(
            timing.samples(
                contenders(width, luts, inputs, tokens) | roofline.contenders(), args.rounds
            )
        )
        limits = roofline.rates({k: found.pop(k)["median_ms"] / 1e3 for k in roofline.LIMITS})
        operations = {MLP_NAME: 16 * width**2, "  adding": 2 * luts * width}
        shares = {
            of: tokens * count / found[of]["median_ms"] / 1e6 / limits["float32_GFLOP_per_s"]
            for of, count in operations.items()
        }
        lines += ["", name, timing.spread_table(found, MLP_NAME)]
        lines += [
            "roofline: " + ", ".join(f"{k} {v:.1f}" for k, v in limits.items()),
            "operations as a share of the float32 rate: "
            + ", ".join(f"{k.strip()} {v:.2f}" for k, v in shares.items()),
        ]
        facts[name] = {"contenders": found, "roofline": limits, "share_of_float32": shares}
    print("\n".join(lines))
    timing.write(args.out, lines)
    timing.write_json(args.out, facts)


if __name__ == "__main__":
    main()
