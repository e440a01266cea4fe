// Rounds of several chunks at once, for one instruction set. Internal linkage, see shared/formats.h.
#pragma once

// MSVC has not what counts bits here
#if defined(__AVX2__) && !defined(_MSC_VER)
#define TERNARIZE_ROUNDS
#include <immintrin.h>
#endif

#include "entropy/entropy.h"

namespace ternarize {
namespace {

#ifdef TERNARIZE_ROUNDS
#ifdef __AVX512VL__
// States with the next word in each lane that has become too small, in the order of the lanes.
__m256i with_words(__m256i next, const uint8_t*& at) {
  const __mmask8 low = _mm256_cmplt_epu32_mask(next, _mm256_set1_epi32(kRansLeast));
  const __m256i words =
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  at += 2 * __builtin_popcount(low);
  return _mm256_mask_or_epi32(next, low, _mm256_slli_epi32(next, 16),
                              _mm256_maskz_expand_epi32(low, words));
}

// Of eight numbers their lowest bytes. (GCC 12 warns of the function without a mask.)
__m128i lowest_bytes(__m256i x) { return _mm256_maskz_cvtepi32_epi8(0xff, x); }
#else
// For each mask of lanes, which word each of them takes.
struct Expansions {
  alignas(32) uint32_t of[256][8];
};

constexpr Expansions kExpansions = [] {
  Expansions table{};
  for (int mask = 0; mask < 256; ++mask)
    for (int lane = 0, word = 0; lane < 8; ++lane)
      if (mask >> lane & 1) table.of[mask][lane] = static_cast<uint32_t>(word++);
  return table;
}();

// States with the next word in each lane that has become too small, in the order of the lanes.
__m256i with_words(__m256i next, const uint8_t*& at) {
  const __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(next, 16), _mm256_setzero_si256());
  const auto mask = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(low)));
  const __m256i words =
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  const __m256i taken = _mm256_permutevar8x32_epi32(
      words, _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpansions.of[mask])));
  at += 2 * __builtin_popcount(mask);
  return _mm256_blendv_epi8(next, _mm256_or_si256(_mm256_slli_epi32(next, 16), taken), low);
}

// Of eight numbers their lowest bytes.
__m128i lowest_bytes(__m256i x) {
  const __m256i four = _mm256_shuffle_epi8(x, _mm256_set1_epi32(0x0c080400));
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
}
#endif

// A chunk's eight states are a vector, which waits for its table and its product: the next chunks'
// instructions fill that time.
template <int count>
int64_t take_rounds(RansChunk* chunks, int64_t n, const uint32_t* table) {
  __m256i x[count];
  uint8_t* bytes[count];
  const uint8_t* at[count];
  for (int c = 0; c < count; ++c) {
    x[c] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunks[c].states));
    bytes[c] = chunks[c].bytes, at[c] = chunks[c].at;
  }
  const __m256i slots = _mm256_set1_epi32(kRansTotal - 1);
  int64_t i = 0;
  for (;;) {
    int64_t rounds = (n - i) / kRansLanes;  // in which no lane can lack its word
    for (int c = 0; c < count; ++c)
      rounds = smaller(rounds, (chunks[c].end - at[c]) / (2 * kRansLanes));
    if (rounds <= 0) break;
    for (; rounds > 0; --rounds, i += kRansLanes) {
#pragma GCC unroll 8
      for (int c = 0; c < count; ++c) {
        const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int*>(table),
                                                     _mm256_and_si256(x[c], slots), 4);
        const __m256i upper = _mm256_srli_epi32(x[c], kRansBits);
        const __m256i less = _mm256_and_si256(_mm256_srli_epi32(entry, 8), slots);
        const __m256i rest = _mm256_add_epi32(upper, _mm256_srli_epi32(entry, 20));
        x[c] = with_words(_mm256_add_epi32(_mm256_mullo_epi32(less, upper), rest), at[c]);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes[c] + i), lowest_bytes(entry));
      }
    }
  }
  for (int c = 0; c < count; ++c) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(chunks[c].states), x[c]);
    chunks[c].at = at[c];
  }
  return i;
}

int64_t take_rounds(RansChunk* chunks, int count, int64_t n, const uint32_t* table) {
  static_assert(kRansTogether == 8);
  switch (count) {
    case 1: return take_rounds<1>(chunks, n, table);
    case 2: return take_rounds<2>(chunks, n, table);
    case 3: return take_rounds<3>(chunks, n, table);
    case 4: return take_rounds<4>(chunks, n, table);
    case 5: return take_rounds<5>(chunks, n, table);
    case 6: return take_rounds<6>(chunks, n, table);
    case 7: return take_rounds<7>(chunks, n, table);
    default: return take_rounds<8>(chunks, n, table);
  }
}
#else
int64_t take_rounds(RansChunk*, int, int64_t, const uint32_t*) { return 0; }
#endif
#undef TERNARIZE_ROUNDS

constexpr Entropy kEntropy{take_rounds};

}  // namespace
}  // namespace ternarize
