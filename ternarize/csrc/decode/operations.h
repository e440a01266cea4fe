// Norms, gates, dense products and attention of decode.h. Internal linkage, see shared/formats.h.
#pragma once

#include <cmath>

#include "decode/decode.h"

namespace ternarize {
namespace {

template <class F>
float rounded(float x) {
  return F::load(F::store(x));
}

constexpr int64_t kSumLanes = 16;

float sum_of(const float* lanes) {
  float sum = lanes[0];
  for (int i = 1; i < kSumLanes; ++i) sum += lanes[i];
  return sum;
}

// The sum of term(i) for the n numbers i.
template <class Term>
TERNARIZE_INLINE float sum_in_lanes(int64_t n, Term term) {
  float lanes[kSumLanes] = {};
  int64_t done = 0;
  for (; done + kSumLanes <= n; done += kSumLanes)
    for (int i = 0; i < kSumLanes; ++i) lanes[i] += term(done + i);
  for (int i = 0; done + i < n; ++i) lanes[i] += term(done + i);
  return sum_of(lanes);
}

template <class F>
void rms_norm(int64_t rows, int64_t n, const void* x, const void* weight, float epsilon,
              void* out) {
  const auto* from = static_cast<const typename F::Word*>(x);
  const auto* w = static_cast<const typename F::Word*>(weight);
  auto* to = static_cast<typename F::Word*>(out);
  for (int64_t row = 0; row < rows; ++row, from += n, to += n) {
    const auto square = [=](int64_t i) { return F::load(from[i]) * F::load(from[i]); };
    const float mean = sum_in_lanes(n, square) / static_cast<float>(n);
    const float factor = 1.0f / std::sqrt(mean + epsilon);
    for (int64_t i = 0; i < n; ++i)
      to[i] = F::store(F::load(w[i]) * rounded<F>(F::load(from[i]) * factor));
  }
}

// The rotary embedding of one head: pairs are half a head apart (RoFormer,
// https://arxiv.org/abs/2104.09864, in the order that transformers has them).
template <class F>
void rotate_head(float* x, int64_t dim, const float* cosine, const float* sine) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = rounded<F>(rounded<F>(a * cosine[i]) + rounded<F>(-b * sine[i]));
    x[i + half] =
        rounded<F>(rounded<F>(b * cosine[i + half]) + rounded<F>(a * sine[i + half]));
  }
}

// e^x of x <= 0 (or NaN), to two units in the last place: 2^n e^r with |r| <= log(2) / 2, e^r by its
// series. Below e^-87 it stays there.
TERNARIZE_INLINE float exponential(float x) {
  constexpr float kRound = 0x1.8p23f;  // a sum with it has no fraction
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 0x1.715476p+0f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float y = 1.0f / 5040.0f;
  y = y * r + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const uint32_t power = bits_as<uint32_t>(shifted) - bits_as<uint32_t>(kRound) + 127u;
  return y * bits_as<float>(power << 23);
}

template <class F>
void gate(Activation activation, int64_t n, const void* gate, const void* up, void* out) {
  const auto* g = static_cast<const typename F::Word*>(gate);
  const auto* u = static_cast<const typename F::Word*>(up);
  auto* to = static_cast<typename F::Word*>(out);
  if (activation == Activation::Silu) {
    for (int64_t i = 0; i < n; ++i) {
      const float x = F::load(g[i]), e = exponential(-std::fabs(x));
      const float part = (x < 0.0f ? e : 1.0f) / (1.0f + e);
      to[i] = F::store(rounded<F>(x * part) * F::load(u[i]));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const float x = F::load(g[i]), positive = x < 0.0f ? 0.0f : x;
      to[i] = F::store(rounded<F>(positive * positive) * F::load(u[i]));
    }
  }
}

template <class F>
void dense(int64_t tokens, int64_t rows, int64_t cols, const float* x, const void* w,
           int64_t first, int64_t last, void* out) {
  constexpr int64_t kLanes = 4 * kSumLanes;  // so that an addition need not wait for the one before
  const auto* row = static_cast<const typename F::Word*>(w) + first * cols;
  auto* to = static_cast<typename F::Word*>(out);
  for (int64_t r = first; r < last; ++r, row += cols)
    for (int64_t token = 0; token < tokens; ++token) {
      const float* in = x + token * cols;
      float lanes[kLanes] = {};
      int64_t done = 0;
      for (; done + kLanes <= cols; done += kLanes)
        for (int i = 0; i < kLanes; ++i) lanes[i] += F::load(row[done + i]) * in[done + i];
      for (int i = 0; done + i < cols; ++i) lanes[i] += F::load(row[done + i]) * in[done + i];
      for (int i = 0; i < kSumLanes; ++i)
        lanes[i] = (lanes[i] + lanes[kSumLanes + i]) +
                   (lanes[2 * kSumLanes + i] + lanes[3 * kSumLanes + i]);
      to[token * rows + r] = F::store(sum_of(lanes));
    }
}

// s = e^(s - max s); returns 1 / sum s.
float soften(float* s, int64_t n) {
  float largest = s[0];
  for (int64_t i = 1; i < n; ++i) largest = s[i] > largest ? s[i] : largest;
  for (int64_t i = 0; i < n; ++i) s[i] = exponential(s[i] - largest);
  return 1.0f / sum_in_lanes(n, [=](int64_t i) { return s[i]; });
}

// n numbers, at most kChunk, and zeros behind them.
template <class F>
TERNARIZE_INLINE void load_chunk(const void* x, int64_t at, int64_t n, float* out) {
  if (n == kChunk) return widen<F>(x, at, kChunk, out);
  for (int64_t i = 0; i < kChunk; ++i) out[i] = 0.0f;
  widen<F>(x, at, n, out);
}

// sum[i] += weights[j] * rows[j, i] for n rows of kChunk numbers, `stride` apart.
TERNARIZE_INLINE void add_rows(int64_t n, const float* weights, const float* rows, int64_t stride,
                               float* sum) {
  float all[kChunk];
  for (int64_t i = 0; i < kChunk; ++i) all[i] = sum[i];
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < kChunk; ++i) all[i] += weights[j] * rows[j * stride + i];
  for (int64_t i = 0; i < kChunk; ++i) sum[i] = all[i];
}

template <class F>
void attend(const Attention& a, int64_t first, int64_t last, float* scratch) {
  const int64_t dim = a.dim, queries = a.heads / a.kv_heads, tokens = a.position + 1;
  const int64_t wide_dim = in_chunks(dim), wide_tokens = in_chunks(tokens);
  float* const q = scratch;                     // [queries, wide_dim]
  float* const y = q + queries * wide_dim;      // [queries, wide_dim]
  float* const scores = y + queries * wide_dim;  // [queries, wide_tokens]
  float* const piece = scores + queries * wide_tokens;  // [wide_dim, kChunk] or the other way
  float* const cosine = piece + wide_dim * kChunk;
  float* const sine = cosine + wide_dim;
  widen<F>(a.cosine, 0, dim, cosine);
  widen<F>(a.sine, 0, dim, sine);
  for (int64_t pair = first; pair < last; ++pair) {
    const int64_t keys = pair * dim * a.capacity, values = pair * a.capacity * dim;
    widen<F>(a.k, pair * dim, dim, piece);
    rotate_head<F>(piece, dim, cosine, sine);
    for (int64_t d = 0; d < dim; ++d)
      narrow<F>(piece + d, 1, a.keys, keys + d * a.capacity + a.position);
    widen<F>(a.v, pair * dim, dim, piece);
    narrow<F>(piece, dim, a.values, values + a.position * dim);
    for (int64_t i = 0; i < queries; ++i) {
      widen<F>(a.q, (pair * queries + i) * dim, dim, q + i * wide_dim);
      rotate_head<F>(q + i * wide_dim, dim, cosine, sine);
    }

    for (int64_t i = 0; i < queries * wide_tokens; ++i) scores[i] = 0.0f;
    for (int64_t t = 0; t < tokens; t += kChunk) {
      for (int64_t d = 0; d < dim; ++d)
        load_chunk<F>(a.keys, keys + d * a.capacity + t, smaller(kChunk, tokens - t),
                      piece + d * kChunk);
      for (int64_t i = 0; i < queries; ++i)
        add_rows(dim, q + i * wide_dim, piece, kChunk, scores + i * wide_tokens + t);
    }
    for (int64_t i = 0; i < queries; ++i) {
      float* const s = scores + i * wide_tokens;
      for (int64_t t = 0; t < tokens; ++t) s[t] *= a.scaling;
      const float factor = soften(s, tokens);
      for (int64_t t = 0; t < tokens; ++t) s[t] *= factor;
    }
    for (int64_t i = 0; i < queries * wide_dim; ++i) y[i] = 0.0f;
    for (int64_t t = 0; t < tokens; t += kChunk) {
      const int64_t n = smaller(kChunk, tokens - t);
      for (int64_t row = 0; row < n; ++row)
        for (int64_t d = 0; d < dim; d += kChunk)
          load_chunk<F>(a.values, values + (t + row) * dim + d, smaller(kChunk, dim - d),
                        piece + row * wide_dim + d);
      for (int64_t i = 0; i < queries; ++i)
        for (int64_t d = 0; d < dim; d += kChunk)
          add_rows(n, scores + i * wide_tokens + t, piece + d, wide_dim, y + i * wide_dim + d);
    }
    for (int64_t i = 0; i < queries; ++i)
      narrow<F>(y + i * wide_dim, dim, a.out, (pair * queries + i) * dim);
  }
}

template <class F>
constexpr Decoding kDecoding{rms_norm<F>, gate<F>, dense<F>, attend<F>};

}  // namespace
}  // namespace ternarize
