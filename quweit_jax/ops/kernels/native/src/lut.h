// What look-ups of real tables share: how addresses lie, and tables held in registers.
//
// Addresses lie by blocks of 64 tokens: byte 4 i + k of a block is that of its token 16 k + i. So a
// register of 32-bit lanes, shifted right by 8 k bits, has those of neighboring tokens in its lanes'
// lowest bits, and registers are permuted by the lowest bits of their lanes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "blocks.h"

namespace quweit {

constexpr size_t kLutTokens = 64;  // of a block
constexpr size_t kLutLanes = 16;   // neighbors among them
constexpr int kMostLutInputs = 8;
QUWEIT_INLINE uint8_t* AddressOf(uint8_t* block, size_t token) {
  return block + token % kLutLanes * 4 + token / kLutLanes;
}

#if defined(__x86_64__)
#define QUWEIT_INLINE_AVX2 QUWEIT_AVX2 static inline __attribute__((always_inline))
#define QUWEIT_INLINE_AVX512 QUWEIT_AVX512 static inline __attribute__((always_inline))

// 2**n floats in registers of 8, as far as that is faster than reading them from memory.
template <int n>
struct EntriesOf8 {
  static constexpr bool kHeld = n <= 5;
  static constexpr int kParts = n <= 3 || !kHeld ? 1 : 1 << (n - 3);
  const float* memory;
  __m256 part[kParts];
};

template <int n>
QUWEIT_INLINE_AVX2 void Load8(const float* entries, EntriesOf8<n>& to) {
  to.memory = entries;
  if constexpr (n < 3) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(1 << n), lanes);
    to.part[0] = _mm256_maskload_ps(entries, mask);
  } else if constexpr (EntriesOf8<n>::kHeld) {
    for (int i = 0; i < to.kParts; ++i) to.part[i] = _mm256_loadu_ps(entries + 8 * i);
  }
}

template <int n>
QUWEIT_INLINE_AVX2 __m256 Choose8(const __m256* part, __m256i at) {
  if constexpr (n <= 3) {
    return _mm256_permutevar8x32_ps(part[0], at);
  } else {
    const __m256 low = Choose8<n - 1>(part, at);
    const __m256 high = Choose8<n - 1>(part + (1 << (n - 4)), at);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 32 - n)));
  }
}

// The entries at the lowest n bits of each lane.
template <int n>
QUWEIT_INLINE_AVX2 __m256 Read8(const EntriesOf8<n>& entries, __m256i at) {
  if constexpr (EntriesOf8<n>::kHeld) {
    return Choose8<n>(entries.part, at);
  } else {
    at = _mm256_and_si256(at, _mm256_set1_epi32((1 << n) - 1));
    return _mm256_i32gather_ps(entries.memory, at, 4);
  }
}

template <int n>
struct EntriesOf16 {
  static constexpr int kParts = n <= 4 ? 1 : 1 << (n - 4);
  __m512 part[kParts];
};

template <int n>
QUWEIT_INLINE_AVX512 void Load16(const float* entries, EntriesOf16<n>& to) {
  constexpr __mmask16 mask = static_cast<__mmask16>(n < 4 ? (1u << (1 << n % 4)) - 1 : 0xFFFF);
  for (int i = 0; i < to.kParts; ++i) to.part[i] = _mm512_maskz_loadu_ps(mask, entries + 16 * i);
}

template <int n>
QUWEIT_INLINE_AVX512 __m512 Read16(const __m512* part, __m512i at) {
  if constexpr (n <= 4) {
    return _mm512_permutexvar_ps(at, part[0]);
  } else if constexpr (n == 5) {
    return _mm512_permutex2var_ps(part[0], at, part[1]);
  } else {
    const __m512 low = Read16<n - 1>(part, at);
    const __m512 high = Read16<n - 1>(part + (1 << (n - 5)), at);
    const __mmask16 is_high = _mm512_test_epi32_mask(at, _mm512_set1_epi32(1 << (n - 1)));
    return _mm512_mask_blend_ps(is_high, low, high);
  }
}
#endif  // __x86_64__

// The function of a number of inputs: FUNCTION<1> to FUNCTION<8>.
#define QUWEIT_BY_INPUTS(function, n)                                                        \
  (n == 1   ? function<1>                                                                    \
   : n == 2 ? function<2>                                                                    \
   : n == 3 ? function<3>                                                                    \
   : n == 4 ? function<4>                                                                    \
   : n == 5 ? function<5>                                                                    \
   : n == 6 ? function<6>                                                                    \
   : n == 7 ? function<7>                                                                    \
            : function<8>)

}  // namespace quweit
