// The LookupGLU as it is trained: forward, with what its gradients need, and backward. Ternary
// weights come as digits (`combinations.h`), tokens are last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "combinations.h"
#include "gradients.h"
#include "many.h"
#include "parallel.h"

namespace quweit {

// Of a float matrix (inputs, outputs): the digits of its ternary weights, sign(w) where |w| inverse
// is above a half, and of the transposed matrix.
QUWEIT_INLINE void MakeDigits(const float* weights, size_t inputs, size_t outputs, float inverse,
                              Digits* digits, Digits* transposed) {
  thread_local Scratch<uint8_t> codes_of, parts_of;
  const size_t rows = (inputs + 15) / 16, columns = (outputs + 15) / 16, width = 16 * columns;
  uint8_t *codes = codes_of.Get(16 * width), *parts = parts_of.Get(4 * width);
  memset(codes, 1, 16 * width);
  for (size_t row = 0; row < rows; ++row) {
    const size_t count = std::min<size_t>(16, inputs - row * 16);
    for (size_t i = 0; i < 16; ++i) {
      uint8_t* to = codes + i * width;
      if (i >= count) {
        memset(to, 1, outputs);
        continue;
      }
      const float* from = weights + (row * 16 + i) * outputs;
      for (size_t o = 0; o < outputs; ++o) {
        const float real = from[o] * inverse;
        to[o] = static_cast<uint8_t>(1 + (real > 0.5f) - (real < -0.5f));
      }
    }
    for (size_t b = 0; b < 4; ++b) {
      const uint8_t* c = codes + 4 * b * width;
      for (size_t o = 0; o < outputs; ++o) {
        parts[b * width + o] = static_cast<uint8_t>(
            c[o] + 3 * c[width + o] + 9 * c[2 * width + o] + 27 * c[3 * width + o]);
      }
    }
    Digits* to = digits + row * outputs * 4;
    for (size_t o = 0; o < outputs; ++o) {
      for (size_t b = 0; b < 4; ++b) to[4 * o + b] = static_cast<Digits>(64 * parts[b * width + o]);
    }
    for (size_t i = 0; i < count; ++i) {
      for (size_t column = 0; column < columns; ++column) {
        Digits* at = transposed + (column * inputs + row * 16 + i) * 4;
        uint32_t four[4];
        memcpy(four, codes + i * width + 16 * column, sizeof(four));
        // The highest byte of the product is the sum of the four, times 1, 3, 9 and 27.
        for (int b = 0; b < 4; ++b) at[b] = static_cast<Digits>((four[b] * 0x0103091Bu >> 24) * 64);
      }
    }
  }
}

inline void PortableDigits(const float* weights, size_t inputs, size_t outputs, float inverse,
                           Digits* digits, Digits* transposed) {
  MakeDigits(weights, inputs, outputs, inverse, digits, transposed);
}
#if defined(__x86_64__)
QUWEIT_AVX2 inline void Avx2Digits(const float* weights, size_t inputs, size_t outputs,
                                   float inverse, Digits* digits, Digits* transposed) {
  MakeDigits(weights, inputs, outputs, inverse, digits, transposed);
}
#endif

inline void DigitsOf(Level level, const float* weights, size_t inputs, size_t outputs,
                     float inverse, Digits* digits, Digits* transposed) {
  auto make = PortableDigits;
#if defined(__x86_64__)
  if (level != kPortable) make = Avx2Digits;
#endif
  make(weights, inputs, outputs, inverse, digits, transposed);
}

// An address tells which entry a unit read: its number in the table, and in the two bits above it
// whether the first and the second sum were inside their codes' range.

struct TrainedGate {
  const int32_t* offsets;  // (2 units,)
  const int8_t* tables;    // (groups, C, C)
  size_t units, groups;
  int code_bits;
  int32_t step;
};

// Of units, tokens lie by blocks of 16: [block][unit][16].
struct TrainedForward {
  const float* x;  // (tokens, inputs), whole numbers of an int8
  size_t tokens, inputs;
  Chosen mix, total;
  TrainedGate gate;
  float* out;           // (tokens, outputs)
  uint16_t* addresses;  // [blocks][units][16]; null: not kept
  int8_t* read;         // [blocks][units][16]
};

// The deployed form: x and sums are integers.
struct PackedForward {
  const int8_t* x;
  int32_t* out;  // (tokens, outputs)
  size_t outputs;
};

// The largest whole number that is not above x; one beyond the codes for what is beyond them.
QUWEIT_INLINE int32_t Floor(float x, int32_t half) {
  const float limit = static_cast<float>(half) + 0.5f;
  x = x < -limit ? -limit : x > limit ? limit : x;
  const int32_t whole = static_cast<int32_t>(x);
  return whole - (static_cast<float>(whole) > x);
}

// The addresses of a unit's tokens, of its sums. `glu.h` tells why the product is right.
QUWEIT_INLINE void UnitAddresses(const int32_t* first, const int32_t* second,
                                 const TrainedGate& gate, size_t unit, uint16_t* addresses) {
  const float step = static_cast<float>(gate.step) + 0.5f;
  const float reciprocal = 1.0f / (2.0f * static_cast<float>(gate.step));
  const int32_t half = 1 << (gate.code_bits - 1), bits = gate.code_bits;
  const int32_t a = gate.offsets[unit], b = gate.offsets[gate.units + unit];
  for (size_t t = 0; t < kWords; ++t) {
    const float x = (2.0f * static_cast<float>(first[t] - a) + step) * reciprocal;
    const float y = (2.0f * static_cast<float>(second[t] - b) + step) * reciprocal;
    const int32_t row = Floor(x, half), column = Floor(y, half);
    const int32_t r = std::min(std::max(row, -half), half - 1);
    const int32_t c = std::min(std::max(column, -half), half - 1);
    addresses[t] = static_cast<uint16_t>(((r + half) << bits) + c + half +
                                         ((r == row) << 2 * bits) +
                                         ((c == column) << (2 * bits + 1)));
  }
}

// (count, width) -> [width][tokens of a register], zeros past the end.
template <typename Number>
QUWEIT_INLINE void TokensLast(const float* from, size_t count, size_t width, size_t tokens,
                              Number* to) {
  memset(to, 0, width * tokens * sizeof(Number));
  for (size_t start = 0; start < width; start += 16) {
    const size_t end = std::min(width, start + 16);
    for (size_t t = 0; t < count; ++t) {
      for (size_t i = start; i < end; ++i) {
        to[i * tokens + t] = static_cast<Number>(from[t * width + i]);
      }
    }
  }
}

template <typename Number, typename Out>
QUWEIT_INLINE void TokensFirst(const Number* from, size_t count, size_t width, size_t tokens,
                               Out* to) {
  for (size_t start = 0; start < width; start += 16) {
    const size_t end = std::min(width, start + 16);
    for (size_t t = 0; t < count; ++t) {
      for (size_t i = start; i < end; ++i) {
        to[t * width + i] = static_cast<Out>(from[i * tokens + t]);
      }
    }
  }
}

template <size_t Bytes>
QUWEIT_INLINE void ForwardBlock(const TrainedForward& f, const PackedForward* packed,
                                size_t start) {
  thread_local Scratch<int16_t> x_of, sums_of, words_of, read_of;
  thread_local Scratch<int32_t> totals_of;
  const size_t units = f.gate.units, entries = size_t{1} << (2 * f.gate.code_bits);
  const size_t count = std::min(kWords, f.tokens - start);
  const size_t most = std::max(2 * units, f.total.outputs) * kWords;
  int16_t *x = x_of.Get(f.mix.rows * 16 * kWords), *sums = sums_of.Get(kRowSums / 2);
  int16_t *words = words_of.Get(most), *read = read_of.Get(f.total.rows * 16 * kWords);
  int32_t* totals = totals_of.Get(most);
  if (packed) {
    TurnTokens(packed->x + start * f.inputs, count, f.inputs, f.mix.rows, x);
  } else {
    TokensLast(f.x + start * f.inputs, count, f.inputs, kWords, x);
    memset(x + f.inputs * kWords, 0, (f.mix.rows * 16 - f.inputs) * kWords * sizeof(int16_t));
  }
  SumWords<Bytes>(x, f.mix, sums, words, totals);
  memset(read + units / 16 * 16 * kWords, 0,
         (f.total.rows * 16 - units / 16 * 16) * kWords * sizeof(int16_t));
  uint16_t* kept_addresses = f.addresses + start * units;
  int8_t* kept = f.read + start * units;
  for (size_t u = 0; u < units; ++u) {
    alignas(64) uint16_t addresses[kWords];
    UnitAddresses(totals + u * kWords, totals + (units + u) * kWords, f.gate, u, addresses);
    const int8_t* table = f.gate.tables + u / (units / f.gate.groups) * entries;
    int16_t* values = read + (packed ? Turned(u) : u) * kWords;
    for (size_t t = 0; t < kWords; ++t) {
      uint32_t entry = addresses[t] & (entries - 1);
      asm("" : "+r"(entry));  // gathers, which the compiler would use, are slower than single reads
      values[t] = table[entry];
    }
    for (size_t half = 0; half < count && !packed; half += kFloats) {
      const size_t at = half * units + u * kFloats;
      memcpy(kept_addresses + at, addresses + half, kFloats * sizeof(uint16_t));
      for (size_t t = 0; t < kFloats; ++t) kept[at + t] = static_cast<int8_t>(values[half + t]);
    }
  }
  SumWords<Bytes>(read, f.total, sums, words, totals);
  if (packed) {
    TokensFirst(totals, count, packed->outputs, kWords, packed->out + start * packed->outputs);
  } else {
    TokensFirst(totals, count, f.total.outputs, kWords, f.out + start * f.total.outputs);
  }
}

struct TrainedBackward {
  const float *gradient, *x;  // (tokens, outputs), (tokens, inputs)
  size_t tokens, outputs;
  const uint16_t* addresses;  // [blocks][units][16]
  const int8_t* read;         // [blocks][units][16]
  const float* slopes;        // (groups, addresses, 2)
  size_t units, groups;
  int code_bits;
  Chosen total, mix;              // of the transposed weights
  float mix_scale, total_scale;   // of their gradients
  float *to_x, *to_mix, *to_shift, *to_total;
  float* to_read;  // [blocks][units][16], or null
};

// to_sums: of this block, [2 units][16].
template <size_t Bytes>
QUWEIT_INLINE void BackwardBlock(const TrainedBackward& f, size_t start, float* to_sums) {
  thread_local Scratch<float> gradient_of, sums_of, read_of, both_of, x_of;
  const size_t count = std::min(kFloats, f.tokens - start);
  const size_t entries = size_t{1} << (2 * f.code_bits), units = f.units;
  float* gradient = gradient_of.Get(f.total.rows * 16 * kFloats);
  float *sums = sums_of.Get(kRowSums / 4), *read = read_of.Get(units * kFloats);
  float *both = both_of.Get(f.mix.rows * 16 * kFloats), *x = x_of.Get(f.mix.outputs * kFloats);
  TokensLast(f.gradient + start * f.outputs, count, f.outputs, kFloats, gradient);
  memset(gradient + f.outputs * kFloats, 0,
         (f.total.rows * 16 - f.outputs) * kFloats * sizeof(float));
  SumFloats<Bytes>(gradient, f.total, sums, read);
  memset(both + 2 * units * kFloats, 0, (f.mix.rows * 16 - 2 * units) * kFloats * sizeof(float));
  const uint16_t* addresses = f.addresses + start * units;
  for (size_t u = 0; u < units; ++u, addresses += kFloats) {
    const float* slopes = f.slopes + 8 * entries * (u / (units / f.groups));
    const float* of_unit = read + u * kFloats;
    float *first = both + u * kFloats, *second = both + (units + u) * kFloats;
    alignas(64) float pairs[2 * kFloats];
    for (size_t t = 0; t < kFloats; ++t) {
      memcpy(pairs + 2 * t, slopes + 2 * addresses[t], 2 * sizeof(float));
    }
    for (size_t t = 0; t < kFloats; ++t) {
      first[t] = of_unit[t] * pairs[2 * t];
      second[t] = of_unit[t] * pairs[2 * t + 1];
    }
  }
  memcpy(to_sums, both, 2 * units * kFloats * sizeof(float));
  if (f.to_read) memcpy(f.to_read + start * units, read, units * kFloats * sizeof(float));
  SumFloats<Bytes>(both, f.mix, sums, x);
  TokensFirst(x, count, f.mix.outputs, kFloats, f.to_x + start * f.mix.outputs);
}

inline void PortableForward(const TrainedForward& f, const PackedForward* packed,
                            size_t start) {
  ForwardBlock<16>(f, packed, start);
}
inline void PortableBackward(const TrainedBackward& f, size_t start, float* to_sums) {
  BackwardBlock<16>(f, start, to_sums);
}
#if defined(__x86_64__)
QUWEIT_AVX2 inline void Avx2Forward(const TrainedForward& f, const PackedForward* packed,
                                        size_t start) {
  ForwardBlock<32>(f, packed, start);
}
QUWEIT_AVX2 inline void Avx2Backward(const TrainedBackward& f, size_t start, float* to_sums) {
  BackwardBlock<32>(f, start, to_sums);
}
QUWEIT_AVX512 inline void Avx512Forward(const TrainedForward& f, const PackedForward* packed,
                                          size_t start) {
  ForwardBlock<64>(f, packed, start);
}
QUWEIT_AVX512 inline void Avx512Backward(const TrainedBackward& f, size_t start, float* to_sums) {
  BackwardBlock<64>(f, start, to_sums);
}
#endif

using Forward = void (*)(const TrainedForward&, const PackedForward*, size_t);

inline Forward ForwardOf(Level level) {
#if defined(__x86_64__)
  if (level == kAvx2) return Avx2Forward;
  if (level == kAvx512) return Avx512Forward;
#endif
  return PortableForward;
}

inline void GluForward(xla::ffi::ThreadPool& pool, Level level, const TrainedForward& f) {
  const Forward block = ForwardOf(level);
  InParallel(pool, (f.tokens + kWords - 1) / kWords,
             [&f, block](size_t piece) { block(f, nullptr, piece * kWords); });
}

constexpr size_t kMostWords = size_t{1} << 21;  // of weights, whose digits (16 MB) are held

// `GluSums` of many tokens.
inline void ManyGlu(xla::ffi::ThreadPool& pool, Level level, const int8_t* x, size_t tokens,
                    size_t inputs, const Packed& mix, const TrainedGate& gate,
                    const Packed& total, size_t outputs, int32_t* out) {
  static thread_local Scratch<Digits> mix_of, total_of;
  const size_t padded = (outputs + kLanes - 1) / kLanes * kLanes;
  Digits *of_mix = mix_of.Get(mix.rows * 2 * gate.units * 4);
  Digits *of_total = total_of.Get(total.rows * padded * 4);
  Unpack(mix, 0, 2 * gate.units, of_mix);
  Unpack(total, 0, padded, of_total);
  const TrainedForward f = {nullptr, tokens, inputs, {of_mix, mix.rows, 2 * gate.units},
                            {of_total, total.rows, padded}, gate, nullptr, nullptr, nullptr};
  const PackedForward packed = {x, out, outputs};
  const Forward block = ForwardOf(level);
  InParallel(pool, (tokens + kWords - 1) / kWords,
             [&f, &packed, block](size_t piece) { block(f, &packed, piece * kWords); });
}

constexpr size_t kTokensAtOnce = 1024;  // whose gradients to sums are held

inline void GluBackward(xla::ffi::ThreadPool& pool, Level level, const TrainedBackward& f) {
  auto block = PortableBackward;
#if defined(__x86_64__)
  if (level == kAvx2) block = Avx2Backward;
  if (level == kAvx512) block = Avx512Backward;
#endif
  static thread_local Scratch<float> to_sums_of;
  const size_t units = f.units, inputs = f.mix.outputs;
  float* to_sums = to_sums_of.Get(2 * units * std::min(kTokensAtOnce, f.tokens + kFloats));
  memset(f.to_mix, 0, 2 * units * inputs * sizeof(float));
  memset(f.to_shift, 0, 2 * units * sizeof(float));
  memset(f.to_total, 0, units * f.outputs * sizeof(float));
  for (size_t start = 0; start < f.tokens; start += kTokensAtOnce) {
    const size_t tokens = std::min(kTokensAtOnce, f.tokens - start);
    const size_t blocks = (tokens + kFloats - 1) / kFloats;
    InParallel(pool, blocks, [&f, block, start, to_sums](size_t piece) {
      block(f, start + piece * kFloats, to_sums + piece * 2 * f.units * kFloats);
    });
    WeightGradients(pool, level,
                    {tokens, 2 * units, inputs, f.x + start * inputs, f.mix_scale, f.to_mix, true,
                     f.to_shift},
                    static_cast<const float*>(to_sums));
    WeightGradients(pool, level,
                    {tokens, units, f.outputs, f.gradient + start * f.outputs, f.total_scale,
                     f.to_total, false, nullptr},
                    f.read + start * units);
  }
}

}  // namespace quweit
