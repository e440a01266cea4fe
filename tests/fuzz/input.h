// What the fuzzers of the compiled core have in common: shapes and numbers drawn from the input,
// memory of exactly the size that the core is promised, and the end when a result is wrong.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "cpus/cpus.h"

namespace fuzz {

using namespace ternarize;

// Numbers from the bytes of an input. When they are used up, more are made from all of them, so that a
// short input can stand for a large matrix.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : at_(data), end_(data + size) {
    for (size_t i = 0; i < size; ++i) state_ = (state_ ^ data[i]) * 0x100000001b3u;  // FNV-1a
  }
  uint8_t byte() { return at_ < end_ ? *at_++ : static_cast<uint8_t>(more() >> 32); }
  // 0 to n - 1, of one byte where that is enough.
  int64_t below(int64_t n) {
    int64_t value = byte();
    if (n > 256) value = value << 8 | byte();
    return n > 0 ? value % n : 0;
  }
  template <class T>
  T bits() {
    T value;
    uint8_t bytes[sizeof(T)];
    for (uint8_t& one : bytes) one = byte();
    std::memcpy(&value, bytes, sizeof(T));
    return value;
  }
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }

 private:
  uint64_t more() {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }
  const uint8_t* at_;
  const uint8_t* end_;
  uint64_t state_ = 0xcbf29ce484222325u;
};

// Heap memory of exactly n elements: an access beside it is seen. Filled with a pattern that no test
// takes for a result.
template <class T>
struct Exact {
  explicit Exact(int64_t n)
      : size(n), at(static_cast<T*>(std::malloc(n ? static_cast<size_t>(n) * sizeof(T) : 1))) {
    if (n) std::memset(static_cast<void*>(at), 0xa5, static_cast<size_t>(n) * sizeof(T));
  }
  ~Exact() { std::free(at); }
  Exact(const Exact&) = delete;
  T& operator[](int64_t i) { return at[i]; }
  const T& operator[](int64_t i) const { return at[i]; }
  int64_t size;
  T* at;
};

#define FUZZ_CHECK(holds, ...)                                              \
  do {                                                                      \
    if (!(holds)) {                                                         \
      std::fprintf(stderr, "%s: %s: ", ::ternarize::variant().name, #holds); \
      std::fprintf(stderr, __VA_ARGS__);                                    \
      std::fprintf(stderr, "\n");                                           \
      std::abort();                                                         \
    }                                                                       \
  } while (false)

inline long long ll(int64_t value) { return static_cast<long long>(value); }

// ---------------------------------------------------------------------------------------------
// Numbers of a kind, by arithmetic: what is tested does it by moving bits.

struct Format {
  int mantissa;  // bits, the leading one not counted
  int lowest;    // exponent of the smallest normal number
  double largest;
};

inline Format format_of(Kind kind) {
  if (kind == Kind::F32) return {23, -126, 0x1.fffffep127};
  if (kind == Kind::BF16) return {7, -126, 0x1.fep127};
  return {10, -14, 65504.0};
}

// The number of the bits of a 16-bit kind.
inline double number_of(Kind kind, uint16_t bits) {
  const Format format = format_of(kind);
  const int exponent = (bits & 0x7fff) >> format.mantissa;
  const int fraction = bits & ((1 << format.mantissa) - 1);
  const int most = (1 << (15 - format.mantissa)) - 1;
  double value = exponent == most ? (fraction ? std::nan("") : INFINITY)
                 : exponent == 0
                     ? std::ldexp(fraction, format.lowest - format.mantissa)
                     : std::ldexp(fraction + (1 << format.mantissa),
                                  exponent - 1 + format.lowest - format.mantissa);
  return bits & 0x8000 ? -value : value;
}

// The number at i.
inline double value_of(Kind kind, const void* numbers, int64_t i) {
  if (kind == Kind::F32) return static_cast<const float*>(numbers)[i];
  static const std::vector<double>* const tables = [] {
    static std::vector<double> made[2];
    for (int bits = 0; bits < 1 << 16; ++bits) {
      made[0].push_back(number_of(Kind::BF16, static_cast<uint16_t>(bits)));
      made[1].push_back(number_of(Kind::F16, static_cast<uint16_t>(bits)));
    }
    return made;
  }();
  return tables[kind == Kind::F16][static_cast<const uint16_t*>(numbers)[i]];
}

// A double rounded to a kind, to nearest, at the middle to even.
inline double rounded_to(Kind kind, double value) {
  if (kind == Kind::F32) return static_cast<float>(value);
  if (!std::isfinite(value) || value == 0.0) return value;
  const Format format = format_of(kind);
  const int exponent = std::max(std::ilogb(value), format.lowest) - format.mantissa;
  const double result = std::ldexp(std::nearbyint(std::ldexp(value, -exponent)), exponent);
  return std::fabs(result) > format.largest ? std::copysign(INFINITY, value) : result;
}

// Equal, the sign of 0 too; all NaN are one.
inline bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

// n numbers of a kind, in one of a few manners: any bits, or small and finite (then `bounded`).
struct Numbers {
  Numbers(Kind kind, int64_t n) : kind(kind), memory(n * size_of(kind)), n(n) {
    for (int64_t i = 0; i < memory.size; ++i) memory[i] = 0;
  }
  Numbers(Input& in, Kind kind, int64_t n) : kind(kind), memory(n * size_of(kind)), n(n) {
    const int64_t manner = in.below(4);
    bounded = manner != 0;
    const int shift = manner == 3 ? static_cast<int>(in.below(60)) - 30 : 0;
    if (manner == 3 && kind == Kind::F16) bounded = shift <= 4;
    for (int64_t i = 0; i < n; ++i) {
      if (manner == 0) {
        const uint32_t bits = in.bits<uint32_t>();
        std::memcpy(memory.at + i * size_of(kind), &bits, static_cast<size_t>(size_of(kind)));
        continue;
      }
      const double x = manner == 1 ? in.byte() % 7 - 3 : in.bits<int16_t>() / 4096.0;
      set(i, std::ldexp(x, shift));
    }
    bounded = bounded && (manner != 3 || (shift <= 8 && shift >= -8));
  }
  void set(int64_t i, double value) {
    const double x = rounded_to(kind, value);
    if (kind == Kind::F32) {
      const auto single = static_cast<float>(x);
      std::memcpy(memory.at + i * 4, &single, 4);
      return;
    }
    const Format format = format_of(kind);
    uint16_t bits = 0;
    if (std::isinf(x)) {
      bits = static_cast<uint16_t>(((1 << (15 - format.mantissa)) - 1) << format.mantissa);
    } else if (x != 0.0) {
      const int exponent = std::max(std::ilogb(x), format.lowest);
      const auto whole = static_cast<int>(std::ldexp(std::fabs(x), format.mantissa - exponent));
      bits = static_cast<uint16_t>(whole + ((exponent - format.lowest) << format.mantissa));
    }
    if (std::signbit(x)) bits |= 0x8000;
    std::memcpy(memory.at + i * 2, &bits, 2);
  }
  double operator[](int64_t i) const { return value_of(kind, memory.at, i); }
  Kind kind;
  Exact<uint8_t> memory;
  int64_t n;
  bool bounded = true;  // finite, and so small that sums of products do not overflow
};

// ---------------------------------------------------------------------------------------------
// Shapes

struct Shape {
  int64_t rows, cols, group_size;
};

// Mostly small, so that there are many: of 32 one has many rows, one many columns, four some of both.
inline Shape shape_of(Input& in, int64_t most_rows, int64_t most_cols) {
  const int64_t manner = in.below(32);
  const int64_t rows = in.below(manner == 0 ? most_rows + 1 : manner < 6 ? 40 : 4);
  int64_t cols = in.below(manner == 1 ? most_cols + 1 : manner < 6 ? 140 : 32);
  cols = std::min(cols, 1500 / std::max<int64_t>(1, rows));  // inputs that reach more are kept, and slow
  const int64_t group_size =
      in.below(4) ? in.below(manner < 6 ? 140 : 24) - 1
                  : in.pick<int64_t>({-1, 0, 5, 64, 128, 256, 1 << 20, INT64_MAX});
  return {rows, cols, group_size};
}

inline int threads_of(Input& in) { return in.byte() % 64 == 63 ? 2 : 1; }
inline Kind kind_of(Input& in) { return in.pick({Kind::F32, Kind::BF16, Kind::F16}); }

// The first and the length of group g, the way formats/base3.md says it.
inline int64_t group_of(const Shape& s) {
  return s.group_size <= 0 || s.group_size > s.cols ? s.cols : s.group_size;
}

// Takes one of the variants that the CPU has.
inline void use_one(Input& in) {
  int64_t count = 0;
  while (variants()[count].name) ++count;
  use(variants()[in.below(count)].name);
}

}  // namespace fuzz
