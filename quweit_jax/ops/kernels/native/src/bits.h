// Models of bits, 256 tokens at a time: numbers against thresholds, look-up tables of one bit an
// entry as trees of multiplexers over registers of tokens, and the sum of the vectors of set bits, or
// the number of set bits of each class.
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

// 16 rows of 16 bytes, transposed: each step interleaves rows that are 8 apart.
QUWEIT_INLINE void Transpose16(const uint8_t* from, size_t from_stride, uint8_t* to,
                               size_t to_stride) {
  Sixteen rows[16], others[16];
  for (int i = 0; i < 16; ++i) memcpy(&rows[i], from + i * from_stride, 16);
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      others[2 * i] = __builtin_shuffle(
          rows[i], rows[i + 8],
          Sixteen{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
      others[2 * i + 1] = __builtin_shuffle(
          rows[i], rows[i + 8],
          Sixteen{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
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
#endif

// bits [width * steps][256] of `count` tokens from `start` on; those past the end are undefined.
template <size_t Bytes>
QUWEIT_INLINE void Compare(const BitModel& m, const Ladder& ladder, size_t start, size_t count,
                           uint64_t* bits) {
  thread_local Scratch<uint8_t> above_of, turned_of;
  auto below = PortableBelow;
  auto is_above = PortableAbove;
#if defined(__x86_64__)
  if (Bytes > 16) below = Avx2Below, is_above = Avx2Above;
#endif
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
template <size_t Bytes>
QUWEIT_INLINE const uint64_t* BitsOf(const BitModel& m, const Ladder& ladder, size_t start) {
  thread_local Scratch<uint64_t> first_of, second_of;
  size_t most = m.width * m.steps;
  for (const LutLayer& layer : m.layers) most = std::max(most, layer.count);
  uint64_t *bits = first_of.Get(most * kBitWords), *out = second_of.Get(most * kBitWords);
  Compare<Bytes>(m, ladder, start, std::min(kBits, m.tokens - start), bits);
  for (const LutLayer& layer : m.layers) {
    LookUpLayer<Bytes>(layer, bits, out);
    std::swap(bits, out);
  }
  return bits;
}

// How many bits of each class are set: the classes' bits lie next to one another. out (tokens,
// classes) from `start` on.
QUWEIT_INLINE void Count(const BitModel& m, const uint64_t* bits, size_t start, size_t classes,
                         int32_t* out) {
  const size_t each = m.Bits() / classes, count = std::min(kBits, m.tokens - start);
  alignas(64) int32_t totals[kBits];
  for (size_t c = 0; c < classes; ++c) {
    // Numbers of 7 binary digits, each a register of bits, as long as they fit.
    memset(totals, 0, sizeof(totals));
    for (size_t from = 0; from < each; from += 127) {
      alignas(64) uint64_t digits[7][kBitWords] = {};
      const size_t end = std::min<size_t>(each, from + 127);
      for (size_t l = from; l < end; ++l) {
        const uint64_t* bit = bits + (c * each + l) * kBitWords;
        uint64_t carry[kBitWords];
        memcpy(carry, bit, sizeof(carry));
#pragma GCC unroll 7
        for (int d = 0; d < 7; ++d) {
#pragma GCC unroll 4
          for (size_t w = 0; w < kBitWords; ++w) {
            const uint64_t both = digits[d][w] & carry[w];
            digits[d][w] ^= carry[w];
            carry[w] = both;
          }
        }
      }
      for (int d = 0; d < 7; ++d) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(digits[d]);
        for (size_t w = 0; w < kBits / 32; ++w) {
          const uint32_t word = words[w];
          for (size_t t = 0; t < 32; ++t) {
            totals[32 * w + t] += static_cast<int32_t>((word >> t & 1) << d);
          }
        }
      }
    }
    for (size_t t = 0; t < count; ++t) out[(start + t) * classes + c] = totals[t];
  }
}

constexpr size_t kGroup = 6;                // vectors whose 64 sums are made
constexpr size_t kGroupsAtOnce = 6;         // whose sums of 32 features a first cache holds
constexpr size_t kGroupsOfWords = 42;       // whose sums fit int16: 42 x 6 x 128 < 2**15
constexpr size_t kTokensOfSums = 4096;      // whose numbers of sums are held

// numbers [group][tokens of a pass]: which of each group's vectors are to be added.
QUWEIT_INLINE void Numbers(const BitModel& m, const uint64_t* bits, size_t stride,
                           uint8_t* numbers) {
  const size_t count = m.Bits(), groups = (count + kGroup - 1) / kGroup;
  for (size_t g = 0; g < groups; ++g) {
    uint8_t* to = numbers + g * stride;
    const size_t most = std::min(kGroup, count - g * kGroup);
    for (size_t byte = 0; byte < kBits / 8; ++byte) {
      // 8 tokens' bits as rows of a square of bits, transposed (Warren, Hacker's Delight, 7-3).
      uint64_t square = 0;
      for (size_t i = 0; i < most; ++i) {
        const uint8_t* row = reinterpret_cast<const uint8_t*>(bits + (g * kGroup + i) * kBitWords);
        square |= static_cast<uint64_t>(row[byte]) << 8 * i;
      }
      uint64_t swap = (square ^ square >> 7) & 0x00AA00AA00AA00AAull;
      square ^= swap ^ swap << 7;
      swap = (square ^ square >> 14) & 0x0000CCCC0000CCCCull;
      square ^= swap ^ swap << 14;
      swap = (square ^ square >> 28) & 0x00000000F0F0F0F0ull;
      square ^= swap ^ swap << 28;
      memcpy(to + 8 * byte, &square, 8);
    }
  }
}

struct VectorsOfBits {
  const int8_t* vectors;  // (bits, features)
  size_t bits, features;
  int32_t* out;  // (tokens, features)
};

// Adds up 32 features from `feature` on of the tokens from `begin` to `end` of a pass.
template <size_t Bytes>
QUWEIT_INLINE void AddNumbered(const VectorsOfBits& f, const uint8_t* numbers, size_t stride,
                               size_t feature, size_t begin, size_t end, int32_t* out) {
  using Vector = typename Register<int16_t, Bytes>::Vector;
  constexpr size_t parts = 64 / Bytes, sums = size_t{1} << kGroup;
  thread_local Scratch<int16_t> tables_of, words_of;
  const size_t groups = (f.bits + kGroup - 1) / kGroup, tokens = end - begin;
  const size_t width = std::min(kWords, f.features - feature);
  int16_t* tables = tables_of.Get(kGroupsAtOnce * sums * kWords);
  int16_t* words = words_of.Get(tokens * kWords);
  for (size_t first = 0; first < groups;) {
    const size_t last = std::min(groups, first + kGroupsOfWords);
    const bool fresh = first == 0;
    memset(words, 0, tokens * kWords * sizeof(int16_t));
    for (; first < last; first += kGroupsAtOnce) {
      for (size_t g = 0; g < kGroupsAtOnce; ++g) {
        int16_t* table = tables + g * sums * kWords;
        memset(table, 0, kWords * sizeof(int16_t));
        for (size_t i = 0; i < kGroup; ++i) {
          const size_t bit = (first + g) * kGroup + i;
          alignas(64) int16_t vector[kWords] = {};
          if (bit < f.bits && first + g < last) {
            const int8_t* from = f.vectors + bit * f.features + feature;
            for (size_t j = 0; j < width; ++j) vector[j] = from[j];
          }
          int16_t* to = table + (size_t{1} << i) * kWords;
          for (size_t s = 0; s < size_t{1} << i; ++s) {
            for (size_t j = 0; j < kWords; ++j) to[s * kWords + j] = table[s * kWords + j] + vector[j];
          }
        }
      }
      const uint8_t* of[kGroupsAtOnce];
      for (size_t g = 0; g < kGroupsAtOnce; ++g) {
        of[g] = numbers + std::min(first + g, groups - 1) * stride + begin;
      }
      Vector* to = reinterpret_cast<Vector*>(words);
      for (size_t t = 0; t < tokens; ++t, to += parts) {
        const Vector* row[kGroupsAtOnce];
#pragma GCC unroll 8
        for (size_t g = 0; g < kGroupsAtOnce; ++g) {
          row[g] = reinterpret_cast<const Vector*>(tables + (g * sums + of[g][t]) * kWords);
        }
#pragma GCC unroll 4
        for (size_t p = 0; p < parts; ++p) {
          Vector sum = to[p];
#pragma GCC unroll 8
          for (size_t g = 0; g < kGroupsAtOnce; ++g) sum += row[g][p];
          to[p] = sum;
        }
      }
    }
    for (size_t t = 0; t < tokens; ++t) {
      int32_t* sum = out + (begin + t) * f.features + feature;
      const int16_t* from = words + t * kWords;
      if (width == kWords) {
        for (size_t j = 0; j < kWords; ++j) sum[j] = from[j] + (fresh ? 0 : sum[j]);
      } else {
        for (size_t j = 0; j < width; ++j) sum[j] = from[j] + (fresh ? 0 : sum[j]);
      }
    }
  }
}

struct BitKernels {
  const uint64_t* (*bits)(const BitModel&, const Ladder&, size_t);
  void (*count)(const BitModel&, const uint64_t*, size_t, size_t, int32_t*);
  void (*numbers)(const BitModel&, const uint64_t*, size_t, uint8_t*);
  void (*add)(const VectorsOfBits&, const uint8_t*, size_t, size_t, size_t, size_t, int32_t*);
};

#define QUWEIT_BIT_KERNELS(name, target, bytes)                                                   \
  target inline const uint64_t* name##Bits(const BitModel& m, const Ladder& ladder,               \
                                           size_t start) {                                        \
    return BitsOf<bytes>(m, ladder, start);                                                       \
  }                                                                                               \
  target inline void name##Count(const BitModel& m, const uint64_t* bits, size_t start,           \
                                 size_t classes, int32_t* out) {                                  \
    Count(m, bits, start, classes, out);                                                          \
  }                                                                                               \
  target inline void name##Numbers(const BitModel& m, const uint64_t* bits, size_t stride,        \
                                   uint8_t* numbers) {                                            \
    Numbers(m, bits, stride, numbers);                                                            \
  }                                                                                               \
  target inline void name##Add(const VectorsOfBits& f, const uint8_t* numbers, size_t stride,     \
                               size_t feature, size_t begin, size_t end, int32_t* out) {          \
    AddNumbered<bytes>(f, numbers, stride, feature, begin, end, out);                             \
  }

QUWEIT_BIT_KERNELS(Portable, , 16)
#if defined(__x86_64__)
QUWEIT_BIT_KERNELS(Avx2, QUWEIT_AVX2, 32)
#endif
#undef QUWEIT_BIT_KERNELS

inline BitKernels KernelsOfBits(Level level) {
#if defined(__x86_64__)
  if (level != kPortable) return {Avx2Bits, Avx2Count, Avx2Numbers, Avx2Add};
#endif
  return {PortableBits, PortableCount, PortableNumbers, PortableAdd};
}

inline void CountBits(xla::ffi::ThreadPool& pool, Level level, const BitModel& m, size_t classes,
                      int32_t* out) {
  const Ladder ladder(m);
  const BitKernels kernels = KernelsOfBits(level);
  InParallel(pool, (m.tokens + kBits - 1) / kBits, [&](size_t piece) {
    const uint64_t* bits = kernels.bits(m, ladder, piece * kBits);
    kernels.count(m, bits, piece * kBits, classes, out);
  });
}

inline void AddVectorsOfBits(xla::ffi::ThreadPool& pool, Level level, const BitModel& m,
                             const int8_t* vectors, size_t features, int32_t* out) {
  static thread_local Scratch<uint8_t> numbers_of;
  const Ladder ladder(m);
  const BitKernels kernels = KernelsOfBits(level);
  const VectorsOfBits f = {vectors, m.Bits(), features, out};
  const size_t groups = (f.bits + kGroup - 1) / kGroup, slices = (features + kWords - 1) / kWords;
  for (size_t start = 0; start < m.tokens; start += kTokensOfSums) {
    const size_t tokens = std::min(kTokensOfSums, m.tokens - start);
    const size_t blocks = (tokens + kBits - 1) / kBits, stride = blocks * kBits;
    uint8_t* numbers = numbers_of.Get(groups * stride);
    InParallel(pool, blocks, [&, start, stride, numbers](size_t piece) {
      const uint64_t* bits = kernels.bits(m, ladder, start + piece * kBits);
      kernels.numbers(m, bits, stride, numbers + piece * kBits);
    });
    // The sums of a group's vectors are made again for every part of the tokens.
    const size_t parts = std::max<size_t>(1, std::min(2 * Threads(pool) / slices, tokens / 512));
    InParallel(pool, slices * parts, [&, start, stride, numbers, parts](size_t piece) {
      kernels.add(f, numbers, stride, piece / parts * kWords,
                  PartStart(piece % parts, parts, tokens, 1),
                  PartStart(piece % parts + 1, parts, tokens, 1), out + start * features);
    });
  }
}

}  // namespace quweit
