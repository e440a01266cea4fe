// Products for x86-64 with AVX2, and with AVX-VNNI where the compiler may use it. Internal linkage, see
// shared/formats.h.
#include <immintrin.h>

#include "multiply/registers.h"

namespace ternarize {
namespace {

struct Avx2 {
  using Vector = __m256i;
  static TERNARIZE_INLINE Vector load(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static TERNARIZE_INLINE void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
};

namespace lanes {

constexpr bool kLanes3 = false;
constexpr int64_t kDirect = 3, kFew = 3;  // 4 fields of 3 rows are 12 of the 16 registers
constexpr int64_t kTile = 0, kSlice = 0;
struct Session {};

struct Vectors : Avx2 {
  static constexpr int kPeak = 4;
  static TERNARIZE_INLINE void hide(Vector& x) { __asm__ volatile("" : "+v"(x)); }
  static TERNARIZE_INLINE Vector four(const int8_t* q) {
    int32_t x;
    std::memcpy(&x, q, 4);
    return _mm256_set1_epi32(x);
  }
  // sums += the products of u, unsigned, and x, signed: of each lane's four bytes to 32 bits, or of
  // two and two to 16.
  static TERNARIZE_INLINE void dot(Vector& sums, Vector u, Vector x) {
#ifdef __AVXVNNI__
    sums = _mm256_dpbusd_avx_epi32(sums, u, x);
#else
    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(u, x));
#endif
  }
};

// Quads that are summed up before the sums go to memory: of 16 bits, each quad adds at most
// 2 * 2 * 128 to them. Half a vector (8 lanes of each field) is done after the other, because sums of
// both do not fit in the registers; the second half comes from the cache.
constexpr int64_t kRun = 64;
constexpr int64_t kAhead = 1024;  // bytes to prefetch ahead

TERNARIZE_INLINE void add_to(int32_t* sums, __m256i more) {
  auto* at = reinterpret_cast<__m256i*>(sums);
  _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), more));
}

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
    Vectors::prefetch(lanes + kAhead);
    const __m256i v = Vectors::load(lanes);
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
    dot_rows<Vectors, 4>(s, digits, q, stride, Count<n>{});
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

}  // namespace lanes

namespace int8 {

constexpr int64_t kSums = 8, kFew = 0, kTileRows = 0;
constexpr int32_t kPanelOffset = 0;
struct Session {};

// Activations, and weights as the other side of `dot`.
#ifdef __AVXVNNI__
constexpr int32_t kSumOffset = 128;
constexpr int64_t kStep = 32;  // columns of a vector

struct Vectors : Avx2 {
  static TERNARIZE_INLINE void dot(Vector& sum, Vector w, Vector x) {
    sum = _mm256_dpbusd_avx_epi32(sum, w, x);
  }
};
// vpdpbusd wants one side without a sign: weights + 128
struct Weights {
  TERNARIZE_INLINE __m256i operator()(const int8_t* p) const {
    return _mm256_xor_si256(Vectors::load(p), _mm256_set1_epi8(-128));
  }
};
#else
constexpr int32_t kSumOffset = 0;
constexpr int64_t kStep = 16;

// As numbers of 16 bits: vpmaddubsw's sums of two products would not fit.
struct Vectors : Avx2 {
  static TERNARIZE_INLINE Vector load(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static TERNARIZE_INLINE void dot(Vector& sum, Vector w, Vector x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
  }
};
struct Weights {
  TERNARIZE_INLINE __m256i operator()(const int8_t* p) const { return Vectors::load(p); }
};
#endif

TERNARIZE_INLINE int32_t total(__m256i x) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

template <int... i>
TERNARIZE_INLINE void store_totals(const __m256i* s, int32_t* sums, Indices<i...>) {
  ((sums[i] = total(s[i])), ...);
}

template <int rows, int n>
void dots(const int8_t* weights, int64_t weights_stride, int64_t cols, const int8_t* q,
          int64_t stride, int64_t ahead, int32_t* sums) {
  __m256i s[rows * n];
  clear(s, Count<rows * n>{});
  int64_t c = 0;
  for (; c + kStep <= cols; c += kStep) {
    if (c % 64 == 0) prefetch_all<Vectors>(weights + c + ahead, weights_stride, Count<rows>{});
    __m256i x[n];
    load_all<Vectors>(x, q + c, stride, Count<n>{});
    dot_weights<Vectors, n>(s, weights + c, weights_stride, Weights{}, x, Count<rows>{});
  }
  store_totals(s, sums, Count<rows * n>{});
  for (; c < cols; ++c)
    for (int r = 0; r < n; ++r)
      for (int i = 0; i < rows; ++i)
        sums[r * rows + i] += (weights[i * weights_stride + c] + kSumOffset) * q[r * stride + c];
}

}  // namespace int8
}  // namespace
}  // namespace ternarize

#include "multiply/table.h"
