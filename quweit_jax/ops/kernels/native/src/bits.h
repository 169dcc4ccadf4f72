// Models of bits, 256 tokens at a time: numbers against thresholds, and look-up tables of one bit
// an entry as trees of multiplexers over registers of tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "combinations.h"
#include "parallel.h"

namespace quweit {

constexpr size_t kBits = 256;  // tokens whose bits lie together
constexpr size_t kBitWords = kBits / 64;

struct LutLayer {
  const int32_t* wiring;  // (tables, inputs)
  size_t count, inputs;
  // [table][entry], 0 or ~0: the entry where input 0 isn't set, and its difference from the other.
  std::vector<uint32_t> entries;

  // tables: (count, bytes), one bit an entry.
  LutLayer(const int32_t* wiring, const uint8_t* tables, size_t count, size_t inputs, size_t bytes)
      : wiring(wiring), count(count), inputs(inputs), entries(count << inputs) {
    uint32_t* to = entries.data();
    for (size_t l = 0; l < count; ++l, tables += bytes) {
      for (size_t e = 0; e < size_t{1} << inputs; e += 2, to += 2) {
        const uint32_t two = tables[e / 8] >> e % 8;
        to[0] = 0 - (two & 1);
        to[1] = 0 - ((two ^ two >> 1) & 1);
      }
    }
  }
};

struct BitModel {
  const float* x;  // (tokens, width)
  size_t tokens, width;
  const float* thresholds;  // (width or 1, steps)
  size_t steps;
  bool shared;  // one row of thresholds for all
  std::vector<LutLayer> layers;

  size_t Bits() const { return layers.empty() ? width * steps : layers.back().count; }
};

// Thresholds as [step][width], in rising order, and the place of each in that order: x is above a
// threshold where it is above more thresholds of its row than come before that one.
struct Ladder {
  std::vector<float> rising;    // [step][width]
  std::vector<uint8_t> before;  // [width][step]

  explicit Ladder(const BitModel& m) : rising(m.width * m.steps), before(m.width * m.steps) {
    std::vector<size_t> order(m.steps);
    for (size_t i = 0; i < m.width; ++i) {
      const float* of = m.thresholds + (m.shared ? 0 : i * m.steps);
      for (size_t s = 0; s < m.steps; ++s) order[s] = s;
      // A threshold that is no number has no x above it: last.
      std::stable_sort(order.begin(), order.end(), [of](size_t a, size_t b) {
        return of[a] < of[b] || (of[a] == of[a] && of[b] != of[b]);
      });
      for (size_t s = 0; s < m.steps; ++s) {
        rising[s * m.width + i] = of[order[s]];
        before[i * m.steps + order[s]] = static_cast<uint8_t>(s);
      }
    }
  }
};

typedef uint8_t Sixteen __attribute__((vector_size(16), may_alias));

#if defined(__clang__)
#define QUWEIT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define QUWEIT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Sixteen{__VA_ARGS__})
#endif

// 16 rows of 16 bytes, transposed: each step interleaves rows that are 8 apart.
QUWEIT_INLINE void Transpose16(const uint8_t* from, size_t from_stride, uint8_t* to,
                               size_t to_stride) {
  Sixteen rows[16], others[16];
  for (int i = 0; i < 16; ++i) memcpy(&rows[i], from + i * from_stride, 16);
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      others[2 * i] = QUWEIT_SHUFFLE(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                     6, 22, 7, 23);
      others[2 * i + 1] = QUWEIT_SHUFFLE(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
                                         13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = others[i];
  }
  for (int i = 0; i < 16; ++i) memcpy(to + i * to_stride, &rows[i], 16);
}

// The highest bits of 8 bytes.
QUWEIT_INLINE uint64_t HighBits(uint64_t bytes) {
  return ((bytes >> 7 & 0x0101010101010101ull) * 0x0102040810204080ull) >> 56;
}

// above[i]: how many of its thresholds x[i] is above, for i from `begin` to `end`.
QUWEIT_INLINE void CountBelow(const BitModel& m, const Ladder& ladder, const float* x,
                              size_t begin, size_t end, uint8_t* above) {
  for (size_t i = begin; i < end; ++i) {
    int total = 0;
    for (size_t s = 0; s < m.steps; ++s) total += x[i] > ladder.rising[s * m.width + i];
    above[i] = static_cast<uint8_t>(total);
  }
}

inline void PortableBelow(const BitModel& m, const Ladder& ladder, const float* x,
                          uint8_t* above) {
  CountBelow(m, ladder, x, 0, m.width, above);
}

// Of 256 tokens' numbers: those above `before`, as bits.
inline void PortableAbove(const uint8_t* numbers, uint8_t before, uint64_t* bits) {
  const uint64_t add = 0x0101010101010101ull * (127 - before);
  for (size_t w = 0; w < kBitWords; ++w) {
    uint64_t word = 0;
    for (size_t byte = 0; byte < 8; ++byte) {
      uint64_t eight;
      memcpy(&eight, numbers + 64 * w + 8 * byte, 8);
      word |= HighBits(eight + add) << 8 * byte;
    }
    bits[w] = word;
  }
}

#if defined(__x86_64__)
QUWEIT_AVX2 inline void Avx2Below(const BitModel& m, const Ladder& ladder, const float* x,
                                  uint8_t* above) {
  // The packing of numbers works within halves of a register; this is how their fours then lie.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  size_t i = 0;
  for (; i + 32 <= m.width; i += 32) {
    __m256 of_x[4];
    __m256i total[4];
    for (int j = 0; j < 4; ++j) {
      of_x[j] = _mm256_loadu_ps(x + i + 8 * j), total[j] = _mm256_setzero_si256();
    }
    for (size_t s = 0; s < m.steps; ++s) {
      const float* thresholds = ladder.rising.data() + s * m.width + i;
      for (int j = 0; j < 4; ++j) {
        const __m256 is = _mm256_cmp_ps(of_x[j], _mm256_loadu_ps(thresholds + 8 * j), _CMP_GT_OQ);
        total[j] = _mm256_sub_epi32(total[j], _mm256_castps_si256(is));
      }
    }
    const __m256i low = _mm256_packs_epi32(total[0], total[1]);
    const __m256i high = _mm256_packs_epi32(total[2], total[3]);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(above + i), bytes);
  }
  CountBelow(m, ladder, x, i, m.width, above);
}

QUWEIT_AVX2 inline void Avx2Above(const uint8_t* numbers, uint8_t before, uint64_t* bits) {
  const __m256i bound = _mm256_set1_epi8(static_cast<char>(before));
  uint32_t* to = reinterpret_cast<uint32_t*>(bits);
  for (size_t w = 0; w < kBits / 32; ++w) {
    const __m256i of = _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers + 32 * w));
    to[w] = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi8(of, bound)));
  }
}
QUWEIT_AVX512 inline void Avx512Below(const BitModel& m, const Ladder& ladder, const float* x,
                                      uint8_t* above) {
  const __m512i one = _mm512_set1_epi32(1);
  size_t i = 0;
  for (; i + 64 <= m.width; i += 64) {
    __m512 of_x[4];
    __m512i total[4];
    for (int j = 0; j < 4; ++j) {
      of_x[j] = _mm512_loadu_ps(x + i + 16 * j), total[j] = _mm512_setzero_si512();
      // Inputs come from memory, and a few lines ahead they come in time.
      _mm_prefetch(reinterpret_cast<const char*>(x + i + 16 * j + 512), _MM_HINT_T0);
    }
    for (size_t s = 0; s < m.steps; ++s) {
      const float* thresholds = ladder.rising.data() + s * m.width + i;
      for (int j = 0; j < 4; ++j) {
        const __m512 than = _mm512_loadu_ps(thresholds + 16 * j);
        const __mmask16 is = _mm512_cmp_ps_mask(of_x[j], than, _CMP_GT_OQ);
        total[j] = _mm512_mask_add_epi32(total[j], is, total[j], one);
      }
    }
    for (int j = 0; j < 4; ++j) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(above + i + 16 * j),
                       _mm512_cvtepi32_epi8(total[j]));
    }
  }
  CountBelow(m, ladder, x, i, m.width, above);
}

QUWEIT_AVX512 inline void Avx512Above(const uint8_t* numbers, uint8_t before, uint64_t* bits) {
  const __m512i bound = _mm512_set1_epi8(static_cast<char>(before));
  for (size_t w = 0; w < kBitWords; ++w) {
    bits[w] = _mm512_cmpgt_epi8_mask(_mm512_load_si512(numbers + 64 * w), bound);
  }
}
#endif

// bits [width * steps][256] of `count` tokens from `start` on; those past the end are undefined.
template <typename Below, typename Above>
QUWEIT_INLINE void Compare(const BitModel& m, const Ladder& ladder, Below below, Above is_above,
                           size_t start, size_t count, uint64_t* bits) {
  thread_local Scratch<uint8_t> above_of, turned_of;
  const size_t stride = (m.width + 15) / 16 * 16 + 16;  // no power of two
  uint8_t *above = above_of.Get(kBits * stride), *turned = turned_of.Get(kBits * stride);
  for (size_t t = 0; t < count; ++t) {
    below(m, ladder, m.x + (start + t) * m.width, above + t * stride);
  }
  for (size_t i = 0; i < m.width; i += 16) {
    for (size_t t = 0; t < count; t += 16) {
      Transpose16(above + t * stride + i, stride, turned + i * kBits + t, kBits);
    }
  }
  for (size_t i = 0; i < m.width; ++i) {
    for (size_t s = 0; s < m.steps; ++s, bits += kBitWords) {
      is_above(turned + i * kBits, ladder.before[i * m.steps + s], bits);
    }
  }
}

// A table of n inputs for one register of tokens.
template <int n, size_t Bytes>
QUWEIT_INLINE typename Register<uint32_t, Bytes>::Vector Multiplex(
    const uint32_t* entries, const typename Register<uint32_t, Bytes>::Vector* inputs) {
  using Vector = typename Register<uint32_t, Bytes>::Vector;
  if constexpr (n == 1) {
    return (inputs[0] & entries[1]) ^ entries[0];
  } else {
    const Vector low = Multiplex<n - 1, Bytes>(entries, inputs);
    const Vector high = Multiplex<n - 1, Bytes>(entries + (1 << (n - 1)), inputs);
    return low ^ ((low ^ high) & inputs[n - 1]);
  }
}

// Tables of n inputs, and of n + more: then as many tables of n, whose bits the other inputs choose
// between.
template <int n, size_t Bytes>
QUWEIT_INLINE void LookUp(const LutLayer& layer, int more, const uint64_t* bits, uint64_t* out) {
  using Vector = typename Register<uint32_t, Bytes>::Vector;
  constexpr size_t parts = kBits / 8 / Bytes;
  const int32_t* wiring = layer.wiring;
  const uint32_t* entries = layer.entries.data();
  for (size_t l = 0; l < layer.count; ++l, out += kBitWords, wiring += n + more) {
    for (size_t p = 0; p < parts; ++p) {
      const auto input = [&](int i) {
        return reinterpret_cast<const Vector*>(bits + wiring[i] * kBitWords + p * (Bytes / 8));
      };
      Vector inputs[n], found[4];
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) inputs[i] = *input(i);
      for (int i = 0; i < 1 << more; ++i) {
        found[i] = Multiplex<n, Bytes>(entries + (i << n), inputs);
      }
      for (int i = more; i > 0; --i) {
        const Vector high = *input(n + i - 1);
        const int half = 1 << (i - 1);
        for (int j = 0; j < half; ++j) found[j] ^= (found[j] ^ found[j + half]) & high;
      }
      *reinterpret_cast<Vector*>(out + p * (Bytes / 8)) = found[0];
    }
    entries += size_t{1} << (n + more);
  }
}

template <size_t Bytes>
QUWEIT_INLINE void LookUpLayer(const LutLayer& layer, const uint64_t* bits, uint64_t* out) {
  switch (layer.inputs) {
    case 1: return LookUp<1, Bytes>(layer, 0, bits, out);
    case 2: return LookUp<2, Bytes>(layer, 0, bits, out);
    case 3: return LookUp<3, Bytes>(layer, 0, bits, out);
    case 4: return LookUp<4, Bytes>(layer, 0, bits, out);
    case 5: return LookUp<5, Bytes>(layer, 0, bits, out);
    default: return LookUp<6, Bytes>(layer, static_cast<int>(layer.inputs) - 6, bits, out);
  }
}

// The last layer's bits [bits][256] of the tokens from `start` on.
template <size_t Bytes, typename Below, typename Above>
QUWEIT_INLINE const uint64_t* BitsOf(const BitModel& m, const Ladder& ladder, Below below,
                                     Above is_above, size_t start) {
  thread_local Scratch<uint64_t> first_of, second_of;
  size_t most = m.width * m.steps;
  for (const LutLayer& layer : m.layers) most = std::max(most, layer.count);
  uint64_t *bits = first_of.Get(most * kBitWords), *out = second_of.Get(most * kBitWords);
  Compare(m, ladder, below, is_above, start, std::min(kBits, m.tokens - start), bits);
  for (const LutLayer& layer : m.layers) {
    LookUpLayer<Bytes>(layer, bits, out);
    std::swap(bits, out);
  }
  return bits;
}

}  // namespace quweit
