// Products for x86-64 with AVX-512 F, BW, VL, DQ, VNNI and VBMI: what the registers of AVX-512 do alone
// and beside AMX; many tokens are multiplied by avx512.cpp and amx.cpp. Internal linkage, see
// shared/formats.h.
#pragma once

#include <immintrin.h>

#include "multiply/registers.h"

namespace ternarize {
namespace {

struct Avx512 {
  using Vector = __m512i;
  static constexpr int kPeak = 12;
  static TERNARIZE_INLINE void hide(Vector& x) { __asm__ volatile("" : "+v"(x)); }
  static TERNARIZE_INLINE Vector load(const void* p) { return _mm512_loadu_si512(p); }
  static TERNARIZE_INLINE void store(void* p, Vector x) { _mm512_storeu_si512(p, x); }
  static TERNARIZE_INLINE void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  static TERNARIZE_INLINE Vector four(const int8_t* q) {
    int32_t x;
    std::memcpy(&x, q, 4);
    return _mm512_set1_epi32(x);
  }
  // sum += the four products of each lane's bytes, u unsigned and x signed. As an instruction, because
  // compilers that may move the intrinsic keep sums in memory.
  static TERNARIZE_INLINE void dot(Vector& sum, Vector u, Vector x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(x));
  }
};

namespace lanes {

using Vectors = Avx512;
constexpr bool kLanes3 = true;
constexpr int64_t kDirect = 4, kFew = 12;

TERNARIZE_INLINE __m512i bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// Tables of 64 bytes, of which `look_up` reads the one that the low six bits of each index say.
//
// A byte of Lanes3 is v = r + 28 b, r = d0 + 3 d1 + 9 d2 and b = d3 + 3 d4. 28 is more than r needs,
// but a multiple of 4: so b is known from v / 4, and v / 4 is below 64.
struct alignas(64) Table {
  uint8_t of[64];
};
// v - kUpper[v / 4] = r + 64 d4, whose low six bits are r.
constexpr Table kUpper = [] {
  Table table{};
  for (int i = 0; i < 63; ++i) table.of[i] = static_cast<uint8_t>(28 * (i / 7) - 64 * (i / 21));
  return table;
}();
// d3 + 4 d4 of v / 4
constexpr Table kUpperDigits = [] {
  Table table{};
  for (int i = 0; i < 63; ++i) table.of[i] = static_cast<uint8_t>(i / 7 % 3 + 4 * (i / 21));
  return table;
}();
// d0 + 4 d1 + 16 d2 of r
constexpr Table kLowerDigits = [] {
  Table table{};
  for (int r = 0; r < 27; ++r)
    table.of[r] = static_cast<uint8_t>(r % 3 + 4 * (r / 3 % 3) + 16 * (r / 9));
  return table;
}();
TERNARIZE_INLINE __m512i look_up(const Table& table, __m512i index) {
  return _mm512_maskz_permutexvar_epi8(~__mmask64{0}, index, _mm512_load_si512(table.of));
}

// Intrinsics of GCC 12 warn about a variable of their own: hence the operator here and the mask of all
// bytes above.
TERNARIZE_INLINE __m512i shift_right(__m512i x, int n) {
  return reinterpret_cast<__m512i>(reinterpret_cast<__v16si>(x) >> n);
}

// Bytes whose products with the activations determine those of the digits, with as few instructions
// as possible; `solve` takes the digits' sums from theirs. They are, of Lanes3 (v, r as above) and of
// Lanes2 (v = d0 + 4 d1 + 16 d2 + 64 d3):
//
//     d0,  4 d1,  d0 + 4 d1 + 16 d2,  v,  r + 64 d4              d0,  4 d1,  16 d2,  v
template <int fields>
struct Bytes {
  __m512i of[fields];
};

template <int fields>
TERNARIZE_INLINE Bytes<fields> split(__m512i v) {
  const __m512i m0 = bytes(3), m1 = bytes(12);
  if constexpr (fields == 5) {
    const __m512i i = _mm512_sub_epi8(v, look_up(kUpper, _mm512_srli_epi16(v, 2)));
    const __m512i three = look_up(kLowerDigits, i);
    return {{_mm512_and_si512(three, m0), _mm512_and_si512(three, m1), three, v, i}};
  } else {
    return {{_mm512_and_si512(v, m0), _mm512_and_si512(v, m1), _mm512_and_si512(v, bytes(48)), v}};
  }
}

// All sums are multiples of what they are divided by, and in groups of at most kLongestGroup the
// largest, of v <= 250, is below 2^31. Dividing by 7 is multiplying by its inverse modulo 2^32.
template <int fields>
TERNARIZE_INLINE void solve(__m512i* s) {
  const auto times = [](__m512i x, unsigned y) {
    return _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(y)));
  };
  const __m512i s1 = shift_right(s[1], 2);
  if constexpr (fields == 5) {
    const __m512i s2 = shift_right(_mm512_sub_epi32(s[2], _mm512_add_epi32(s[0], s[1])), 4);
    const __m512i r = _mm512_add_epi32(s[0], _mm512_add_epi32(times(s1, 3), times(s2, 9)));
    const __m512i s4 = shift_right(_mm512_sub_epi32(s[4], r), 6);
    const __m512i s3 = _mm512_sub_epi32(s[3], _mm512_add_epi32(r, times(s4, 84)));
    s[2] = s2;
    s[3] = times(shift_right(s3, 2), 0xb6db6db7u);
    s[4] = s4;
  } else {
    const __m512i low = _mm512_add_epi32(s[0], _mm512_add_epi32(s[1], s[2]));
    s[3] = shift_right(_mm512_sub_epi32(s[3], low), 6);
    s[2] = shift_right(s[2], 4);
  }
  s[1] = s1;
}

template <int... i>
TERNARIZE_INLINE void add_all(__m512i* sums, const __m512i* more, Indices<i...>) {
  ((sums[i] = _mm512_add_epi32(sums[i], more[i])), ...);
}

template <int fields, int... r>
TERNARIZE_INLINE void solve_rows(__m512i* s, int32_t* sums, int64_t stride, Indices<r...>) {
  (solve<fields>(s + r * fields), ...);
  store_rows<Vectors, fields>(s, sums, stride, Indices<r...>{});
}

constexpr int64_t kAhead = 2048;  // bytes to prefetch ahead

template <int fields, int n>
TERNARIZE_INLINE void add_quad(__m512i* s, const uint8_t* lanes, const int8_t* q, int64_t stride) {
  Vectors::prefetch(lanes + kAhead);
  const Bytes<fields> b = split<fields>(Vectors::load(lanes));
  dot_rows<Vectors, fields>(s, b.of, q, stride, Count<n>{});
}

template <int fields, int n>
void dots(const uint8_t* lanes, int64_t quads, const int8_t* q, int64_t stride, int32_t* sums,
          int64_t sums_stride) {
  // Of one row two sets of sums in turn: an instruction's sum is not there for the next one at once.
  constexpr int kSets = n == 1 ? 2 : 1, kSums = n * fields;
  __m512i s[kSets * kSums];
  clear(s, Count<kSets * kSums>{});
  int64_t i = 0;
  for (; i + kSets <= quads; i += kSets, lanes += kSets * 64, q += kSets * 4) {
    add_quad<fields, n>(s, lanes, q, stride);
    if constexpr (kSets == 2) add_quad<fields, n>(s + kSums, lanes + 64, q + 4, stride);
  }
  if (i < quads) add_quad<fields, n>(s, lanes, q, stride);
  if constexpr (kSets == 2) add_all(s, s + kSums, Count<kSums>{});
  solve_rows<fields>(s, sums, sums_stride, Count<n>{});
}

template <int fields>
void stream(const float* all, float factor, float* to) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int i = 0; i < 16 * fields; i += 16)
    _mm512_stream_ps(to + i, _mm512_mul_ps(_mm512_loadu_ps(all + i), f));
}

// `open`. Tiles are filled with 16 rows that follow each other in memory.
template <int fields, bool in_tiles>
void open_for(const uint8_t* lanes, int64_t quads, uint8_t* panel) {
  constexpr int64_t kField = in_tiles ? 1024 : 64;
  const __m512i m0 = bytes(3);
  for (int64_t i = 0; i < (quads + 15) / 16 * 16; ++i) {
    uint8_t* to = panel + (in_tiles ? i / 16 * (fields * 1024) + i % 16 * 64 : i * fields * 64);
    if (i >= quads) {
      for (int f = 0; f < fields; ++f) _mm512_store_si512(to + f * kField, _mm512_setzero_si512());
      continue;
    }
    const __m512i v = _mm512_loadu_si512(lanes + i * 64);
    __m512i low = v, high = _mm512_srli_epi16(v, 6);  // of fields 0 to 2, and of the others
    if constexpr (fields == 5) {
      const __m512i quarter = _mm512_srli_epi16(v, 2);
      low = look_up(kLowerDigits, _mm512_sub_epi8(v, look_up(kUpper, quarter)));
      high = look_up(kUpperDigits, quarter);
      _mm512_store_si512(to + 4 * kField, _mm512_and_si512(_mm512_srli_epi16(high, 2), m0));
    }
    _mm512_store_si512(to, _mm512_and_si512(low, m0));
    _mm512_store_si512(to + kField, _mm512_and_si512(_mm512_srli_epi16(low, 2), m0));
    _mm512_store_si512(to + 2 * kField, _mm512_and_si512(_mm512_srli_epi16(low, 4), m0));
    _mm512_store_si512(to + 3 * kField, _mm512_and_si512(high, m0));
  }
}

}  // namespace lanes

namespace int8 {

using Vectors = Avx512;
constexpr int64_t kSums = 16, kFew = 8;
constexpr int32_t kSumOffset = 128;

TERNARIZE_INLINE __mmask64 first(int64_t n) {
  return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
}

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

// Weights as `dot` wants them on the side without a sign: weights + 128, and 0 beyond the columns.
struct Whole {
  TERNARIZE_INLINE __m512i operator()(const int8_t* w) const {
    return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8(-128));
  }
};
struct Part {
  __mmask64 mask;
  TERNARIZE_INLINE __m512i operator()(const int8_t* w) const {
    return _mm512_maskz_sub_epi8(mask, _mm512_maskz_loadu_epi8(mask, w), _mm512_set1_epi8(-128));
  }
};

template <int rows, int n, class Load>
TERNARIZE_INLINE void add_columns(__m512i* s, const int8_t* weights, int64_t weights_stride,
                                  Load load, const int8_t* q, int64_t stride) {
  __m512i x[n];
  load_all<Vectors>(x, q, stride, Count<n>{});
  dot_weights<Vectors, n>(s, weights, weights_stride, load, x, Count<rows>{});
}

template <int rows, int n>
void dots(const int8_t* weights, int64_t weights_stride, int64_t cols, const int8_t* q,
          int64_t stride, int64_t ahead, int32_t* sums) {
  static_assert(rows * n <= 16, "one vector of totals");
  __m512i s[16];
  clear(s, Count<16>{});
  int64_t c = 0;
  for (; c + 64 <= cols; c += 64) {
    prefetch_all<Vectors>(weights + c + ahead, weights_stride, Count<rows>{});
    add_columns<rows, n>(s, weights + c, weights_stride, Whole{}, q + c, stride);
  }
  if (c < cols)
    add_columns<rows, n>(s, weights + c, weights_stride, Part{first(cols - c)}, q + c, stride);
  _mm512_storeu_si512(sums, totals(s));
}

}  // namespace int8
}  // namespace
}  // namespace ternarize
