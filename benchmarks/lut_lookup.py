"""lut_lookup against the textbook formulation, forward and backward, and packed look-ups against a
read a token: taskset -c 0 python benchmarks/lut_lookup.py

The textbook: tokens x tables gathers with a one-hot sum over all 2**n entries for every sample in
the backward pass, as the EFD formula is written. Both compute the same values and gradients, which
is checked before anything is timed.
"""

from __future__ import annotations

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import roofline
import timing

from quweit_jax.ops import lut, packed_lut
from quweit_jax.ops.wiring import invert_wiring, random_wiring


def textbook(bits, wiring, tables):
    """Token-major: address each table, take its entry; gradients by gather and scatter over
    (tokens, tables, slots).
    """
    matrix = jnp.asarray(
        lut.efd_matrix(wiring.shape[1], lut.efd_weighting(wiring.shape[1])), jnp.float32
    )
    return _textbook(bits, wiring, tables, matrix)


@jax.custom_vjp
def _textbook(bits, wiring, tables, matrix):
    return tables[jnp.arange(tables.shape[0]), _addresses(bits, wiring)]


def _addresses(bits, wiring):
    return (bits[:, wiring].astype(jnp.int32) << jnp.arange(wiring.shape[1])).sum(-1)


def _forward(bits, wiring, tables, matrix):
    return _textbook(bits, wiring, tables, matrix), (bits, wiring, tables, matrix)


def _backward(saved, grad):
    bits, wiring, tables, matrix = saved
    address, luts = _addresses(bits, wiring), jnp.arange(tables.shape[0])
    grad_tables = (
        jnp.zeros_like(tables).at[jnp.broadcast_to(luts, address.shape), address].add(grad)
    )
    grad_bits = jnp.zeros_like(bits)
    differences = jnp.einsum("lra,ja->ljr", matrix, tables)
    for l in range(wiring.shape[1]):
        rest = (address & ((1 << l) - 1)) | ((address >> (l + 1)) << l)
        grad_bits = grad_bits.at[:, wiring[:, l]].add(grad * differences[l][luts, rest])
    return grad_bits, None, grad_tables, None


_textbook.defvjp(_forward, _backward)


def contender(function, bits, tables, grad_out):
    """A call that runs forward and backward to the end."""

    def both(bits, tables, grad_out):
        out, vjp = jax.vjp(function, bits, tables)
        return out, *vjp(grad_out)

    compiled = jax.jit(both)
    return lambda: jax.block_until_ready(compiled(bits, tables, grad_out))


def trained_contenders(bits, wiring, tables, grad_out):
    """Look-ups forward and backward, of bits (tokens, inputs), and "feature-major" of bits that are
    (inputs, tokens) already, as they are inside a block. All give the textbook's numbers.
    """
    inverse = invert_wiring(wiring, bits.shape[1])

    def by_tokens(implementation, inverse=None):
        def read(bits, tables):
            return lut.lut_lookup(
                bits, wiring, tables, inverse=inverse, implementation=implementation
            )

        return contender(read, bits, tables, grad_out)

    def by_features(implementation):
        def read(bits_FT, tables):
            return lut.lut_lookup_feature_major(
                bits_FT, wiring, tables, inverse=inverse, implementation=implementation
            )

        return contender(read, bits.T + 0, tables, grad_out.T + 0)

    made = {
        "textbook": contender(lambda b, t: textbook(b, wiring, t), bits, tables, grad_out),
        "XLA": by_tokens("xla"),
        "XLA, inverse given": by_tokens("xla", inverse),
        "reference": by_tokens("reference"),
        "feature-major, XLA": by_features("xla"),
    }
    if timing.native_level() != "none":
        made |= {"native": by_tokens("native"), "feature-major, native": by_features("native")}
    expected = made["textbook"]()
    for name, call in made.items():
        for ours, theirs in zip(call(), expected):
            turned = name.startswith("feature-major") and ours.shape != tables.shape
            np.testing.assert_allclose(ours.T if turned else ours, theirs, atol=2e-3, err_msg=name)
    return made


def packed_contenders(bits_FT, wiring, packed):
    """Packed look-ups of booleans and of words."""

    def call(function, *operands):
        compiled = jax.jit(function).lower(*operands, wiring, packed).compile()
        return lambda: jax.block_until_ready(compiled(*operands, wiring, packed))

    words = packed_lut.pack_bits(bits_FT)
    made = {
        "a read a token": call(
            lambda b, w, p: packed_lut.look_up(b, w, p, implementation="reference"), bits_FT
        ),
        "words, packed and unpacked": call(packed_lut.look_up, bits_FT),
        "words, packed": call(
            lambda b, w, p: packed_lut.look_up_words(packed_lut.pack_bits(b), w, p), bits_FT
        ),
        "words given": call(packed_lut.look_up_words, words),
    }
    expected = made["a read a token"]()
    np.testing.assert_array_equal(made["words, packed and unpacked"](), expected)
    np.testing.assert_array_equal(made["words given"]().unpack(), expected)
    return made


def main() -> None:
    parser = timing.parser(__doc__, rounds=7)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=1536)
    parser.add_argument("--luts", type=int, default=1536)
    parser.add_argument("--lut_inputs", type=int, default=6)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    bits = jnp.asarray(rng.integers(0, 2, (args.tokens, args.inputs)), jnp.float32)
    tables = jnp.asarray(rng.uniform(-1, 1, (args.luts, 2**args.lut_inputs)), jnp.float32)
    grad_out = jnp.asarray(rng.normal(size=(args.tokens, args.luts)), jnp.float32)
    wiring = random_wiring(jax.random.key(0), args.inputs, args.luts, args.lut_inputs)
    contenders = trained_contenders(bits, wiring, tables, grad_out)
    trained = timing.samples(contenders | roofline.contenders(), args.rounds, warmup=1)
    limits = roofline.rates({k: statistics.median(trained.pop(k)) for k in roofline.LIMITS})
    packed = packed_contenders(bits.T.astype(bool), wiring, packed_lut.pack_tables(tables))
    found = {
        "forward + backward": (timing.summary(trained), "textbook"),
        "packed": (timing.summary(timing.samples(packed, 3 * args.rounds)), "a read a token"),
    }
    size = (
        f"{args.tokens} tokens, F = {args.inputs}, L = {args.luts}, n = {args.lut_inputs}, "
        f"{jax.default_backend()}, native: {timing.native_level()}"
    )
    lines = [size, timing.machine(), timing.cores()]
    for name, (summary, baseline) in found.items():
        lines += ["", name, timing.spread_table(summary, baseline)]
    lines += ["roofline: " + ", ".join(f"{k} {v:.1f}" for k, v in limits.items())]
    print("\n".join(lines))
    timing.write(args.out, lines)
    facts = {"size": size, "machine": timing.machine(), "timed": timing.cores(), "roofline": limits}
    timing.write_json(args.out, facts | {name: summary for name, (summary, _) in found.items()})


if __name__ == "__main__":
    main()
