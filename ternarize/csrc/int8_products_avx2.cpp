// Products with int8 weights for x86-64 with AVX2; int8_products_avxvnni.cpp compiles this with
// AVX-VNNI as well.
#include <immintrin.h>

#include <cstdint>

#include "indices.inc"

namespace ternarize {
namespace {

constexpr int64_t kSums = 8, kFew = 0, kTileRows = 0;
constexpr int32_t kPanelOffset = 0;
struct Session {};

#ifdef __AVXVNNI__
constexpr int32_t kSumOffset = 128;
constexpr int64_t kStep = 32;  // columns of a vector

TERNARIZE_INLINE __m256i load(const int8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
// vpdpbusd wants one side without a sign: weights + 128
TERNARIZE_INLINE __m256i load_weights(const int8_t* p) {
  return _mm256_xor_si256(load(p), _mm256_set1_epi8(-128));
}
TERNARIZE_INLINE void dot(__m256i& sum, __m256i w, __m256i x) {
  sum = _mm256_dpbusd_avx_epi32(sum, w, x);
}
#else
constexpr int32_t kSumOffset = 0;
constexpr int64_t kStep = 16;

// As numbers of 16 bits: vpmaddubsw's sums of two products would not fit.
TERNARIZE_INLINE __m256i load(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TERNARIZE_INLINE __m256i load_weights(const int8_t* p) { return load(p); }
TERNARIZE_INLINE void dot(__m256i& sum, __m256i w, __m256i x) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
}
#endif

TERNARIZE_INLINE int32_t total(__m256i x) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

template <int... r>
TERNARIZE_INLINE void load_q(__m256i* x, const int8_t* q, int64_t stride, Indices<r...>) {
  ((x[r] = load(q + r * stride)), ...);
}

// A row of weights, row i of `rows`, with all rows of q.
template <int rows, int... r>
TERNARIZE_INLINE void dot_row(__m256i* s, const int8_t* w, const __m256i* x, Indices<r...>) {
  const __m256i weights = load_weights(w);
  (dot(s[r * rows], weights, x[r]), ...);
}

template <int rows, int n, int... i>
TERNARIZE_INLINE void dot_rows_of(__m256i* s, const int8_t* w, int64_t stride, const __m256i* x,
                                  Indices<i...>) {
  (dot_row<rows>(s + i, w + i * stride, x, Count<n>{}), ...);
}

template <int... i>
TERNARIZE_INLINE void store_totals(const __m256i* s, int32_t* sums, Indices<i...>) {
  ((sums[i] = total(s[i])), ...);
}

template <int... i>
TERNARIZE_INLINE void prefetch(const int8_t* w, int64_t stride, Indices<i...>) {
  (_mm_prefetch(reinterpret_cast<const char*>(w + i * stride), _MM_HINT_T0), ...);
}

template <int rows, int n>
void dots(const int8_t* weights, int64_t weights_stride, int64_t cols, const int8_t* q,
          int64_t stride, int64_t ahead, int32_t* sums) {
  __m256i s[rows * n];
  clear(s, Count<rows * n>{});
  int64_t c = 0;
  for (; c + kStep <= cols; c += kStep) {
    if (c % 64 == 0) prefetch(weights + c + ahead, weights_stride, Count<rows>{});
    __m256i x[n];
    load_q(x, q + c, stride, Count<n>{});
    dot_rows_of<rows, n>(s, weights + c, weights_stride, x, Count<rows>{});
  }
  store_totals(s, sums, Count<rows * n>{});
  for (; c < cols; ++c)
    for (int r = 0; r < n; ++r)
      for (int i = 0; i < rows; ++i)
        sums[r * rows + i] += (weights[i * weights_stride + c] + kSumOffset) * q[r * stride + c];
}

}  // namespace
}  // namespace ternarize

#ifndef TERNARIZE_INT8
#define TERNARIZE_INT8 kAvx2Int8
#endif
#include "int8_products.inc"
