"""What the kernels for TPUs cost beside XLA by the compiler's schedules and estimates; no TPU is
needed, but libtpu is: python benchmarks/tpu_kernels.py --chip v5e

A kernel's time is the larger of its cycles, in which nothing waits, at the chip's clock, and of the
bytes that it reads and writes at the memory's bandwidth. XLA's is that of its estimates; it has
none for gathers, and counts a loop once. --small: small shapes, to see that all can be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import timing
import tpu_schedule
from tpu_schedule import CHIPS


class Piece(NamedTuple):
    """What is compared: our function, XLA's, the shapes, and the bytes that our kernels move.

    kernels: those of ours that count; None: all, and what XLA does around them.
    """

    ours: Callable[..., Any]
    xla: Callable[..., Any] | None
    shapes: tuple[Any, ...]
    moved: float
    kernels: tuple[str, ...] | None = None
    seldom: Mapping[int, int] | None = None


def shape(*sizes: int, dtype: str = "float32") -> Any:
    import jax

    return jax.ShapeDtypeStruct(sizes, dtype)


def look_ups(tokens: int, inputs: int, luts: int, n: int) -> dict[str, Piece]:
    """Look-ups of real tables, feature-major."""
    import jax
    import jax.numpy as jnp

    from quweit_jax.ops import lut
    from quweit_jax.ops.kernels import lut_xla
    from quweit_jax.ops.kernels.tpu import lut as kernels

    cut = kernels.chunks(tokens, n)
    bits, tables = shape(inputs, tokens), shape(luts, 2**n)
    wiring, grad = shape(luts, n, dtype="int32"), shape(luts, tokens)
    inverse = shape(inputs, luts * n // inputs, dtype="int32")
    # words of bits, of addresses (of which the gradient to the bits reads all for each group)
    words = 4 * inputs * kernels.GROUP * cut.count
    addresses = 4 * luts * kernels.GROUP * cut.count
    values, features = 4 * luts * tokens, 4 * inputs * tokens
    forward = features + 2 * words + addresses + values
    backward = {
        "lut_table_gradient": addresses + values,
        "lut_bit_gradient": cut.groups * addresses + values + features,
    }
    groups = cut.count * cut.groups
    seldom = {inputs: groups, -(-inputs // 8): groups}

    def read(implementation: str | None) -> Callable[..., Any]:
        def both(bits: Any, wiring: Any, inverse: Any, tables: Any, grad: Any) -> Any:
            out, pullback = jax.vjp(
                lambda b, t: lut.lut_lookup_feature_major(
                    b, wiring, t, inverse=inverse, implementation=implementation
                ),
                bits,
                tables,
            )
            return out, pullback(grad)

        return both

    def address(bits: Any, wiring: Any) -> Any:
        return lut_xla._address(list(lut_xla._wire(bits != 0, wiring)))

    everything = (bits, wiring, inverse, tables, grad)
    both = read("pallas")
    return {
        "look-up forward": Piece(
            both,
            lambda b, w, i, t, g: lut_xla.forward(b != 0, w, t),
            everything,
            forward,
            ("lut_pack", "lut_look_up"),
            seldom,
        ),
        "table gradient": Piece(
            both,
            lambda b, w, i, t, g: lut_xla._table_grad_product(address(b, w), g, 2**n),
            everything,
            backward["lut_table_gradient"],
            ("lut_table_gradient",),
            seldom,
        ),
        "bit gradient": Piece(
            both,
            lambda b, w, i, t, g: lut_xla.bit_gradient(
                b != 0, w, i, jnp.zeros((n, luts, 2 ** (n - 1))), g
            ),
            everything,
            backward["lut_bit_gradient"],
            ("lut_bit_gradient",),
            seldom,
        ),
        "look-up forward + backward": Piece(
            both, read("xla"), everything, forward + sum(backward.values()), None, seldom
        ),
    }


def recurrences(batch: int, steps: int, features: int) -> dict[str, Piece]:
    """The gated recurrence."""
    import jax

    from quweit_jax.ops.recurrence import gated_recurrence

    x, start = shape(batch, steps, features), shape(batch, features)
    once = 4 * batch * steps * features

    def states(implementation: str) -> Callable[..., Any]:
        return lambda f, c, s, g: gated_recurrence(f, c, s, implementation=implementation)[0]

    def gradients(implementation: str) -> Callable[..., Any]:
        return lambda f, c, s, g: jax.vjp(lambda *a: states(implementation)(*a, g), f, c, s)[1](g)

    shapes = (x, x, start, x)
    return {
        "recurrence forward": Piece(states("pallas"), states("chunked"), shapes, 3 * once),
        "recurrence backward": Piece(
            gradients("pallas"), None, shapes, 5 * once, ("recurrence_backward",)
        ),
    }


def thermometers(features: int, tokens: int, steps: int) -> dict[str, Piece]:
    """Thermometer bits and their surrogate gradient."""
    import jax

    from quweit_jax.ops.thermometer import encode_feature_major

    def both(implementation: str) -> Callable[..., Any]:
        def run(x: Any, thresholds: Any, grad: Any) -> Any:
            out, pullback = jax.vjp(
                lambda *a: encode_feature_major(*a, implementation=implementation), x, thresholds
            )
            return out, pullback(grad)

        return run

    shapes = (shape(features, tokens), shape(features, steps), shape(features * steps, tokens))
    moved = 4 * features * tokens * (3 + 2 * steps)
    return {"thermometer forward + backward": Piece(both("pallas"), both("xla"), shapes, moved)}


def ternaries(tokens: int, inputs: int, outputs: int) -> dict[str, Piece]:
    """The packed ternary product."""
    from quweit_jax.ops.packed_ternary import packed_bytes, packed_shape, packed_sums

    def sums(implementation: str) -> Callable[..., Any]:
        return lambda x, packed: packed_sums(x, packed, implementation=implementation)

    shapes = (
        shape(tokens, inputs, dtype="int8"),
        shape(*packed_shape(inputs, outputs), dtype="uint32"),
    )
    moved = packed_bytes(inputs, outputs) + tokens * (inputs + 4 * outputs)
    name = f"ternary {inputs} x {outputs}, {tokens} tokens"
    return {name: Piece(sums("pallas"), sums("xla"), shapes, moved, ("ternary_sums",))}


def packed_look_ups(tokens: int, inputs: int, luts: int, n: int) -> dict[str, Piece]:
    """Look-ups of packed bits in 1-bit tables."""
    from quweit_jax.ops import packed_lut

    words = -(-tokens // packed_lut.WORD)

    def read(implementation: str) -> Callable[..., Any]:
        return lambda words, wiring, tables: (
            packed_lut.look_up_words(
                packed_lut.Bits(words, tokens), wiring, tables, implementation=implementation
            ).words
        )

    shapes = (
        shape(inputs, words, dtype="uint32"),
        shape(luts, n, dtype="int32"),
        shape(luts, -(-(2**n) // 8), dtype="uint8"),
    )
    moved = 4 * words * (inputs + luts)
    return {
        "packed look-up": Piece(read("pallas"), read("xla"), shapes, moved, ("packed_look_up",))
    }


def pieces(small: bool) -> dict[str, dict[str, Piece]]:
    """What is compared, under the sizes at which it is."""
    if small:
        return {
            "small": look_ups(1100, 16, 40, 5)
            | recurrences(2, 16, 128)
            | thermometers(8, 200, 3)
            | ternaries(3, 256, 300)
            | packed_look_ups(1100, 16, 40, 5)
        }
    return {
        "4,096 tokens, F = L = 1,536, n = 6": look_ups(4096, 1536, 1536, 6)
        | packed_look_ups(4096, 1536, 1536, 6),
        "2,048 tokens, F = 1,536, L = 2,688, n = 4": look_ups(2048, 1536, 2688, 4),
        "(8, 2048, 2048)": recurrences(8, 2048, 2048),
        "384 features, 4 thresholds, 2,048 tokens": thermometers(384, 2048, 4),
        "decoding": ternaries(32, 4096, 4096) | ternaries(1, 5120, 13824),
        "prefill": ternaries(4096, 4096, 4096),
    }


class Ours(NamedTuple):
    """A compiled function of ours: cycles of each of its kernels and of XLA's operations in it."""

    kernels: dict[str, int]
    around: int


def compile_ours(piece: Piece, folder: Any, device: Any) -> Ours:
    """What a piece's kernels cost."""
    compiled = tpu_schedule.compile_for(piece.ours, piece.shapes, device)
    kernels = dict(tpu_schedule.kernel_cycles(folder, piece.seldom))
    return Ours(kernels, tpu_schedule.xla_cycles(compiled))


def measure(piece: Piece, ours: Ours, device: Any, chip: tpu_schedule.Chip) -> dict[str, Any]:
    """Cycles and microseconds of ours and of XLA's."""
    every = piece.kernels is None
    counted = {k: c for k, c in ours.kernels.items() if every or k in piece.kernels}
    if not counted:
        raise ValueError(f"no kernel of {piece.kernels} among those compiled, {list(ours.kernels)}")
    cycles = sum(counted.values()) + (ours.around if every else 0)
    memory_us = 1e6 * piece.moved / chip.bytes_per_second
    found = {
        "cycles": cycles,
        "kernels": counted,
        "bytes": piece.moved,
        "memory_us": memory_us,
        "us": max(1e6 * cycles / chip.hertz, memory_us),
    }
    if piece.xla:
        compiled = tpu_schedule.compile_for(piece.xla, piece.shapes, device)
        cycles = tpu_schedule.xla_cycles(compiled)
        moved = float(compiled.cost_analysis()["bytes accessed"])
        us = 1e6 * max(cycles / chip.hertz, moved / chip.bytes_per_second)
        found |= {"xla_cycles": cycles, "xla_bytes": moved, "xla_us": us}
    return found


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--ours", action="store_true", help="leave XLA's own forms out")
    args = parser.parse_args()
    folder, chip = tpu_schedule.dump_schedules(), CHIPS[args.chip]

    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[0]
    lines = [
        f"{args.chip}, {chip.hertz / 1e9} GHz, {chip.bytes_per_second / 1e9:.0f} GB/s: schedules "
        "of our kernels beside estimates of XLA",
        timing.machine(("jax", "jaxlib", "libtpu")),
        f"{'':40}      cycles  memory us  us at least      XLA us   times faster",
    ]
    results: dict[str, Any] = {}
    for title, group in pieces(args.small).items():
        lines.append(title)
        print("\n".join(lines[-4:] if len(results) == 0 else lines[-1:]), flush=True)
        compiled: dict[Callable[..., Any], Ours] = {}
        for name, piece in group.items():
            if piece.ours not in compiled:
                compiled[piece.ours] = compile_ours(piece, folder, device)
            if args.ours:
                piece = piece._replace(xla=None)
            found = measure(piece, compiled[piece.ours], device, chip)
            results[f"{title}: {name}"] = found
            xla = found.get("xla_us")
            beside = f"{xla:10,.0f}  {xla / found['us']:13.1f}" if xla else f"{'-':>10}"
            lines.append(
                f"  {name:38}  {found['cycles']:10,}  {found['memory_us']:9,.1f}  "
                f"{found['us']:11,.1f}  {beside}"
            )
            print(lines[-1], flush=True)
            timing.write(args.out, lines)
            timing.write_json(args.out, {"chip": args.chip, "versions": lines[1], "found": results})


if __name__ == "__main__":
    main()
