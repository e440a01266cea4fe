// The methods: from sums of |w| to a scale and a threshold. Internal linkage, see shared/formats.h.
#pragma once

#include "ternarize/ternarize.h"

namespace ternarize {
namespace {

inline double mean(Total t) { return t.count ? t.sum / static_cast<double>(t.count) : 0.0; }

// The scale of a group or of a tensor, and what the |w| are above whose trits are not 0. Of `weights`,
// all() is the Total of all |w|, above(threshold) that of those above it, and at(x) a threshold.
//
// BitNet b1.58 (arXiv 2402.17764), eq. 1-3: scale = mean |w|, trit = clip(round(w / scale)), and
// |w / scale| rounds to 1 or more where |w| > scale / 2.
// TWN (arXiv 1605.04711): threshold = 0.7 mean |w|, scale = mean of the |w| above it.
// Itf repeats the least-squares steps from there: the best trits of a scale are those above half of
// it, the best scale of these trits is the mean of their |w|; until the trits stay.
template <class Weights, class Threshold>
double fit(Method method, const Weights& weights, Threshold* threshold) {
  const double mean_all = mean(weights.all());
  if (method == Method::Absmean) {
    *threshold = weights.at(mean_all / 2);
    return mean_all;
  }
  *threshold = weights.at(0.7 * mean_all);
  Total now = weights.above(*threshold);
  if (method == Method::Twn) return mean(now);
  for (int i = 0; i < 100; ++i) {
    const Threshold next = weights.at(mean(now) / 2);
    const Total then = weights.above(next);
    // Of two sets of |w| above a threshold one holds the other: they are equal if their counts are.
    if (then.count == now.count) break;
    *threshold = next;
    now = then;
  }
  return mean(now);
}

}  // namespace
}  // namespace ternarize
