// Base 3, of a range of rows: byte = d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4 with digit = trit + 1
// (formats/base3.md).
//
// The loops have fixed lengths and no branches, so that compilers turn them into vector code: one
// source serves all CPUs. Internal linkage, see shared/formats.h.
#pragma once

#ifdef __AVX512VBMI__
#include <immintrin.h>
#endif

#include "pack/pack.h"

namespace ternarize {
namespace {

constexpr int kPerByte = 5;
constexpr uint8_t kLargestCode = 242;
constexpr uint8_t kZeroCode = 121;  // five zero trits
constexpr int kPowers[kPerByte] = {1, 3, 9, 27, 81};

// The trits of each byte, in eight bytes so that one store writes them.
struct Trits {
  int8_t of[256][8];
};

constexpr Trits make_trits() {
  Trits table{};
  for (int code = 0; code < 256; ++code)
    for (int k = 0; k < kPerByte; ++k)
      table.of[code][k] = static_cast<int8_t>(code / kPowers[k] % 3 - 1);
  return table;
}

constexpr Trits kTrits = make_trits();

// One byte from the five low bytes of `trits`.
TERNARIZE_INLINE uint8_t encode(uint64_t trits) {
  // trit + 1 in every byte without a carry into the next: -1 is 0xff.
  const uint64_t digits = ((trits & 0x0303030303) + 0x0101010101) & 0x0303030303;
  // Byte 4 of the product is the sum of digit i times byte 4 - i of the factor; the bytes below it
  // stay under 256 and so carry nothing into it.
  return static_cast<uint8_t>((digits * 0x0103091b51) >> 32);
}

#ifdef __AVX512VBMI__
// n <= 128 trits to ceil(n / 5) bytes: digit k of 26 bytes at once is a permutation of the trits.
TERNARIZE_INLINE void encode_128(const int8_t* trits, int64_t n, uint8_t* packed) {
  struct Places {
    uint8_t of[kPerByte][64];
  };
  static constexpr Places kPlaces = [] {
    Places places{};
    for (int k = 0; k < kPerByte; ++k)
      for (int i = 0; i < 26; ++i) places.of[k][i] = static_cast<uint8_t>(5 * i + k);
    return places;
  }();
  const auto first = [](int64_t count) {
    return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  };
  // Beyond n there are zeros, which is also what pads the last byte. The 26th has three digits.
  const __m512i low = _mm512_maskz_loadu_epi8(first(n), trits);
  const __m512i high = _mm512_maskz_loadu_epi8(n > 64 ? first(n - 64) : 0, trits + 64);
  __m512i sum = _mm512_setzero_si512();
  for (int k = kPerByte - 1; k >= 0; --k) {
    const __m512i digit = _mm512_maskz_permutex2var_epi8(
        first(k < 3 ? 26 : 25), low, _mm512_loadu_si512(kPlaces.of[k]), high);
    sum = _mm512_add_epi8(_mm512_add_epi8(sum, sum), _mm512_add_epi8(sum, digit));
  }
  sum = _mm512_add_epi8(sum, _mm512_set1_epi8(kZeroCode));
  _mm512_mask_storeu_epi8(packed, first((n + 4) / kPerByte), sum);
}

TERNARIZE_INLINE void encode_group(const int8_t* trits, int64_t n, uint8_t* packed) {
  constexpr int64_t kStep = 125;  // whole bytes
  for (; n > 128; n -= kStep, trits += kStep, packed += kStep / kPerByte)
    encode_128(trits, kStep, packed);
  encode_128(trits, n, packed);
}
#else
TERNARIZE_INLINE void encode_group(const int8_t* trits, int64_t n, uint8_t* packed) {
  int64_t i = 0;
  for (; i + 8 <= n; i += kPerByte) {
    uint64_t eight;
    std::memcpy(&eight, trits + i, 8);
    *packed++ = encode(eight);
  }
  for (; i < n; i += kPerByte) {
    uint64_t last = 0;  // zero trits are the padding
    std::memcpy(&last, trits + i, static_cast<size_t>(smaller(n - i, kPerByte)));
    *packed++ = encode(last);
  }
}
#endif

// Writes n trits; any byte is safe.
TERNARIZE_INLINE void decode_group(const uint8_t* packed, int64_t n, int8_t* trits) {
  int64_t i = 0;
  for (; i + 8 <= n; i += kPerByte) std::memcpy(trits + i, kTrits.of[*packed++], 8);
  for (; i < n; i += kPerByte)
    std::memcpy(trits + i, kTrits.of[*packed++], static_cast<size_t>(smaller(n - i, kPerByte)));
}

// A last byte that holds `used` trits: the digits above them must be 1, so that its value is that of
// these 1s plus less than 3^used.
TERNARIZE_INLINE bool padding_is_zero(uint8_t last, int64_t used) {
  constexpr int kLowest[kPerByte] = {0, 120, 117, 108, 81}, kValues[kPerByte] = {256, 3, 9, 27, 81};
  return last >= kLowest[used] && last < kLowest[used] + kValues[used];
}

TERNARIZE_INLINE int64_t bytes_of(int64_t n) { return (n + kPerByte - 1) / kPerByte; }

struct Seen {
  bool valid;
  bool nonzero;
};

// What the bytes of one group hold, eight at a time; the last eight overlap the ones before.
TERNARIZE_INLINE Seen look(const uint8_t* packed, int64_t bytes, int64_t n) {
  constexpr uint64_t kOnes = 0x0101010101010101;
  uint64_t invalid = 0, other = 0;
  const auto eight = [&](uint64_t x) {
    // Adding 13 to the low seven bits sets the top bit of those that are 115 or more, and
    // 128 + 115 = 243.
    invalid |= ((x & (0x7f * kOnes)) + 0x0d * kOnes) & x;
    other |= x ^ (kZeroCode * kOnes);
  };
  uint64_t x = kZeroCode * kOnes;
  if (bytes < 8) {
    std::memcpy(&x, packed, static_cast<size_t>(bytes));
    eight(x);
  } else {
    for (int64_t at = 0; at + 8 < bytes; at += 8) {
      std::memcpy(&x, packed + at, 8);
      eight(x);
    }
    std::memcpy(&x, packed + bytes - 8, 8);
    eight(x);
  }
  return {(invalid & (0x80 * kOnes)) == 0 && padding_is_zero(packed[bytes - 1], n % kPerByte),
          other != 0};
}

// The first bad byte of a group that `look` found to be invalid.
int64_t first_invalid(const uint8_t* packed, int64_t bytes) {
  for (int64_t k = 0; k + 1 < bytes; ++k)
    if (packed[k] > kLargestCode) return k;
  return bytes - 1;
}

// The usual group length as a type: code for it is compiled apart, with loops of constant length.
struct Usual {
  constexpr operator int64_t() const { return 128; }
};

template <class Each, class Group>
int64_t for_groups_of(const Layout& x, int64_t first, int64_t last, Group length, Each each) {
  for (int64_t row = first; row < last; ++row) {
    int64_t at = row * x.cols, byte = row * x.width, group = 0;
    for (int64_t left = x.cols; left >= length; left -= length) {
      const int64_t bad = each(row, group++, length, at, byte);
      if (bad != kNone) return bad;
      at += length;
      byte += bytes_of(length);
    }
    if (at < (row + 1) * x.cols) {
      const int64_t bad = each(row, group, (row + 1) * x.cols - at, at, byte);
      if (bad != kNone) return bad;
    }
  }
  return kNone;
}

// Calls each(row, group, n, weight offset, byte offset) for the groups of the rows in order, until
// it returns an index other than kNone.
template <class Each>
int64_t for_groups(const Layout& x, int64_t first, int64_t last, Each each) {
  if (x.cols == 0) return kNone;  // no columns, no groups: their length is 0 too
  return x.group == Usual{} ? for_groups_of(x, first, last, Usual{}, each)
                            : for_groups_of(x, first, last, x.group, each);
}

int64_t pack(const Layout& x, int64_t first, int64_t last, const int8_t* trits, uint8_t* packed) {
  return for_groups(x, first, last, [=](int64_t, int64_t, auto n, int64_t at, int64_t byte) {
    uint8_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad |= static_cast<uint8_t>(trits[at + i] + 1) > 2;
    if (bad) {
      int64_t i = at;
      while (static_cast<uint8_t>(trits[i] + 1) <= 2) ++i;
      return i;
    }
    encode_group(trits + at, n, packed + byte);
    return kNone;
  });
}

int64_t unpack(const Layout& x, int64_t first, int64_t last, const uint8_t* packed,
               int8_t* trits) {
  return for_groups(x, first, last, [=](int64_t, int64_t, auto n, int64_t at, int64_t byte) {
    if (!look(packed + byte, bytes_of(n), n).valid)
      return byte + first_invalid(packed + byte, bytes_of(n));
    decode_group(packed + byte, n, trits + at);
    return kNone;
  });
}

int64_t check(const Layout& x, int64_t first, int64_t last, const uint8_t* packed,
              uint8_t* nonzero) {
  return for_groups(x, first, last,
                    [=](int64_t row, int64_t group, auto n, int64_t, int64_t byte) {
                      const Seen seen = look(packed + byte, bytes_of(n), n);
                      nonzero[row * x.groups + group] = seen.nonzero;
                      return seen.valid ? kNone
                                        : byte + first_invalid(packed + byte, bytes_of(n));
                    });
}

template <class F>
void dequantize(const Layout& x, int64_t first, int64_t last, const uint8_t* packed,
                const float* scales, int64_t rows_per_scale, void* out) {
  using Word = typename F::Word;
  constexpr int64_t kChunk = 128 * kPerByte;  // trits that stay in the nearest cache
  for_groups(x, first, last, [=](int64_t row, int64_t group, auto n, int64_t at, int64_t byte) {
    const float scale = scales[row / rows_per_scale * x.groups + group];
    // The products of all three trits, so that what a scale that is not finite gives is right too.
    const Word minus = F::store(-1.0f * scale), zero = F::store(0.0f * scale);
    const Word plus = F::store(scale);
    int8_t trits[kChunk];
    for (int64_t done = 0; done < n; done += kChunk) {
      const int64_t count = smaller(kChunk, n - done);
      decode_group(packed + byte + done / kPerByte, count, trits);
      Word* to = static_cast<Word*>(out) + at + done;
      for (int64_t i = 0; i < count; ++i) {
        const Word sided = trits[i] < 0 ? minus : plus;
        to[i] = trits[i] == 0 ? zero : sided;
      }
    }
    return kNone;
  });
}

constexpr Packing kPacking{
    pack, unpack, check, {dequantize<Float32>, dequantize<BFloat16>, dequantize<Float16>}};

}  // namespace
}  // namespace ternarize
