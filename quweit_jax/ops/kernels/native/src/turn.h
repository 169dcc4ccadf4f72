// Matrices of numbers of 1, 2, 4 or 8 bytes, transposed by tiles.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "bits.h"
#include "parallel.h"

namespace quweit {

constexpr size_t kTurnTile = 64;  // rows and columns: as many pages as are found fast

// from (rows, columns) -> to (columns, rows): the rows from `begin` to `end`.
template <typename Number>
void TurnRows(const Number* from, size_t rows, size_t columns, size_t begin, size_t end,
              Number* to) {
  for (size_t first = 0; first < columns; first += kTurnTile) {
    const size_t last = std::min(columns, first + kTurnTile);
    for (size_t row = begin; row < end; row += 16) {
      const size_t height = std::min<size_t>(16, end - row);
      for (size_t column = first; column < last; column += 16) {
        const size_t width = std::min<size_t>(16, last - column);
        const Number* corner = from + row * columns + column;
        Number* turned = to + column * rows + row;
        if (height == 16 && width == 16) {
          if constexpr (sizeof(Number) == 1) {
            Transpose16(corner, columns, turned, rows);
          } else {
            for (size_t c = 0; c < 16; ++c) {
#pragma GCC unroll 16
              for (size_t r = 0; r < 16; ++r) turned[c * rows + r] = corner[r * columns + c];
            }
          }
          continue;
        }
        for (size_t c = 0; c < width; ++c) {
          for (size_t r = 0; r < height; ++r) turned[c * rows + r] = corner[r * columns + c];
        }
      }
    }
  }
}

template <typename Number>
void Turn(xla::ffi::ThreadPool& pool, const void* from, size_t rows, size_t columns, void* to) {
  const size_t pieces = (rows + kTurnTile - 1) / kTurnTile;
  InParallel(pool, pieces, [=](size_t piece) {
    const size_t begin = piece * kTurnTile;
    TurnRows(static_cast<const Number*>(from), rows, columns, begin,
             std::min(rows, begin + kTurnTile), static_cast<Number*>(to));
  });
}

}  // namespace quweit
