// The loops of latent.h. Internal linkage, see shared/formats.h.
#pragma once

#include <cmath>

#include "latent/latent.h"

namespace ternarize {
namespace {

constexpr int64_t kGradientLanes = 16;  // in which a group's gradients are added up first

// Calls work(at, n, index of the scale) for the groups of the rows [first, last).
template <class Work>
TERNARIZE_INLINE void for_scales(const Layout& x, int64_t first, int64_t last, Work work) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t group = 0; group < x.groups; ++group) {
      const int64_t col = group * x.group;
      work(row * x.cols + col, smaller(x.group, x.cols - col), row * x.groups + group);
    }
}

template <class F>
void read(const Layout& x, int64_t first, int64_t last, const float* latent, const float* scales,
          void* out) {
  auto* to = static_cast<typename F::Word*>(out);
  for_scales(x, first, last, [=](int64_t at, int64_t n, int64_t index) {
    const float scale = scales[index], half = scale * 0.5f;
    const float* v = latent + at;
    for (int64_t i = 0; i < n; ++i) {
      const float size = std::fabs(v[i]) > half ? scale : 0.0f;
      to[at + i] = F::store(std::copysign(size, v[i]));
    }
  });
}

template <class F>
void gradients(const Layout& x, int64_t first, int64_t last, const float* latent,
               const float* scales, const void* given, float edge, float* to_latent,
               float* to_scales) {
  const auto* from = static_cast<const typename F::Word*>(given);
  for_scales(x, first, last, [=](int64_t at, int64_t n, int64_t index) {
    const float scale = scales[index], half = scale * 0.5f;
    const float* v = latent + at;
    const typename F::Word* above = from + at;
    float* to = to_latent + at;
    const auto term = [=](int64_t i) {
      const float gradient = F::load(above[i]), ratio = v[i] / scale;
      const float inside = std::fabs(ratio) < edge ? gradient : 0.0f;
      const float trit = std::copysign(std::fabs(v[i]) > half ? 1.0f : 0.0f, v[i]);
      to[i] = inside;
      return trit * gradient - ratio * inside;
    };
    float lanes[kGradientLanes] = {};
    int64_t done = 0;
    for (; done + kGradientLanes <= n; done += kGradientLanes)
      for (int64_t i = 0; i < kGradientLanes; ++i) lanes[i] += term(done + i);
    for (int64_t i = 0; done + i < n; ++i) lanes[i] += term(done + i);
    float sum = lanes[0];
    for (int64_t i = 1; i < kGradientLanes; ++i) sum += lanes[i];
    to_scales[index] = sum;
  });
}

template <class F>
constexpr Latent kLatent{read<F>, gradients<F>};

}  // namespace
}  // namespace ternarize
