// Products for x86-64 with AVX-512 F, BW, VL, DQ, VNNI and VBMI; products_amx.cpp compiles this with
// AMX as well.
#include <immintrin.h>

#include <cstdint>

namespace ternarize {
namespace {

constexpr bool kLanes3 = true;
constexpr int64_t kDirect = 4;

// sum += the four products of each lane's bytes, u unsigned and x signed. As an instruction, because
// compilers that may move the intrinsic keep sums in memory.
inline void dot(__m512i& sum, __m512i u, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(x));
}

inline __m512i four(const int8_t* q) {
  int32_t x;
  __builtin_memcpy(&x, q, 4);
  return _mm512_set1_epi32(x);
}

inline __m512i bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// For each number below 81 its first three or its four digits of base 3, two bits each.
struct Digits {
  alignas(64) uint8_t three[128];
  alignas(64) uint8_t four[128];
};
constexpr Digits kDigits = [] {
  Digits table{};
  for (int v = 0; v < 81; ++v) {
    table.three[v] = static_cast<uint8_t>(v % 3 | v / 3 % 3 << 2 | v / 9 % 3 << 4);
    table.four[v] = static_cast<uint8_t>(table.three[v] | v / 27 << 6);
  }
  return table;
}();
inline __m512i look_up(const uint8_t* table, __m512i index) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
}
// v mod 81: the least of v, v - 81 and v - 162, where a negative one wraps around to more than 80.
inline __m512i mod81(__m512i v) {
  const __m512i once = _mm512_sub_epi8(v, bytes(81)), twice = _mm512_sub_epi8(v, bytes(162));
  return _mm512_min_epu8(v, _mm512_min_epu8(once, twice));
}

// The vector operator: the intrinsic of GCC 12 warns about a variable of its own.
inline __m512i shift_right(__m512i x, int n) {
  return reinterpret_cast<__m512i>(reinterpret_cast<__v16si>(x) >> n);
}

// Bytes whose products with the activations determine those of the digits, with as few instructions
// as possible; `solve` takes the digits' sums from theirs. Of base 3, v = d0 + 3 d1 + ... + 81 d4:
//
//     d0,  4 d1,  d0 + 4 d1 + 16 d2,  v mod 81,  v
//
// Of 2 bits: d0, 4 d1, 16 d2, v.
template <int fields>
struct Bytes {
  __m512i of[fields];
};

template <int fields>
inline Bytes<fields> split(__m512i v) {
  const __m512i m0 = bytes(3), m1 = bytes(12);
  if constexpr (fields == 5) {
    const __m512i low = mod81(v), three = look_up(kDigits.three, low);
    return {{_mm512_and_si512(three, m0), _mm512_and_si512(three, m1), three, low, v}};
  } else {
    return {{_mm512_and_si512(v, m0), _mm512_and_si512(v, m1), _mm512_and_si512(v, bytes(48)), v}};
  }
}

// All sums are multiples of what they are divided by. Sums of v may have wrapped around: 27 and 81 are
// odd, and dividing by them is multiplying by their inverses modulo 2^32.
template <int fields>
inline void solve(__m512i* s) {
  const __m512i s1 = shift_right(s[1], 2);
  if constexpr (fields == 5) {
    const __m512i inverse27 = _mm512_set1_epi32(static_cast<int>(0x684bda13u));
    const __m512i inverse81 = _mm512_set1_epi32(static_cast<int>(0x781948b1u));
    const __m512i s2 = shift_right(_mm512_sub_epi32(s[2], _mm512_add_epi32(s[0], s[1])), 4);
    const __m512i three = _mm512_add_epi32(
        s[0], _mm512_add_epi32(_mm512_mullo_epi32(s1, _mm512_set1_epi32(3)),
                               _mm512_mullo_epi32(s2, _mm512_set1_epi32(9))));
    const __m512i s4 = _mm512_mullo_epi32(_mm512_sub_epi32(s[4], s[3]), inverse81);
    s[3] = _mm512_mullo_epi32(_mm512_sub_epi32(s[3], three), inverse27);
    s[2] = s2;
    s[4] = s4;
  } else {
    const __m512i low = _mm512_add_epi32(s[0], _mm512_add_epi32(s[1], s[2]));
    s[3] = shift_right(_mm512_sub_epi32(s[3], low), 6);
    s[2] = shift_right(s[2], 4);
  }
  s[1] = s1;
}

constexpr int64_t kAhead = 2048;  // bytes to prefetch ahead

template <int fields, int n>
void dots(const uint8_t* lanes, int64_t quads, const int8_t* q, int64_t stride, int32_t* sums,
          int64_t sums_stride) {
  // Of one row two sets of sums in turn: an instruction's sum is not there for the next one at once.
  constexpr int kSets = n == 1 ? 2 : 1;
  __m512i s[kSets][n][fields];
  for (auto& set : s)
    for (auto& row : set)
      for (auto& sum : row) sum = _mm512_setzero_si512();
  const auto quad = [&](int set) {
    _mm_prefetch(reinterpret_cast<const char*>(lanes + kAhead), _MM_HINT_T0);
    const Bytes<fields> b = split<fields>(_mm512_loadu_si512(lanes));
    for (int r = 0; r < n; ++r) {
      const __m512i x = four(q + r * stride);
      for (int f = 0; f < fields; ++f) dot(s[set][r][f], b.of[f], x);
    }
    lanes += 64;
    q += 4;
  };
  int64_t i = 0;
  for (; i + kSets <= quads; i += kSets)
    for (int set = 0; set < kSets; ++set) quad(set);
  if (i < quads) quad(0);
  for (int r = 0; r < n; ++r) {
    if constexpr (kSets == 2)
      for (int f = 0; f < fields; ++f) s[0][r][f] = _mm512_add_epi32(s[0][r][f], s[1][r][f]);
    solve<fields>(s[0][r]);
    for (int f = 0; f < fields; ++f)
      _mm512_storeu_si512(sums + r * sums_stride + 16 * f, s[0][r][f]);
  }
}

// The digits themselves, for many rows of q.
template <int fields>
void open(const uint8_t* lanes, int64_t quads, uint8_t* panel) {
  const __m512i m0 = bytes(3);
  for (int64_t i = 0; i < (quads + 15) / 16 * 16; ++i) {
    uint8_t* to = panel + i / 16 * (fields * 1024) + i % 16 * 64;
    if (i >= quads) {
      for (int f = 0; f < fields; ++f) _mm512_store_si512(to + f * 1024, _mm512_setzero_si512());
      continue;
    }
    const __m512i v = _mm512_loadu_si512(lanes + i * 64);
    __m512i two_bits = v;
    if constexpr (fields == 5) {
      const __mmask64 upper1 = _mm512_cmpge_epu8_mask(v, bytes(81));
      const __mmask64 upper2 = _mm512_cmpge_epu8_mask(v, bytes(162));
      const __m512i d4 = _mm512_mask_add_epi8(_mm512_maskz_mov_epi8(upper1, bytes(1)), upper2,
                                              bytes(1), bytes(1));
      two_bits = look_up(kDigits.four, mod81(v));
      _mm512_store_si512(to + 4 * 1024, d4);
    }
    _mm512_store_si512(to, _mm512_and_si512(two_bits, m0));
    _mm512_store_si512(to + 1024, _mm512_and_si512(_mm512_srli_epi16(two_bits, 2), m0));
    _mm512_store_si512(to + 2048, _mm512_and_si512(_mm512_srli_epi16(two_bits, 4), m0));
    _mm512_store_si512(to + 3072, _mm512_and_si512(_mm512_srli_epi16(two_bits, 6), m0));
  }
}

#ifndef __AMX_INT8__

constexpr int64_t kTile = 5;
struct Session {};

template <int fields, int n>
void tile_of(const uint8_t* panel, int64_t quads, const int8_t* q, int64_t stride, int32_t* sums,
             int64_t sums_stride) {
  __m512i s[n][fields];
  for (auto& row : s)
    for (auto& sum : row) sum = _mm512_setzero_si512();
  for (int64_t done = 0; done < quads; done += 16, panel += fields * 1024) {
    const uint8_t* at = panel;
    const int64_t end = quads - done < 16 ? quads - done : 16;
    for (int64_t i = 0; i < end; ++i, at += 64, q += 4) {
      __m512i digits[fields];
      for (int f = 0; f < fields; ++f) digits[f] = _mm512_load_si512(at + f * 1024);
      for (int r = 0; r < n; ++r) {
        const __m512i x = four(q + r * stride);
        for (int f = 0; f < fields; ++f) dot(s[r][f], digits[f], x);
      }
    }
  }
  for (int r = 0; r < n; ++r)
    for (int f = 0; f < fields; ++f)
      _mm512_storeu_si512(sums + r * sums_stride + 16 * f, s[r][f]);
}

template <int fields>
void tile(int64_t n, const uint8_t* panel, int64_t quads, const int8_t* q, int64_t stride,
          int32_t* sums, int64_t sums_stride) {
  switch (n) {
    case 1: return tile_of<fields, 1>(panel, quads, q, stride, sums, sums_stride);
    case 2: return tile_of<fields, 2>(panel, quads, q, stride, sums, sums_stride);
    case 3: return tile_of<fields, 3>(panel, quads, q, stride, sums, sums_stride);
    case 4: return tile_of<fields, 4>(panel, quads, q, stride, sums, sums_stride);
    default: return tile_of<fields, 5>(panel, quads, q, stride, sums, sums_stride);
  }
}

#else

// A tile holds 16 rows of 64 bytes: 16 quads of 16 lanes of one field, 16 quads of 16 tokens, or the
// sums of 16 tokens and 16 lanes.
constexpr int64_t kTile = 16;

struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// While it lives, the thread's tiles have these shapes.
struct Session {
  Session() {
    static constexpr Shapes shapes{};
    _tile_loadconfig(&shapes);
  }
  ~Session() { _tile_release(); }
};

template <int fields>
void tile(int64_t, const uint8_t* panel, int64_t quads, const int8_t* q, int64_t stride,
          int32_t* sums, int64_t sums_stride) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if constexpr (fields == 5) _tile_zero(4);
  for (int64_t i = 0; i < quads; i += 16, panel += fields * 1024) {
    _tile_loadd(5, q + i * 4, static_cast<size_t>(stride));
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel + 1024, 64);
    _tile_dpbsud(0, 5, 6);
    _tile_dpbsud(1, 5, 7);
    _tile_loadd(6, panel + 2048, 64);
    _tile_loadd(7, panel + 3072, 64);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
    if constexpr (fields == 5) {
      _tile_loadd(6, panel + 4096, 64);
      _tile_dpbsud(4, 5, 6);
    }
  }
  const size_t to = static_cast<size_t>(sums_stride) * sizeof(int32_t);
  _tile_stored(0, sums, to);
  _tile_stored(1, sums + 16, to);
  _tile_stored(2, sums + 32, to);
  _tile_stored(3, sums + 48, to);
  if constexpr (fields == 5) _tile_stored(4, sums + 64, to);
}

#endif

}  // namespace
}  // namespace ternarize

#ifndef TERNARIZE_PRODUCTS
#define TERNARIZE_PRODUCTS kAvx512Products
#endif
#include "products.inc"
