"""The bit-sliced half of a classifier's C file: as many examples at a time as a word has bits.
Words of 128 and more are vectors of gcc's and clang's, part by part the same as one of 64.

Words of the inputs are packed side by side without the bits that none of them uses, and transposed
into planes, one for each bit of an input; of four planes each comparison with one of 16 numbers is
made once for all comparators of the input; tables are trees of choices whose leaves are functions
of two bits; counting and the tournament work on planes, too.
"""

from __future__ import annotations

from collections.abc import Iterable

_ENCODE = """
typedef union {{
  bits_t all;
  part_t part[WORD / PART];
}} plane_t;

/* Bit j of word i becomes bit i of word j. */
static void transpose(plane_t *m) {{
  part_t mask = ONES;
  for (unsigned s = PART / 2u; s; s /= 2u) {{
    mask ^= mask << s;
    for (unsigned first = 0; first < PART; first += 2u * s)
      for (unsigned k = first; k < first + s; ++k) {{
        bits_t swapped = ((m[k].all >> s) ^ m[k + s].all) & mask;
        m[k].all ^= swapped << s;
        m[k + s].all ^= swapped;
      }}
  }}
}}

{squeeze}
/* The words of so many inputs of an example, FIELD bits each. */
static part_t row_of(const {word_type} *from, unsigned inputs) {{
  part_t row = 0;
  unsigned l = 0;
  for (; l + PART / SIZE <= inputs; l += PART / SIZE) {{
    part_t wide = {wide};
    row |= squeeze(wide) << FIELD * l;
  }}
  for (; l < inputs; ++l) row |= (part_t)NUMBER(from[l]) << FIELD * l;
  return row;
}}

/* at_least[v]: where the number of PLANES planes is v or more. */
static void compare(const plane_t *plane, bits_t *at_least) {{
  at_least[0] = ~NONE;
  for (unsigned p = 0; p < PLANES; ++p)
    for (unsigned v = 0; v < 1u << p; ++v) {{
      at_least[(1u << p) + v] = plane[p].all & at_least[v];
      at_least[v] |= plane[p].all;
    }}
  at_least[1u << PLANES] = at_least[(1u << PLANES) + 1u] = NONE;
}}

/* Reads a few rows of planes of an example, then those of the next: they lie side by side. */
static void encode(const {word_type} *x, bits_t *out) {{
  plane_t plane[BLOCK][PART];
  bits_t at_least[DIGITS][18];
  unsigned i = 0, full = PART / FIELD;
  for (unsigned block = 0; block < INPUTS; block += BLOCK * full) {{
    for (unsigned e = 0; e < WORD; ++e) {{
      const {word_type} *from = x + e * INPUTS;
      for (unsigned r = 0, at = block; r < BLOCK && at < INPUTS; ++r, at += full)
        /* a full row's number of inputs is known when this is compiled */
        plane[r][e % PART].part[e / PART] =
            INPUTS - at >= full ? row_of(from + at, full) : row_of(from + at, INPUTS - at);
    }}
    for (unsigned r = 0, first = block; r < BLOCK && first < INPUTS; ++r, first += full) {{
      transpose(plane[r]);
      for (unsigned l = 0; l < full && first + l < INPUTS; ++l) {{
        if (!comparators[first + l]) continue;
        for (unsigned d = 0; d < DIGITS; ++d)
          compare(plane[r] + FIELD * l + 4u * d, at_least[d]);
        for (unsigned c = comparators[first + l]; c; --c, ++i) {{
          unsigned rest = least[i];
          bits_t found = at_least[0][DIGITS > 1 ? rest & 15u : rest];
          for (unsigned d = 1; d < DIGITS; ++d) {{
            unsigned digit = (rest >>= 4) & (d + 1u < DIGITS ? 15u : 31u);
            found = at_least[d][digit + 1u] | (at_least[d][digit] & found);
          }}
          out[i] = found;
        }}
      }}
    }}
  }}
}}

/* Of two words the bits of the second where a third one has ones. */
#define CHOOSE(low, high, by) ((low) ^ (((low) ^ (high)) & (by)))
/* A bit everywhere. */
#define ALL(bit) (NONE - (part_t)((bit) & 1u))
"""

_LAYER = """
static void layer_of_{inputs}(const {wire_type} *wiring, const uint8_t *t, unsigned count,
                       const bits_t *in, bits_t *out) {{
  for (unsigned j = 0; j < count; ++j, wiring += {inputs}, t += {bytes}) {{
    bits_t f[16];
    pairs(in + wiring[0], {second}, f);
{body}
  }}
}}
"""

_PAIRS = """
/* All 16 functions of two bits, by their tables. */
static void pairs(const bits_t *first, const bits_t *second, bits_t *f) {
  bits_t a = *first, b = second ? *second : NONE;
  f[0] = NONE;
  f[1] = ~(a | b);
  f[2] = a & ~b;
  f[3] = ~b;
  f[4] = b & ~a;
  f[5] = ~a;
  f[6] = a ^ b;
  f[7] = ~(a & b);
  f[8] = a & b;
  f[9] = ~(a ^ b);
  f[10] = a;
  f[11] = a | ~b;
  f[12] = b;
  f[13] = b | ~a;
  f[14] = a | b;
  f[15] = ~NONE;
}
"""

MANY = """
void {name}_many(const {word_type} *x, unsigned *decision, unsigned *score) {{
  bits_t a[WIDEST], b[WIDEST];
  bits_t counts[CLASSES][SCORE_BITS], chosen[DECISION_BITS];
  encode(x, a);
{many}
  for (unsigned k = 0; k < CLASSES; ++k)
    for (unsigned p = 0; p < SCORE_BITS; ++p) counts[k][p] = ALL(offset[k] >> p);
  for (unsigned j = 0; j < VOTES; ++j) {{
    bits_t carry = {last}[j], *count = counts[group[j]];
    for (unsigned p = 0; p < SCORE_BITS; ++p) {{
      bits_t held = count[p];
      count[p] = held ^ carry;
      carry &= held;
    }}
  }}
  for (unsigned p = 0; p < DECISION_BITS; ++p) chosen[p] = NONE;
  for (unsigned k = 1; k < CLASSES; ++k) {{ /* counts[0] becomes the largest */
    bits_t more = NONE;
    for (unsigned p = 0; p < SCORE_BITS; ++p)
      more = CHOOSE(more, counts[k][p], counts[k][p] ^ counts[0][p]);
    for (unsigned p = 0; p < SCORE_BITS; ++p)
      counts[0][p] = CHOOSE(counts[0][p], counts[k][p], more);
    for (unsigned p = 0; p < DECISION_BITS; ++p)
      chosen[p] = CHOOSE(chosen[p], ALL(k >> p), more);
  }}
  for (unsigned e = 0; e < WORD; ++e) {{
    decision[e] = score[e] = 0;
    for (unsigned p = 0; p < DECISION_BITS; ++p)
      decision[e] |= (unsigned)(AT(chosen[p], e / PART) >> e % PART & 1u) << p;
    for (unsigned p = 0; p < SCORE_BITS; ++p)
      score[e] |= (unsigned)(AT(counts[0][p], e / PART) >> e % PART & 1u) << p;
  }}
}}
"""


def field(bits: int) -> int:
    """Bits that a word of `bits` takes in a row: a power of two, so that inputs fill a row."""
    return next(size for size in (1, 2, 4, 8, 16) if bits <= size)


def encode(bits: int, lowest: int, part: int, word_type: str, size: int) -> str:
    """`encode`, and what it needs.

    bits: of a word; its number is the word plus `lowest`. part: bits of a row. word_type: of an
    input, of `size` bits.
    """
    # written out: of a loop compilers make a read an input
    wide = [f"(part_t)(uint{size}_t)from[l + {k}u] << {size * k}" for k in range(part // size)]
    return _ENCODE.format(
        wide="\n                  | ".join(wide),
        squeeze=_squeeze(bits, lowest, part, size),
        word_type=word_type,
    )


def _squeeze(bits: int, lowest: int, part: int, size: int) -> str:
    """Words of `size` bits each, side by side, as numbers of `field(bits)` bits side by side."""

    def every(number: int, distance: int) -> str:
        return f"(part_t)0x{sum(number << at for at in range(0, part, distance)):x}u"

    held, lines = field(bits), [f"x &= {every((1 << bits) - 1, size)};"]
    if lowest:
        lines.append(f"x ^= {every(lowest, size)};")
    while size < part and held < size:
        lines.append(f"x |= x >> {size - held};")
        size, held = 2 * size, 2 * held
        lines.append(f"x &= {every((1 << held) - 1, size)};")
    body = "\n".join(f"  {line}" for line in lines)
    return f"static part_t squeeze(part_t x) {{\n{body}\n  return x;\n}}\n"


def layers(inputs: Iterable[int], wire_type: str) -> str:
    """`layer_of_N` for each number of inputs of a table, 1 to 8."""
    return _PAIRS + "".join(_layer(n, wire_type) for n in sorted(set(inputs)))


def _layer(inputs: int, wire_type: str) -> str:
    """A layer of tables with as many inputs, its tree of choices written out."""
    lines: list[str] = []
    if inputs > 2:
        _tree(inputs, 0, lines)
    else:
        lines.append("out[j] = f[t[0] & 15u];")
    return _LAYER.format(
        inputs=inputs,
        wire_type=wire_type,
        bytes=max(1, (1 << inputs) // 8),
        second="in + wiring[1]" if inputs > 1 else "0",
        body="\n".join(f"    {line}" for line in lines),
    )


def _tree(inputs: int, byte: int, lines: list[str], top: bool = True) -> str:
    """Adds the choices of the `2 ** inputs` entries from a byte on; the name of the last one."""
    name = f"v{inputs}_{byte}"
    if inputs == 3:
        low, high = f"f[t[{byte}] & 15u]", f"f[t[{byte}] >> 4]"
    else:
        low = _tree(inputs - 1, byte, lines, False)
        high = _tree(inputs - 1, byte + (1 << inputs) // 16, lines, False)
    target = "out[j]" if top else f"bits_t {name}"
    lines.append(f"{target} = CHOOSE({low}, {high}, in[wiring[{inputs - 1}]]);")
    return name
