// What all folders share: float formats bit by bit, threads (parallel.h, pool.h), memory (workspace.h).
//
// Headers with loops or arithmetic are compiled once for each instruction set. So everything in them
// has internal linkage, and nothing of the C++ library is used in them but types: an inline function
// that is shared with another file could be taken by the linker from the AVX-512 build and then run on
// a CPU without it.
#pragma once

#include <cstdint>
#include <cstring>

// For the inner loops, so that what their caller knows of lengths and thresholds is compiled in. And
// for the functions in headers that sources of one instruction set include: they leave no copy that
// the linker could take for all.
#ifdef _MSC_VER
#define TERNARIZE_INLINE __forceinline
#else
#define TERNARIZE_INLINE inline __attribute__((always_inline))
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "ternarize's compiled core is for little-endian machines"
#endif

namespace ternarize {

// Bits of a weight, an input or an output.
enum class Kind { F32, BF16, F16 };
constexpr TERNARIZE_INLINE int64_t size_of(Kind kind) { return kind == Kind::F32 ? 4 : 2; }  // bytes

constexpr int64_t kNone = -1;  // "no such index", of the functions that return the first bad one

namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t lines(int64_t bytes) { return ceil_div(bytes, 64) * 64; }  // whole cache lines

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The largest float <= x, of an x >= 0 that is at most the largest float. It rounds to nearest and
// steps back one where that went up.
inline uint32_t floor_float(double x) {
  const float nearest = static_cast<float>(x);
  return bits_as<uint32_t>(nearest) - (static_cast<double>(nearest) > x);
}

// Each format: Word, what a number is stored in; `load`, its value; `store`, the number nearest to a
// float, of two the even one. Of magnitudes: Bits, the signed integer of its size; their mask, which is
// also the largest positive Bits; infinity; the value of a finite one; and floor(x), that of the
// largest number <= x. With it |w| > x is a comparison of integers: for a w of the format,
// |w| > x  <=>  |w| > floor(x).
struct Float32 {
  using Word = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }

  using Bits = int32_t;
  static constexpr Bits kMask = 0x7fffffff, kInfinity = 0x7f800000;
  static float value(Bits m) { return bits_as<float>(m); }
  static Bits floor(double x) { return static_cast<Bits>(floor_float(x)); }
};

struct BFloat16 {
  using Word = uint16_t;
  static float load(Word x) { return bits_as<float>(static_cast<uint32_t>(x) << 16); }
  static Word store(float x) {
    const uint32_t u = bits_as<uint32_t>(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<Word>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
  }

  using Bits = int16_t;
  static constexpr Bits kMask = 0x7fff, kInfinity = 0x7f80;
  static float value(Bits m) { return load(static_cast<Word>(m)); }
  static Bits floor(double x) { return static_cast<Bits>(floor_float(x) >> 16); }
};

// The exponent's bias is 112 less than a float's; a subnormal is a multiple of 2^-24.
struct Float16 {
  using Word = uint16_t;
  static float load(Word x) {
    const uint32_t wide = static_cast<uint32_t>(x & 0x7fff) << 13;
    const uint32_t normal = wide + (112u << 23);
    const uint32_t subnormal = bits_as<uint32_t>(static_cast<float>(x & 0x7fff) * 0x1p-24f);
    const uint32_t finite = wide < 0x400u << 13 ? subnormal : normal;
    const uint32_t magnitude = wide < 0x7c00u << 13 ? finite : wide | 0x7f800000u;
    return bits_as<float>(magnitude | static_cast<uint32_t>(x & 0x8000) << 16);
  }
  static Word store(float x) {
    const uint32_t u = bits_as<uint32_t>(x), m = u & 0x7fffffffu;
    uint32_t half;
    if (m > 0x7f800000u) {
      half = 0x7e00;
    } else if (m >= 0x47800000u) {  // 2^16: infinity
      half = 0x7c00;
    } else if (m < 0x38800000u) {  // under 2^-14: the sum's last bit is 2^-24, a subnormal's unit
      half = bits_as<uint32_t>(bits_as<float>(m) + 0.5f) - 0x3f000000u;
    } else {
      half = (m + 0xfffu + ((m >> 13) & 1) - (112u << 23)) >> 13;
    }
    return static_cast<Word>(half | (u >> 16 & 0x8000u));
  }

  using Bits = int16_t;
  static constexpr Bits kMask = 0x7fff, kInfinity = 0x7c00;
  static float value(Bits m) {
    const int32_t wide = m;
    const float normal = bits_as<float>((wide << 13) + (112 << 23));
    const float subnormal = static_cast<float>(wide) * 0x1p-24f;
    return wide < 0x400 ? subnormal : normal;
  }
  static Bits floor(double x) {
    const uint32_t f = floor_float(x);
    if (f < 0x38800000u) return static_cast<Bits>(bits_as<float>(f) * 0x1p24f);
    return static_cast<Bits>(smaller((f - (112u << 23)) >> 13, kInfinity - 1));
  }
};

// n numbers from `at` on as floats, and floats rounded to n such numbers.
template <class F>
TERNARIZE_INLINE void widen(const void* x, int64_t at, int64_t n, float* out) {
  const auto* from = static_cast<const typename F::Word*>(x) + at;
  for (int64_t i = 0; i < n; ++i) out[i] = F::load(from[i]);
}

template <class F>
TERNARIZE_INLINE void narrow(const float* x, int64_t n, void* out, int64_t at) {
  auto* to = static_cast<typename F::Word*>(out) + at;
  for (int64_t i = 0; i < n; ++i) to[i] = F::store(x[i]);
}

TERNARIZE_INLINE void widen(Kind kind, const void* x, int64_t at, int64_t n, float* out) {
  if (kind == Kind::F32) return widen<Float32>(x, at, n, out);
  if (kind == Kind::BF16) return widen<BFloat16>(x, at, n, out);
  return widen<Float16>(x, at, n, out);
}

TERNARIZE_INLINE void narrow(Kind kind, const float* x, int64_t n, void* out, int64_t at) {
  if (kind == Kind::F32) return narrow<Float32>(x, n, out, at);
  if (kind == Kind::BF16) return narrow<BFloat16>(x, n, out, at);
  return narrow<Float16>(x, n, out, at);
}

}  // namespace
}  // namespace ternarize
