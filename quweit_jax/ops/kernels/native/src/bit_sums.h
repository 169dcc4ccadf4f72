// Sums of models of bits: the vectors of set bits added, or the set bits of each class counted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bits.h"
#include "parallel.h"

namespace quweit {

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
        uint32_t words[kBits / 32];
        memcpy(words, digits[d], sizeof(words));
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
            const int16_t* from = table + s * kWords;
            for (size_t j = 0; j < kWords; ++j) to[s * kWords + j] = from[j] + vector[j];
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
    return BitsOf<bytes>(m, ladder, name##Below, name##Above, start);                                                       \
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
// Of 256 tokens there are no more bits than 32 bytes, but one instruction chooses between them.
QUWEIT_BIT_KERNELS(Avx512, QUWEIT_AVX512, 32)
#endif
#undef QUWEIT_BIT_KERNELS

inline BitKernels KernelsOfBits(Level level) {
#if defined(__x86_64__)
  if (level == kAvx512) return {Avx512Bits, Avx512Count, Avx512Numbers, Avx512Add};
  if (level == kAvx2) return {Avx2Bits, Avx2Count, Avx2Numbers, Avx2Add};
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
