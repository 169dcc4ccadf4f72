// Ternary sums of many tokens, four weights an addition: of every four inputs all 81 sums that four
// ternary weights can make are made once (of 64 bytes of tokens at a time), and each output adds
// the one that its weights ask for (Arlazarov, Dinic, Kronrod & Faradzhev, 1970).
//
// Tokens are last here: values of an input, and of an output, lie next to one another.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "blocks.h"
#include "parallel.h"
#include "ternary.h"

namespace quweit {

constexpr size_t kWords = 32;   // tokens of a register of int16
constexpr size_t kFloats = 16;  // and of one of float32
constexpr size_t kSums = 81;    // of four ternary weights
// Rows of 16 inputs of int8 whose sums fit int16.
constexpr size_t kRowsOfWords = 15;

// A register of `Bytes`, as wide as the processor's, so that the compiler keeps it in one.
template <typename Number, size_t Bytes>
struct Register {
  typedef Number Vector __attribute__((vector_size(Bytes), aligned(Bytes), may_alias));
  static constexpr size_t kParts = 64 / Bytes;
};

// [row][output][4]: which of the sums of inputs 16 row + 4 b + (0 to 3) an output adds, times 64,
// for b from 0 to 3: the weights' codes 0, 1, 2 as the digits of a number, the first the lowest.
using Digits = uint16_t;

// The sums of one row: x [16][64 bytes of tokens] -> sums [4][81].
template <typename Number, size_t Bytes>
QUWEIT_INLINE void Combine(const Number* x, Number* sums) {
  using Vector = typename Register<Number, Bytes>::Vector;
  constexpr size_t parts = Register<Number, Bytes>::kParts;
  const Vector zero = {};
  for (size_t b = 0; b < 4 * parts; ++b) {
    const Vector* input = reinterpret_cast<const Vector*>(x) + b / parts * 4 * parts + b % parts;
    Vector* to = reinterpret_cast<Vector*>(sums) + b / parts * kSums * parts + b % parts;
    const Vector x0 = input[0], x1 = input[parts], x2 = input[2 * parts], x3 = input[3 * parts];
    const Vector low[9] = {-x0 - x1, -x1, x0 - x1, -x0, zero, x0, x1 - x0, x1, x0 + x1};
    const Vector high[9] = {-x2 - x3, -x3, x2 - x3, -x2, zero, x2, x3 - x2, x3, x2 + x3};
#pragma GCC unroll 1
    for (int h = 0; h < 9; ++h, to += 9 * parts) {
      const Vector add = high[h];
#pragma GCC unroll 9
      for (int l = 0; l < 9; ++l) to[l * parts] = add + low[l];
    }
  }
}

// Adds one row's sums to `outputs` totals [output][tokens].
template <typename Number, size_t Bytes>
QUWEIT_INLINE void AddChosen(const Number* sums, const Digits* digits, size_t outputs,
                             Number* totals) {
  using Vector = typename Register<Number, Bytes>::Vector;
  constexpr size_t parts = Register<Number, Bytes>::kParts;
  const char* from = reinterpret_cast<const char*>(sums);
  Vector* to = reinterpret_cast<Vector*>(totals);
  for (size_t o = 0; o < outputs; ++o, digits += 4, to += parts) {
    const Vector* chosen[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
      chosen[b] = reinterpret_cast<const Vector*>(from + b * kSums * 64 + digits[b]);
    }
#pragma GCC unroll 4
    for (size_t p = 0; p < parts; ++p) {
      to[p] = (to[p] + chosen[0][p]) + (chosen[1][p] + (chosen[2][p] + chosen[3][p]));
    }
  }
}

// Memory that a thread keeps, of whole lines of a cache.
template <typename Number>
class Scratch {
 public:
  ~Scratch() { free(data_); }
  // Room for `count`, whose values are undefined.
  Number* Get(size_t count) {
    if (count > size_) {
      free(data_);
      size_ = (count * sizeof(Number) + 63) / 64 * 64 / sizeof(Number);
      data_ = static_cast<Number*>(aligned_alloc(64, size_ * sizeof(Number)));
      if (data_ == nullptr) size_ = 0, throw std::bad_alloc();
    }
    return data_;
  }

 private:
  Number* data_ = nullptr;
  size_t size_ = 0;
};

// Digits [rows][outputs][4] of weights whose inputs are 16 a row.
struct Chosen {
  const Digits* digits;
  size_t rows, outputs;
};

constexpr size_t kRowSums = 4 * kSums * 64;  // bytes of a row's sums

// x [16 rows][32] -> totals [outputs][32]; words: room for as many.
template <size_t Bytes>
QUWEIT_INLINE void SumWords(const int16_t* x, const Chosen& weights, int16_t* sums, int16_t* words,
                            int32_t* totals) {
  const size_t count = weights.outputs * kWords;
  memset(totals, 0, count * sizeof(int32_t));
  for (size_t row = 0; row < weights.rows;) {
    const size_t end = std::min(weights.rows, row + kRowsOfWords);
    memset(words, 0, count * sizeof(int16_t));
    for (; row < end; ++row) {
      Combine<int16_t, Bytes>(x + row * 16 * kWords, sums);
      AddChosen<int16_t, Bytes>(sums, weights.digits + row * weights.outputs * 4, weights.outputs,
                                words);
    }
    for (size_t i = 0; i < count; ++i) totals[i] += words[i];
  }
}

// x [16 rows][16] -> totals [outputs][16].
template <size_t Bytes>
QUWEIT_INLINE void SumFloats(const float* x, const Chosen& weights, float* sums, float* totals) {
  memset(totals, 0, weights.outputs * kFloats * sizeof(float));
  for (size_t row = 0; row < weights.rows; ++row) {
    Combine<float, Bytes>(x + row * 16 * kFloats, sums);
    AddChosen<float, Bytes>(sums, weights.digits + row * weights.outputs * 4, weights.outputs,
                            totals);
  }
}

}  // namespace quweit
