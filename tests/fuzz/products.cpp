// Fuzzes the products with packed weights, those of trits and those of int8, against multiply.h done one
// multiplication at a time: levels, sums of groups and their order are restated here.
#include "input.h"

using namespace fuzz;

namespace {

constexpr int64_t kMost = 20000;  // multiplications of an input, if it has more than one token

// Integers and factor of a token; q[part][column].
struct Token {
  std::vector<int32_t> q[3];
  float factor;
};

Token quantized(const Numbers& x, int64_t token, int64_t cols, int parts) {
  Token out;
  float absmax = 0.0f;
  bool finite = true;
  for (int64_t c = 0; c < cols; ++c) {
    const auto value = static_cast<float>(std::fabs(x[token * cols + c]));
    finite = finite && std::isfinite(value);
    absmax = std::max(absmax, value);
  }
  finite = finite && std::isfinite(absmax * 127.0f);
  for (auto& q : out.q) q.assign(static_cast<size_t>(cols), 0);
  if (!finite) {
    out.factor = NAN;
    return out;
  }
  if (parts == 1) {
    out.factor = absmax / 127.0f;
    for (int64_t c = 0; c < cols && absmax > 0.0f; ++c) {
      const float times = static_cast<float>(x[token * cols + c]) * 127.0f;
      out.q[0][static_cast<size_t>(c)] = static_cast<int32_t>(std::nearbyint(times / absmax));
    }
    return out;
  }
  // the largest k <= 126 that leaves |x 2^k| <= 127 (65536 + 256 + 1)
  int k = 126;
  while (std::ldexp(static_cast<double>(absmax), k) > 127.0 * (65536 + 256 + 1)) --k;
  out.factor = static_cast<float>(std::ldexp(1.0, -k));
  for (int64_t c = 0; c < cols; ++c) {
    auto whole = static_cast<int64_t>(std::nearbyint(std::ldexp(x[token * cols + c], k)));
    for (int p = 0; p < 3; ++p) {
      int64_t digit = ((whole % 256) + 256) % 256;
      if (digit > 127) digit -= 256;
      out.q[p][static_cast<size_t>(c)] = static_cast<int32_t>(digit);
      whole = (whole - digit) / 256;
    }
    FUZZ_CHECK(whole == 0, "three digits do not hold column %lld", ll(c));
  }
  return out;
}

struct Weights {
  std::vector<int8_t> values;  // [row, col]
  std::vector<float> scales;   // [row, group]
};

// y = (sum over groups, in order, of value * scale) * factor
float expected(const Shape& s, const Weights& w, const Token& token, int parts, int64_t row) {
  const int64_t group = group_of(s), groups = s.cols ? (s.cols + group - 1) / group : 0;
  float sum = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    float part[3] = {};
    for (int p = 0; p < parts; ++p) {
      int64_t exact = 0;
      for (int64_t c = g * group; c < std::min(s.cols, (g + 1) * group); ++c)
        exact += w.values[static_cast<size_t>(row * s.cols + c)] *
                 token.q[p][static_cast<size_t>(c)];
      part[p] = static_cast<float>(exact);
    }
    const float value =
        parts == 1 ? part[0] : part[2] * 65536.0f + (part[1] * 256.0f + part[0]);
    sum += value * w.scales[static_cast<size_t>(row * groups + g)];
  }
  return sum * token.factor;
}

// A scale: finite and not negative, as the reader leaves it.
double scale_of(Input& in, Kind kind) {
  uint32_t bits = in.bits<uint32_t>() & 0x7fffffff;
  const double value = value_of(kind, &bits, 0);
  return std::isfinite(value) ? std::fabs(value) : in.byte() / 64.0;
}

void compare(const Shape& s, const Weights& w, const std::vector<Token>& tokens, int parts,
             Kind kind, const void* out) {
  for (int64_t token = 0; token < static_cast<int64_t>(tokens.size()); ++token)
    for (int64_t row = 0; row < s.rows; ++row) {
      const float y = expected(s, w, tokens[static_cast<size_t>(token)], parts, row);
      const double found = value_of(kind, out, token * s.rows + row);
      FUZZ_CHECK(same(found, rounded_to(kind, y)),
                 "token %lld, row %lld of %lld x %lld, group %lld, parts %d: %g, not %g", ll(token),
                 ll(row), ll(s.rows), ll(s.cols), ll(s.group_size), parts, found,
                 rounded_to(kind, y));
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const bool int8 = in.below(2) == 1;
  Shape shape = shape_of(in, 200, 700);
  const int64_t most = kMost / std::max<int64_t>(1, shape.rows * shape.cols);
  const int64_t tokens =
      std::min(in.below(8) == 0 ? in.below(170) : in.below(7), std::max<int64_t>(1, most));
  const int parts = in.below(2) ? 1 : 3;
  use_one(in);
  const int threads = threads_of(in);
  const Kind kind = kind_of(in);
  const int64_t cols = shape.cols, group = group_of(shape);
  const int64_t groups = cols ? (cols + group - 1) / group : 0;

  const Numbers x(in, kind, tokens * cols);
  std::vector<Token> levels;
  for (int64_t token = 0; token < tokens; ++token)
    levels.push_back(quantized(x, token, cols, parts));

  if (int8) {
    const int64_t divisor = in.below(3) == 0 ? 1 : shape.rows;  // rows with a scale of their own
    const int64_t scale_rows = divisor ? divisor : 1, shared = shape.rows / scale_rows;
    const Kind scale_kind = in.pick({Kind::F32, Kind::F16});
    Numbers stored(scale_kind, scale_rows * groups);
    for (int64_t i = 0; i < stored.n; ++i) stored.set(i, scale_of(in, scale_kind));
    Exact<int8_t> weights(shape.rows * cols);
    for (int64_t i = 0; i < weights.size; ++i) weights[i] = static_cast<int8_t>(in.byte());
    Weights w;
    w.values.assign(weights.at, weights.at + weights.size);
    for (int64_t row = 0; row < shape.rows; ++row)
      for (int64_t g = 0; g < groups; ++g)
        w.scales.push_back(static_cast<float>(stored[row / shared * groups + g]));
    const Int8Matrix matrix{lanes_of(Form::Lanes2, layout_of(shape.rows, cols, shape.group_size)),
                            weights.at, stored.memory.at, scale_kind,
                            shape.rows ? shared : 1};
    Exact<uint8_t> out(tokens * shape.rows * size_of(kind));
    int8_product(matrix, kind, parts, tokens, x.memory.at, out.at, threads);
    compare(shape, w, levels, parts, kind, out.at);
    return 0;
  }

  // One or two matrices with the same columns.
  const int count = in.below(4) == 0 ? 2 : 1;
  const Kind scale_kind = in.pick({Kind::F32, Kind::F16});
  Shape shapes[2] = {shape, shape};
  shapes[1].rows = in.below(40);
  std::vector<Weights> w(static_cast<size_t>(count));
  std::vector<std::vector<uint8_t>> packed(static_cast<size_t>(count));
  for (int m = 0; m < count; ++m) {
    const Layout x = layout_of(shapes[m].rows, cols, shape.group_size);
    auto& values = w[static_cast<size_t>(m)].values;
    values.resize(static_cast<size_t>(x.rows * cols));
    for (auto& trit : values) trit = static_cast<int8_t>(in.byte() % 3 - 1);
    for (int64_t i = 0; i < x.rows * groups; ++i)
      w[static_cast<size_t>(m)].scales.push_back(static_cast<float>(scale_of(in, scale_kind)));
    packed[static_cast<size_t>(m)].resize(static_cast<size_t>(x.rows * x.width));
    FUZZ_CHECK(pack(x, values.data(), packed[static_cast<size_t>(m)].data(), 1) == kNone, "pack");
  }
  const Form form = products().lanes3 && in.below(2) ? Form::Lanes3 : Form::Lanes2;
  {
    std::vector<std::unique_ptr<Exact<uint8_t>>> memory;
    const auto take = [&](int64_t n) {
      memory.push_back(std::make_unique<Exact<uint8_t>>(n));
      return memory.back()->at;
    };
    std::vector<Matrix> matrices;
    for (int m = 0; m < count; ++m) {
      const Lanes lanes = lanes_of(form, layout_of(shapes[m].rows, cols, shape.group_size));
      uint8_t* const run = take(lanes.size());
      FUZZ_CHECK(to_lanes(lanes, packed[static_cast<size_t>(m)].data(), run, 1) == kNone, "lanes");
      const int64_t padded = lanes.blocks * groups * lanes.block;
      Numbers scales(scale_kind, padded);
      for (int64_t row = 0; row < shapes[m].rows; ++row)
        for (int64_t g = 0; g < groups; ++g)
          scales.set((row / lanes.block * groups + g) * lanes.block + row % lanes.block,
                     w[static_cast<size_t>(m)].scales[static_cast<size_t>(row * groups + g)]);
      uint8_t* const held = take(padded * size_of(scale_kind));
      std::memcpy(held, scales.memory.at, static_cast<size_t>(scales.memory.size));
      matrices.push_back({lanes, run, {held, scale_kind == Kind::F16},
                          take(tokens * shapes[m].rows * size_of(kind))});
    }
    product(matrices.data(), count, kind, parts, tokens, x.memory.at, threads);
    for (int m = 0; m < count; ++m)
      compare(shapes[m], w[static_cast<size_t>(m)], levels, parts, kind,
              matrices[static_cast<size_t>(m)].out);
  }
  return 0;
}
