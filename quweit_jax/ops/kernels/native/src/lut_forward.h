// Look-ups of real tables as they are trained, tokens last: the entries that are read, and the
// addresses they are read at, which the gradients need.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "lut.h"
#include "parallel.h"

namespace quweit {

struct LutForward {
  const uint8_t* bits;  // (inputs, tokens), 0 or 1
  size_t inputs, tokens;
  const int32_t* wiring;  // (count, n)
  const float* tables;    // (count, 2**n)
  size_t count;
  float* out;          // (count, tokens)
  uint8_t* addresses;  // [table][block][64]

  size_t Blocks() const { return (tokens + kLutTokens - 1) / kLutTokens; }
  // Of an input that isn't there the nearest one.
  const uint8_t* Row(int32_t input) const {
    const size_t last = inputs - 1;
    return bits + (input < 0 ? 0 : std::min<size_t>(input, last)) * tokens;
  }
};
template <int n>
void PortableLut(const LutForward& f, size_t table) {
  const float* entries = f.tables + (table << n);
  const uint8_t* rows[n];
  for (int i = 0; i < n; ++i) rows[i] = f.Row(f.wiring[table * n + i]);
  uint8_t* to = f.addresses + table * f.Blocks() * kLutTokens;
  float* out = f.out + table * f.tokens;
  for (size_t start = 0; start < f.tokens; start += kLutTokens, to += kLutTokens) {
    const size_t count = std::min(kLutTokens, f.tokens - start);
    uint8_t at[kLutTokens] = {};
    for (int i = n; i-- > 0;) {
      for (size_t t = 0; t < count; ++t) {
        at[t] = static_cast<uint8_t>(2 * at[t] + (rows[i][start + t] & 1));
      }
    }
    for (size_t t = 0; t < count; ++t) out[start + t] = entries[at[t]];
    for (size_t t = 0; t < kLutTokens; ++t) *AddressOf(to, t) = at[t];
  }
}

#if defined(__x86_64__)
// A block of 64 tokens of a table whose inputs lie at `rows`.
template <int n>
QUWEIT_INLINE_AVX2 void Avx2LutBlock(const uint8_t* const* rows, size_t start,
                                     const EntriesOf8<n>& entries, float* out,
                                     uint8_t* addresses) {
  __m256i half[2];
  for (int h = 0; h < 2; ++h) {
    __m256i at = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = n; i-- > 0;) {
      const uint8_t* from = rows[i] + start + 32 * h;
      const __m256i bit = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      at = _mm256_add_epi8(_mm256_add_epi8(at, at), bit);
    }
    half[h] = _mm256_and_si256(at, _mm256_set1_epi8(static_cast<char>((1 << n) - 1)));
  }
  const __m128i r0 = _mm256_castsi256_si128(half[0]), r1 = _mm256_extracti128_si256(half[0], 1);
  const __m128i r2 = _mm256_castsi256_si128(half[1]), r3 = _mm256_extracti128_si256(half[1], 1);
  const __m128i low01 = _mm_unpacklo_epi8(r0, r1), high01 = _mm_unpackhi_epi8(r0, r1);
  const __m128i low23 = _mm_unpacklo_epi8(r2, r3), high23 = _mm_unpackhi_epi8(r2, r3);
  const __m256i turned[2] = {
      _mm256_set_m128i(_mm_unpackhi_epi16(low01, low23), _mm_unpacklo_epi16(low01, low23)),
      _mm256_set_m128i(_mm_unpackhi_epi16(high01, high23), _mm_unpacklo_epi16(high01, high23))};
  for (int h = 0; h < 2; ++h) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(addresses + 32 * h), turned[h]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m256 read = Read8<n>(entries, _mm256_srli_epi32(turned[h], 8 * k));
      _mm256_storeu_ps(out + kLutLanes * k + 8 * h, read);
    }
  }
}

template <int n>
QUWEIT_AVX2 void Avx2Lut(const LutForward& f, size_t table) {
  EntriesOf8<n> entries;
  Load8<n>(f.tables + (table << n), entries);
  const uint8_t* rows[n];
  for (int i = 0; i < n; ++i) rows[i] = f.Row(f.wiring[table * n + i]);
  uint8_t* to = f.addresses + table * f.Blocks() * kLutTokens;
  float* out = f.out + table * f.tokens;
  size_t start = 0;
  for (; start + kLutTokens <= f.tokens; start += kLutTokens, to += kLutTokens) {
    Avx2LutBlock<n>(rows, start, entries, out + start, to);
  }
  if (const size_t left = f.tokens - start) {
    uint8_t padded[n][kLutTokens] = {};
    const uint8_t* padded_rows[n];
    float read[kLutTokens];
    for (int i = 0; i < n; ++i) {
      memcpy(padded[i], rows[i] + start, left), padded_rows[i] = padded[i];
    }
    Avx2LutBlock<n>(padded_rows, 0, entries, read, to);
    memcpy(out + start, read, left * sizeof(float));
  }
}

template <int n>
QUWEIT_AVX512 void Avx512Lut(const LutForward& f, size_t table) {
  alignas(64) static constexpr uint8_t order[64] = {
      0,  16, 32, 48, 1,  17, 33, 49, 2,  18, 34, 50, 3,  19, 35, 51, 4,  20, 36, 52, 5,  21,
      37, 53, 6,  22, 38, 54, 7,  23, 39, 55, 8,  24, 40, 56, 9,  25, 41, 57, 10, 26, 42, 58,
      11, 27, 43, 59, 12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63};
  const __m512i turn = _mm512_load_si512(order);
  EntriesOf16<n> entries;
  Load16<n>(f.tables + (table << n), entries);
  const uint8_t* rows[n];
  for (int i = 0; i < n; ++i) rows[i] = f.Row(f.wiring[table * n + i]);
  uint8_t* to = f.addresses + table * f.Blocks() * kLutTokens;
  float* out = f.out + table * f.tokens;
  for (size_t start = 0; start < f.tokens; start += kLutTokens, to += kLutTokens) {
    const size_t left = f.tokens - start;
    const uint64_t there = left < kLutTokens ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
    __m512i at = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = n; i-- > 0;) {
      const __m512i bit = _mm512_maskz_loadu_epi8(there, rows[i] + start);
      at = _mm512_add_epi8(_mm512_add_epi8(at, at), bit);
    }
    at = _mm512_and_si512(at, _mm512_set1_epi8(static_cast<char>((1 << n) - 1)));
    at = _mm512_permutexvar_epi8(turn, at);
    _mm512_storeu_si512(to, at);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512 read = Read16<n>(entries.part, _mm512_srli_epi32(at, 8 * k));
      const __mmask16 mask = static_cast<__mmask16>(there >> 16 * k);
      _mm512_mask_storeu_ps(out + start + kLutLanes * k, mask, read);
    }
  }
}

#endif  // __x86_64__

inline void ReadLuts(xla::ffi::ThreadPool& pool, Level level, const LutForward& f, size_t n) {
  auto read = QUWEIT_BY_INPUTS(PortableLut, n);
#if defined(__x86_64__)
  if (level == kAvx2) read = QUWEIT_BY_INPUTS(Avx2Lut, n);
  if (level == kAvx512) read = QUWEIT_BY_INPUTS(Avx512Lut, n);
#endif
  const size_t pieces = std::min(4 * Threads(pool), f.count);
  InParallel(pool, pieces, [&f, read, pieces](size_t piece) {
    const size_t end = PartStart(piece + 1, pieces, f.count, 1);
    for (size_t l = PartStart(piece, pieces, f.count, 1); l < end; ++l) read(f, l);
  });
}

}  // namespace quweit
