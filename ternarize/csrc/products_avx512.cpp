// Products for x86-64 with AVX-512 F, BW, VL, DQ, VNNI and VBMI; products_amx.cpp compiles this with
// AMX as well.
#include <immintrin.h>

#include <cstdint>

#ifdef __AMX_INT8__
#include "amx.inc"
#endif
#include "floats.inc"

namespace ternarize {
namespace {

constexpr bool kLanes3 = true;
constexpr int64_t kDirect = 4, kFew = 12;

// sum += the four products of each lane's bytes, u unsigned and x signed. As an instruction, because
// compilers that may move the intrinsic keep sums in memory.
TERNARIZE_INLINE void dot(__m512i& sum, __m512i u, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(x));
}

TERNARIZE_INLINE __m512i four(const int8_t* q) {
  int32_t x;
  __builtin_memcpy(&x, q, 4);
  return _mm512_set1_epi32(x);
}

TERNARIZE_INLINE __m512i bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

}  // namespace
}  // namespace ternarize

#include "unroll.inc"

namespace ternarize {
namespace {

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

template <int... i>
TERNARIZE_INLINE void store_all(const __m512i* values, int32_t* to, Indices<i...>) {
  (_mm512_storeu_si512(to + 16 * i, values[i]), ...);
}

template <int fields, int... r>
TERNARIZE_INLINE void store_rows(const __m512i* s, int32_t* sums, int64_t stride, Indices<r...>) {
  (store_all(s + r * fields, sums + r * stride, Count<fields>{}), ...);
}

template <int fields, int... r>
TERNARIZE_INLINE void solve_rows(__m512i* s, int32_t* sums, int64_t stride, Indices<r...>) {
  (solve<fields>(s + r * fields), ...);
  store_rows<fields>(s, sums, stride, Indices<r...>{});
}

constexpr int64_t kAhead = 2048;  // bytes to prefetch ahead

template <int fields, int n>
TERNARIZE_INLINE void add_quad(__m512i* s, const uint8_t* lanes, const int8_t* q, int64_t stride) {
  _mm_prefetch(reinterpret_cast<const char*>(lanes + kAhead), _MM_HINT_T0);
  const Bytes<fields> b = split<fields>(_mm512_loadu_si512(lanes));
  dot_rows<fields>(s, b.of, q, stride, Count<n>{});
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

// Tiles are filled with 16 rows that follow each other in memory.
#ifdef __AMX_INT8__
constexpr bool kInTiles = true;
#else
constexpr bool kInTiles = false;
#endif

template <int fields>
void stream(const float* all, float factor, float* to) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int i = 0; i < 16 * fields; i += 16)
    _mm512_stream_ps(to + i, _mm512_mul_ps(_mm512_loadu_ps(all + i), f));
}

// The digits themselves, for many rows of q.
template <int fields>
void open(const uint8_t* lanes, int64_t quads, uint8_t* panel) {
  constexpr int64_t kField = kInTiles ? 1024 : 64;
  const __m512i m0 = bytes(3);
  for (int64_t i = 0; i < (quads + 15) / 16 * 16; ++i) {
    uint8_t* to = panel + (kInTiles ? i / 16 * (fields * 1024) + i % 16 * 64 : i * fields * 64);
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

#ifndef __AMX_INT8__

constexpr int64_t kTile = 5, kSlice = 64;  // a panel fills less than half of the first cache

struct Session {
  ~Session() { _mm_sfence(); }  // after `stream`
};

template <int... i>
TERNARIZE_INLINE void load_all(__m512i* values, const int32_t* from, Indices<i...>) {
  ((values[i] = _mm512_loadu_si512(from + 16 * i)), ...);
}

template <int fields, int... r>
TERNARIZE_INLINE void load_rows(__m512i* s, const int32_t* sums, int64_t stride, Indices<r...>) {
  (load_all(s + r * fields, sums + r * stride, Count<fields>{}), ...);
}

template <int... f>
TERNARIZE_INLINE void load_digits(__m512i* digits, const uint8_t* at, Indices<f...>) {
  ((digits[f] = _mm512_load_si512(at + f * 64)), ...);
}

template <int fields, int n>
void tile_of(const uint8_t* panel, int64_t quads, const int8_t* q, int64_t stride, bool more,
             int32_t* sums, int64_t sums_stride) {
  __m512i s[n * fields];
  if (more)
    load_rows<fields>(s, sums, sums_stride, Count<n>{});
  else
    clear(s, Count<n * fields>{});
  // the next rows
  for (int r = 0; r < n; ++r)
    for (int64_t i = 0; i < quads * 4; i += 64)
      _mm_prefetch(reinterpret_cast<const char*>(q + (n + r) * stride + i), _MM_HINT_T0);
  for (int64_t i = 0; i < quads; ++i, panel += fields * 64, q += 4) {
    __m512i digits[fields];
    load_digits(digits, panel, Count<fields>{});
    dot_rows<fields>(s, digits, q, stride, Count<n>{});
  }
  store_rows<fields>(s, sums, sums_stride, Count<n>{});
}

template <int fields>
void tile(int64_t n, const uint8_t* panel, int64_t quads, const int8_t* q, int64_t stride,
          bool more, int32_t* sums, int64_t sums_stride) {
  switch (n) {
    case 1: return tile_of<fields, 1>(panel, quads, q, stride, more, sums, sums_stride);
    case 2: return tile_of<fields, 2>(panel, quads, q, stride, more, sums, sums_stride);
    case 3: return tile_of<fields, 3>(panel, quads, q, stride, more, sums, sums_stride);
    case 4: return tile_of<fields, 4>(panel, quads, q, stride, more, sums, sums_stride);
    default: return tile_of<fields, 5>(panel, quads, q, stride, more, sums, sums_stride);
  }
}

#else

// A tile holds 16 rows of 64 bytes: 16 quads of 16 lanes of one field, 16 quads of 16 tokens, or the
// sums of 16 tokens and 16 lanes.
constexpr int64_t kTile = 32;
constexpr int64_t kSlice = 256;  // of less, sums would go through memory more often

struct Session {
  Tiles tiles;
  ~Session() { _mm_sfence(); }  // after `stream`
};

// The sums of one or two tiles of tokens and of fields: of two, what is loaded is used twice.
template <int fields, int tokens, int used>
TERNARIZE_INLINE void square(const uint8_t* panel, int64_t quads, const int8_t* q, size_t stride,
                             bool more, int32_t* sums, size_t to) {
  const int8_t* q16 = q + 16 * stride;
  int32_t* sums16 = sums + 16 * to / sizeof(int32_t);
  if (more) {
    _tile_loadd(0, sums, to);
    if constexpr (used == 2) _tile_loadd(1, sums + 16, to);
    if constexpr (tokens == 2) _tile_loadd(2, sums16, to);
    if constexpr (tokens == 2 && used == 2) _tile_loadd(3, sums16 + 16, to);
  } else {
    _tile_zero(0);
    if constexpr (used == 2) _tile_zero(1);
    if constexpr (tokens == 2) _tile_zero(2);
    if constexpr (tokens == 2 && used == 2) _tile_zero(3);
  }
  for (int64_t i = 0; i < quads; i += 16, panel += fields * 1024) {
    _tile_loadd(4, q + i * 4, stride);
    _tile_loadd(6, panel, 64);
    if constexpr (used == 2) _tile_loadd(7, panel + 1024, 64);
    if constexpr (tokens == 2) _tile_loadd(5, q16 + i * 4, stride);
    _tile_dpbsud(0, 4, 6);
    if constexpr (used == 2) _tile_dpbsud(1, 4, 7);
    if constexpr (tokens == 2) _tile_dpbsud(2, 5, 6);
    if constexpr (tokens == 2 && used == 2) _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums, to);
  if constexpr (used == 2) _tile_stored(1, sums + 16, to);
  if constexpr (tokens == 2) _tile_stored(2, sums16, to);
  if constexpr (tokens == 2 && used == 2) _tile_stored(3, sums16 + 16, to);
}

template <int fields, int tokens>
void tile_of(const uint8_t* panel, int64_t quads, const int8_t* q, size_t stride, bool more,
             int32_t* sums, size_t to) {
  square<fields, tokens, 2>(panel, quads, q, stride, more, sums, to);
  square<fields, tokens, 2>(panel + 2048, quads, q, stride, more, sums + 32, to);
  if constexpr (fields == 5)
    square<fields, tokens, 1>(panel + 4096, quads, q, stride, more, sums + 64, to);
}

template <int fields>
void tile(int64_t n, const uint8_t* panel, int64_t quads, const int8_t* q, int64_t stride,
          bool more, int32_t* sums, int64_t sums_stride) {
  const auto from = static_cast<size_t>(stride);
  const size_t to = static_cast<size_t>(sums_stride) * sizeof(int32_t);
  if (n <= 16) return tile_of<fields, 1>(panel, quads, q, from, more, sums, to);
  tile_of<fields, 2>(panel, quads, q, from, more, sums, to);
}

#endif

}  // namespace
}  // namespace ternarize

#define TERNARIZE_VECTOR __m512i
#ifndef TERNARIZE_PRODUCTS
#define TERNARIZE_PRODUCTS kAvx512Products
#endif
#include "products.inc"
