// Ternarizing of a range of rows: fixed lengths and no branches in the inner loops, so that compilers
// turn them into vector code. Internal linkage, see shared/formats.h.
#pragma once

#include "pack/base3.h"
#include "ternarize/methods.h"
#include "ternarize/sums.h"

namespace ternarize {
namespace {

// Sum and count of the 128 magnitudes of a block that are above a threshold.
template <class F>
TERNARIZE_INLINE Total block_total(const typename F::Bits* w, typename F::Bits threshold) {
  using Bits = typename F::Bits;
  Bits m[kBlock];
  Bits above = 0;
  for (int i = 0; i < kBlock; ++i) {
    const Bits magnitude = w[i] & F::kMask;
    const Bits in = -static_cast<Bits>(magnitude > threshold);
    m[i] = magnitude & in;
    above -= in;
  }
  float v[kBlock];
  for (int i = 0; i < kBlock; ++i) v[i] = F::value(m[i]);
  double x[64];
  for (int i = 0; i < 64; ++i) x[i] = static_cast<double>(v[i]) + static_cast<double>(v[i + 64]);
  return {sum_halves<32>(x), above};
}

// Sum and count of the n magnitudes that are above a threshold; all are above -1.
template <class F>
TERNARIZE_INLINE Total total(const typename F::Bits* w, int64_t n, typename F::Bits threshold) {
  Total part = {0.0, 0};
  if (n == kBlock) {
    part = block_total<F>(w, threshold);
  } else {
    Tree tree;
    int64_t count = 0, at = 0;
    for (; at + kBlock <= n; at += kBlock) {
      part = block_total<F>(w + at, threshold);
      tree.add(part.sum);
      count += part.count;
    }
    if (at < n) {
      typename F::Bits padded[kBlock] = {};
      std::memcpy(padded, w + at, static_cast<size_t>(n - at) * sizeof *w);
      part = block_total<F>(padded, threshold);
      tree.add(part.sum);
      count += part.count;
    }
    part = {tree.finish(), count};
  }
  if (threshold < 0) part.count = n;  // the padding is not above a threshold >= 0
  return part;
}

template <class F>
TERNARIZE_INLINE bool all_finite(const typename F::Bits* w, int64_t n) {
  typename F::Bits most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const typename F::Bits m = w[i] & F::kMask;
    most = m > most ? m : most;
  }
  return most < F::kInfinity;
}

template <class F>
int64_t first_bad(const typename F::Bits* w) {
  int64_t i = 0;
  while ((w[i] & F::kMask) < F::kInfinity) ++i;
  return i;
}

template <class F>
TERNARIZE_INLINE void signs_above(const typename F::Bits* w, int64_t n,
                                  typename F::Bits threshold, int8_t* trits) {
  using Bits = typename F::Bits;
  constexpr int kSign = 8 * sizeof(Bits) - 1;
  for (int64_t i = 0; i < n; ++i) {
    const Bits magnitude = w[i] & F::kMask;
    const Bits sign = (w[i] >> kSign) | 1;
    trits[i] = static_cast<int8_t>(magnitude > threshold ? sign : 0);
  }
}

template <class F>
struct Group {
  using Bits = typename F::Bits;
  const Bits* w;
  int64_t n;
  TERNARIZE_INLINE Total all() const { return total<F>(w, n, static_cast<Bits>(-1)); }
  TERNARIZE_INLINE Total above(Bits threshold) const { return total<F>(w, n, threshold); }
  static TERNARIZE_INLINE Bits at(double x) { return F::floor(x); }
};

template <class F>
const typename F::Bits* bits_of(const void* weights) {
  return static_cast<const typename F::Bits*>(weights);
}

template <class F>
int64_t ternarize(Method method, const Layout& x, int64_t first, int64_t last, const void* weights,
                  int8_t* trits, double* scales) {
  return for_groups(x, first, last,
                    [=](int64_t row, int64_t group, auto n, int64_t at, int64_t) {
                      const auto* w = bits_of<F>(weights) + at;
                      if (!all_finite<F>(w, n)) return at + first_bad<F>(w);
                      typename F::Bits threshold;
                      scales[row * x.groups + group] = fit(method, Group<F>{w, n}, &threshold);
                      signs_above<F>(w, n, threshold, trits + at);
                      return kNone;
                    });
}

// ---------------------------------------------------------------------------------------------
// Whole tensors with one scale

template <class F>
int64_t first_not_finite(const Layout& x, int64_t first, int64_t last, const void* weights) {
  for (int64_t row = first; row < last; ++row) {
    const auto* w = bits_of<F>(weights) + row * x.cols;
    if (!all_finite<F>(w, x.cols)) return row * x.cols + first_bad<F>(w);
  }
  return kNone;
}

template <class F>
void row_totals(const Layout& x, int64_t first, int64_t last, const void* weights,
                double threshold, Total* totals) {
  const auto t = threshold < 0 ? static_cast<typename F::Bits>(-1) : F::floor(threshold);
  for (int64_t row = first; row < last; ++row)
    totals[row] = total<F>(bits_of<F>(weights) + row * x.cols, x.cols, t);
}

template <class F>
void cut(const Layout& x, int64_t first, int64_t last, const void* weights, double threshold,
         int8_t* trits) {
  const int64_t at = first * x.cols, n = (last - first) * x.cols;
  signs_above<F>(bits_of<F>(weights) + at, n, F::floor(threshold), trits + at);
}

// ---------------------------------------------------------------------------------------------
// Weights that are trits and scales already

// Trits of w where each is 0 or has this magnitude.
template <class F>
bool signs_of(const typename F::Bits* w, int64_t n, typename F::Bits magnitude, int8_t* trits) {
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t count = smaller(kBlock, n - at);
    typename F::Bits other = 0;
    for (int64_t i = 0; i < count; ++i) {
      const typename F::Bits m = w[at + i] & F::kMask;
      other |= m != 0 && m != magnitude;
    }
    if (other) return false;
    signs_above<F>(w + at, count, 0, trits + at);
  }
  return true;
}

template <class F>
typename F::Bits first_magnitude_of(const typename F::Bits* w, int64_t n) {
  int64_t i = 0;
  while (i < n && (w[i] & F::kMask) == 0) ++i;
  return i < n ? w[i] & F::kMask : 0;
}

template <class F>
bool levels(const Layout& x, int64_t first, int64_t last, const void* weights, int8_t* trits,
            double* scales) {
  return kNone == for_groups(x, first, last,
                             [=](int64_t row, int64_t group, auto n, int64_t at, int64_t) {
                               const auto* w = bits_of<F>(weights) + at;
                               const typename F::Bits magnitude = first_magnitude_of<F>(w, n);
                               if (magnitude >= F::kInfinity) return at;
                               scales[row * x.groups + group] =
                                   static_cast<double>(F::value(magnitude));
                               return signs_of<F>(w, n, magnitude, trits + at) ? kNone : at;
                             });
}

template <class F>
bool levels_of(const Layout& x, int64_t first, int64_t last, const void* weights,
               double magnitude, int8_t* trits) {
  const int64_t at = first * x.cols, n = (last - first) * x.cols;
  return signs_of<F>(bits_of<F>(weights) + at, n, F::floor(magnitude), trits + at);
}

template <class F>
double first_magnitude(const Layout& x, const void* weights) {
  const typename F::Bits m = first_magnitude_of<F>(bits_of<F>(weights), x.rows * x.cols);
  return m < F::kInfinity ? static_cast<double>(F::value(m)) : -1.0;
}

// ---------------------------------------------------------------------------------------------
// Distances

// A block of 128: squares of what the trits miss, and of the weights. In float within the block:
// it is a measure to be read by people, and twice as fast.
template <class F>
TERNARIZE_INLINE Distance block_distance(const typename F::Bits* w, const int8_t* trits,
                                         float scale) {
  float error[kBlock], energy[kBlock];
  int32_t used[kBlock];
  int32_t nonzero = 0;
  for (int i = 0; i < kBlock; ++i) used[i] = -static_cast<int32_t>(trits[i] != 0);
  for (int i = 0; i < kBlock; ++i) nonzero -= used[i];
  const int32_t bits = bits_as<int32_t>(scale);
  for (int i = 0; i < kBlock; ++i) {
    const float v = F::value(w[i] & F::kMask);
    const float missed = v - bits_as<float>(bits & used[i]);
    error[i] = missed * missed;
    energy[i] = v * v;
  }
  return {sum_halves<kBlock / 2>(error), sum_halves<kBlock / 2>(energy), nonzero};
}

template <class F>
TERNARIZE_INLINE Distance group_distance(const typename F::Bits* w, const int8_t* trits, int64_t n,
                                         float scale) {
  if (n == kBlock) return block_distance<F>(w, trits, scale);
  Tree error, energy;
  int64_t nonzero = 0;
  for (int64_t at = 0; at < n; at += kBlock) {
    typename F::Bits padded_w[kBlock] = {};
    int8_t padded_trits[kBlock] = {};
    const auto count = static_cast<size_t>(smaller(kBlock, n - at));
    std::memcpy(padded_w, w + at, count * sizeof *w);
    std::memcpy(padded_trits, trits + at, count);
    const Distance part = block_distance<F>(padded_w, padded_trits, scale);
    error.add(part.error);
    energy.add(part.energy);
    nonzero += part.nonzero;
  }
  return {error.finish(), energy.finish(), nonzero};
}

// The distance of a row, group by group: the tree adds 128 groups at a time, as it does blocks.
class RowDistance {
 public:
  void add(const Distance& part) {
    errors_[used_] = part.error;
    energies_[used_++] = part.energy;
    nonzero_ += part.nonzero;
    if (used_ == kBlock) flush();
  }

  Distance finish() {
    if (used_) flush();
    return {error_.finish(), energy_.finish(), nonzero_};
  }

 private:
  void flush() {
    for (int i = used_; i < kBlock; ++i) errors_[i] = energies_[i] = 0.0;
    error_.add(sum_block(errors_));
    energy_.add(sum_block(energies_));
    used_ = 0;
  }

  Tree error_, energy_;
  double errors_[kBlock], energies_[kBlock];
  int used_ = 0;
  int64_t nonzero_ = 0;
};

template <class F>
void distances(const Layout& x, int64_t first, int64_t last, const void* weights,
               const int8_t* trits, const double* scales, int64_t rows_per_scale,
               Distance* distances) {
  for (int64_t row = first; row < last; ++row) {
    RowDistance sums;
    for_groups(x, row, row + 1, [&](int64_t, int64_t group, auto n, int64_t at, int64_t) {
      const auto scale = static_cast<float>(scales[row / rows_per_scale * x.groups + group]);
      sums.add(group_distance<F>(bits_of<F>(weights) + at, trits + at, n, scale));
      return kNone;
    });
    distances[row] = sums.finish();
  }
}

// ---------------------------------------------------------------------------------------------
// All of it, a group at a time

template <class F>
int64_t ternarize_packed(Method method, const Layout& x, int64_t first, int64_t last,
                         const void* weights, uint8_t* packed, double* scales,
                         Distance* distances, int8_t* trits) {
  for (int64_t row = first; row < last; ++row) {
    RowDistance sums;
    const int64_t bad = for_groups(
        x, row, row + 1, [&](int64_t, int64_t group, auto n, int64_t at, int64_t byte) {
          const auto* w = bits_of<F>(weights) + at;
          if (!all_finite<F>(w, n)) return at + first_bad<F>(w);
          typename F::Bits threshold;
          double scale = fit(method, Group<F>{w, n}, &threshold);
          // One that is too small for a float cannot be stored: the group is 0.
          if (static_cast<float>(scale) == 0.0f) scale = 0.0, threshold = F::kMask;
          scales[row * x.groups + group] = scale;
          signs_above<F>(w, n, threshold, trits);
          encode_group(trits, n, packed + byte);
          sums.add(group_distance<F>(w, trits, n, static_cast<float>(scale)));
          return kNone;
        });
    if (bad != kNone) return bad;
    distances[row] = sums.finish();
  }
  return kNone;
}

template <class F>
constexpr Ternarizing kTernarizing{ternarize<F>, first_not_finite<F>, row_totals<F>,
                                   cut<F>,       levels<F>,           levels_of<F>,
                                   first_magnitude<F>, distances<F>,
                                   ternarize_packed<F>};

}  // namespace
}  // namespace ternarize
