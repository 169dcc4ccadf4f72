// Gradients of weights: products of values that lie by blocks of 16 tokens, [block][row][16], with
// float32 rows (tokens, columns), summed over tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "combinations.h"
#include "parallel.h"

namespace quweit {

constexpr int kTileRows = 6;  // whose sums, two registers each, fit 16 registers

constexpr size_t kTileTokens = 256;  // whose values of two registers' columns a first cache holds
constexpr size_t kBlockRows = 96;    // whose values of as many tokens a second one holds

// Adds to 6 rows of sums: left [token][6], right [token][columns of two registers], out of as many
// columns in rows of `stride`.
template <size_t Bytes>
QUWEIT_INLINE void Tile(const float* left, const float* right, size_t tokens, float* out,
                        size_t stride) {
  using Vector = typename Register<float, Bytes>::Vector;
  constexpr size_t lanes = Bytes / sizeof(float);
  const Vector* columns = reinterpret_cast<const Vector*>(right);
  Vector total[kTileRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
    total[r][0] = *reinterpret_cast<const Vector*>(out + r * stride);
    total[r][1] = *reinterpret_cast<const Vector*>(out + r * stride + lanes);
  }
  for (size_t t = 0; t < tokens; ++t, columns += 2, left += kTileRows) {
    const Vector a = columns[0], b = columns[1];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      total[r][0] += a * left[r];
      total[r][1] += b * left[r];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
    *reinterpret_cast<Vector*>(out + r * stride) = total[r][0];
    *reinterpret_cast<Vector*>(out + r * stride + lanes) = total[r][1];
  }
}

// What is added to `out`.
struct WeightGradient {
  size_t tokens, rows, columns;
  const float* right;  // (tokens, columns)
  float scale;
  float* out;  // (rows, columns), or (columns, rows) where `transposed`
  bool transposed;
  float* row_sums;  // (rows,), from which the rows' values are taken; or null
};

// Of the rows from `begin` to `end`; left: [block][rows][16] of float or int8.
template <size_t Bytes, typename Number>
QUWEIT_INLINE void GradientRows(const WeightGradient& f, const Number* left, const float* panels,
                                size_t begin, size_t end) {
  constexpr size_t width = 2 * Bytes / sizeof(float);
  const size_t stride = (f.columns + width - 1) / width * width;
  thread_local Scratch<float> left_of, out_of;
  float *packed = left_of.Get(kBlockRows * kTileTokens), *out = out_of.Get(kBlockRows * stride);
  for (size_t first = begin; first < end; first += kBlockRows) {
    const size_t rows = std::min(kBlockRows, end - first);
    memset(out, 0, (rows + kTileRows - 1) / kTileRows * kTileRows * stride * sizeof(float));
    for (size_t start = 0; start < f.tokens; start += kTileTokens) {
      const size_t tokens = std::min(kTileTokens, f.tokens - start);
      for (size_t row = 0; row < rows; ++row) {
        float sums[kFloats] = {};
        float* to = packed + row / kTileRows * kTileRows * tokens + row % kTileRows;
        for (size_t t = 0; t < tokens; t += kFloats) {
          const Number* from = left + ((start + t) / kFloats * f.rows + first + row) * kFloats;
          const size_t most = std::min(kFloats, tokens - t);
          for (size_t i = 0; i < most; ++i) to[(t + i) * kTileRows] = static_cast<float>(from[i]);
          for (size_t i = 0; i < most; ++i) sums[i] += static_cast<float>(from[i]);
        }
        if (f.row_sums) {
          float total = 0;
          for (size_t i = 0; i < kFloats; ++i) total += sums[i];
          f.row_sums[first + row] -= total;
        }
      }
      for (size_t column = 0; column < f.columns; column += width) {
        const float* panel = panels + column * f.tokens + start * width;
        for (size_t row = 0; row < rows; row += kTileRows) {
          Tile<Bytes>(packed + row * tokens, panel, tokens, out + row * stride + column, stride);
        }
      }
    }
    const size_t next_row = f.transposed ? 1 : f.columns, next_column = f.transposed ? f.rows : 1;
    float* to = f.out + first * next_row;
    // 8 columns at a time: a cache holds that many lines whatever lies between them.
    for (size_t start = 0; start < f.columns; start += 8) {
      const size_t most = std::min(f.columns, start + 8);
      for (size_t row = 0; row < rows; ++row) {
        for (size_t c = start; c < most; ++c) {
          to[row * next_row + c * next_column] += out[row * stride + c] * f.scale;
        }
      }
    }
  }
}

// right as [columns / width][token][width], with zeros past the end.
inline void Panels(const WeightGradient& f, size_t width, float* panels) {
  for (size_t column = 0; column < f.columns; column += width) {
    const size_t most = std::min(width, f.columns - column);
    float* to = panels + column * f.tokens;
    for (size_t t = 0; t < f.tokens; ++t, to += width) {
      memcpy(to, f.right + t * f.columns + column, most * sizeof(float));
      memset(to + most, 0, (width - most) * sizeof(float));
    }
  }
}

template <typename Number>
using GradientPart = void (*)(const WeightGradient&, const Number*, const float*, size_t, size_t);

template <typename Number>
void PortableGradient(const WeightGradient& f, const Number* left, const float* panels,
                      size_t begin, size_t end) {
  GradientRows<16>(f, left, panels, begin, end);
}
#if defined(__x86_64__)
template <typename Number>
QUWEIT_AVX2 void Avx2Gradient(const WeightGradient& f, const Number* left, const float* panels,
                              size_t begin, size_t end) {
  GradientRows<32>(f, left, panels, begin, end);
}
template <typename Number>
QUWEIT_AVX512 void Avx512Gradient(const WeightGradient& f, const Number* left, const float* panels,
                                  size_t begin, size_t end) {
  GradientRows<64>(f, left, panels, begin, end);
}
#endif

template <typename Number>
void WeightGradients(xla::ffi::ThreadPool& pool, Level level, const WeightGradient& f,
                     const Number* left) {
  static thread_local Scratch<float> panels_of;
  GradientPart<Number> part = PortableGradient<Number>;
  size_t bytes = 16;
#if defined(__x86_64__)
  if (level == kAvx2) part = Avx2Gradient<Number>, bytes = 32;
  if (level == kAvx512) part = Avx512Gradient<Number>, bytes = 64;
#endif
  const size_t width = 2 * bytes / sizeof(float);
  float* panels = panels_of.Get((f.columns + width - 1) / width * width * f.tokens);
  Panels(f, width, panels);
  const size_t parts = std::max<size_t>(1, std::min(4 * Threads(pool), f.rows / 48));
  InParallel(pool, parts, [&f, part, left, panels, parts](size_t i) {
    part(f, left, panels, PartStart(i, parts, f.rows, kTileRows),
         PartStart(i + 1, parts, f.rows, kTileRows));
  });
}

}  // namespace quweit
