"""Drawn cases of the functions of `ops` that have several implementations,
for `kernel_draws.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quweit_jax.ops import (
    bit_models,
    delta,
    lut,
    packed_glu,
    packed_lut,
    packed_ternary,
    recurrence,
    ternary_glu,
    thermometer,
    vector_lut,
)

# Programs are compiled to be compiled soon: there are thousands, each run a few times.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
Call = Callable[[], Any]
FLOAT, HALF, EXACT = 2e-5, 2**-6, 0.0  # tolerances


class Drawn(NamedTuple):
    """A drawn case of a function.

    make: implementation -> a call that gives what is compared, by name (or one array, the values).
    reference: an implementation, or what is expected. others: the implementations that are compared
      with it.
    """

    sizes: str
    make: Callable[[str], Call]
    reference: str | dict[str, np.ndarray]
    others: tuple[str, ...]
    tolerance: float


def one_of(rng: np.random.Generator, *values: Any) -> Any:
    """One of the values."""
    return values[int(rng.integers(len(values)))]


def int8s(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """int8 over its whole range, its ends often."""
    values = rng.integers(-128, 128, shape)
    return np.where(rng.random(shape) < 0.2, rng.choice([-128, 127], shape), values).astype(np.int8)


def floats(rng: np.random.Generator, dtype: Any, *shape: int) -> jax.Array:
    """Normal numbers."""
    return jnp.asarray(rng.normal(size=shape), dtype)


def called(function: Callable[..., Any], *arrays: Any) -> Call:
    """A call of function(*arrays), compiled at its first use."""
    compiled = jax.jit(function, compiler_options=QUICK)
    return lambda: compiled(*arrays)


def pulled_back(function: Callable[..., Any], inputs: Any, towards: Any, *names: str) -> Call:
    """A call for values and the gradients to all inputs, by name."""

    def both(inputs: Any, towards: Any) -> dict[str, Any]:
        out, pullback = jax.vjp(function, *inputs)
        values = dict(zip(names, out)) if names else {"values": out}
        return values | {f"gradient {i}": g for i, g in enumerate(pullback(towards))}

    return called(both, inputs, towards)


def look_up(rng: np.random.Generator) -> Drawn:
    """Real tables, trained."""
    n, tokens = int(rng.integers(1, 9)), one_of(rng, 0, 1, 7, 63, 64, 65, 200)
    inputs, luts = one_of(rng, 1, 5, 40), one_of(rng, 0, 1, 3, 17, 40)
    dtype = one_of(rng, jnp.float32, jnp.float32, jnp.bfloat16)
    bits = jnp.asarray(rng.integers(0, 2, (inputs, tokens)), dtype)
    wiring = rng.integers(0, inputs, (luts, n)).astype(np.int32)
    tables, towards = floats(rng, dtype, luts, 2**n), floats(rng, dtype, luts, tokens)
    decay = one_of(rng, *lut.DECAYS)

    def make(implementation: str) -> Call:
        def read(bits: Any, tables: Any) -> Any:
            return lut.lut_lookup_feature_major(
                bits, wiring, tables, decay=decay, implementation=implementation
            )

        return pulled_back(read, (bits, tables), towards)

    sizes = f"n={n} tokens={tokens} inputs={inputs} luts={luts} {jnp.dtype(dtype).name}"
    tolerance = HALF if dtype == jnp.bfloat16 else FLOAT
    return Drawn(sizes, make, "reference", ("native", "xla", "pallas"), tolerance)


def packed_tables(rng: np.random.Generator) -> Drawn:
    """Tables of one bit an entry."""
    n, tokens = int(rng.integers(1, 9)), one_of(rng, 0, 1, 31, 32, 33, 130)
    inputs, luts = one_of(rng, 1, 5, 40), one_of(rng, 1, 7, 33)
    bits = jnp.asarray(rng.integers(0, 2, (inputs, tokens)), bool)
    wiring = jnp.asarray(rng.integers(0, inputs, (luts, n)), jnp.int32)
    packed = packed_lut.pack_tables(rng.normal(size=(luts, 2**n)))

    def make(implementation: str) -> Call:
        def read(bits: Any, wiring: Any, packed: Any) -> Any:
            return packed_lut.look_up(bits, wiring, packed, implementation=implementation)

        return called(read, bits, wiring, packed)

    sizes = f"n={n} tokens={tokens} inputs={inputs} luts={luts}"
    return Drawn(sizes, make, "reference", ("xla",), EXACT)


def vectors_of_bits(rng: np.random.Generator) -> Drawn:
    """The vectors of set bits, added."""
    bits, tokens, features = one_of(rng, 1, 7, 70), one_of(rng, 0, 1, 33, 300), one_of(rng, 1, 35)
    set_bits = jnp.asarray(rng.integers(0, 2, (bits, tokens)), bool)
    vectors = jnp.asarray(int8s(rng, bits, features))

    def make(implementation: str) -> Call:
        def add(set_bits: Any, vectors: Any) -> Any:
            return packed_lut.add_vectors(set_bits, vectors, implementation=implementation)

        return called(add, set_bits, vectors)

    return Drawn(f"bits={bits} tokens={tokens} d={features}", make, "reference", ("xla",), EXACT)


def bits_of_models(rng: np.random.Generator) -> Drawn:
    """Thresholds, layers of tables of one bit, sums and counts."""
    tokens, width = one_of(rng, 1, 40, 257), one_of(rng, 1, 20, 33)
    steps, shared = one_of(rng, 1, 3, 9), bool(rng.integers(2))
    x, thresholds = (
        floats(rng, "float32", tokens, width),
        floats(rng, "float32", 1 if shared else width, steps),
    )
    bits, layers = width * steps, []
    for _ in range(int(rng.integers(0, 3))):
        luts, n = one_of(rng, 6, 60), int(rng.integers(1, 9))
        wiring = jnp.asarray(rng.integers(0, bits, (luts, n)), jnp.uint16)
        layers.append((wiring, packed_lut.pack_tables(rng.normal(size=(luts, 2**n)))))
        bits = luts
    vectors = jnp.asarray(int8s(rng, bits, one_of(rng, 1, 35)))
    classes = next(c for c in (6, 5, 3, 2, 1) if bits % c == 0)

    def make(implementation: str) -> Call:
        return called(
            lambda x: {
                "sums": bit_models.bit_sums(
                    x, thresholds, layers, vectors, implementation=implementation
                ),
                "counts": bit_models.bit_counts(
                    x, thresholds, layers, classes, implementation=implementation
                ),
            },
            x,
        )

    tables = [tuple(wiring.shape) for wiring, _ in layers]
    sizes = f"tokens={tokens} width={width} z={steps} shared={shared} tables={tables}"
    return Drawn(sizes, make, "reference", ("native", "xla"), EXACT)


def ternary(rng: np.random.Generator) -> Drawn:
    """The packed ternary product, against exact integers."""
    tokens, inputs = one_of(rng, 0, 1, 3, 23, 24, 70), one_of(rng, 0, 1, 16, 33, 250)
    outputs = one_of(rng, 1, 16, 47, 130, 300)
    x, weights = int8s(rng, tokens, inputs), rng.integers(-1, 2, (inputs, outputs)).astype(np.int8)
    packed = jnp.asarray(packed_ternary.pack_ternary(weights))

    def make(implementation: str) -> Call:
        def product(x: Any, packed: Any) -> Any:
            how = {"num_outputs": outputs, "implementation": implementation}
            return packed_ternary.packed_sums(x, packed, **how)

        return called(product, jnp.asarray(x), packed)

    expected = {"values": x.astype(np.int64) @ weights.astype(np.int64)}
    others = ("native", "xla", "pallas", "reference")
    return Drawn(f"tokens={tokens} {inputs} x {outputs}", make, expected, others, EXACT)


def pair_tables(rng: np.random.Generator) -> Drawn:
    """The packed LookupGLU: ternary sums, a table read by two codes, ternary sums."""
    tokens, inputs, units = one_of(rng, 1, 5, 24, 50), one_of(rng, 1, 33), one_of(rng, 16, 48)
    outputs, groups, bits = one_of(rng, 1, 17), one_of(rng, 1, 4), int(rng.integers(1, 7))
    step, x = one_of(rng, 1, 37, 500), jnp.asarray(int8s(rng, tokens, inputs))
    mix, total = (
        jnp.asarray(packed_ternary.pack_ternary(rng.integers(-1, 2, shape).astype(np.int8)))
        for shape in ((inputs, 2 * units), (units, outputs))
    )
    offsets = jnp.asarray(rng.integers(-300, 300, 2 * units), jnp.int16)
    tables = jnp.asarray(int8s(rng, groups, 2**bits, 2**bits))

    def make(implementation: str) -> Call:
        def sums(x: Any, *held: Any) -> Any:
            how = {"step": step, "num_outputs": outputs, "implementation": implementation}
            return packed_glu.packed_glu(x, *held, **how)

        return called(sums, x, mix, offsets, tables, total)

    sizes = f"tokens={tokens} {inputs} x {units} x {outputs} groups={groups} bits={bits}"
    return Drawn(sizes, make, "reference", ("native", "xla"), EXACT)


def trained_glu(rng: np.random.Generator) -> Drawn:
    """The LookupGLU as it is trained: ternary products and their gradients, and the tables'."""
    tokens, inputs, units = one_of(rng, 1, 5, 33, 70), one_of(rng, 1, 20), one_of(rng, 4, 12)
    outputs, groups, bits = one_of(rng, 1, 5), one_of(rng, 1, 2, 4), int(rng.integers(1, 7))
    arrays = (
        jnp.asarray(rng.integers(-127, 128, (tokens, inputs)), jnp.float32),
        floats(rng, "float32", inputs, 2 * units),
        jnp.asarray(rng.integers(-60, 60, 2 * units), jnp.float32),
        jnp.asarray(rng.integers(-127, 128, (groups, 2**bits, 2**bits)), jnp.float32),
        floats(rng, "float32", units, outputs),
    )
    step, towards = one_of(rng, 1, 37), floats(rng, "float32", tokens, outputs)

    def make(implementation: str) -> Call:
        def sums(*arrays: Any) -> Any:
            return ternary_glu.ternary_glu(*arrays, step=step, implementation=implementation)

        return pulled_back(sums, arrays, towards)

    sizes = f"tokens={tokens} {inputs} x {units} x {outputs} groups={groups} bits={bits}"
    return Drawn(sizes, make, "xla", ("native",), FLOAT)


def gated(rng: np.random.Generator) -> Drawn:
    """The gated recurrence: states, the final one, and the gradients of both."""
    batch, steps, width = one_of(rng, 1, 3), one_of(rng, 1, 2, 17, 40, 130), one_of(rng, 1, 3, 130)
    gates = rng.uniform(0, 1, (batch, steps, width))
    gates[rng.random(gates.shape) < 0.1] = 0
    arrays = (
        jnp.asarray(gates, jnp.float32),
        floats(rng, "float32", batch, steps, width),
        floats(rng, "float32", batch, width),
    )
    towards = floats(rng, "float32", batch, steps, width), floats(rng, "float32", batch, width)

    def make(implementation: str) -> Call:
        def states(*arrays: Any) -> Any:
            return recurrence.gated_recurrence(*arrays, implementation=implementation)

        return pulled_back(states, arrays, towards, "values", "final state")

    others = ("associative", "chunked", "pallas")
    return Drawn(f"({batch}, {steps}, {width})", make, "sequential", others, FLOAT)


def gated_delta(rng: np.random.Generator) -> Drawn:
    """The gated delta rule, with its final state and gradients."""
    batch, steps, heads = one_of(rng, 1, 2), one_of(rng, 1, 5, 20, 70), one_of(rng, 1, 2)
    keys, values, chunk = one_of(rng, 1, 4), one_of(rng, 1, 5), one_of(rng, 1, 8, 64)
    lead = batch, steps, heads
    q, k = (rng.normal(size=(*lead, keys)) for _ in range(2))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = tuple(
        jnp.asarray(a, jnp.float32)
        for a in (
            q,
            k,
            rng.normal(size=(*lead, values)),
            -rng.uniform(0, 1, lead),
            rng.uniform(0, 1, lead),
            rng.normal(size=(batch, heads, keys, values)),
        )
    )
    towards = arrays[2] + 1, arrays[5] + 1

    def make(implementation: str) -> Call:
        def read(*arrays: Any) -> Any:
            return delta.gated_delta(*arrays, implementation=implementation, chunk=chunk)

        return pulled_back(read, arrays, towards, "values", "final state")

    sizes = f"({batch}, {steps}, {heads}) K={keys} V={values} chunk={chunk}"
    return Drawn(sizes, make, "sequential", ("chunked",), 1e-4)


def thermometers(rng: np.random.Generator) -> Drawn:
    """Thermometer bits and their surrogate gradient, against NumPy in float64."""
    width, steps = one_of(rng, 1, 5, 8, 70), int(rng.integers(1, 10))
    tokens, shape = one_of(rng, 0, 1, 130), one_of(rng, *thermometer.WINDOWS)
    x, thresholds = floats(rng, "float32", width, tokens), floats(rng, "float32", width, steps)
    towards, window = floats(rng, "float32", width * steps, tokens), 0.7

    def make(implementation: str) -> Call:
        def encode(x: Any, thresholds: Any) -> Any:
            how = {"window": window, "shape": shape, "implementation": implementation}
            return thermometer.encode_feature_major(x, thresholds, **how)

        return pulled_back(encode, (x, thresholds), towards)

    distance = np.asarray(x, np.float64)[:, None] - np.asarray(thresholds, np.float64)[..., None]
    near = np.maximum(0, 1 - abs(distance) / window)
    slope = (near if shape == "triangular" else 0.5 * (near > 0)) / window
    along = slope * np.asarray(towards, np.float64).reshape(width, steps, tokens)
    expected = {
        "values": (distance > 0).reshape(width * steps, tokens),
        "gradient 0": along.sum(1),
        "gradient 1": -along.sum(2),
    }
    sizes = f"width={width} z={steps} tokens={tokens} {shape}"
    return Drawn(sizes, make, expected, ("xla", "pallas"), FLOAT)


def vector_tables(rng: np.random.Generator) -> Drawn:
    """Tables whose entries are int8 vectors."""
    tokens, luts = one_of(rng, 0, 1, 7, 13), one_of(rng, 1, 3, 127, 130)
    n, features = int(rng.integers(1, 9)), one_of(rng, 1, 5, 64, 131)
    bits = jnp.asarray(rng.integers(0, 2, (luts, n, tokens)), jnp.float32)
    vectors = jnp.asarray(int8s(rng, luts, 2**n, features))

    def make(implementation: str) -> Call:
        def add(bits: Any, vectors: Any) -> Any:
            return vector_lut.packed_vector_lookup(bits, vectors, implementation=implementation)

        return called(add, bits, vectors)

    sizes = f"tokens={tokens} luts={luts} n={n} d={features}"
    return Drawn(sizes, make, "reference", ("native", "xla"), EXACT)


FUNCTIONS = {
    "lut_lookup": look_up,
    "packed_lut.look_up": packed_tables,
    "packed_lut.add_vectors": vectors_of_bits,
    "bit_sums, bit_counts": bits_of_models,
    "packed_sums": ternary,
    "packed_glu": pair_tables,
    "ternary_glu": trained_glu,
    "gated_recurrence": gated,
    "gated_delta": gated_delta,
    "encode_feature_major": thermometers,
    "packed_vector_lookup": vector_tables,
}
