// int8 times packed ternary matrices for many tokens: exact int32 sums by tables of combinations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "combinations.h"
#include "parallel.h"
#include "ternary.h"

namespace quweit {

constexpr size_t kManyTokens = 24;      // from which on it is worth it
constexpr size_t kTileOutputs = 1024;   // whose sums a second cache holds
constexpr size_t kTokensOfPass = 1024;  // that are turned at once

// The digits of packed weights, of the outputs from `begin` to `end` (multiples of 16): a byte of a
// word has the weights of inputs 16 row + b + (0, 4, 8, 12).
QUWEIT_INLINE void Unpack(const Packed& weights, size_t begin, size_t end, Digits* digits) {
  const size_t width = end - begin;
  for (size_t o = begin; o < end; o += kLanes) {
    const uint32_t* words = weights.At(o);
    for (size_t row = 0; row < weights.rows; ++row, words += weights.lanes) {
      alignas(64) uint32_t numbers[kLanes];
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t pairs = (words[lane] & 0x33333333u) + 3 * (words[lane] >> 2 & 0x33333333u);
        numbers[lane] = (pairs & 0x0F0F0F0Fu) + 9 * (pairs >> 4 & 0x0F0F0F0Fu);
      }
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(numbers);
      Digits* to = digits + (row * width + (o - begin)) * 4;
      for (size_t i = 0; i < 4 * kLanes; ++i) to[i] = static_cast<Digits>(64 * bytes[i]);
    }
  }
}

// Where input i of 16 lies among them, so that a byte's inputs are neighbors.
inline size_t Turned(size_t i) { return i / 16 * 16 + i % 4 * 4 + i % 16 / 4; }

// x (count, inputs) -> [16 rows][32], zeros past the end.
inline void TurnTokens(const int8_t* x, size_t count, size_t inputs, size_t rows, int16_t* to) {
  memset(to, 0, rows * 16 * kWords * sizeof(int16_t));
  for (size_t start = 0; start < inputs; start += 16) {
    const size_t end = std::min(inputs, start + 16);
    for (size_t t = 0; t < count; ++t) {
      for (size_t i = start; i < end; ++i) to[Turned(i) * kWords + t] = x[t * inputs + i];
    }
  }
}

struct ManyTokens {
  const int16_t* x;  // [blocks][16 rows][32]
  size_t tokens;
  Packed weights;
  size_t outputs;
  int32_t* out;  // (tokens, outputs)
};

// The outputs from `begin` to `end`.
template <size_t Bytes>
QUWEIT_INLINE void ManyOutputs(const ManyTokens& m, size_t begin, size_t end) {
  thread_local Scratch<Digits> digits_of;
  thread_local Scratch<int16_t> sums_of, words_of;
  thread_local Scratch<int32_t> totals_of;
  const size_t width = end - begin, rows = m.weights.rows;
  Digits* digits = digits_of.Get(rows * width * 4);
  Unpack(m.weights, begin, end, digits);
  const Chosen chosen = {digits, rows, width};
  int16_t *sums = sums_of.Get(kRowSums / 2), *words = words_of.Get(width * kWords);
  int32_t* totals = totals_of.Get(width * kWords);
  for (size_t start = 0; start < m.tokens; start += kWords) {
    SumWords<Bytes>(m.x + start * rows * 16, chosen, sums, words, totals);
    const size_t count = std::min(kWords, m.tokens - start);
    const size_t most = std::min(end, m.outputs);
    for (size_t o = begin; o < most; o += 16) {
      const size_t last = std::min(most, o + 16);
      for (size_t t = 0; t < count; ++t) {
        int32_t* to = m.out + (start + t) * m.outputs;
        for (size_t i = o; i < last; ++i) to[i] = totals[(i - begin) * kWords + t];
      }
    }
  }
}

inline void PortableOutputs(const ManyTokens& m, size_t begin, size_t end) {
  ManyOutputs<16>(m, begin, end);
}
#if defined(__x86_64__)
QUWEIT_AVX2 inline void Avx2Outputs(const ManyTokens& m, size_t begin, size_t end) {
  ManyOutputs<32>(m, begin, end);
}
QUWEIT_AVX512 inline void Avx512Outputs(const ManyTokens& m, size_t begin, size_t end) {
  ManyOutputs<64>(m, begin, end);
}
#endif

inline void ManySums(xla::ffi::ThreadPool& pool, Level level, const int8_t* x, size_t tokens,
                     size_t inputs, const Packed& weights, size_t outputs, int32_t* out) {
  static thread_local Scratch<int16_t> turned_of;
  auto part = PortableOutputs;
#if defined(__x86_64__)
  if (level == kAvx2) part = Avx2Outputs;
  if (level == kAvx512) part = Avx512Outputs;
#endif
  const size_t padded = (outputs + kLanes - 1) / kLanes * kLanes, rows = weights.rows;
  const size_t threads = Threads(pool);
  size_t parts = (padded + kTileOutputs - 1) / kTileOutputs;
  if (threads > 1) parts = std::max(parts, std::min(threads, (padded + 127) / 128));
  for (size_t start = 0; start < tokens; start += kTokensOfPass) {
    const size_t count = std::min(kTokensOfPass, tokens - start);
    const size_t blocks = (count + kWords - 1) / kWords, size = rows * 16 * kWords;
    int16_t* turned = turned_of.Get(blocks * size);
    const int8_t* from = x + start * inputs;
    InParallel(pool, blocks, [=](size_t block) {
      const size_t first = block * kWords;
      TurnTokens(from + first * inputs, std::min(kWords, count - first), inputs, rows,
                 turned + block * size);
    });
    const ManyTokens many = {turned, count, weights, outputs, out + start * outputs};
    InParallel(pool, parts, [&many, part, parts, padded](size_t i) {
      part(many, PartStart(i, parts, padded, kLanes), PartStart(i + 1, parts, padded, kLanes));
    });
  }
}

}  // namespace quweit
