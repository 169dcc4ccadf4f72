"""What look-ups cost on a TPU by its compiler's estimates; no TPU is needed, but libtpu is: python
benchmarks/tpu_lookup.py

Cycles are the sum of what the compiler expects of each operation of the compiled program; it has
none for gathers, which copy whole rows here. The time is the larger of cycles at the chip's clock
and of bytes accessed at its memory's bandwidth (v5e: 1.5 GHz, 819 GB/s), with no stalls.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import timing
from jax import Array
from jax.experimental import topologies

from quweit_jax.ops import lut, packed_lut
from quweit_jax.ops.kernels import lut_xla
from quweit_jax.ops.kernels.choice import compiling_for

HERTZ, BYTES_PER_SECOND = 1.5e9, 819e9


def masked_reduction(address: Array, grad: Array, entries: int) -> Array:
    """Table gradients as a sum over tokens for every entry."""
    hit = address[:, None, :] == jnp.arange(entries, dtype=jnp.int32)[None, :, None]
    return jnp.where(hit, grad[:, None, :], 0).sum(-1)


def both(bits: Array, wiring: Array, inverse: Array, tables: Array, grad: Array) -> Any:
    """A look-up forward and backward, feature-major."""
    out, pullback = jax.vjp(
        lambda b, t: lut.lut_lookup_feature_major(b, wiring, t, inverse=inverse), bits, tables
    )
    return out, pullback(grad)


def pieces(
    tokens: int, inputs: int, luts: int, n: int
) -> dict[str, tuple[Callable[..., Any], Any]]:
    """What is compiled, and for which shapes."""
    entries, words = 2**n, -(-tokens // 32)
    shape = jax.ShapeDtypeStruct
    address, grad = shape((luts, tokens), jnp.int32), shape((luts, tokens), jnp.float32)
    bits, wiring = shape((inputs, tokens), jnp.float32), shape((luts, n), jnp.int32)
    tables = shape((luts, entries), jnp.float32)
    inverse = shape((inputs, luts * n // inputs), jnp.int32)
    packed = shape((luts, max(1, entries // 8)), jnp.uint8)

    def look_up_words(words: Array, wiring: Array, packed: Array) -> Array:
        return packed_lut.look_up_words(packed_lut.Bits(words, tokens), wiring, packed).words

    return {
        "table gradient, masked reduction": (
            lambda a, g: masked_reduction(a, g, entries),
            (address, grad),
        ),
        "table gradient, product": (
            lambda a, g: lut_xla._table_grad_product(a, g, entries),
            (address, grad),
        ),
        "look-up forward + backward": (both, (bits, wiring, inverse, tables, grad)),
        "packing": (lambda b: packed_lut.pack_bits(b).words, (shape((inputs, tokens), jnp.bool_),)),
        "packed look-up": (look_up_words, (shape((inputs, words), jnp.uint32), wiring, packed)),
    }


def estimate(function: Callable[..., Any], shapes: Any, device: Any) -> dict[str, float]:
    """Cycles, bytes and microseconds of a compiled function."""
    where = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes)
    with compiling_for("tpu", portable=True):
        compiled = jax.jit(function).lower(*placed).compile()
    text, costs = compiled.as_text(), compiled.cost_analysis()
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    moved = float(costs["bytes accessed"])
    seconds = max(cycles / HERTZ, moved / BYTES_PER_SECOND)
    return {
        "cycles": cycles,
        "bytes": moved,
        "us": 1e6 * seconds,
        "gathers": len(re.findall(r" gather\(", text)),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=1536)
    parser.add_argument("--luts", type=int, default=1536)
    parser.add_argument("--lut_inputs", type=int, default=6)
    args = parser.parse_args()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices[0]
    sizes = (args.tokens, args.inputs, args.luts, args.lut_inputs)
    found = {name: estimate(*piece, device) for name, piece in pieces(*sizes).items()}
    title = "{} tokens, F = {}, L = {}, n = {}, ".format(*sizes) + f"{args.topology}, estimates"
    lines = [title, timing.machine(("jax", "jaxlib", "libtpu"))]
    lines += [f"{'':34}      cycles    MB accessed   us at least   gathers   temporary MB"]
    lines += [
        f"{name:34}  {f['cycles']:10,}  {f['bytes'] / 1e6:13,.1f}  {f['us']:12,.0f}  "
        f"{f['gathers']:8}  {f['temporary_bytes'] / 1e6:13,.1f}"
        for name, f in found.items()
    ]
    print("\n".join(lines))
    timing.write(args.out, lines)
    timing.write_json(args.out, {"size": title, "versions": lines[1], "estimates": found})


if __name__ == "__main__":
    main()
