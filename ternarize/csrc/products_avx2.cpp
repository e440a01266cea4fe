// Products for x86-64 with AVX2; products_avxvnni.cpp compiles this with AVX-VNNI as well.
#include <immintrin.h>

#include <cstdint>

#include "floats.inc"

namespace ternarize {
namespace {

constexpr bool kLanes3 = false;
constexpr int64_t kDirect = 3, kFew = 3;  // 4 fields of 3 rows are 12 of the 16 registers
constexpr int64_t kTile = 0, kSlice = 0;
struct Session {};

TERNARIZE_INLINE __m256i four(const int8_t* q) {
  int32_t x;
  __builtin_memcpy(&x, q, 4);
  return _mm256_set1_epi32(x);
}

TERNARIZE_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// sums += the products of u, unsigned, and x, signed: of each lane's four bytes to 32 bits, or of two
// and two to 16.
TERNARIZE_INLINE void dot(__m256i& sums, __m256i u, __m256i x) {
#ifdef __AVXVNNI__
  sums = _mm256_dpbusd_avx_epi32(sums, u, x);
#else
  sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(u, x));
#endif
}

TERNARIZE_INLINE void add_to(int32_t* sums, __m256i more) {
  auto* at = reinterpret_cast<__m256i*>(sums);
  _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), more));
}

}  // namespace
}  // namespace ternarize

#include "unroll.inc"

namespace ternarize {
namespace {

// Quads that are summed up before the sums go to memory: of 16 bits, each quad adds at most
// 2 * 2 * 128 to them. Half a vector (8 lanes of each field) is done after the other, because sums of
// both do not fit in the registers; the second half comes from the cache.
constexpr int64_t kRun = 64;
constexpr int64_t kAhead = 1024;  // bytes to prefetch ahead

// s[f] to the sums of field f: 8 lanes of 32 bits.
TERNARIZE_INLINE void add_fields(const __m256i* s, int32_t* to) {
#ifdef __AVXVNNI__
  const __m256i low = _mm256_add_epi32(s[0], _mm256_add_epi32(s[1], s[2]));
  add_to(to, s[0]);
  add_to(to + 16, _mm256_srai_epi32(s[1], 2));
  add_to(to + 32, _mm256_srai_epi32(s[2], 4));
  add_to(to + 48, _mm256_srai_epi32(_mm256_sub_epi32(s[3], low), 6));
#else
  const __m256i ones = _mm256_set1_epi16(1);
  add_to(to, _mm256_madd_epi16(s[0], ones));
  add_to(to + 16, _mm256_madd_epi16(s[1], ones));
  add_to(to + 32, _mm256_madd_epi16(s[2], ones));
  add_to(to + 48, _mm256_madd_epi16(s[3], ones));
#endif
}

template <int... r>
TERNARIZE_INLINE void add_rows(const __m256i* s, int32_t* sums, int64_t stride, Indices<r...>) {
  (add_fields(s + r * 4, sums + r * stride), ...);
}

// sums[r, 16 f + i] += of up to kRun quads, for the 8 lanes i that start at `lanes`.
template <int n>
TERNARIZE_INLINE void half_run(const uint8_t* lanes, int64_t quads, const int8_t* q,
                               int64_t stride, int32_t* sums, int64_t sums_stride) {
  __m256i s[n * 4];
  clear(s, Count<n * 4>{});
  const __m256i m0 = _mm256_set1_epi8(3);
  for (int64_t i = 0; i < quads; ++i, lanes += 64, q += 4) {
    _mm_prefetch(reinterpret_cast<const char*>(lanes + kAhead), _MM_HINT_T0);
    const __m256i v = load(lanes);
#ifdef __AVXVNNI__
    // Digits where they are: the sums of field f are 4^f times too large, those of field 3 are in the
    // sum of all four.
    const __m256i digits[4] = {_mm256_and_si256(v, m0),
                               _mm256_and_si256(v, _mm256_set1_epi8(12)),
                               _mm256_and_si256(v, _mm256_set1_epi8(48)), v};
#else
    const __m256i digits[4] = {_mm256_and_si256(v, m0),
                               _mm256_and_si256(_mm256_srli_epi16(v, 2), m0),
                               _mm256_and_si256(_mm256_srli_epi16(v, 4), m0),
                               _mm256_and_si256(_mm256_srli_epi16(v, 6), m0)};
#endif
    dot_rows<4>(s, digits, q, stride, Count<n>{});
  }
  add_rows(s, sums, sums_stride, Count<n>{});
}

template <int fields, int n>
void dots(const uint8_t* lanes, int64_t quads, const int8_t* q, int64_t stride, int32_t* sums,
          int64_t sums_stride) {
  static_assert(fields == 4, "Lanes2");
  for (int r = 0; r < n; ++r)
    for (int i = 0; i < 64; ++i) sums[r * sums_stride + i] = 0;
  for (int64_t done = 0; done < quads; done += kRun) {
    const int64_t run = quads - done < kRun ? quads - done : kRun;
    const uint8_t* at = lanes + done * 64;
    half_run<n>(at, run, q + done * 4, stride, sums, sums_stride);
    half_run<n>(at + 32, run, q + done * 4, stride, sums + 8, sums_stride);
  }
}

}  // namespace
}  // namespace ternarize

#define TERNARIZE_VECTOR __m256i
#ifndef TERNARIZE_PRODUCTS
#define TERNARIZE_PRODUCTS kAvx2Products
#endif
#include "products.inc"
