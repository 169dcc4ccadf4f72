"""A packed 13B MatMul-free model (random weights) built and decoding tokens, with the peak of
resident memory: PYTHONPATH=. python benchmarks/decode_13b.py

Beside it, in a process of its own, Transformer++ in bfloat16 with --baseline=SIZE (the largest
whose weights fit; a KV cache of --context). The packed model is made directly in its packed form,
matrix by matrix: its float weights, 51 GB, never exist.
"""

from __future__ import annotations

import resource
import statistics
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import timing

from quweit_jax.deploy.generate import decode_step, empty_cache
from quweit_jax.deploy.pack import constants, stored_bytes, without
from quweit_jax.models import build


def peak_bytes() -> int:
    """The most memory this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shapes_of(model):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def packed_variables(model, rng: np.random.Generator):
    """Random variables in the form `deploy.pack` gives; dense ones in bfloat16."""
    tokens, shapes = jnp.zeros((1, 1), jnp.int32), {"params": shapes_of(model)}
    written = jax.eval_shape(lambda v: constants(model, v, tokens), shapes)
    layers = jax.tree.map(lambda leaf: constant(leaf, rng), written)
    rest = jax.tree.map(lambda leaf: dense(leaf.shape, rng), without(shapes["params"], written))
    return {"params": rest, "packed": layers}


def constant(leaf: jax.ShapeDtypeStruct, rng: np.random.Generator):
    """Words of sixteen random weights, a scale, or those of a norm."""
    if leaf.dtype != jnp.uint32:
        return jnp.full(leaf.shape, 1.0 if leaf.shape else 0.02, leaf.dtype)
    # Random codes 0, 1, 2: three of four codes are kept, 3 becomes 1.
    codes = rng.integers(0, 2**32, leaf.shape, np.uint32)
    codes &= ~((codes & (codes >> 1) & 0x55555555) << 1)
    return jnp.asarray(codes)


def dense(shape: tuple[int, ...], rng: np.random.Generator):
    if len(shape) < 2:
        return jnp.ones(shape, jnp.float32)
    out = np.empty(shape, ml_dtypes.bfloat16)
    for start in range(0, shape[0], 1024):
        out[start : start + 1024] = (
            rng.standard_normal((len(out[start : start + 1024]), *shape[1:]), np.float32) * 0.02
        )
    return jnp.asarray(out)


def dense_variables(model, rng: np.random.Generator):
    return {"params": jax.tree.map(lambda leaf: dense(leaf.shape, rng), shapes_of(model))}


def decode(name: str, model, variables, tokens: int) -> str:
    weights = stored_bytes(variables)
    cache = empty_cache(model)
    carried = stored_bytes(cache)
    seconds, token = [], jnp.zeros((1, 1), jnp.int32)
    for _ in range(tokens + 1):
        begun = time.perf_counter()
        logits, cache = decode_step(model, variables, cache, token)
        token = jnp.argmax(logits[:, -1:], -1).astype(jnp.int32)
        token.block_until_ready()
        seconds.append(time.perf_counter() - begun)
    assert bool(jnp.isfinite(logits).all())
    return (
        f"{name}: weights {weights:,} bytes, carried {carried:,}; {tokens} tokens, median "
        f"{1e3 * statistics.median(seconds[1:]):,.0f} ms a token "
        f"(first, with compiling: {seconds[0]:.0f} s); peak resident {peak_bytes():,} bytes"
    )


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--size", default="13b", help="of the packed MatMul-free model")
    parser.add_argument(
        "--baseline", default="", help="measure a bfloat16 Transformer++ of this size instead"
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=0,
        help="fewer layers than the size's, where the whole doesn't fit",
    )
    parser.add_argument("--context", type=int, default=2048, help="of the baseline's cache")
    parser.add_argument("--tokens", type=int, default=8)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    shared = {
        "size": args.baseline or args.size,
        "layers": args.layers,
        "dtype": "bfloat16",
        "context": args.context,
    }
    if args.baseline:
        title, form, name, make = "Transformer++", "bfloat16", "transformer_pp", dense_variables
    else:
        title, form, name, make = "MatMul-free", "packed", "matmulfree", packed_variables
    model = build({"name": name, **shared}, 32000)
    said = f"{title} {shared['size']}, {model.config.sizes()[1]} layers, {form}"
    line = decode(said, model, make(model, rng), args.tokens)
    lines = [timing.machine() + f", {jax.default_backend()}", line]
    print("\n".join(lines))
    timing.write(args.out, lines, "a")


if __name__ == "__main__":
    main()
