// Tables of vectors: int8 rows chosen by addresses, added in int32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "blocks.h"
#include "parallel.h"

namespace quweit {

constexpr size_t kWide = 64;     // outputs that are added at a time
constexpr size_t kTables = 128;  // whose sums fit 16 bits, and whose vectors stay in a cache
constexpr size_t kTokens = 32;   // of a piece of work

typedef uint16_t Words __attribute__((vector_size(kWide)));
typedef int16_t SignedWords __attribute__((vector_size(kWide)));

// Adds `tables` rows of at most 64 int8 each to out. Bytes are added two in a word: the words as
// they are, and their high bytes; the low bytes, made positive, are the difference.
QUWEIT_INLINE void AddRows(const int8_t* vectors, size_t entries, size_t outputs,
                           const uint8_t* addresses, size_t tables, size_t width, int32_t* out) {
  Words both = {};
  SignedWords high = {};
  for (size_t l = 0; l < tables; ++l) {
    const int8_t* row = vectors + (l * entries + addresses[l]) * outputs;
    Words words = {};
    if (width == kWide) {
      memcpy(&words, row, kWide);
    } else {
      memcpy(&words, row, width);
    }
    both += words ^ static_cast<uint16_t>(0x80);
    high += reinterpret_cast<SignedWords>(words) >> 8;
  }
  const Words low = both - (reinterpret_cast<Words>(high) << 8);
  for (size_t i = 0; i < width; ++i) {
    out[i] += i % 2 ? high[i / 2] : static_cast<int32_t>(low[i / 2]) - 128 * static_cast<int>(tables);
  }
}

// A piece's tokens: addresses (tokens, tables), vectors (tables, entries, outputs), out (tokens,
// outputs).
QUWEIT_INLINE void AddTokens(const uint8_t* addresses, size_t tokens, size_t tables,
                             const int8_t* vectors, size_t entries, size_t outputs, int32_t* out) {
  memset(out, 0, sizeof(int32_t) * tokens * outputs);
  for (size_t start = 0; start < tables; start += kTables) {
    const size_t count = tables - start < kTables ? tables - start : kTables;
    const int8_t* from = vectors + start * entries * outputs;
    for (size_t t = 0; t < tokens; ++t) {
      const uint8_t* of_token = addresses + t * tables + start;
      for (size_t o = 0; o < outputs; o += kWide) {
        const size_t width = outputs - o < kWide ? outputs - o : kWide;
        AddRows(from + o, entries, outputs, of_token, count, width, out + t * outputs + o);
      }
    }
  }
}

inline void PortableTokens(const uint8_t* addresses, size_t tokens, size_t tables,
                           const int8_t* vectors, size_t entries, size_t outputs, int32_t* out) {
  AddTokens(addresses, tokens, tables, vectors, entries, outputs, out);
}
#if defined(__x86_64__)
QUWEIT_AVX2 inline void Avx2Tokens(const uint8_t* addresses, size_t tokens, size_t tables,
                                   const int8_t* vectors, size_t entries, size_t outputs,
                                   int32_t* out) {
  AddTokens(addresses, tokens, tables, vectors, entries, outputs, out);
}
QUWEIT_AVX512 inline void Avx512Tokens(const uint8_t* addresses, size_t tokens, size_t tables,
                                       const int8_t* vectors, size_t entries, size_t outputs,
                                       int32_t* out) {
  AddTokens(addresses, tokens, tables, vectors, entries, outputs, out);
}
#endif

inline void VectorSums(xla::ffi::ThreadPool& pool, Level level, const uint8_t* addresses,
                       size_t tokens, size_t tables, const int8_t* vectors, size_t entries,
                       size_t outputs, int32_t* out) {
  auto add = PortableTokens;
#if defined(__x86_64__)
  if (level == kAvx2) add = Avx2Tokens;
  if (level == kAvx512) add = Avx512Tokens;
#endif
  InParallel(pool, (tokens + kTokens - 1) / kTokens, [=](size_t piece) {
    const size_t start = piece * kTokens, left = tokens - start;
    add(addresses + start * tables, left < kTokens ? left : kTokens, tables, vectors, entries,
        outputs, out + start * outputs);
  });
}

}  // namespace quweit
