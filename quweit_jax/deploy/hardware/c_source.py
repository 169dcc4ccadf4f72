"""A classifier as one self-contained C99 file: for one example at a time, and bit-sliced for as
many at a time as a word has bits. No libraries, no allocation; the bench alone prints.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quweit_jax.deploy.hardware import c_sliced
from quweit_jax.deploy.hardware.benches import EXPECTED, INPUTS, PASSED
from quweit_jax.deploy.hardware.circuit import Circuit
from quweit_jax.deploy.hardware.description import Classifier, Layer
from quweit_jax.errors import InputError

WORDS = (32, 64, 128, 256, 512)

_TYPES = """\
/* {classes} classes from {inputs} words of {bits} bits; input_scaling.json says what they are.
 *
 *   int {name}_one(const {word_type} *x, unsigned *score);
 *     The class of x[0..{highest}], the lowest of those with the largest count, and that count.
 *   void {name}_many(const {word_type} *x, unsigned *decision, unsigned *score);
 *     The same for {word} examples, x[example * {inputs} + input].
 */
#include <stdint.h>

typedef uint{part}_t part_t;
#define WORD {word}u
#define PART {part}u
#define ONES (part_t) ~(part_t)0
{bits_t}
#define INPUTS {inputs}
#define CLASSES {classes}
#define WIDEST {widest}
#define SCORE_BITS {score_bits}
#define DECISION_BITS {decision_bits}
/* An input's type has SIZE bits, of which the lowest {bits} are its word. NUMBER counts words from
 * the smallest, in FIELD bits, which are compared in DIGITS digits of PLANES bits. BLOCK rows of
 * PART bits are read of an example at a time. */
#define SIZE {size}u
#define FIELD {field}u
#define DIGITS {digits}u
#define PLANES (FIELD < 4u ? FIELD : 4u)
#define BLOCK 8u
#define NUMBER(word) (((unsigned)(word) & {mask}u) ^ {lowest}u)

int {name}_one(const {word_type} *x, unsigned *score);
void {name}_many(const {word_type} *x, unsigned *decision, unsigned *score);

"""

_SCALAR = """typedef part_t bits_t;
#define NONE (part_t)0
#define AT(bits, part) (bits)"""
_VECTOR = """typedef part_t bits_t __attribute__((vector_size(WORD / 8u)));
#define NONE (bits_t){0}
#define AT(bits, part) (bits)[part]"""

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

_ONE = """int {name}_one(const {word_type} *x, unsigned *score) {{
  uint8_t a[WIDEST], b[WIDEST];
  uint32_t counts[CLASSES];
  int best = 0;
  for (unsigned f = 0, i = 0; f < INPUTS; ++f) {{
    unsigned number = NUMBER(x[f]);
    for (unsigned c = comparators[f]; c; --c, ++i) a[i] = (uint8_t)(number >= least[i]);
  }}
{one}
  for (unsigned k = 0; k < CLASSES; ++k) counts[k] = offset[k];
  for (unsigned j = 0; j < VOTES; ++j) counts[group[j]] += {last}[j];
  for (int k = 1; k < CLASSES; ++k)
    if (counts[k] > counts[best]) best = k;
  *score = counts[best];
  return best;
}}
"""

_BENCH = """/* {passed} when all outputs are right:
 * gcc -std=c99 -O3 -Wall -Wextra -Werror -o bench bench.c {name}.c && ./bench
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
        word: examples at a time, one of WORDS.

    Raises:
      InputError: another word.
    """
    if word not in WORDS:
        raise InputError(
            f"--word: expected {', '.join(map(str, WORDS))} examples at a time, found {word}."
        )
    c, scaling = classifier, classifier.scaling
    widths = [len(c.feature), *(len(layer.tables) for layer in c.layers)]
    inputs = [layer.wiring.shape[1] for layer in c.layers]
    encoder, layers = _by_port(c, ports)
    size = 8 if scaling.bits <= 8 else 16
    facts = {
        "name": name,
        "classes": c.classes,
        "inputs": max(1, len(ports)),
        "highest": max(1, len(ports)) - 1,
        "bits": scaling.bits,
        "word": word,
        "part": min(word, 64),
        "bits_t": _VECTOR if word > 64 else _SCALAR,
        "word_type": word_type(scaling.bits, scaling.signed),
        "wire_type": unsigned(max(widths)),
        "widest": max(widths),
        "score_bits": c.score_bits,
        "decision_bits": c.decision_bits,
        "size": size,
        "lowest": -scaling.low,
        "mask": (1 << scaling.bits) - 1,
        "field": c_sliced.field(scaling.bits),
        "digits": -(-scaling.bits // 4),
    }
    data = [
        *encoder,
        *(
            line
            for i, layer in enumerate(layers)
            for line in layer_arrays(i, layer, facts["wire_type"])
        ),
        f"#define VOTES {len(c.group)}",
        array("group", unsigned(c.classes), c.group),
        array("offset", "uint32_t", c.offset),
    ]
    names = ["a", "b"] * len(c.layers)
    layer_one, layer_many = [], []
    for i, layer in enumerate(layers):
        count, n = layer.wiring.shape
        given, wired = f"{names[i]}, {names[i + 1]});", f"(wiring_{i}, tables_{i}, {count}, "
        layer_one.append(f"  layer_one{wired}{n}, {given}")
        layer_many.append(f"  layer_of_{n}{wired}{given}")
    facts |= {
        "one": "\n".join(layer_one),
        "many": "\n".join(layer_many),
        "last": names[len(c.layers)],
    }
    planes = c_sliced.encode(
        scaling.bits, -scaling.low, facts["part"], facts["word_type"], facts["size"]
    )
    return (
        _TYPES.format(**facts)
        + "\n".join(data)
        + "\n"
        + (LAYER_ONE + "\n" + _ONE).format(**facts)
        + planes
        + c_sliced.layers(inputs, facts["wire_type"])
        + c_sliced.MANY.format(**facts)
    )


def _by_port(c: Classifier, ports: Sequence[int]) -> tuple[list[str], list[Layer]]:
    """The encoder's arrays, comparators in the order of the ports that they look at, and the layers
    with the first one wired to them.
    """
    places = {f: i for i, f in enumerate(ports)}
    port = np.array([places.get(int(f), 0) for f in c.feature], np.int64)
    order = np.argsort(port, kind="stable")
    became = np.empty(len(order), np.int64)
    became[order] = np.arange(len(order))
    most = 1 << c.scaling.bits  # a number that no word reaches
    least = np.clip(c.threshold.astype(np.int64) + 1 - c.scaling.low, 0, most)[order]
    counts = np.bincount(port, minlength=max(1, len(ports)))
    first = Layer(c.layers[0].tables, became[c.layers[0].wiring])
    return [
        array("comparators", unsigned(int(counts.max()) + 1), counts),
        array("least", unsigned(most + 1), least),
    ], [first, *c.layers[1:]]


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
