"""A classifier as one self-contained C99 file: for one example at a time, and bit-sliced for 32 or
64 at a time, a bit of a word each. No libraries, no allocation; the bench alone prints.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quweit_jax.deploy.hardware.benches import EXPECTED, INPUTS, PASSED
from quweit_jax.deploy.hardware.circuit import Circuit
from quweit_jax.deploy.hardware.description import Classifier, Layer
from quweit_jax.errors import InputError

WORDS = (32, 64)

_TYPES = """/* {classes} classes from {inputs} words of {bits} bits; input_scaling.json says what they are.
 *
 *   int {name}_one(const {word_type} *x, unsigned *score);
 *     The class of x[0..{last}], the lowest of those with the largest count, and that count.
 *   void {name}_many(const {word_type} *x, unsigned *decision, unsigned *score);
 *     The same for {word} examples, x[example * {inputs} + input].
 */
#include <stdint.h>

typedef uint{word}_t bits_t;
#define WORD {word}
#define INPUTS {inputs}
#define CLASSES {classes}
#define COMPARATORS {comparators}
#define WIDEST {widest}
#define SCORE_BITS {score_bits}

int {name}_one(const {word_type} *x, unsigned *score);
void {name}_many(const {word_type} *x, unsigned *decision, unsigned *score);

"""

LAYER_ONE = """
static unsigned entry(const uint8_t *table, unsigned address) {{
  return (unsigned)(table[address >> 3] >> (address & 7u)) & 1u;
}}

static void layer_one(const {wire_type} *wiring, const uint8_t *tables, unsigned count,
                      unsigned inputs, const uint8_t *in, uint8_t *out) {{
  unsigned bytes = (1u << inputs) > 8u ? (1u << inputs) / 8u : 1u;
  for (unsigned j = 0; j < count; ++j) {{
    unsigned address = 0;
    for (unsigned l = 0; l < inputs; ++l) address |= (unsigned)in[wiring[j * inputs + l]] << l;
    out[j] = (uint8_t)entry(tables + j * bytes, address);
  }}
}}
"""

_FUNCTIONS = """int {name}_one(const {word_type} *x, unsigned *score) {{
  uint8_t a[WIDEST], b[WIDEST];
  uint32_t counts[CLASSES];
  int best = 0;
  for (unsigned i = 0; i < COMPARATORS; ++i) a[i] = (uint8_t)(x[feature[i]] > threshold[i]);
{one}
  for (unsigned k = 0; k < CLASSES; ++k) counts[k] = offset[k];
  for (unsigned j = 0; j < VOTES; ++j) counts[group[j]] += {last}[j];
  for (int k = 1; k < CLASSES; ++k)
    if (counts[k] > counts[best]) best = k;
  *score = counts[best];
  return best;
}}

/* Halves of a table chosen by one input after another, the highest first read last. */
static bits_t look_up(const uint8_t *table, unsigned inputs, const bits_t *in) {{
  bits_t held[{half}];
  unsigned size = (1u << inputs) / 2u;
  for (unsigned i = 0; i < size; ++i) {{
    bits_t low = (bits_t)0 - entry(table, 2u * i), high = (bits_t)0 - entry(table, 2u * i + 1u);
    held[i] = low ^ ((low ^ high) & in[0]);
  }}
  for (unsigned l = 1; l < inputs; ++l) {{
    size /= 2u;
    for (unsigned i = 0; i < size; ++i)
      held[i] = held[2u * i] ^ ((held[2u * i] ^ held[2u * i + 1u]) & in[l]);
  }}
  return held[0];
}}

static void layer_many(const {wire_type} *wiring, const uint8_t *tables, unsigned count,
                       unsigned inputs, const bits_t *in, bits_t *out) {{
  unsigned bytes = (1u << inputs) > 8u ? (1u << inputs) / 8u : 1u;
  for (unsigned j = 0; j < count; ++j) {{
    bits_t wired[{most_inputs}];
    for (unsigned l = 0; l < inputs; ++l) wired[l] = in[wiring[j * inputs + l]];
    out[j] = look_up(tables + j * bytes, inputs, wired);
  }}
}}

void {name}_many(const {word_type} *x, unsigned *decision, unsigned *score) {{
  bits_t a[WIDEST], b[WIDEST];
  bits_t counts[CLASSES][SCORE_BITS];
  for (unsigned i = 0; i < COMPARATORS; ++i) {{
    bits_t found = 0;
    for (unsigned e = 0; e < WORD; ++e)
      found |= (bits_t)(x[e * INPUTS + feature[i]] > threshold[i]) << e;
    a[i] = found;
  }}
{many}
  for (unsigned k = 0; k < CLASSES; ++k)
    for (unsigned p = 0; p < SCORE_BITS; ++p)
      counts[k][p] = (bits_t)0 - (bits_t)(offset[k] >> p & 1u);
  for (unsigned j = 0; j < VOTES; ++j) {{
    bits_t carry = {last}[j];
    for (unsigned p = 0; carry && p < SCORE_BITS; ++p) {{
      bits_t sum = counts[group[j]][p] ^ carry;
      carry &= counts[group[j]][p];
      counts[group[j]][p] = sum;
    }}
  }}
  for (unsigned e = 0; e < WORD; ++e) {{
    decision[e] = 0;
    score[e] = 0;
    for (unsigned k = 0; k < CLASSES; ++k) {{
      unsigned own = 0;
      for (unsigned p = 0; p < SCORE_BITS; ++p) own |= (unsigned)(counts[k][p] >> e & 1u) << p;
      if (own > score[e]) {{
        score[e] = own;
        decision[e] = k;
      }}
    }}
  }}
}}
"""

_BENCH = """/* {passed} when all outputs are right:
 * gcc -std=c99 -O2 -Wall -Wextra -Werror -o bench bench.c {name}.c && ./bench
 */
#include <stdint.h>
#include <stdio.h>

#define COUNT {count}
#define INPUTS {inputs}
#define WORD {word}

int {name}_one(const {word_type} *x, unsigned *score);
void {name}_many(const {word_type} *x, unsigned *decision, unsigned *score);

static {word_type} x[(COUNT + WORD) * INPUTS];

int main(void) {{
  FILE *inputs = fopen("{inputs_file}", "r"), *expected = fopen("{expected_file}", "r");
  static unsigned decision[COUNT + WORD], score[COUNT + WORD];
  int wrong = 0;
  if (!inputs || !expected) {{
    printf("FAILED: the vectors are not here\\n");
    return 1;
  }}
  for (long i = 0; i < (long)COUNT * WORDS_READ; ++i) {{
    unsigned value;
    if (fscanf(inputs, "%x", &value) != 1) {{
      printf("FAILED: vectors are incomplete\\n");
      return 1;
    }}
    x[i] = ({word_type})({extended});
  }}
  for (long i = 0; i < COUNT; i += WORD) {name}_many(x + i * INPUTS, decision + i, score + i);
  for (long i = 0; i < COUNT; ++i) {{
    unsigned right, count, own;
    int one = {name}_one(x + i * INPUTS, &own);
    if (fscanf(expected, "%x %x", &right, &count) != 2) {{
      printf("FAILED: vectors are incomplete\\n");
      return 1;
    }}
    if ((unsigned)one != right || own != count || decision[i] != right || score[i] != count) {{
      if (++wrong < 10)
        printf("example %ld: %d, %u and %u, %u instead of %u, %u\\n", i, one, own, decision[i],
               score[i], right, count);
    }}
  }}
  if (wrong)
    printf("FAILED %d of %d\\n", wrong, COUNT);
  else
    printf("{passed} %d examples\\n", COUNT);
  return wrong != 0;
}}
"""


def word_type(bits: int, signed: bool) -> str:
    """The smallest C type that holds a word."""
    size = 8 if bits <= 8 else 16
    return f"int{size}_t" if signed else f"uint{size}_t"


def source(classifier: Classifier, ports: Sequence[int], name: str = "dwn", word: int = 64) -> str:
    """The C99 file.

    Args:
      ports: the features that are read, in order: x holds those alone. name: of its two functions.
        word: examples at a time, 32 or 64.

    Raises:
      InputError: another word.
    """
    if word not in WORDS:
        raise InputError(f"--word: expected 32 or 64 examples at a time, found {word}.")
    c, scaling = classifier, classifier.scaling
    widths = [len(c.feature), *(len(layer.tables) for layer in c.layers)]
    inputs = [layer.wiring.shape[1] for layer in c.layers]
    places = {f: i for i, f in enumerate(ports)}
    facts = {
        "name": name,
        "classes": c.classes,
        "inputs": max(1, len(ports)),
        "last": max(1, len(ports)) - 1,
        "bits": scaling.bits,
        "word": word,
        "word_type": word_type(scaling.bits, scaling.signed),
        "wire_type": unsigned(max(widths)),
        "comparators": len(c.feature),
        "widest": max(widths),
        "score_bits": c.score_bits,
        "half": max(1, (1 << max(inputs)) // 2),
        "most_inputs": max(inputs),
    }
    data = [
        array("feature", unsigned(len(ports) + 1), [places.get(int(f), 0) for f in c.feature]),
        array("threshold", "int32_t", c.threshold),
        *(
            line
            for i, layer in enumerate(c.layers)
            for line in layer_arrays(i, layer, facts["wire_type"])
        ),
        f"#define VOTES {len(c.group)}",
        array("group", unsigned(c.classes), c.group),
        array("offset", "uint32_t", c.offset),
    ]
    names = ["a", "b"] * len(c.layers)
    calls = {
        how: "\n".join(
            f"  layer_{how}(wiring_{i}, tables_{i}, {len(layer.tables)}, {layer.wiring.shape[1]}, "
            f"{names[i]}, {names[i + 1]});"
            for i, layer in enumerate(c.layers)
        )
        for how in ("one", "many")
    }
    layer_one = LAYER_ONE.format(wire_type=facts["wire_type"])
    functions = facts | calls | {"last": names[len(c.layers)]}
    return (
        _TYPES.format(**facts)
        + "\n".join(data)
        + "\n"
        + layer_one
        + "\n"
        + _FUNCTIONS.format(**functions)
    )


def layer_arrays(number: int, layer: Layer, wire_type: str) -> list[str]:
    """Definitions of a layer's wiring and tables."""
    tables = np.packbits(layer.tables, axis=1, bitorder="little").reshape(-1)
    return [
        array(f"wiring_{number}", wire_type, layer.wiring.reshape(-1)),
        array(f"tables_{number}", "uint8_t", tables),
    ]


def unsigned(values: int) -> str:
    """The smallest unsigned type for 0 to values - 1."""
    return next(f"uint{size}_t" for size in (8, 16, 32) if values <= 1 << size)


def array(name: str, kind: str, values: Sequence[int] | np.ndarray) -> str:
    """A constant array's definition."""
    numbers = [str(int(v)) for v in values]
    rows = [", ".join(numbers[i : i + 20]) for i in range(0, len(numbers), 20)]
    body = ",\n  ".join(rows)
    return f"static const {kind} {name}[{len(numbers)}] = {{\n  {body}}};"


def bench(circuit: Circuit, count: int, name: str = "dwn", word: int = 64) -> str:
    """The bench for `count` golden examples, to be run where the vectors lie."""
    scaling, ports = circuit.classifier.scaling, circuit.ports()
    sign = 1 << (scaling.bits - 1)
    text = _BENCH.format(
        name=name,
        passed=PASSED,
        count=count,
        inputs=max(1, len(ports)),
        word=word,
        word_type=word_type(scaling.bits, scaling.signed),
        inputs_file=INPUTS,
        expected_file=EXPECTED,
        extended=f"(int)(value ^ {sign}u) - {sign}" if scaling.signed else "value",
    )
    return text.replace("WORDS_READ", str(len(ports)))
