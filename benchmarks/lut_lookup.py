"""lut_lookup against the textbook formulation, forward and backward: python
benchmarks/lut_lookup.py

The textbook: tokens x tables gathers with a one-hot sum over all 2**n entries for every sample in
the backward pass, as the EFD formula is written. Both compute the same values and gradients, which
is checked before anything is timed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import timing

from quweit_jax.ops import lut
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
    inverse = invert_wiring(wiring, args.inputs)
    contenders = {
        "textbook": contender(lambda b, t: textbook(b, wiring, t), bits, tables, grad_out),
        "lut_lookup": contender(lambda b, t: lut.lut_lookup(b, wiring, t), bits, tables, grad_out),
        "lut_lookup, inverse given": contender(
            lambda b, t: lut.lut_lookup(b, wiring, t, inverse=inverse), bits, tables, grad_out
        ),
    }
    expected = contenders["textbook"]()
    for name, call in contenders.items():
        for ours, theirs in zip(call(), expected):
            np.testing.assert_allclose(
                np.asarray(ours), np.asarray(theirs), atol=2e-3, err_msg=name
            )
    medians = timing.side_by_side(contenders, args.rounds, warmup=1)
    lines = [
        f"lut_lookup forward + backward, {args.tokens} tokens, F = {args.inputs}, L = {args.luts}, "
        f"n = {args.lut_inputs}, {jax.default_backend()}",
        timing.machine(),
        timing.table(medians, "lut_lookup, inverse given"),
    ]
    print("\n".join(lines))
    timing.write(args.out, lines)


if __name__ == "__main__":
    main()
