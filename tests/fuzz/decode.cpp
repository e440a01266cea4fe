// Fuzzes norms, gates, dense products and attention: any sizes, any bits. All variants must give the
// same bits; where the numbers are bounded, they must be near plain sums in double.
#include "input.h"

using namespace fuzz;

namespace {

// How far a result of a kind may be from the plain one: `steps` of the kind, and what else is lost.
void near(Kind kind, double found, double expected, int steps, double lost, const char* what,
          int64_t i) {
  const double step = std::ldexp(std::fabs(expected), -format_of(kind).mantissa);
  const double least = std::ldexp(1.0, format_of(kind).lowest - format_of(kind).mantissa);
  FUZZ_CHECK(std::fabs(found - expected) <= steps * (step + least) + lost,
             "%s at %lld: %.9g, not %.9g", what, ll(i), found, expected);
}

// The results of the first variant, with which the others are compared.
struct Agreed {
  std::vector<uint8_t> bytes;
  bool there = false;
  void check(Kind kind, const Exact<uint8_t>& out, const char* what) {
    if (!there) {
      bytes.assign(out.at, out.at + out.size);
      there = true;
      return;
    }
    for (int64_t i = 0; i < out.size / size_of(kind); ++i) {
      const double a = value_of(kind, out.at, i), b = value_of(kind, bytes.data(), i);
      FUZZ_CHECK(same(a, b), "%s at %lld: %g, the first variant gave %g", what, ll(i), a, b);
    }
  }
};

// Calls work() on the portable variant and on another.
template <class Work>
void on_two(Input& in, Work work) {
  use("portable");
  work();
  use_one(in);
  work();
}

void fuzz_norm(Input& in, Kind kind, int threads) {
  const int64_t rows = in.below(6), n = 1 + in.below(in.below(32) ? 60 : 3000);
  const Numbers x(in, kind, rows * n), weight(in, kind, n);
  const float epsilon = in.pick({1e-5f, 1e-6f, 0.0f, 1.0f});
  Agreed agreed;
  on_two(in, [&] {
    Exact<uint8_t> out(rows * n * size_of(kind));
    rms_norm(kind, rows, n, x.memory.at, weight.memory.at, epsilon, out.at, threads);
    agreed.check(kind, out, "rms_norm");
    if (!x.bounded || !weight.bounded || epsilon < 1e-6f) return;
    double sum = 0.0;
    for (int64_t i = 0; i < rows * n; ++i) {
      if (i % n == 0) sum = 0.0;
      for (int64_t c = 0; c < n && i % n == 0; ++c) sum += x[i + c] * x[i + c];
      const double part = x[i] / std::sqrt(sum / static_cast<double>(n) + epsilon);
      // the bracket is rounded before it is multiplied, which may double what it is off
      const double expected = weight[i % n] * rounded_to(kind, part);
      near(kind, value_of(kind, out.at, i), expected, 3, 1e-5 * std::fabs(expected), "rms_norm", i);
    }
  });
}

void fuzz_gate(Input& in, Kind kind, int threads) {
  const int64_t n = in.below(64) ? in.below(80) : in.below(20000);
  const Activation activation = in.pick({Activation::Silu, Activation::Relu2});
  const Numbers g(in, kind, n), up(in, kind, n);
  Agreed agreed;
  on_two(in, [&] {
    Exact<uint8_t> out(n * size_of(kind));
    gate(kind, activation, n, g.memory.at, up.memory.at, out.at, threads);
    agreed.check(kind, out, "gate");
    if (!g.bounded || !up.bounded) return;
    for (int64_t i = 0; i < n; ++i) {
      const double x = g[i], positive = std::max(x, 0.0);
      // e^-|x| stays at e^-87, see exponential in operations.h
      const double e = std::exp(std::max(-std::fabs(x), -87.0));
      const double part = (x < 0.0 ? e : 1.0) / (1.0 + e);
      const double first = activation == Activation::Silu ? x * part : positive * positive;
      const double expected = rounded_to(kind, rounded_to(kind, first) * up[i]);
      const double found = value_of(kind, out.at, i);
      if (std::isinf(expected) && std::fabs(found) >= format_of(kind).largest * 0.99) continue;
      const double least = std::ldexp(1.0, format_of(kind).lowest - format_of(kind).mantissa);
      near(kind, found, expected, 3, 2 * least * std::fabs(up[i]) + 1e-5 * std::fabs(expected), "gate",
           i);
    }
  });
}

void fuzz_dense(Input& in, Kind kind, int threads) {
  const int64_t cols = 1 + in.below(in.below(32) ? 90 : 1000);
  const int64_t rows = in.below(in.below(32) ? 5 : 60), tokens = in.below(4);
  const Numbers x(in, kind, tokens * cols), w(in, kind, rows * cols);
  Agreed agreed;
  on_two(in, [&] {
    Exact<uint8_t> out(tokens * rows * size_of(kind));
    dense(kind, tokens, rows, cols, x.memory.at, w.memory.at, out.at, threads);
    agreed.check(kind, out, "dense");
    if (!x.bounded || !w.bounded) return;
    for (int64_t i = 0; i < tokens * rows; ++i) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t c = 0; c < cols; ++c) {
        const double product = x[i / rows * cols + c] * w[i % rows * cols + c];
        sum += product;
        magnitude += std::fabs(product);
      }
      const double found = value_of(kind, out.at, i);
      if (std::fabs(sum) + magnitude * 1e-4 >= format_of(kind).largest) continue;
      near(kind, found, sum, 1, 2e-5 * magnitude, "dense", i);
    }
  });
}

void fuzz_attend(Input& in, Kind kind, int threads) {
  Attention a{};
  a.batch = in.below(3);
  a.kv_heads = 1 + in.below(3);
  a.heads = a.kv_heads * (1 + in.below(3));
  a.dim = 2 * (1 + in.below(in.below(32) ? 8 : 70));
  a.capacity = 1 + in.below(in.below(32) ? 8 : 140);
  a.position = in.below(a.capacity);
  a.scaling = in.pick({1.0f, 0.125f, 0.5f});
  const int64_t pairs = a.batch * a.kv_heads, queries = a.heads / a.kv_heads, dim = a.dim;
  const Numbers q(in, kind, a.batch * a.heads * dim), k(in, kind, pairs * dim),
      v(in, kind, pairs * dim);
  Numbers cosine(kind, dim), sine(kind, dim);
  for (int64_t i = 0; i < dim; ++i) {
    const double angle = in.byte() / 40.0;
    cosine.set(i, std::cos(angle));
    sine.set(i, std::sin(angle));
  }
  const Numbers keys(in, kind, pairs * dim * a.capacity), values(in, kind, pairs * a.capacity * dim);
  const bool bounded =
      q.bounded && k.bounded && v.bounded && keys.bounded && values.bounded;
  a.q = q.memory.at;
  a.k = k.memory.at;
  a.v = v.memory.at;
  a.cosine = cosine.memory.at;
  a.sine = sine.memory.at;
  const auto rotated = [&](const Numbers& x, int64_t head, int64_t i) {
    const auto product = [&](int64_t j, const Numbers& by, double sign) {
      return rounded_to(kind, static_cast<float>(sign * x[head * dim + j]) *
                                  static_cast<float>(by[i]));
    };
    const int64_t half = dim / 2;
    const double other = i < half ? product(i + half, sine, -1.0) : product(i - half, sine, 1.0);
    return rounded_to(kind, static_cast<float>(product(i, cosine, 1.0)) + static_cast<float>(other));
  };
  Agreed agreed, agreed_keys;
  on_two(in, [&] {
    Exact<uint8_t> out(a.batch * a.heads * dim * size_of(kind)), key(keys.memory.size),
        value(values.memory.size);
    if (key.size) std::memcpy(key.at, keys.memory.at, static_cast<size_t>(key.size));
    if (value.size) std::memcpy(value.at, values.memory.at, static_cast<size_t>(value.size));
    a.keys = key.at;
    a.values = value.at;
    a.out = out.at;
    attend(kind, a, threads);
    agreed.check(kind, out, "attend");
    agreed_keys.check(kind, key, "keys");
    // The cache: the new token's numbers at its place, all else as it was.
    for (int64_t i = 0; i < keys.n; ++i) {
      const int64_t pair = i / (dim * a.capacity), d = i / a.capacity % dim;
      const bool fresh = i % a.capacity == a.position;
      const double expected = fresh ? rotated(k, pair, d) : keys[i];
      FUZZ_CHECK(same(value_of(kind, key.at, i), expected), "key %lld", ll(i));
    }
    for (int64_t i = 0; i < values.n; ++i) {
      const int64_t pair = i / (dim * a.capacity), d = i % dim;
      const bool fresh = i / dim % a.capacity == a.position;
      const double expected = fresh ? v[pair * dim + d] : values[i];
      FUZZ_CHECK(same(value_of(kind, value.at, i), expected), "value %lld", ll(i));
    }
    if (!bounded) return;
    for (int64_t head = 0; head < a.batch * a.heads; ++head) {
      const int64_t pair = head / queries;
      std::vector<double> scores, query;
      for (int64_t d = 0; d < dim; ++d) query.push_back(rotated(q, head, d));
      double sum = 0.0, spread = 0.0, most = -INFINITY;
      for (int64_t t = 0; t <= a.position; ++t) {
        double s = 0.0, magnitude = 0.0;
        for (int64_t d = 0; d < dim; ++d) {
          const double product =
              query[static_cast<size_t>(d)] * value_of(kind, key.at, (pair * dim + d) * a.capacity + t);
          s += product;
          magnitude += std::fabs(product);
        }
        scores.push_back(s * a.scaling);
        spread = std::max(spread, magnitude * a.scaling);
        most = std::max(most, scores.back());
      }
      if (spread > 1000.0) return;  // what float sums lose is no longer small beside e^score
      for (double& s : scores) sum += s = std::exp(std::max(s - most, -87.0));
      for (int64_t d = 0; d < dim; ++d) {
        double y = 0.0, size = 0.0;
        for (int64_t t = 0; t <= a.position; ++t) {
          const double one = value_of(kind, value.at, (pair * a.capacity + t) * dim + d);
          y += scores[static_cast<size_t>(t)] / sum * one;
          size = std::max(size, std::fabs(one));
        }
        near(kind, value_of(kind, out.at, head * dim + d), y, 1, 2e-5 * size * (1.0 + spread),
             "attend", head * dim + d);
      }
    }
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const auto one = in.pick({fuzz_norm, fuzz_gate, fuzz_dense, fuzz_attend});
  const Kind kind = kind_of(in);
  one(in, kind, threads_of(in));
  return 0;
}
