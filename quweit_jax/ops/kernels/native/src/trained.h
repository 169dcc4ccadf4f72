// The LookupGLU as it is trained: forward, with what its gradients need, and backward. Ternary
// weights come as digits (`combinations.h`), tokens are last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "combinations.h"
#include "parallel.h"

namespace quweit {

// Of a float matrix (inputs, outputs): the digits of its ternary weights, sign(w) where |w| inverse
// is above a half.
inline void DigitsOf(const float* weights, size_t inputs, size_t outputs, size_t input_stride,
                     size_t output_stride, float inverse, Digits* digits) {
  static const uint16_t power[4] = {64, 3 * 64, 9 * 64, 27 * 64};
  const size_t rows = (inputs + 15) / 16;
  const auto code = [inverse](float weight) {
    const float real = weight * inverse;
    return static_cast<uint16_t>(1 + (real > 0.5f) - (real < -0.5f));
  };
  for (size_t row = 0; row < rows; ++row) {
    Digits* to = digits + row * outputs * 4;
    for (size_t o = 0; o < outputs; ++o) {
      for (int b = 0; b < 4; ++b) to[4 * o + b] = 0;
    }
    if (output_stride == 1) {
      for (int i = 0; i < 16; ++i) {
        const size_t input = row * 16 + i;
        const float* from = weights + input * input_stride;
        for (size_t o = 0; o < outputs; ++o) {
          to[4 * o + i / 4] += power[i % 4] * (input < inputs ? code(from[o]) : 1);
        }
      }
    } else {
      for (size_t o = 0; o < outputs; ++o) {
        const float* from = weights + o * output_stride + row * 16;
        for (int i = 0; i < 16; ++i) {
          to[4 * o + i / 4] += power[i % 4] * (row * 16 + i < inputs ? code(from[i]) : 1);
        }
      }
    }
  }
}

// Which entry a unit read: its number in the table, and above it whether the first and the second
// sum were inside their codes' range.
constexpr int kFirstInside = 12, kSecondInside = 13;

struct TrainedGate {
  const int32_t* offsets;  // (2 units,)
  const int8_t* tables;    // (groups, C, C)
  size_t units, groups;
  int code_bits;
  int32_t step;
};

struct TrainedForward {
  const int8_t* x;  // (inputs, tokens)
  size_t tokens, inputs;
  Chosen mix, total;
  TrainedGate gate;
  float* out;           // (outputs, tokens)
  uint16_t* addresses;  // (units, tokens)
  int8_t* read;         // (units, tokens)
};

// The largest whole number that is not above x; one beyond the codes for what is beyond them.
QUWEIT_INLINE int32_t Floor(float x, int32_t half) {
  const float limit = static_cast<float>(half) + 0.5f;
  x = x < -limit ? -limit : x > limit ? limit : x;
  const int32_t whole = static_cast<int32_t>(x);
  return whole - (static_cast<float>(whole) > x);
}

// The addresses of a unit's tokens, of its sums. `glu.h` tells why the product is right.
QUWEIT_INLINE void UnitAddresses(const int32_t* first, const int32_t* second, const TrainedGate& gate,
                                 size_t unit, uint16_t* addresses) {
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
                                         ((r == row) << kFirstInside) +
                                         ((c == column) << kSecondInside));
  }
}

template <size_t Bytes>
QUWEIT_INLINE void ForwardBlock(const TrainedForward& f, size_t start) {
  thread_local Scratch<int16_t> x_of, sums_of, words_of, read_of;
  thread_local Scratch<int32_t> totals_of;
  const size_t units = f.gate.units, entries = size_t{1} << (2 * f.gate.code_bits);
  const size_t count = std::min(kWords, f.tokens - start);
  const size_t most = std::max(2 * units, f.total.outputs) * kWords;
  int16_t *x = x_of.Get(f.mix.rows * 16 * kWords), *sums = sums_of.Get(kRowSums / 2);
  int16_t *words = words_of.Get(most), *read = read_of.Get(f.total.rows * 16 * kWords);
  int32_t* totals = totals_of.Get(most);
  memset(x, 0, f.mix.rows * 16 * kWords * sizeof(int16_t));
  for (size_t i = 0; i < f.inputs; ++i) {
    const int8_t* from = f.x + i * f.tokens + start;
    for (size_t t = 0; t < count; ++t) x[i * kWords + t] = from[t];
  }
  SumWords<Bytes>(x, f.mix, sums, words, totals);
  memset(read + units * kWords, 0, (f.total.rows * 16 - units) * kWords * sizeof(int16_t));
  for (size_t u = 0; u < units; ++u) {
    alignas(64) uint16_t addresses[kWords];
    alignas(64) int8_t values[kWords];
    UnitAddresses(totals + u * kWords, totals + (units + u) * kWords, f.gate, u, addresses);
    const int8_t* table = f.gate.tables + u / (units / f.gate.groups) * entries;
    for (size_t t = 0; t < kWords; ++t) values[t] = table[addresses[t] & (entries - 1)];
    for (size_t t = 0; t < kWords; ++t) read[u * kWords + t] = values[t];
    memcpy(f.addresses + u * f.tokens + start, addresses, count * sizeof(uint16_t));
    memcpy(f.read + u * f.tokens + start, values, count);
  }
  SumWords<Bytes>(read, f.total, sums, words, totals);
  for (size_t o = 0; o < f.total.outputs; ++o) {
    float* to = f.out + o * f.tokens + start;
    for (size_t t = 0; t < count; ++t) to[t] = static_cast<float>(totals[o * kWords + t]);
  }
}

struct TrainedBackward {
  const float* gradient;  // (outputs, tokens)
  size_t tokens, outputs;
  const uint16_t* addresses;  // (units, tokens)
  const float* slopes;        // (groups, C, C, 2)
  size_t units, groups;
  int code_bits;
  Chosen total, mix;  // of the transposed weights
  float* to_sums;     // (2 units, tokens)
  float* to_x;        // (inputs, tokens)
  float* to_read;     // (units, tokens), or null
};

template <size_t Bytes>
QUWEIT_INLINE void BackwardBlock(const TrainedBackward& f, size_t start) {
  thread_local Scratch<float> gradient_of, sums_of, read_of, both_of, x_of;
  const size_t count = std::min(kFloats, f.tokens - start);
  const size_t entries = size_t{1} << (2 * f.code_bits), units = f.units;
  float* gradient = gradient_of.Get(f.total.rows * 16 * kFloats);
  float *sums = sums_of.Get(kRowSums / 4), *read = read_of.Get(units * kFloats);
  float *both = both_of.Get(f.mix.rows * 16 * kFloats), *x = x_of.Get(f.mix.outputs * kFloats);
  memset(gradient, 0, f.total.rows * 16 * kFloats * sizeof(float));
  for (size_t o = 0; o < f.outputs; ++o) {
    memcpy(gradient + o * kFloats, f.gradient + o * f.tokens + start, count * sizeof(float));
  }
  SumFloats<Bytes>(gradient, f.total, sums, read);
  memset(both + 2 * units * kFloats, 0, (f.mix.rows * 16 - 2 * units) * kFloats * sizeof(float));
  for (size_t u = 0; u < units; ++u) {
    const float* slopes = f.slopes + 2 * entries * (u / (units / f.groups));
    const uint16_t* addresses = f.addresses + u * f.tokens + start;
    const float* of_unit = read + u * kFloats;
    float *first = both + u * kFloats, *second = both + (units + u) * kFloats;
    memset(first, 0, kFloats * sizeof(float));
    memset(second, 0, kFloats * sizeof(float));
    for (size_t t = 0; t < count; ++t) {
      const uint32_t address = addresses[t];
      const float* slope = slopes + 2 * (address & (entries - 1));
      first[t] = address >> kFirstInside & 1 ? of_unit[t] * slope[0] : 0.0f;
      second[t] = address >> kSecondInside & 1 ? of_unit[t] * slope[1] : 0.0f;
    }
    memcpy(f.to_sums + u * f.tokens + start, first, count * sizeof(float));
    memcpy(f.to_sums + (units + u) * f.tokens + start, second, count * sizeof(float));
    if (f.to_read) memcpy(f.to_read + u * f.tokens + start, of_unit, count * sizeof(float));
  }
  SumFloats<Bytes>(both, f.mix, sums, x);
  for (size_t i = 0; i < f.mix.outputs; ++i) {
    memcpy(f.to_x + i * f.tokens + start, x + i * kFloats, count * sizeof(float));
  }
}

inline void PortableForward(const TrainedForward& f, size_t start) { ForwardBlock<16>(f, start); }
inline void PortableBackward(const TrainedBackward& f, size_t start) {
  BackwardBlock<16>(f, start);
}
#if defined(__x86_64__)
QUWEIT_AVX2 inline void Avx2Forward(const TrainedForward& f, size_t start) {
  ForwardBlock<32>(f, start);
}
QUWEIT_AVX2 inline void Avx2Backward(const TrainedBackward& f, size_t start) {
  BackwardBlock<32>(f, start);
}
QUWEIT_AVX512 inline void Avx512Forward(const TrainedForward& f, size_t start) {
  ForwardBlock<64>(f, start);
}
QUWEIT_AVX512 inline void Avx512Backward(const TrainedBackward& f, size_t start) {
  BackwardBlock<64>(f, start);
}
#endif

inline void GluForward(xla::ffi::ThreadPool& pool, Level level, const TrainedForward& f) {
  auto block = PortableForward;
#if defined(__x86_64__)
  if (level == kAvx2) block = Avx2Forward;
  if (level == kAvx512) block = Avx512Forward;
#endif
  InParallel(pool, (f.tokens + kWords - 1) / kWords,
             [&f, block](size_t piece) { block(f, piece * kWords); });
}

inline void GluBackward(xla::ffi::ThreadPool& pool, Level level, const TrainedBackward& f) {
  auto block = PortableBackward;
#if defined(__x86_64__)
  if (level == kAvx2) block = Avx2Backward;
  if (level == kAvx512) block = Avx512Backward;
#endif
  InParallel(pool, (f.tokens + kFloats - 1) / kFloats,
             [&f, block](size_t piece) { block(f, piece * kFloats); });
}

}  // namespace quweit
