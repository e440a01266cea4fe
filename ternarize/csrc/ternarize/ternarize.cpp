// The threads of ternarizing, and tensors with one scale, which take a pass for each sum.
#include "ternarize/ternarize.h"

#include <vector>

#include "cpus/cpus.h"
#include "shared/parallel.h"
#include "ternarize/methods.h"
#include "ternarize/sums.h"

namespace ternarize {
namespace {

const Ternarizing& of(Kind kind) { return kernels().ternarizing[static_cast<int>(kind)]; }

// True if work(first, last) is true for all parts; an ordinary tensor, for which it is not, ends with
// the first row, before any thread is started.
template <class Work>
bool all_of(const Layout& x, int threads, Work work) {
  return work(0, smaller(1, x.rows)) &&
         first_of(x.rows, x.cols, threads, [&](int64_t first, int64_t last) {
           return work(first, last) ? kNone : first;
         }) == kNone;
}

// Of the distances of rows, at least one.
Distance sum_of(const Distance* rows, int64_t n) {
  int64_t nonzero = 0;
  for (int64_t row = 0; row < n; ++row) nonzero += rows[row].nonzero;
  constexpr int64_t kStride = sizeof(Distance) / sizeof(double);
  return {fixed_sum(&rows->error, n, kStride), fixed_sum(&rows->energy, n, kStride), nonzero};
}

struct Tensor {
  Kind kind;
  const Layout& x;
  const void* weights;
  Total* totals;
  int threads;

  static double at(double x) { return x; }
  Total all() const { return above(-1.0); }
  Total above(double threshold) const {
    parallel_for(x.rows, x.cols, threads, [&](int, int64_t first, int64_t last) {
      of(kind).row_totals(x, first, last, weights, threshold, totals);
    });
    int64_t count = 0;
    for (int64_t row = 0; row < x.rows; ++row) count += totals[row].count;
    constexpr int64_t kStride = sizeof(Total) / sizeof(double);
    return {x.rows ? fixed_sum(&totals->sum, x.rows, kStride) : 0.0, count};
  }
};

}  // namespace

int64_t ternarize(Method method, Kind kind, const Layout& x, const void* weights, int8_t* trits,
                  double* scales, int threads) {
  return first_of(x.rows, x.cols, threads, [&](int64_t first, int64_t last) {
    return of(kind).ternarize(method, x, first, last, weights, trits, scales);
  });
}

bool levels(Kind kind, const Layout& x, const void* weights, int8_t* trits, double* scales,
            int threads) {
  return all_of(x, threads, [&](int64_t first, int64_t last) {
    return of(kind).levels(x, first, last, weights, trits, scales);
  });
}

Distance distance(Kind kind, const Layout& x, const void* weights, const int8_t* trits,
                  const double* scales, int64_t scale_rows, Distance* rows, int threads) {
  if (x.rows == 0) return {0.0, 0.0, 0};
  parallel_for(x.rows, x.cols, threads, [&](int, int64_t first, int64_t last) {
    of(kind).distances(x, first, last, weights, trits, scales, x.rows / scale_rows, rows);
  });
  return sum_of(rows, x.rows);
}

int64_t ternarize_packed(Method method, Kind kind, const Layout& x, const void* weights,
                         uint8_t* packed, double* scales, Distance* rows, Distance* distance,
                         int threads) {
  const int64_t bad = first_of(x.rows, x.cols, threads, [&](int64_t first, int64_t last) {
    std::vector<int8_t> trits(static_cast<size_t>(x.group));
    return of(kind).packed(method, x, first, last, weights, packed, scales, rows, trits.data());
  });
  if (bad == kNone) *distance = x.rows ? sum_of(rows, x.rows) : Distance{0.0, 0.0, 0};
  return bad;
}

int64_t ternarize_tensor(Method method, Kind kind, const Layout& x, const void* weights,
                         int8_t* trits, double* scale, Total* totals, int threads) {
  const int64_t bad = first_of(x.rows, x.cols, threads, [&](int64_t first, int64_t last) {
    return of(kind).first_not_finite(x, first, last, weights);
  });
  if (bad != kNone) return bad;
  double threshold;
  *scale = fit(method, Tensor{kind, x, weights, totals, threads}, &threshold);
  parallel_for(x.rows, x.cols, threads, [&](int, int64_t first, int64_t last) {
    of(kind).cut(x, first, last, weights, threshold, trits);
  });
  return kNone;
}

bool levels_tensor(Kind kind, const Layout& x, const void* weights, int8_t* trits, double* scale,
                   int threads) {
  const double magnitude = of(kind).first_magnitude(x, weights);
  if (magnitude < 0) return false;
  *scale = magnitude;
  return all_of(x, threads, [&](int64_t first, int64_t last) {
    return of(kind).levels_of(x, first, last, weights, magnitude, trits);
  });
}

}  // namespace ternarize
