"""A block of an integer-only ViT as one self-contained C99 file, a token at a time: no libraries,
no allocation. Ternary weights are four a byte.
"""

from __future__ import annotations

import numpy as np

from quweit_jax.deploy.hardware.benches import EXPECTED, INPUTS, PASSED
from quweit_jax.deploy.hardware.blocks.description import (
    BRANCH_LIMIT,
    Block,
    Branch,
    GLUBlock,
    TableBlock,
)
from quweit_jax.deploy.hardware.c_source import LAYER_ONE, array, layer_arrays, unsigned
from quweit_jax.layers.integer import RESIDUAL_BITS

_HEAD = """/* A channel-mixing block of an integer-only ViT.
 *
 *   void {name}(const int8_t *x, const int16_t *stream, int16_t *y);
 *     One token: x[0..{last}] are the words behind the norm, stream[0..{last}] those of the
 *     residual stream, y[0..{last}] the stream's words behind the block.
 */
#include <stdint.h>

#define FEATURES {features}

void {name}(const int8_t *x, const int16_t *stream, int16_t *y);

"""

# The magnitude is shifted, as shifting a negative number is the compiler's affair.
_REQUANTIZE = """
/* round(x * multiplier / 2**shift), halves to even, at most {limit} either way. */
static int32_t requantized(int32_t x, uint32_t multiplier, unsigned shift) {{
  uint64_t product = (uint64_t)(x < 0 ? -(int64_t)x : (int64_t)x) * multiplier;
  uint64_t whole = product >> shift, rest = product - (whole << shift);
  if (shift) {{
    uint64_t half = (uint64_t)1 << (shift - 1);
    whole += rest > half || (rest == half && (whole & 1u));
  }}
  if (whole > {limit}u) whole = {limit}u;
  return x < 0 ? -(int32_t)whole : (int32_t)whole;
}}

static int16_t added(int32_t sum, int16_t word, unsigned i) {{
  int32_t both = requantized(sum, multiplier_of_sums[i], shift_of_sums[i]) +
                 requantized(word, multiplier_of_stream[i], shift_of_stream[i]);
  return (int16_t)(both < {low} ? {low} : both > {high} ? {high} : both);
}}
"""

_GLU = """
#define UNITS {units}
#define CODES {codes}

/* Codes 0, 1 and 2 of two bits stand for weights of -1, 0 and 1. */
static int32_t ternary(const uint8_t *weights, const int8_t *x, unsigned count) {{
  int32_t sum = 0;
  for (unsigned i = 0; i < count; ++i)
    sum += (int32_t)(weights[i >> 2] >> (2 * (i & 3u)) & 3) * x[i] - x[i];
  return sum;
}}

static unsigned code(int32_t sum) {{
  unsigned found = 0;
  while (found < CODES - 1 && sum >= halfway[found]) ++found;
  return found;
}}

void {name}(const int8_t *x, const int16_t *stream, int16_t *y) {{
  int8_t entries[UNITS];
  for (unsigned j = 0; j < UNITS; ++j) {{
    unsigned a = code(ternary(mix + j * {mix_bytes}u, x, FEATURES) - offsets[j]);
    unsigned b = code(ternary(mix + (UNITS + j) * {mix_bytes}u, x, FEATURES) - offsets[UNITS + j]);
    entries[j] = gates[((j / {group}u) * CODES + a) * CODES + b];
  }}
  for (unsigned i = 0; i < FEATURES; ++i)
    y[i] = added(bias[i] + ternary(total + i * {total_bytes}u, entries, UNITS), stream[i], i);
}}
"""

_TABLES = """
void {name}(const int8_t *x, const int16_t *stream, int16_t *y) {{
  uint8_t a[{widest}], b[{widest}];
  for (unsigned i = 0; i < {comparators}; ++i) a[i] = (uint8_t)(x[feature[i]] > threshold[i]);
{calls}
  int32_t sums[FEATURES] = {{0}};
{adding}
  for (unsigned i = 0; i < FEATURES; ++i) y[i] = added({twice}sums[i] + bias[i], stream[i], i);
}}
"""
_ADDING = {
    2: """  for (unsigned j = 0; j < {tables}; ++j)
    if ({last}[j])
      for (unsigned i = 0; i < FEATURES; ++i) sums[i] += vectors[j * FEATURES + i];""",
    1: """  for (unsigned j = 0; j < {tables}; ++j)
    if ({last}[j]) sums[j / ({tables} / FEATURES)] += vectors[j];""",
}

_BENCH = """/* {passed} when all results are right:
 * gcc -std=c99 -O2 -Wall -Wextra -Werror -o bench bench.c {name}.c && ./bench
 */
#include <stdint.h>
#include <stdio.h>

#define COUNT {count}
#define FEATURES {features}

void {name}(const int8_t *x, const int16_t *stream, int16_t *y);

int main(void) {{
  FILE *inputs = fopen("{inputs}", "r"), *expected = fopen("{expected}", "r");
  int wrong = 0;
  if (!inputs || !expected) {{
    printf("FAILED: the vectors are not here\\n");
    return 1;
  }}
  for (long token = 0; token < COUNT; ++token) {{
    int8_t x[FEATURES];
    int16_t stream[FEATURES], y[FEATURES];
    unsigned word, own;
    for (int i = 0; i < FEATURES; ++i) {{
      if (fscanf(inputs, "%x %x", &own, &word) != 2) {{
        printf("FAILED: vectors are incomplete\\n");
        return 1;
      }}
      x[i] = (int8_t)((int)(own ^ 0x80u) - 0x80);
      stream[i] = (int16_t)((int)(word ^ 0x8000u) - 0x8000);
    }}
    {name}(x, stream, y);
    for (int i = 0; i < FEATURES; ++i) {{
      if (fscanf(expected, "%x", &word) != 1) {{
        printf("FAILED: vectors are incomplete\\n");
        return 1;
      }}
      if ((unsigned)(uint16_t)y[i] != word && ++wrong < 10)
        printf("token %ld, feature %d: %x instead of %x\\n", token, i, (unsigned)(uint16_t)y[i],
               word);
    }}
  }}
  if (wrong)
    printf("FAILED %d of %d\\n", wrong, COUNT * FEATURES);
  else
    printf("{passed} %d tokens\\n", COUNT);
  return wrong != 0;
}}
"""


def source(block: Block, name: str) -> str:
    """The C99 file of a block."""
    features, high = block.features, (1 << (RESIDUAL_BITS - 1)) - 1
    data = [array("bias", "int32_t", block.bias)]
    for which, branch in zip(("sums", "stream"), block.branches):
        data += _branch(which, branch)
    numbers = {"limit": BRANCH_LIMIT, "low": -high - 1, "high": high}
    kind = _glu if isinstance(block, GLUBlock) else _tables
    own, code = kind(block, name)  # type: ignore[arg-type]
    head = _HEAD.format(name=name, features=features, last=features - 1)
    return head + "\n".join([*data, *own]) + "\n" + _REQUANTIZE.format(**numbers) + code


def _branch(which: str, branch: Branch) -> list[str]:
    return [
        array(f"multiplier_of_{which}", "uint32_t", branch.multiplier),
        array(f"shift_of_{which}", "uint8_t", branch.shift),
    ]


def _glu(block: GLUBlock, name: str) -> tuple[list[str], str]:
    mix, total = _four_a_byte(block.mix.T), _four_a_byte(block.total.T)
    data = [
        array("mix", "uint8_t", mix.reshape(-1)),
        array("offsets", "int32_t", block.offsets),
        array("halfway", "int32_t", block.halfway),
        array("gates", "int8_t", block.tables.reshape(-1)),
        array("total", "uint8_t", total.reshape(-1)),
    ]
    return data, _GLU.format(
        name=name,
        units=block.units,
        codes=len(block.halfway) + 1,
        mix_bytes=mix.shape[1],
        total_bytes=total.shape[1],
        group=block.units // len(block.tables),
    )


def _four_a_byte(weights: np.ndarray) -> np.ndarray:
    """Ternary weights (rows, n) as codes of two bits, the first lowest: uint8 (rows, n / 4)."""
    codes = np.pad(weights + 1, [(0, 0), (0, -weights.shape[1] % 4)]).astype(np.uint8)
    codes = codes.reshape(len(codes), -1, 4) << np.arange(0, 8, 2, dtype=np.uint8)
    return np.bitwise_or.reduce(codes, axis=2)


def _tables(block: TableBlock, name: str) -> tuple[list[str], str]:
    encoder = block.encoder
    widths = [len(encoder.feature), *(len(layer.tables) for layer in encoder.layers)]
    wire = unsigned(max(widths))
    names = ["a", "b"] * len(encoder.layers)
    data = [
        array("feature", unsigned(block.features), encoder.feature),
        array("threshold", "int16_t", encoder.threshold),
        array("vectors", "int8_t", block.vectors.reshape(-1)),
    ]
    for i, layer in enumerate(encoder.layers):
        data += layer_arrays(i, layer, wire)
    calls = [
        f"  layer_one(wiring_{i}, tables_{i}, {len(layer.tables)}, {layer.wiring.shape[1]}, "
        f"{names[i]}, {names[i + 1]});"
        for i, layer in enumerate(encoder.layers)
    ]
    adding = _ADDING[block.vectors.ndim].format(
        tables=len(block.vectors), last=names[len(encoder.layers)]
    )
    return data, LAYER_ONE.format(wire_type=wire) + _TABLES.format(
        name=name,
        widest=max(widths),
        comparators=len(encoder.feature),
        calls="\n".join(calls),
        adding=adding,
        twice="2 * " if block.signed else "",
    )


def bench(features: int, count: int, name: str) -> str:
    """The bench for `count` golden tokens, to be run where the vectors lie."""
    return _BENCH.format(
        name=name, passed=PASSED, count=count, features=features, inputs=INPUTS, expected=EXPECTED
    )
