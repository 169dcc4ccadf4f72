// int8 times packed ternary matrices: exact int32 sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "parallel.h"

namespace quweit {

// uint32 [tiles][rows][lanes], `blocks.h` tells what is in a word; tile t has the outputs from
// t * lanes on.
struct Packed {
  const uint32_t* words;
  size_t tiles, rows, lanes;

  size_t Outputs() const { return tiles * lanes; }
  const uint32_t* At(size_t output) const {
    return words + output / lanes * rows * lanes + output % lanes;
  }
  size_t Bytes() const { return 4 * tiles * rows * lanes; }
};

// The tokens of one block, as `Block` wants them, and the sum of each.
struct Tokens {
  int count;               // of the block; those past the end are 0
  std::vector<int8_t> x;   // [row][count][16]
  std::vector<int32_t> sums;

  void Resize(int tokens, size_t rows) {
    count = tokens;
    x.assign(rows * tokens * kInputs + 64, 0);  // whole registers may be read and written
    sums.assign(tokens, 0);
  }
  int8_t* At(size_t row, int token) { return x.data() + (row * count + token) * kInputs; }

  // Reads `left` tokens, or fewer where the block is smaller, of `inputs` values.
  void Read(const int8_t* from, size_t left, size_t inputs, int tokens, size_t rows) {
    Resize(tokens, rows);
    for (size_t m = 0; m < left && m < static_cast<size_t>(tokens); ++m) {
      const int8_t* values = from + m * inputs;
      for (size_t i = 0; i < inputs; i += kInputs) {
        memcpy(At(i / kInputs, static_cast<int>(m)), values + i, std::min(kInputs, inputs - i));
      }
      int32_t sum = 0;
      for (size_t i = 0; i < inputs; ++i) sum += values[i];
      sums[m] = sum;
    }
  }
};

// Where the blocks of tokens begin.
inline std::vector<size_t> BlockStarts(Level level, size_t tokens) {
  std::vector<size_t> starts;
  for (size_t at = 0; at < tokens; at += BlockTokens(level, tokens - at)) starts.push_back(at);
  return starts;
}

// The outputs from `begin` to `end` (multiples of 16 but for the last) of a block's tokens, of
// which `left` are to be written; out has `outputs` in a row.
inline void SumOutputs(Level level, const Packed& weights, const Tokens& tokens, size_t left,
                       size_t begin, size_t end, size_t outputs, int32_t* out) {
  int32_t sums[kMostTokens * kMostColumns * kLanes];
  for (size_t o = begin; o < end;) {
    const size_t lane = o % weights.lanes;
    const size_t most = std::min(weights.lanes - lane, (end - o + kLanes - 1) / kLanes * kLanes);
    const Entry& entry = WidestBlock(level, tokens.count, most / kLanes);
    const size_t width = entry.columns * kLanes;
    const uint32_t* words = weights.At(o);
    entry.block(words, words + (entry.columns + 1) / 2 * kLanes, weights.lanes, tokens.x.data(),
                weights.rows, sums);
    for (size_t m = 0; m < left && m < static_cast<size_t>(tokens.count); ++m) {
      int32_t* to = out + m * outputs + o;
      const size_t count = std::min(width, outputs - o);
      for (size_t i = 0; i < count; ++i) to[i] = sums[m * width + i] - tokens.sums[m];
    }
    o += width;
  }
}

constexpr size_t kPieceBytes = 1 << 16;  // of weights, that are worth another thread

// x (tokens, inputs) times weights into out (tokens, outputs).
inline void TernarySums(xla::ffi::ThreadPool& pool, Level level, const int8_t* x, size_t tokens,
                        size_t inputs, const Packed& weights, size_t outputs, int32_t* out) {
  const std::vector<size_t> starts = BlockStarts(level, tokens);
  size_t parts = 1;
  if (starts.size() < 2 * Threads(pool) && !starts.empty()) {
    parts = std::min(2 * Threads(pool) / starts.size(), weights.Bytes() / kPieceBytes);
    parts = Threads(pool) == 1 ? 1 : std::max<size_t>(parts, 1);
  }
  const size_t padded = (outputs + kLanes - 1) / kLanes * kLanes;
  InParallel(pool, starts.size() * parts, [&, parts, padded](size_t piece) {
    thread_local Tokens block;
    const size_t start = starts[piece / parts], part = piece % parts;
    block.Read(x + start * inputs, tokens - start, inputs, BlockTokens(level, tokens - start),
               weights.rows);
    const size_t step = std::min<size_t>(weights.lanes, kMostColumns * kLanes);
    SumOutputs(level, weights, block, tokens - start, PartStart(part, parts, padded, step),
               PartStart(part + 1, parts, padded, step), outputs, out + start * outputs);
  });
}

}  // namespace quweit
