// The packed LookupGLU: ternary sums, codes, a table read by two codes, ternary sums.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "ternary.h"

namespace quweit {

struct Gate {
  const int32_t* offsets;  // (2 units,), taken from the sums
  const int8_t* tables;    // (groups, C, C)
  size_t units, groups;
  int code_bits;
  int32_t step;  // of codes, below 2**15

  bool OneSmallTable() const { return groups == 1 && code_bits <= 4; }
};

// The code of a sum from 0 on: floor((sum + step / 2) / step) and half the codes, limited.
//
// The number that is rounded down is a quarter of 1 / step and more away from whole ones, further
// than the product with 1 / (2 step) is wrong within the limits.
QUWEIT_INLINE int32_t Code(int32_t sum, float step, float reciprocal, float low, float high) {
  const float code = std::floor((2.0f * static_cast<float>(sum) + (step + 0.5f)) * reciprocal);
  return static_cast<int32_t>((code < low ? low : code > high ? high : code) - low);
}

// Sums of `columns` x 16 first and as many second ones of one token -> addresses.
QUWEIT_INLINE void AddressesOf(const int32_t* first, const int32_t* second, int32_t token_sum,
                               const Gate& gate, size_t unit, size_t count, int32_t* addresses) {
  const float step = static_cast<float>(gate.step), reciprocal = 1.0f / (2.0f * step);
  const float half = static_cast<float>(1 << (gate.code_bits - 1));
  const int32_t *a = gate.offsets + unit, *b = gate.offsets + gate.units + unit;
  const int bits = gate.code_bits;
  for (size_t i = 0; i < count; ++i) {
    const int32_t row = Code(first[i] - token_sum - a[i], step, reciprocal, -half, half - 1);
    const int32_t column = Code(second[i] - token_sum - b[i], step, reciprocal, -half, half - 1);
    addresses[i] = (row << bits) + column;
  }
}

using Addresses = void (*)(const int32_t*, const int32_t*, int32_t, const Gate&, size_t, size_t,
                           int32_t*);
inline void PortableAddresses(const int32_t* first, const int32_t* second, int32_t token_sum,
                              const Gate& gate, size_t unit, size_t count, int32_t* addresses) {
  AddressesOf(first, second, token_sum, gate, unit, count, addresses);
}
inline void PortableTable(const int8_t* table, size_t, int8_t* values, size_t count) {
  for (size_t i = 0; i < count; ++i) values[i] = table[static_cast<uint8_t>(values[i])];
}

#if defined(__x86_64__)
QUWEIT_AVX2 inline void Avx2Addresses(const int32_t* first, const int32_t* second,
                                      int32_t token_sum, const Gate& gate, size_t unit,
                                      size_t count, int32_t* addresses) {
  AddressesOf(first, second, token_sum, gate, unit, count, addresses);
}
QUWEIT_AVX512 inline void Avx512Addresses(const int32_t* first, const int32_t* second,
                                          int32_t token_sum, const Gate& gate, size_t unit,
                                          size_t count, int32_t* addresses) {
  const __m512 step = _mm512_set1_ps(static_cast<float>(gate.step) + 0.5f);
  const __m512 reciprocal = _mm512_set1_ps(1.0f / (2.0f * static_cast<float>(gate.step)));
  const __m512i low = _mm512_set1_epi32(-(1 << (gate.code_bits - 1)));
  const __m512i high = _mm512_set1_epi32((1 << (gate.code_bits - 1)) - 1);
  const __m512i sums = _mm512_set1_epi32(token_sum);
  const int32_t* offsets[2] = {gate.offsets + unit, gate.offsets + gate.units + unit};
  const int32_t* from[2] = {first, second};
  for (size_t i = 0; i < count; i += kLanes) {
    __m512i codes[2];
    for (int side = 0; side < 2; ++side) {
      __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(from[side] + i), sums);
      sum = _mm512_sub_epi32(sum, _mm512_loadu_si512(offsets[side] + i));
      const __m512 twice = _mm512_cvtepi32_ps(_mm512_slli_epi32(sum, 1));
      const __m512i code =
          _mm512_cvt_roundps_epi32(_mm512_mul_ps(_mm512_add_ps(twice, step), reciprocal),
                                   _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
      codes[side] = _mm512_sub_epi32(_mm512_min_epi32(_mm512_max_epi32(code, low), high), low);
    }
    const __m512i row = _mm512_sll_epi32(codes[0], _mm_cvtsi32_si128(gate.code_bits));
    _mm512_storeu_si512(addresses + i, _mm512_add_epi32(row, codes[1]));
  }
}
// A table of at most 256 bytes lies in four registers.
QUWEIT_AVX512 inline void Avx512Table(const int8_t* table, size_t entries, int8_t* values,
                                      size_t count) {
  alignas(64) int8_t whole[256] = {};
  memcpy(whole, table, entries);
  const __m512i* parts = reinterpret_cast<const __m512i*>(whole);
  const __m512i low0 = parts[0], low1 = parts[1], high0 = parts[2], high1 = parts[3];
  for (size_t i = 0; i < count; i += 64) {
    const __m512i address = _mm512_loadu_si512(values + i);
    const __m512i low = _mm512_permutex2var_epi8(low0, address, low1);
    const __m512i high = _mm512_permutex2var_epi8(high0, address, high1);
    const __m512i read = _mm512_mask_blend_epi8(_mm512_movepi8_mask(address), low, high);
    _mm512_storeu_si512(values + i, read);
  }
}
#endif

// Entries of the units from `begin` to `end` (multiples of 16) of a block of tokens.
inline void ReadUnits(Level level, const Packed& mix, const Tokens& tokens, const Gate& gate,
                      size_t begin, size_t end, Tokens& read) {
  Addresses addresses_of = PortableAddresses;
  auto table_of = PortableTable;
#if defined(__x86_64__)
  if (level == kAvx2) addresses_of = Avx2Addresses;
  if (level == kAvx512) addresses_of = Avx512Addresses, table_of = Avx512Table;
#endif
  const size_t side = size_t{1} << gate.code_bits;
  int32_t sums[kMostTokens * kMostColumns * kLanes], addresses[kMostColumns * kLanes];
  for (size_t unit = begin; unit < end;) {
    const size_t other = unit + gate.units;
    const size_t most = std::min(std::min(mix.lanes - unit % mix.lanes, end - unit),
                                 mix.lanes - other % mix.lanes);
    const Entry& entry = WidestBlock(level, tokens.count, 2 * most / kLanes);
    const size_t count = entry.columns / 2 * kLanes;
    entry.block(mix.At(unit), mix.At(other), mix.lanes, tokens.x.data(), mix.rows, sums);
    for (int m = 0; m < tokens.count; ++m) {
      const int32_t* of_token = sums + m * entry.columns * kLanes;
      addresses_of(of_token, of_token + count, tokens.sums[m], gate, unit, count, addresses);
      for (size_t row = 0; row < count / kInputs; ++row) {
        int8_t* to = read.At(unit / kInputs + row, m);
        const int32_t* at = addresses + row * kInputs;
        if (gate.OneSmallTable()) {
          for (size_t i = 0; i < kInputs; ++i) to[i] = static_cast<int8_t>(at[i]);
          continue;
        }
        for (size_t i = 0; i < kInputs; ++i) {
          const size_t table = (unit + row * kInputs + i) / (gate.units / gate.groups);
          to[i] = gate.tables[table * side * side + at[i]];
        }
      }
    }
    unit += count;
  }
  if (gate.OneSmallTable()) {
    int8_t* values = read.At(begin / kInputs, 0);
    const size_t count = (end - begin) * tokens.count;
    // Whole registers: the last one may reach past this part, so it goes through a copy.
    const size_t whole = count / 64 * 64;
    table_of(gate.tables, side * side, values, whole);
    int8_t rest[64] = {};
    memcpy(rest, values + whole, count - whole);
    table_of(gate.tables, side * side, rest, 64);
    memcpy(values + whole, rest, count - whole);
  }
}

inline void SumOfEntries(size_t units, Tokens& read) {
  for (size_t row = 0; row < units / kInputs; ++row) {
    for (int m = 0; m < read.count; ++m) {
      const int8_t* values = read.At(row, m);
      int32_t sum = 0;
      for (size_t i = 0; i < kInputs; ++i) sum += values[i];
      read.sums[m] += sum;
    }
  }
}

// x (tokens, inputs) -> sums (tokens, outputs). The units are a multiple of 16.
inline void GluSums(xla::ffi::ThreadPool& pool, Level level, const int8_t* x, size_t tokens,
                    size_t inputs, const Packed& mix, const Gate& gate, const Packed& total,
                    size_t outputs, int32_t* out) {
  const std::vector<size_t> starts = BlockStarts(level, tokens);
  const size_t padded = (outputs + kLanes - 1) / kLanes * kLanes;
  const size_t threads = Threads(pool);
  const size_t parts = std::min(threads, std::max<size_t>(1, mix.Bytes() / kPieceBytes));
  const bool by_tokens = starts.size() >= threads || parts == 1;
  auto of_block = [&, padded](size_t piece, size_t parts) {
    static thread_local Tokens of_thread, read_of_thread;
    Tokens &block = of_thread, &read = read_of_thread;
    const size_t start = starts[piece], left = tokens - start;
    block.Read(x + start * inputs, left, inputs, BlockTokens(level, left), mix.rows);
    read.Resize(block.count, total.rows);
    InParallel(pool, parts, [&, parts](size_t part) {
      ReadUnits(level, mix, block, gate, PartStart(part, parts, gate.units, kLanes),
                PartStart(part + 1, parts, gate.units, kLanes), read);
    });
    SumOfEntries(gate.units, read);
    InParallel(pool, parts, [&, parts](size_t part) {
      SumOutputs(level, total, read, left, PartStart(part, parts, padded, kLanes),
                 PartStart(part + 1, parts, padded, kLanes), outputs, out + start * outputs);
    });
  };
  if (by_tokens) {
    InParallel(pool, starts.size(), [&](size_t piece) { of_block(piece, 1); });
  } else {
    for (size_t piece = 0; piece < starts.size(); ++piece) of_block(piece, parts);
  }
}

}  // namespace quweit
