// Fuzzes what makes trits of weights and measures them: the methods, per group and per tensor, what
// recognises tensors that are ternary already, and the distance. Weights are any bits.
#include "input.h"

using namespace fuzz;

namespace {

// Blocks of 128, halves added to halves, until one number is left; then the same over the blocks.
// Uses up the values.
double fixed_sum(std::vector<double>& values) {
  do {
    values.resize((std::max<size_t>(1, values.size()) + 127) / 128 * 128, 0.0);
    for (size_t at = 0; at < values.size(); at += 128) {
      for (size_t half = 64; half; half /= 2)
        for (size_t i = 0; i < half; ++i) values[at + i] += values[at + i + half];
      values[at / 128] = values[at];
    }
    values.resize(values.size() / 128);
  } while (values.size() > 1);
  return values[0];
}

// Rows of numbers that share a scale; the sums of rows are summed in the fixed order too.
using Rows = std::vector<std::vector<double>>;

struct Found {
  double sum;
  int64_t count;
  double mean() const { return count ? sum / static_cast<double>(count) : 0.0; }
};

Found above(const Rows& rows, double threshold) {
  static std::vector<double> sums, magnitudes;
  sums.clear();
  int64_t count = 0;
  for (const auto& row : rows) {
    magnitudes.clear();
    for (const double w : row) {
      const bool in = std::fabs(w) > threshold;
      magnitudes.push_back(in ? std::fabs(w) : 0.0);
      count += in;
    }
    sums.push_back(fixed_sum(magnitudes));
  }
  return {rows.size() == 1 ? sums[0] : fixed_sum(sums), count};
}

// The scale of one set of weights, and the threshold of its trits.
double scale_of(Method method, const Rows& rows, double* threshold) {
  const double mean = above(rows, -1.0).mean();
  if (method == Method::Absmean) {
    *threshold = mean / 2;
    return mean;
  }
  *threshold = 0.7 * mean;
  Found now = above(rows, *threshold);
  for (int i = 0; method == Method::Itf && i < 100; ++i) {
    const Found then = above(rows, now.mean() / 2);
    if (then.count == now.count) break;
    *threshold = now.mean() / 2;
    now = then;
  }
  return now.mean();
}

// The magnitude that all weights other than 0 share, 0 if there are none, -1 if they differ.
double level_of(const Rows& rows) {
  double level = 0.0;
  for (const auto& row : rows)
    for (const double w : row) {
      if (!std::isfinite(w) || (w != 0.0 && level != 0.0 && std::fabs(w) != level)) return -1.0;
      if (w != 0.0) level = std::fabs(w);
    }
  return level;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const Shape shape = shape_of(in, 60, 600);
  use_one(in);
  const int threads = threads_of(in);
  const Kind kind = kind_of(in);
  const Layout x = layout_of(shape.rows, shape.cols, shape.group_size);
  const int64_t group = group_of(shape), cols = shape.cols;
  const Method method = in.pick({Method::Absmean, Method::Twn, Method::Itf});

  Numbers weights(in, kind, shape.rows * cols);
  const int64_t manner = in.below(4);
  if (manner == 0)  // a ternary matrix, or nearly
    for (int64_t i = 0; i < weights.n; ++i) weights.set(i, (in.byte() % 3 - 1) * 0.375);
  if (manner <= 1)
    for (int64_t k = in.below(3); k > 0 && weights.n; --k)
      weights.set(in.below(weights.n), in.pick({0.0, 0.375, 0.5, double{INFINITY}}));

  int64_t bad = kNone;
  for (int64_t i = weights.n - 1; i >= 0; --i)
    if (!std::isfinite(weights[i])) bad = i;
  const bool one_scale = shape.group_size == 0;

  // The sets of weights that share a scale, in the order of the scales.
  std::vector<Rows> sets;
  if (one_scale) sets.emplace_back();
  for (int64_t row = 0; row < shape.rows; ++row)
    for (int64_t at = 0; at < cols || (one_scale && at == 0); at += std::max<int64_t>(1, group)) {
      std::vector<double> part;
      for (int64_t c = at; c < std::min(cols, at + group); ++c)
        part.push_back(weights[row * cols + c]);
      if (one_scale)
        sets[0].push_back(part);
      else
        sets.push_back({part});
    }
  const auto set_of = [&](int64_t i) { return one_scale ? 0 : i / cols * x.groups + i % cols / group; };

  const auto scale_count = one_scale ? 1 : shape.rows * x.groups;
  Exact<double> expected(scale_count);
  std::vector<double> thresholds(sets.size()), magnitudes(sets.size());
  bool ternary = true;
  FUZZ_CHECK(static_cast<int64_t>(sets.size()) == scale_count, "%zu sets", sets.size());
  for (size_t i = 0; i < sets.size(); ++i) {
    if (bad == kNone)
      expected[static_cast<int64_t>(i)] = scale_of(method, sets[i], &thresholds[i]);
    magnitudes[i] = level_of(sets[i]);
    ternary = ternary && magnitudes[i] >= 0.0;
  }
  if (bad == kNone && one_scale && shape.rows == 0) expected[0] = 0.0;

  {
    Exact<int8_t> trits(weights.n);
    Exact<double> scales(scale_count);
    Exact<Total> totals(shape.rows);
    const int64_t found =
        one_scale ? ternarize_tensor(method, kind, x, weights.memory.at, trits.at, scales.at,
                                     totals.at, threads)
                  : ternarize::ternarize(method, kind, x, weights.memory.at, trits.at, scales.at,
                                         threads);
    FUZZ_CHECK(found == bad, "not finite at %lld, found at %lld", ll(bad), ll(found));

    Exact<int8_t> signs(weights.n);
    Exact<double> level(scale_count);
    const bool is = one_scale
                        ? levels_tensor(kind, x, weights.memory.at, signs.at, level.at, threads)
                        : levels(kind, x, weights.memory.at, signs.at, level.at, threads);
    FUZZ_CHECK(is == ternary, "levels says %d", is);
    for (int64_t i = 0; is && i < weights.n; ++i) {
      const double w = weights[i];
      FUZZ_CHECK(signs[i] == (w > 0.0) - (w < 0.0), "sign at %lld", ll(i));
    }
    for (int64_t i = 0; is && i < scale_count; ++i)
      FUZZ_CHECK(level[i] == magnitudes[static_cast<size_t>(i)], "level %lld", ll(i));
    if (bad != kNone) return 0;

    for (int64_t i = 0; i < scale_count; ++i)
      FUZZ_CHECK(same(scales[i], expected[i]), "scale %lld: %.17g, not %.17g", ll(i), scales[i],
                 expected[i]);
    double error = 0.0, energy = 0.0;
    int64_t nonzero = 0;
    for (int64_t i = 0; i < weights.n; ++i) {
      const double w = weights[i], cut = thresholds[static_cast<size_t>(set_of(i))];
      const int trit = std::fabs(w) > cut ? (w > 0.0) - (w < 0.0) : 0;
      FUZZ_CHECK(trits[i] == trit, "trit %lld is %d, not %d", ll(i), trits[i], trit);
      const double rest = w - trit * scales[set_of(i)];
      error += rest * rest;
      energy += w * w;
      nonzero += trit != 0;
    }
    if (cols == 0 || scale_count == 0) return 0;
    Exact<Distance> rows(shape.rows);
    // of a tensor with one scale, its rows are its groups
    const Distance d = distance(kind, x, weights.memory.at, trits.at, scales.at,
                                one_scale ? 1 : shape.rows, rows.at, threads);
    FUZZ_CHECK(d.nonzero == nonzero, "nonzero is %lld, not %lld", ll(d.nonzero), ll(nonzero));
    if (!one_scale) {  // all of it in one pass, and a scale that no float holds is 0 there
      Exact<uint8_t> packed(shape.rows * x.width), whole(shape.rows * x.width);
      Exact<double> again(scale_count);
      Distance of_all;
      FUZZ_CHECK(ternarize_packed(method, kind, x, weights.memory.at, packed.at, again.at, rows.at,
                                  &of_all, threads) == kNone,
                 "not finite");
      bool lost = false;
      for (int64_t i = 0; i < scale_count; ++i) {
        const bool none = static_cast<float>(scales[i]) == 0.0f && scales[i] != 0.0;
        FUZZ_CHECK(same(again[i], none ? 0.0 : scales[i]), "scale %lld in one pass", ll(i));
        lost = lost || none;
      }
      if (!lost) {
        FUZZ_CHECK(pack(x, trits.at, whole.at, threads) == kNone, "a trit is none");
        FUZZ_CHECK(std::memcmp(packed.at, whole.at, static_cast<size_t>(whole.size)) == 0, "bytes");
        FUZZ_CHECK(same(of_all.error, d.error) && same(of_all.energy, d.energy) &&
                       of_all.nonzero == d.nonzero,
                   "distance in one pass");
      }
    }
    if (weights.bounded) {
      FUZZ_CHECK(std::fabs(d.energy - energy) <= 1e-5 * energy + 1e-30, "energy %g, not %g",
                 d.energy, energy);
      FUZZ_CHECK(std::fabs(d.error - error) <= 1e-5 * (error + 1e-3 * energy) + 1e-30,
                 "error %g, not %g", d.error, error);
    }
  }
  return 0;
}
