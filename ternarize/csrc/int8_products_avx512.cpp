// Products with int8 weights for x86-64 with AVX-512 F, BW, VL, DQ and VNNI; int8_products_amx.cpp
// compiles this with AMX as well.
#include <immintrin.h>

#include <cstdint>

#ifdef __AMX_INT8__
#include "amx.inc"
#endif
#include "indices.inc"

namespace ternarize {
namespace {

constexpr int64_t kSums = 16, kFew = 8;
constexpr int32_t kSumOffset = 128;

// sum += the four products of each lane's bytes, u unsigned and x signed; an instruction for the
// reason given in products_avx512.cpp.
TERNARIZE_INLINE void dot(__m512i& sum, __m512i u, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(x));
}

TERNARIZE_INLINE __mmask64 first(int64_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

// Intrinsics of GCC 12 warn about a variable of their own unless they have a mask: that of all lanes.
constexpr __mmask16 kAll16 = 0xffff;
constexpr __mmask8 kAll8 = 0xff;

TERNARIZE_INLINE __m512i zip32(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_maskz_unpacklo_epi32(kAll16, a, b),
                          _mm512_maskz_unpackhi_epi32(kAll16, a, b));
}

TERNARIZE_INLINE __m512i zip64(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_maskz_unpacklo_epi64(kAll8, a, b),
                          _mm512_maskz_unpackhi_epi64(kAll8, a, b));
}

// Quarters of a and b, added in pairs: of neighbours that are two apart, or side by side.
TERNARIZE_INLINE __m512i zip128(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_maskz_shuffle_i32x4(kAll16, a, b, 0x44),
                          _mm512_maskz_shuffle_i32x4(kAll16, a, b, 0xee));
}

TERNARIZE_INLINE __m512i zip256(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_maskz_shuffle_i32x4(kAll16, a, b, 0x88),
                          _mm512_maskz_shuffle_i32x4(kAll16, a, b, 0xdd));
}

TERNARIZE_INLINE __m512i four_totals(const __m512i* s) {
  return zip64(zip32(s[0], s[1]), zip32(s[2], s[3]));
}

// Lane i is the sum of the lanes of s[i].
TERNARIZE_INLINE __m512i totals(const __m512i* s) {
  return zip256(zip128(four_totals(s), four_totals(s + 4)),
                zip128(four_totals(s + 8), four_totals(s + 12)));
}

template <int... r>
TERNARIZE_INLINE void load_q(__m512i* x, const int8_t* q, int64_t stride, Indices<r...>) {
  ((x[r] = _mm512_loadu_si512(q + r * stride)), ...);
}

// A row of weights, row i of `rows`, with all rows of q. vpdpbusd wants one side without a sign:
// weights + 128, and 0 beyond the columns.
template <int rows, bool whole, int... r>
TERNARIZE_INLINE void dot_row(__m512i* s, const int8_t* w, __mmask64 mask, const __m512i* x,
                              Indices<r...>) {
  const __m512i sign = _mm512_set1_epi8(-128);
  const __m512i weights =
      whole ? _mm512_xor_si512(_mm512_loadu_si512(w), sign)
            : _mm512_maskz_sub_epi8(mask, _mm512_maskz_loadu_epi8(mask, w), sign);
  (dot(s[r * rows], weights, x[r]), ...);
}

template <int rows, int n, bool whole, int... i>
TERNARIZE_INLINE void dot_rows_of(__m512i* s, const int8_t* w, int64_t w_stride, __mmask64 mask,
                                  const int8_t* q, int64_t stride, Indices<i...>) {
  __m512i x[n];
  load_q(x, q, stride, Count<n>{});
  (dot_row<rows, whole>(s + i, w + i * w_stride, mask, x, Count<n>{}), ...);
}

template <int... i>
TERNARIZE_INLINE void prefetch(const int8_t* w, int64_t stride, Indices<i...>) {
  (_mm_prefetch(reinterpret_cast<const char*>(w + i * stride), _MM_HINT_T0), ...);
}

template <int rows, int n>
void dots(const int8_t* weights, int64_t weights_stride, int64_t cols, const int8_t* q,
          int64_t stride, int64_t ahead, int32_t* sums) {
  static_assert(rows * n <= 16, "one vector of totals");
  __m512i s[16];
  clear(s, Count<16>{});
  const __mmask64 all = first(64);
  int64_t c = 0;
  for (; c + 64 <= cols; c += 64) {
    prefetch(weights + c + ahead, weights_stride, Count<rows>{});
    dot_rows_of<rows, n, true>(s, weights + c, weights_stride, all, q + c, stride, Count<rows>{});
  }
  if (c < cols)
    dot_rows_of<rows, n, false>(s, weights + c, weights_stride, first(cols - c), q + c, stride,
                                Count<rows>{});
  _mm512_storeu_si512(sums, totals(s));
}

#ifndef __AMX_INT8__

constexpr int64_t kTileRows = 8;
constexpr int32_t kPanelOffset = 128;
struct Session {};

template <int... b>
TERNARIZE_INLINE void load_panels(__m512i* u, const uint8_t* panel, int64_t stride,
                                  Indices<b...>) {
  ((u[b] = _mm512_loadu_si512(panel + b * stride)), ...);
}

// Four weights of row i with all panels.
template <int... b>
TERNARIZE_INLINE void dot_four(__m512i* s, const int8_t* w, const __m512i* u, Indices<b...>) {
  int32_t four;
  __builtin_memcpy(&four, w, 4);
  const __m512i weights = _mm512_set1_epi32(four);
  (dot(s[b * kTileRows], u[b], weights), ...);
}

template <int n, int... i>
TERNARIZE_INLINE void dot_fours(__m512i* s, const int8_t* w, int64_t stride, const __m512i* u,
                                Indices<i...>) {
  (dot_four(s + i, w + i * stride, u, Count<n>{}), ...);
}

template <int... i>
TERNARIZE_INLINE void store_all(const __m512i* s, int32_t* to, Indices<i...>) {
  (_mm512_storeu_si512(to + 16 * i, s[i]), ...);
}

template <int n>
void tile(const int8_t* weights, int64_t weights_stride, int64_t cols, const uint8_t* panel,
          int64_t panel_stride, int32_t* sums) {
  __m512i s[n * kTileRows];
  clear(s, Count<n * kTileRows>{});
  for (int64_t c = 0; c < cols; c += 4, panel += 64) {
    __m512i u[n];
    load_panels(u, panel, panel_stride, Count<n>{});
    dot_fours<n>(s, weights + c, weights_stride, u, Count<kTileRows>{});
  }
  store_all(s, sums, Count<n * kTileRows>{});
}

#else

// Two tiles of 16 rows of weights, straight from memory, with the panels of up to three times 16
// tokens: six tiles of sums, and one each to load weights and a panel.
constexpr int64_t kTileRows = 32;
constexpr int32_t kPanelOffset = 0;

using Session = Tiles;

template <int n>
void tile(const int8_t* weights, int64_t weights_stride, int64_t cols, const uint8_t* panel,
          int64_t panel_stride, int32_t* sums) {
  const auto stride = static_cast<size_t>(weights_stride);
  const int8_t* weights16 = weights + 16 * weights_stride;
  _tile_zero(0);
  _tile_zero(3);
  if constexpr (n > 1) {
    _tile_zero(1);
    _tile_zero(4);
  }
  if constexpr (n > 2) {
    _tile_zero(2);
    _tile_zero(5);
  }
  for (int64_t c = 0; c < cols; c += 64, panel += 1024) {
    _tile_loadd(6, weights + c, stride);
    _tile_loadd(7, panel, 64);
    _tile_dpbssd(0, 6, 7);
    if constexpr (n > 1) {
      _tile_loadd(7, panel + panel_stride, 64);
      _tile_dpbssd(1, 6, 7);
    }
    if constexpr (n > 2) {
      _tile_loadd(7, panel + 2 * panel_stride, 64);
      _tile_dpbssd(2, 6, 7);
    }
    _tile_loadd(6, weights16 + c, stride);
    if constexpr (n > 2) {
      _tile_dpbssd(5, 6, 7);
      _tile_loadd(7, panel, 64);
    } else if constexpr (n > 1) {
      _tile_dpbssd(4, 6, 7);
      _tile_loadd(7, panel, 64);
    }
    _tile_dpbssd(3, 6, 7);
    if constexpr (n > 2) {
      _tile_loadd(7, panel + panel_stride, 64);
      _tile_dpbssd(4, 6, 7);
    }
  }
  constexpr int64_t kPanel = kTileRows * 16;  // sums of a panel
  _tile_stored(0, sums, 64);
  _tile_stored(3, sums + 256, 64);
  if constexpr (n > 1) {
    _tile_stored(1, sums + kPanel, 64);
    _tile_stored(4, sums + kPanel + 256, 64);
  }
  if constexpr (n > 2) {
    _tile_stored(2, sums + 2 * kPanel, 64);
    _tile_stored(5, sums + 2 * kPanel + 256, 64);
  }
}

#endif

}  // namespace
}  // namespace ternarize

#ifndef TERNARIZE_INT8
#define TERNARIZE_INT8 kAvx512Int8
#endif
#include "int8_products.inc"
