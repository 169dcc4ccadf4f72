"""Packed ternary products, LookupGLU and vector tables on one core, beside float32 and beside what
the machine can read: taskset -c 0 python benchmarks/ternary.py [--out=FILE.txt]

Process CPU time, each contender in turn in one process, medians. Matrices lie in as many copies as
no cache holds. 'before' is the product of bytes of four weights that this one took the place of.
--out also writes FILE.json.
"""

from __future__ import annotations

import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import timing

from quweit_jax.deploy.pack import pack
from quweit_jax.layers.lookup_glu import LookupGLU
from quweit_jax.layers.mlp import MLP
from quweit_jax.ops import packed_ternary
from quweit_jax.ops.kernels.native import library

BEYOND_CACHES = 256 * 2**20  # bytes
SHAPES = ((4096, 4096), (5120, 13824))
PARTS = ("products", "blocks")
BLOCKS = ((128, 1), (128, 768), (768, 1), (768, 16), (768, 64), (768, 768))  # width, tokens


def cpu_seconds(calls, rounds: int, least: float = 0.02) -> dict[str, dict[str, float]]:
    """Seconds of one call: the median and the quartiles of rounds; a round's calls take `least`."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.process_time()
        call()
        repeats[name] = max(1, round(least / max(1e-6, time.process_time() - start)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                call()
            found[name].append((time.process_time() - start) / repeats[name])
    cuts = {name: statistics.quantiles(values, n=4) for name, values in found.items()}
    return {name: {"median": m, "low": l, "high": h} for name, (l, m, h) in cuts.items()}


def reading(size: int = BEYOND_CACHES):
    """A call that reads that many bytes: C's search for a byte that is not there."""
    memory = bytearray(b"\2") * size
    return lambda: memory.find(b"\1")


def in_turn(function, x, matrices):
    """A call of a compiled function with the next of several matrices."""
    compiled, place = jax.jit(function).lower(x, matrices[0]).compile(), [0]

    def call():
        place[0] = (place[0] + 1) % len(matrices)
        return jax.block_until_ready(compiled(x, matrices[place[0]]))

    return call


def before(x, packed):
    """The sum of one token as it was: bytes of four weights, rows of inputs, a few at a time."""
    quads = x[0].astype(jnp.int32).reshape(packed.shape[0], 4)
    tile = max(1, 2**20 // packed.shape[1])

    def codes_of(quads, packed):
        codes = packed.astype(jnp.int32)
        return sum((quads[:, j, None] * ((codes >> (2 * j)) & 3) for j in range(4)), 0).sum(0)

    def add(total, i):
        piece = (jax.lax.dynamic_slice_in_dim(a, i * tile, tile, 0) for a in (quads, packed))
        return total + codes_of(*piece), None

    count = packed.shape[0] // tile
    total, _ = jax.lax.scan(add, jnp.zeros(packed.shape[1], jnp.int32), jnp.arange(count))
    total = total + codes_of(quads[count * tile :], packed[count * tile :])
    return (total - quads.sum())[None]


def copies(array: np.ndarray):
    return [jnp.array(array) for _ in range(-(-BEYOND_CACHES // array.nbytes))]


def product_calls(inputs: int, outputs: int, tokens: int):
    rng = np.random.default_rng(0)
    weights = rng.integers(-1, 2, (inputs, outputs)).astype(np.int8)
    codes = (weights + 1).astype(np.uint8).reshape(inputs // 4, 4, outputs)
    rows = codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6
    packed = packed_ternary.pack_ternary(weights)
    x = jnp.asarray(rng.integers(-128, 128, (1, inputs)), jnp.int8)
    many = jnp.asarray(rng.integers(-128, 128, (tokens, inputs)), jnp.int8)
    held = copies(packed)

    def product(x, packed, implementation=None):
        return packed_ternary.packed_sums(
            x, packed, num_outputs=outputs, implementation=implementation
        )

    calls = {
        "float32": in_turn(
            jnp.matmul, x.astype(jnp.float32), copies(weights.astype(np.float32))[:4]
        ),
        "before": in_turn(before, x, copies(rows)),
        "xla": in_turn(functools.partial(product, implementation="xla"), x, held),
        "native": in_turn(product, x, held),
        f"native, {tokens} tokens": in_turn(product, many, held[:1]),
    }
    expected = np.asarray(x, np.int64) @ weights
    for name in ("before", "xla", "native"):
        np.testing.assert_array_equal(calls[name](), expected, err_msg=name)
    return calls


def block_calls(width: int, tokens: int):
    x = jax.random.normal(jax.random.key(0), (tokens, width))
    layers = {
        "dense MLP, float32": MLP(),
        "LookupGLU": LookupGLU(width),
        "LookupGLU, vectors": LookupGLU(width, sum="vector"),
    }
    calls = {}
    for name, layer in layers.items():
        variables = jax.jit(layer.init)(jax.random.key(1), x)
        if isinstance(layer, LookupGLU):
            variables = jax.device_put(pack(layer, variables, x))
        compiled = jax.jit(layer.apply).lower(variables, x).compile()
        calls[name] = functools.partial(_finished, compiled, variables, x)
    return calls


def _finished(compiled, *arguments):
    return jax.block_until_ready(compiled(*arguments))


def lines_of(found, baseline: str) -> list[str]:
    base = found[baseline]["median"]
    return [
        f"{name:24} {1e3 * s['median']:9.4f} ms ({1e3 * s['low']:.4f} to {1e3 * s['high']:.4f})"
        f"  {base / s['median']:7.2f} times as fast as {baseline}"
        for name, s in found.items()
    ]


def main() -> None:
    parser = timing.parser(__doc__, rounds=15)
    parser.add_argument("--tokens", type=int, default=96, help="of a prefill")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    level = library.loaded().use(library.LEVELS[-1])
    lines = [f"{timing.machine()}, {jax.default_backend()}, native: {level}"]
    results: dict[str, object] = {"machine": lines[0], "rounds": args.rounds}
    print(lines[0])
    read = reading()
    for inputs, outputs in SHAPES if "products" in args.parts else ():
        calls = {"read": read, **product_calls(inputs, outputs, args.tokens)}
        found = cpu_seconds(calls, args.rounds)
        bandwidth = BEYOND_CACHES / found.pop("read")["median"]
        size = packed_ternary.packed_bytes(inputs, outputs)
        native = found["native"]["median"]
        a_token = found[f"native, {args.tokens} tokens"]["median"] / args.tokens
        title = f"ternary {inputs} x {outputs}, one token, from memory"
        facts = {
            "times float32": found["float32"]["median"] / native,
            "times before": found["before"]["median"] / native,
            "read GB/s": bandwidth / 1e9,
            "native GB/s": size / native / 1e9,
            "share of reading": size / native / bandwidth,
            "prefill, times a token's rate": native / a_token,
        }
        results[title] = {"seconds": found, **facts}
        lines += ["", title, *lines_of(found, "float32")]
        lines += [f"{name}: {value:.2f}" for name, value in facts.items()]
        print("\n".join(lines[-len(found) - len(facts) - 1 :]), flush=True)
    for width, tokens in BLOCKS if "blocks" in args.parts else ():
        found = cpu_seconds(block_calls(width, tokens), args.rounds)
        title = f"block of width {width}, {tokens} tokens"
        results[title] = {"seconds": found}
        lines += ["", title, *lines_of(found, "dense MLP, float32")]
        print("\n".join(lines[-len(found) - 1 :]), flush=True)
    timing.write(args.out, lines)
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
