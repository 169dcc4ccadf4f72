// The gradients of look-ups of real tables: of each entry the sum over the tokens that read it, and
// of each input the sum over the tables that read it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "combinations.h"
#include "lut.h"
#include "parallel.h"

namespace quweit {

// What the gradient to an input adds up: table and slot of every reader, in the order of slots.
struct LutReader {
  uint32_t table, slot;
};

struct LutReaders {
  std::vector<uint32_t> starts;  // of each input's readers
  std::vector<LutReader> readers;

  LutReaders(const int32_t* wiring, size_t count, size_t n, size_t inputs)
      : starts(inputs + 1), readers(count * n) {
    const auto input = [=](size_t table, size_t slot) {
      const int32_t at = wiring[table * n + slot];
      return at < 0 ? 0 : std::min<size_t>(at, inputs - 1);
    };
    for (size_t table = 0; table < count; ++table) {
      for (size_t slot = 0; slot < n; ++slot) ++starts[input(table, slot) + 1];
    }
    for (size_t i = 0; i < inputs; ++i) starts[i + 1] += starts[i];
    std::vector<uint32_t> next(starts.begin(), starts.end() - 1);
    for (size_t slot = 0; slot < n; ++slot) {
      for (size_t table = 0; table < count; ++table) {
        readers[next[input(table, slot)]++] = {static_cast<uint32_t>(table),
                                               static_cast<uint32_t>(slot)};
      }
    }
  }
};

// Of a block of tokens.
struct LutBlock {
  const float* gradient;     // [table][64]
  const uint8_t* addresses;  // [table][64]
  const float* differences;  // (n, tables, 2**(n - 1))
  size_t count, inputs;
  const LutReaders* readers;
};

// The sums of one input's readers, each the gradient to a table times its difference at the address
// without the bit of the slot. out [64].
template <int n>
void PortableBits(const LutBlock& b, size_t input, float* out) {
  constexpr size_t rest = size_t{1} << (n - 1);
  float total[kLutTokens] = {};
  for (size_t r = b.readers->starts[input]; r < b.readers->starts[input + 1]; ++r) {
    const LutReader reader = b.readers->readers[r];
    const float* entries = b.differences + (reader.slot * b.count + reader.table) * rest;
    const float* gradient = b.gradient + reader.table * kLutTokens;
    const uint8_t* addresses = b.addresses + reader.table * kLutTokens;
    const unsigned low = (1u << reader.slot) - 1;
    for (size_t k = 0; k < kLutTokens / kLutLanes; ++k) {
      for (size_t i = 0; i < kLutLanes; ++i) {
        const unsigned at = addresses[4 * i + k];
        const unsigned without = (at & low) | (at >> 1 & ~low);
        total[kLutLanes * k + i] += gradient[kLutLanes * k + i] * entries[without];
      }
    }
  }
  memcpy(out, total, sizeof(total));
}

#if defined(__x86_64__)
template <int n>
QUWEIT_AVX2 void Avx2Bits(const LutBlock& b, size_t input, float* out) {
  constexpr size_t rest = size_t{1} << (n - 1);
  __m256 total[8];
  for (int i = 0; i < 8; ++i) total[i] = _mm256_setzero_ps();
  for (size_t r = b.readers->starts[input]; r < b.readers->starts[input + 1]; ++r) {
    const LutReader reader = b.readers->readers[r];
    EntriesOf8<n - 1> entries;
    Load8<n - 1>(b.differences + (reader.slot * b.count + reader.table) * rest, entries);
    const float* gradient = b.gradient + reader.table * kLutTokens;
    const uint8_t* addresses = b.addresses + reader.table * kLutTokens;
    const __m256i low = _mm256_set1_epi8(static_cast<char>((1u << reader.slot) - 1));
    for (int h = 0; h < 2; ++h) {
      const __m256i at =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(addresses + 32 * h));
      // Bits of the next byte come into the highest bit, which nothing reads.
      const __m256i above = _mm256_andnot_si256(low, _mm256_srli_epi16(at, 1));
      const __m256i without = _mm256_or_si256(_mm256_and_si256(at, low), above);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m256 slope = Read8<n - 1>(entries, _mm256_srli_epi32(without, 8 * k));
        const __m256 of = _mm256_loadu_ps(gradient + kLutLanes * k + 8 * h);
        total[2 * k + h] = _mm256_fmadd_ps(of, slope, total[2 * k + h]);
      }
    }
  }
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + 8 * i, total[i]);
}

template <int n>
QUWEIT_AVX512 void Avx512Bits(const LutBlock& b, size_t input, float* out) {
  constexpr size_t rest = size_t{1} << (n - 1);
  __m512 total[4];
  for (int k = 0; k < 4; ++k) total[k] = _mm512_setzero_ps();
  for (size_t r = b.readers->starts[input]; r < b.readers->starts[input + 1]; ++r) {
    const LutReader reader = b.readers->readers[r];
    EntriesOf16<n - 1> entries;
    Load16<n - 1>(b.differences + (reader.slot * b.count + reader.table) * rest, entries);
    const float* gradient = b.gradient + reader.table * kLutTokens;
    const __m512i at = _mm512_loadu_si512(b.addresses + reader.table * kLutTokens);
    const __m512i low = _mm512_set1_epi8(static_cast<char>((1u << reader.slot) - 1));
    // Bits of the next byte come into the highest bit, which nothing reads.
    const __m512i above = _mm512_andnot_si512(low, _mm512_srli_epi16(at, 1));
    const __m512i without = _mm512_or_si512(_mm512_and_si512(at, low), above);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512 slope = Read16<n - 1>(entries.part, _mm512_srli_epi32(without, 8 * k));
      const __m512 of = _mm512_loadu_ps(gradient + kLutLanes * k);
      total[k] = _mm512_fmadd_ps(of, slope, total[k]);
    }
  }
  for (int k = 0; k < 4; ++k) _mm512_storeu_ps(out + kLutLanes * k, total[k]);
}
#endif  // __x86_64__

using LutBits = void (*)(const LutBlock&, size_t, float*);

struct LutBackward {
  const uint8_t* addresses;  // [table][block][64]
  const int32_t* wiring;     // (count, n)
  const float* differences;  // (n, count, 2**(n - 1))
  const float* gradient;     // (count, tokens)
  size_t count, tokens, n, inputs;
  float* to_tables;  // (count, 2**n)
  float* to_bits;    // (inputs, tokens); null: not asked for

  size_t Blocks() const { return (tokens + kLutTokens - 1) / kLutTokens; }
};

// The gradient to a table: of each entry 16 sums of tokens, each of every sixteenth in their order,
// then halves added to halves. sums: room for [entry][16].
inline void AddToEntries(const LutBackward& f, size_t table, float* sums) {
  const size_t entries = size_t{1} << f.n;
  memset(sums, 0, entries * kLutLanes * sizeof(float));
  const uint8_t* at = f.addresses + table * f.Blocks() * kLutTokens;
  const float* gradient = f.gradient + table * f.tokens;
  size_t start = 0;
  for (; start + kLutTokens <= f.tokens; start += kLutTokens, at += kLutTokens) {
    for (size_t k = 0; k < kLutTokens / kLutLanes; ++k, gradient += kLutLanes) {
#pragma GCC unroll 16
      for (size_t i = 0; i < kLutLanes; ++i) sums[at[4 * i + k] * kLutLanes + i] += gradient[i];
    }
  }
  for (size_t t = 0; t < f.tokens - start; ++t) {
    const size_t i = t % kLutLanes;
    sums[at[4 * i + t / kLutLanes] * kLutLanes + i] += gradient[t];
  }
  float* to = f.to_tables + table * entries;
  for (size_t e = 0; e < entries; ++e, sums += kLutLanes) {
    for (size_t half = kLutLanes / 2; half > 0; half /= 2) {
      for (size_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    to[e] = sums[0];
  }
}

// The gradients to the bits of one block of tokens.
inline void BitsOfBlock(const LutBackward& f, LutBits bits, const LutReaders& readers,
                        size_t block) {
  thread_local Scratch<float> gradient_of;
  thread_local Scratch<uint8_t> addresses_of;
  const size_t start = block * kLutTokens, count = std::min(kLutTokens, f.tokens - start);
  float* gradient = gradient_of.Get(f.count * kLutTokens);
  uint8_t* addresses = addresses_of.Get(f.count * kLutTokens);
  for (size_t l = 0; l < f.count; ++l) {
    float* to = gradient + l * kLutTokens;
    memcpy(to, f.gradient + l * f.tokens + start, count * sizeof(float));
    memset(to + count, 0, (kLutTokens - count) * sizeof(float));
    memcpy(addresses + l * kLutTokens, f.addresses + (l * f.Blocks() + block) * kLutTokens,
           kLutTokens);
  }
  const LutBlock b = {gradient, addresses, f.differences, f.count, f.inputs, &readers};
  float out[kLutTokens];
  for (size_t i = 0; i < f.inputs; ++i) {
    float* to = f.to_bits + i * f.tokens + start;
    if (count == kLutTokens) {
      bits(b, i, to);
    } else {
      bits(b, i, out);
      memcpy(to, out, count * sizeof(float));
    }
  }
}

inline void LutGradients(xla::ffi::ThreadPool& pool, Level level, const LutBackward& f) {
  const size_t pieces = std::min(4 * Threads(pool), f.count);
  InParallel(pool, pieces, [&f, pieces](size_t piece) {
    thread_local Scratch<float> sums_of;
    float* sums = sums_of.Get(kLutLanes << f.n);
    const size_t end = PartStart(piece + 1, pieces, f.count, 1);
    for (size_t l = PartStart(piece, pieces, f.count, 1); l < end; ++l) AddToEntries(f, l, sums);
  });
  if (f.to_bits == nullptr) return;
  LutBits bits = QUWEIT_BY_INPUTS(PortableBits, f.n);
#if defined(__x86_64__)
  if (level == kAvx2) bits = QUWEIT_BY_INPUTS(Avx2Bits, f.n);
  if (level == kAvx512) bits = QUWEIT_BY_INPUTS(Avx512Bits, f.n);
#endif
  const LutReaders readers(f.wiring, f.count, f.n, f.inputs);
  InParallel(pool, f.Blocks(),
             [&](size_t block) { BitsOfBlock(f, bits, readers, block); });
}
}  // namespace quweit
