// The innermost loops: codes 0, 1, 2 of a few tokens' and outputs' ternary weights times int8.
//
// A word [row, lane] holds the weights of 16 inputs for one output: that of input 16 row + 4 j + b
// in its bits 8 b + 2 j and 8 b + 2 j + 1. So `(word >> 2 j) & 0x03030303` are four inputs that are
// neighbors in x, which is what a multiply-accumulate of four bytes takes; and one vector register
// is one word each of as many outputs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define QUWEIT_AVX2 __attribute__((target("arch=x86-64-v3")))
#define QUWEIT_AVX512 __attribute__((target("arch=x86-64-v4,avx512vnni,avx512vbmi")))
#endif
#define QUWEIT_INLINE static inline __attribute__((always_inline))

namespace quweit {

constexpr size_t kLanes = 16;   // outputs of a column: one AVX-512 register of words
constexpr size_t kInputs = 16;  // of a word

enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Sums of M tokens and N columns into out[m][n][lane]. The first half of the columns (and the
// middle one) lie at `first`, the others at `second`, next to one another; `stride` words from row
// to row. x: [row][m][16 inputs].
using Block = void (*)(const uint32_t* first, const uint32_t* second, size_t stride,
                       const int8_t* x, size_t rows, int32_t* out);

template <int N>
QUWEIT_INLINE const uint32_t* Column(const uint32_t* first, const uint32_t* second, int n) {
  constexpr int half = (N + 1) / 2;
  return n < half ? first + n * kLanes : second + (n - half) * kLanes;
}

template <int M, int N>
void PortableBlock(const uint32_t* first, const uint32_t* second, size_t stride, const int8_t* x,
                   size_t rows, int32_t* out) {
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      const uint32_t* words = Column<N>(first, second, n);
      int32_t total[kLanes] = {};
      for (size_t row = 0; row < rows; ++row, words += stride) {
        const int8_t* inputs = x + (row * M + m) * kInputs;
        for (int i = 0; i < 16; ++i) {
          const int shift = 8 * (i % 4) + 2 * (i / 4);
          const int32_t input = inputs[i];
          for (size_t lane = 0; lane < kLanes; ++lane) {
            total[lane] += input * static_cast<int32_t>((words[lane] >> shift) & 3);
          }
        }
      }
      memcpy(out + (m * N + n) * kLanes, total, sizeof(total));
    }
  }
}

#if defined(__x86_64__)

QUWEIT_INLINE int32_t FourBytes(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, sizeof(four));
  return four;
}

// Sums of pairs of products fit int16 over a row: 4 x 2 x 2 x 128 = 2048.
template <int M, int N>
QUWEIT_AVX2 void Avx2Block(const uint32_t* first, const uint32_t* second, size_t stride,
                           const int8_t* x, size_t rows, int32_t* out) {
  constexpr int kAtOnce = M * 2 >= 8 ? 1 : 8 / (2 * M) < N ? 8 / (2 * M) : N;  // columns
  const __m256i mask = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  for (int start = 0; start < N; start += kAtOnce) {
    __m256i total[M][2 * kAtOnce];
    for (int m = 0; m < M; ++m) {
      for (int h = 0; h < 2 * kAtOnce; ++h) total[m][h] = _mm256_setzero_si256();
    }
    for (size_t row = 0; row < rows; ++row) {
      for (int h = 0; h < 2 * kAtOnce; ++h) {
        const uint32_t* from = Column<N>(first, second, start + h / 2) + row * stride + h % 2 * 8;
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        __m256i codes[4];
        codes[0] = _mm256_and_si256(words, mask);
        codes[1] = _mm256_and_si256(_mm256_srli_epi32(words, 2), mask);
        codes[2] = _mm256_and_si256(_mm256_srli_epi32(words, 4), mask);
        codes[3] = _mm256_and_si256(_mm256_srli_epi32(words, 6), mask);
        for (int m = 0; m < M; ++m) {
          const int8_t* inputs = x + (row * M + m) * kInputs;
          __m256i pairs[4];
          for (int j = 0; j < 4; ++j) {
            pairs[j] =
                _mm256_maddubs_epi16(codes[j], _mm256_set1_epi32(FourBytes(inputs + 4 * j)));
          }
          const __m256i sum = _mm256_add_epi16(_mm256_add_epi16(pairs[0], pairs[1]),
                                               _mm256_add_epi16(pairs[2], pairs[3]));
          total[m][h] = _mm256_add_epi32(total[m][h], _mm256_madd_epi16(sum, ones));
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int h = 0; h < 2 * kAtOnce; ++h) {
        int32_t* to = out + (m * N + start) * kLanes + 8 * h;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), total[m][h]);
      }
    }
  }
}

template <int M, int N>
QUWEIT_AVX512 void Avx512Block(const uint32_t* first, const uint32_t* second, size_t stride,
                               const int8_t* x, size_t rows, int32_t* out) {
  const __m512i mask = _mm512_set1_epi8(3);
  __m512i total[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) total[m][n] = _mm512_setzero_si512();
  }
  for (size_t row = 0; row < rows; ++row) {
    __m512i words[N];
    for (int n = 0; n < N; ++n) {
      words[n] = _mm512_loadu_si512(Column<N>(first, second, n) + row * stride);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512i codes[N];
      for (int n = 0; n < N; ++n) {
        codes[n] = _mm512_and_si512(_mm512_srli_epi32(words[n], 2 * j), mask);
      }
      for (int m = 0; m < M; ++m) {
        const int8_t* inputs = x + (row * M + m) * kInputs + 4 * j;
        const __m512i four = _mm512_set1_epi32(FourBytes(inputs));
        for (int n = 0; n < N; ++n) {
          total[m][n] = _mm512_dpbusd_epi32(total[m][n], codes[n], four);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) _mm512_storeu_si512(out + (m * N + n) * kLanes, total[m][n]);
  }
}

#endif  // __x86_64__

constexpr int kMostTokens = 12, kMostColumns = 8;

struct Entry {
  int tokens, columns;
  Block block;
};

// A level's blocks: by tokens, then by columns, the most first.
inline const Entry* Blocks(Level level) {
  static const Entry portable[] = {{4, 2, PortableBlock<4, 2>}, {4, 1, PortableBlock<4, 1>},
                                   {1, 2, PortableBlock<1, 2>}, {1, 1, PortableBlock<1, 1>},
                                   {0, 0, nullptr}};
#if defined(__x86_64__)
  static const Entry avx2[] = {{4, 2, Avx2Block<4, 2>}, {4, 1, Avx2Block<4, 1>},
                               {2, 4, Avx2Block<2, 4>}, {2, 2, Avx2Block<2, 2>},
                               {2, 1, Avx2Block<2, 1>}, {1, 4, Avx2Block<1, 4>},
                               {1, 2, Avx2Block<1, 2>}, {1, 1, Avx2Block<1, 1>},
                               {0, 0, nullptr}};
  static const Entry avx512[] = {{12, 2, Avx512Block<12, 2>}, {12, 1, Avx512Block<12, 1>},
                                 {6, 4, Avx512Block<6, 4>},   {6, 2, Avx512Block<6, 2>},
                                 {6, 1, Avx512Block<6, 1>},   {4, 4, Avx512Block<4, 4>},
                                 {4, 2, Avx512Block<4, 2>},   {4, 1, Avx512Block<4, 1>},
                                 {2, 8, Avx512Block<2, 8>},   {2, 4, Avx512Block<2, 4>},
                                 {2, 2, Avx512Block<2, 2>},   {2, 1, Avx512Block<2, 1>},
                                 {1, 8, Avx512Block<1, 8>},   {1, 4, Avx512Block<1, 4>},
                                 {1, 2, Avx512Block<1, 2>},   {1, 1, Avx512Block<1, 1>},
                                 {0, 0, nullptr}};
  if (level == kAvx512) return avx512;
  if (level == kAvx2) return avx2;
#endif
  return portable;
}

// The widest block for a number of tokens with at most so many columns.
inline const Entry& WidestBlock(Level level, int tokens, size_t columns) {
  const Entry* entry = Blocks(level);
  while (entry->tokens != tokens || static_cast<size_t>(entry->columns) > columns) ++entry;
  return *entry;
}

// The tokens of the next block where so many are left: the most, or the fewest that are enough.
inline int BlockTokens(Level level, size_t left) {
  const Entry* entry = Blocks(level);
  int tokens = entry->tokens;
  for (; entry->block != nullptr; ++entry) {
    if (static_cast<size_t>(entry->tokens) >= left) tokens = entry->tokens;
  }
  return tokens;
}

}  // namespace quweit
