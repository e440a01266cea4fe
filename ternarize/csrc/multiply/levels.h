// Inputs to integers, and what the sums of integers mean: see Levels. Internal linkage, see
// shared/formats.h.
#pragma once

#include "multiply/multiply.h"

namespace ternarize {
namespace {

constexpr int64_t kPiece = 64;  // numbers that are handled at once

// Up to kPiece numbers, and zeros behind them. Of whole pieces the compiler knows the length.
TERNARIZE_INLINE void widen_piece(Kind kind, const void* x, int64_t at, int64_t n, float* out) {
  if (n == kPiece) return widen(kind, x, at, kPiece, out);
  std::memset(out, 0, kPiece * sizeof(float));
  widen(kind, x, at, n, out);
}

// max |x|; NaN if one is. Magnitudes order like their bits, those of infinity and NaN last.
float largest(Kind kind, const void* x, int64_t at, int64_t n) {
  int32_t most[kPiece] = {};
  for (int64_t done = 0; done < n; done += kPiece) {
    float piece[kPiece];
    widen_piece(kind, x, at + done, smaller(kPiece, n - done), piece);
    for (int i = 0; i < kPiece; ++i) {
      const int32_t magnitude = bits_as<int32_t>(piece[i]) & 0x7fffffff;
      most[i] = most[i] > magnitude ? most[i] : magnitude;
    }
  }
  int32_t all = 0;
  for (int i = 0; i < kPiece; ++i) all = all > most[i] ? all : most[i];
  return bits_as<float>(all);
}

// To the nearest integer, even at the middle, of |x| <= 2^23: the sum has no room for a fraction.
TERNARIZE_INLINE float nearest(float x) {
  const uint32_t sign = bits_as<uint32_t>(x) & 0x80000000u;
  const float magnitude = bits_as<float>(bits_as<uint32_t>(x) ^ sign);
  return bits_as<float>(bits_as<uint32_t>((magnitude + 0x1p23f) - 0x1p23f) | sign);
}

// 2^k of Levels.
float fixed_point(float absmax) {
  const int exponent = static_cast<int>(bits_as<uint32_t>(absmax) >> 23) - 127;  // -127: subnormal
  const int k = static_cast<int>(smaller(22 - exponent, 126));
  const float power = bits_as<float>(static_cast<uint32_t>(k + 127) << 23);
  return absmax * power > 8355711.0f ? power / 2 : power;
}

// Sets digits[p] to those of a piece and adds their sums to sums[p].
template <int parts>
TERNARIZE_INLINE void quantize_piece(const float* x, float divisor, float power,
                                     int8_t (*digits)[kPiece], int32_t* sums) {
  int32_t whole[kPiece], sum = 0;
  if (parts == 1) {
    for (int i = 0; i < kPiece; ++i)
      whole[i] = static_cast<int32_t>(nearest(x[i] * 127.0f / divisor));
    for (int i = 0; i < kPiece; ++i) digits[0][i] = static_cast<int8_t>(whole[i]);
    for (int i = 0; i < kPiece; ++i) sum += whole[i];
    sums[0] += sum;
    return;
  }
  for (int i = 0; i < kPiece; ++i) whole[i] = static_cast<int32_t>(nearest(x[i] * power));
  for (int p = 0; p < parts; ++p) {
    // the last digit with its sign; what is left without it is a multiple of 256
    int32_t digit[kPiece];
    sum = 0;
    for (int i = 0; i < kPiece; ++i) digit[i] = ((whole[i] + 128) & 255) - 128;
    for (int i = 0; i < kPiece; ++i) whole[i] = (whole[i] - digit[i]) >> 8;
    for (int i = 0; i < kPiece; ++i) digits[p][i] = static_cast<int8_t>(digit[i]);
    for (int i = 0; i < kPiece; ++i) sum += digit[i];
    sums[p] += sum;
  }
}

template <int parts>
void quantize_token(const Lanes& x, Kind kind, const void* in, int64_t token, const Levels& out) {
  const int64_t groups = x.stored.groups, at = token * x.stored.cols;
  int8_t* q = out.q + token * parts * out.stride;
  int32_t* sums = out.sums + token * parts * groups;
  const float absmax = largest(kind, in, at, x.stored.cols);
  const bool finite = bits_as<uint32_t>(absmax * 127.0f) < 0x7f800000u;
  if (!finite) {
    out.factors[token] = bits_as<float>(0x7fc00000u);
    for (int p = 0; p < parts; ++p) {
      std::memset(q + p * out.stride, 0, static_cast<size_t>(x.quads * 4));
      std::memset(sums + p * groups, 0, static_cast<size_t>(groups) * sizeof(int32_t));
    }
    return;
  }
  const float power = fixed_point(absmax), divisor = absmax == 0.0f ? 1.0f : absmax;
  out.factors[token] = parts == 1 ? absmax / 127.0f : 1.0f / power;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t n = x.cols_of(g), padded = x.quads_of(g) * 4;
    const int64_t from = at + g * x.stored.group;
    int8_t* to = q + g * x.group_quads * 4;
    int32_t sum[parts] = {};
    for (int64_t done = 0; done < padded; done += kPiece) {
      float piece[kPiece];
      int8_t digits[parts][kPiece];
      widen_piece(kind, in, from + done, smaller(kPiece, n - done), piece);
      quantize_piece<parts>(piece, divisor, power, digits, sum);
      for (int p = 0; p < parts; ++p) {
        if (padded - done >= kPiece)
          std::memcpy(to + p * out.stride + done, digits[p], kPiece);
        else
          std::memcpy(to + p * out.stride + done, digits[p], static_cast<size_t>(padded - done));
      }
    }
    for (int p = 0; p < parts; ++p) sums[p * groups + g] = sum[p];
  }
}

void quantize(const Lanes& x, Kind kind, const void* in, int64_t first, int64_t last,
              const Levels& out) {
  const auto one = out.parts == 1 ? quantize_token<1> : quantize_token<3>;
  for (int64_t token = first; token < last; ++token) one(x, kind, in, token, out);
}

// A group's value from the sums of its three parts.
TERNARIZE_INLINE float value_of(int32_t s0, int32_t s1, int32_t s2) {
  const float f0 = static_cast<float>(s0), f1 = static_cast<float>(s1), f2 = static_cast<float>(s2);
  return f2 * 65536.0f + (f1 * 256.0f + f0);
}

// y = all * factor, rounded, of n rows of the most that there are in a block.
template <int most>
TERNARIZE_INLINE void store(const float* all, float factor, int64_t n, Kind kind, int64_t at,
                            void* out) {
  float y[most];
  for (int i = 0; i < most; ++i) y[i] = all[i] * factor;
  if (n == most)
    narrow(kind, y, most, out, at);
  else
    narrow(kind, y, n, out, at);
}

}  // namespace
}  // namespace ternarize
