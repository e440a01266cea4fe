// Products and layouts against plain loops, for a build with sanitizers: every buffer has exactly its
// size, so that an access beside it is seen. test_kernels.py builds and runs this.
//
//   sanitized_kernels            all variants that this CPU has

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpus/cpus.h"

using namespace ternarize;

namespace {

std::mt19937 random_bits(1);

// Heap memory of exactly n elements; a vector may own more.
template <class T>
struct Exact {
  explicit Exact(int64_t n) : size(n), at(static_cast<T*>(std::malloc(n ? n * sizeof(T) : 1))) {}
  ~Exact() { std::free(at); }
  Exact(const Exact&) = delete;
  int64_t size;
  T* at;
};

void fail(const char* what, const Lanes& x, int64_t tokens, int parts) {
  std::printf("%s: %s of %lld x %lld, group %lld, form %d, %lld tokens, %d parts\n",
              variant().name, what, static_cast<long long>(x.stored.rows),
              static_cast<long long>(x.stored.cols), static_cast<long long>(x.stored.group),
              static_cast<int>(x.form), static_cast<long long>(tokens), parts);
  std::exit(1);
}

// The result that multiply.h defines, for levels that the variant itself made.
float expected(const Lanes& x, const int8_t* trits, const float* scales, const Levels& in,
               int64_t token, int64_t row) {
  float sum = 0.0f;
  for (int64_t g = 0; g < x.stored.groups; ++g) {
    float s[3] = {};
    for (int p = 0; p < in.parts; ++p) {
      int64_t exact = 0;
      const int8_t* q = in.q + (token * in.parts + p) * in.stride + g * x.group_quads * 4;
      for (int64_t c = 0; c < x.cols_of(g); ++c)
        exact += trits[row * x.stored.cols + g * x.stored.group + c] * q[c];
      s[p] = static_cast<float>(exact);
    }
    const float value = in.parts == 1 ? s[0] : s[2] * 65536.0f + (s[1] * 256.0f + s[0]);
    sum += value * scales[row * x.stored.groups + g];
  }
  return sum * in.factors[token];
}

void check(Form form, int64_t rows, int64_t cols, int64_t group_size, int64_t tokens, int parts) {
  const Layout stored = layout_of(rows, cols, group_size);
  const Lanes x = lanes_of(form, stored);
  Exact<int8_t> trits(rows * cols);
  for (int64_t i = 0; i < trits.size; ++i) trits.at[i] = static_cast<int8_t>(random_bits() % 3) - 1;
  Exact<uint8_t> packed(rows * stored.width), again(packed.size), lanes(x.size());
  if (pack(stored, trits.at, packed.at, 2) != kNone) fail("pack", x, tokens, parts);
  if (to_lanes(x, packed.at, lanes.at, 2) != kNone) fail("to_lanes", x, tokens, parts);
  if (from_lanes(x, lanes.at, again.at, 2) != kNone) fail("from_lanes", x, tokens, parts);
  if (std::memcmp(packed.at, again.at, static_cast<size_t>(packed.size)) != 0)
    fail("from_lanes gives other bytes", x, tokens, parts);

  Exact<float> scales(rows * stored.groups), in_order(x.blocks * stored.groups * x.block);
  for (int64_t i = 0; i < in_order.size; ++i) in_order.at[i] = 0.0f;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t g = 0; g < stored.groups; ++g) {
      const float scale = static_cast<float>(random_bits() % 1000) / 64.0f;
      scales.at[row * stored.groups + g] = scale;
      in_order.at[(row / x.block * stored.groups + g) * x.block + row % x.block] = scale;
    }
  Exact<float> in(tokens * cols), out(tokens * rows);
  for (int64_t i = 0; i < in.size; ++i)
    in.at[i] = (static_cast<float>(random_bits() % 20001) - 10000.0f) / 77.0f;
  for (int64_t c = 0; c < cols && tokens > 1; ++c) in.at[cols + c] = 0.0f;
  const Matrix matrix{x, lanes.at, {in_order.at, false}, out.at};
  product(&matrix, 1, Kind::F32, parts, tokens, in.at, 2);

  Levels levels{tokens, parts, x.quads * 4, nullptr, nullptr, nullptr};
  Exact<int8_t> q(tokens * parts * levels.stride);
  Exact<int32_t> sums(tokens * parts * stored.groups);
  Exact<float> factors(tokens);
  levels.q = q.at;
  levels.sums = sums.at;
  levels.factors = factors.at;
  products().quantize(x, Kind::F32, in.at, 0, tokens, levels);
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t row = 0; row < rows; ++row)
      if (out.at[token * rows + row] !=
          expected(x, trits.at, scales.at, levels, token, row))
        fail("product", x, tokens, parts);
}

// Random bytes, which are all int4 weights, and the same as numbers.
void fill_int4(const Lanes& x, const Exact<uint8_t>& halves, const Exact<int8_t>& weights) {
  for (int64_t i = 0; i < halves.size; ++i) halves.at[i] = static_cast<uint8_t>(random_bits());
  const uint8_t* from = halves.at;
  int8_t* to = weights.at;
  for (int64_t row = 0; row < x.stored.rows; ++row)
    for (int64_t g = 0; g < x.stored.groups; ++g) {
      const int64_t n = x.cols_of(g);
      for (int64_t i = 0; i < n; ++i) *to++ = static_cast<int8_t>((from[i / 2] >> i % 2 * 4 & 15) - 8);
      from += (n + 1) / 2;
    }
}

// Of int8 or int4 weights, each buffer of exactly its size.
void check_int8(int64_t rows, int64_t cols, int64_t group_size, int64_t tokens, int parts,
                bool int4) {
  const Lanes x = lanes_of(Form::Lanes2, layout_of(rows, cols, group_size));
  const int64_t groups = x.stored.groups;
  Exact<int8_t> weights(rows * cols);
  for (int64_t i = 0; i < weights.size; ++i) weights.at[i] = static_cast<int8_t>(random_bits());
  Exact<uint8_t> halves(rows * half_width(x));
  if (int4) fill_int4(x, halves, weights);
  Exact<float> scales(rows * groups), in(tokens * cols), out(tokens * rows);
  for (int64_t i = 0; i < scales.size; ++i)
    scales.at[i] = static_cast<float>(random_bits() % 1000) / 64.0f;
  for (int64_t i = 0; i < in.size; ++i)
    in.at[i] = (static_cast<float>(random_bits() % 20001) - 10000.0f) / 77.0f;
  Int8Matrix matrix{x, int4 ? nullptr : weights.at, scales.at, Kind::F32, 1};
  if (int4) matrix.halves = halves.at;
  int8_product(matrix, Kind::F32, parts, tokens, in.at, out.at, 2);
  Levels levels{tokens, parts, x.quads * 4, nullptr, nullptr, nullptr};
  Exact<int8_t> q(tokens * parts * levels.stride);
  Exact<int32_t> sums(tokens * parts * groups);
  Exact<float> factors(tokens);
  levels.q = q.at;
  levels.sums = sums.at;
  levels.factors = factors.at;
  products().quantize(x, Kind::F32, in.at, 0, tokens, levels);
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t row = 0; row < rows; ++row)
      if (out.at[token * rows + row] != expected(x, weights.at, scales.at, levels, token, row))
        fail(int4 ? "int8_product of int4" : "int8_product", x, tokens, parts);
}

}  // namespace

int main() {
  for (const Variant* one = variants(); one->name; ++one) {
    use(one->name);
    for (const Form form : {Form::Lanes2, Form::Lanes3}) {
      if (form == Form::Lanes3 && !products().lanes3) continue;
      for (const int parts : {1, 3})
        for (const int64_t tokens : {1, 2, 3, 4, 6, 33})
          for (const int64_t rows : {1, 97})
            for (const auto& [cols, group_size] :
                 {std::pair<int64_t, int64_t>{1, -1}, {37, 0}, {64, 64}, {130, 64}, {75, 7},
                  {300, 128}})
              check(form, rows, cols, group_size, tokens, parts);
    }
    for (const int parts : {1, 3})
      for (const int64_t tokens : {1, 2, 4, 33})
        for (const int64_t rows : {1, 32, 97})
          for (const auto& [cols, group_size] :
               {std::pair<int64_t, int64_t>{1, -1}, {37, 0}, {64, 64}, {130, 64}, {75, 7},
                {40, 32}, {300, 128}, {1500, -1}})
            for (const bool int4 : {false, true})
              check_int8(rows, cols, group_size, tokens, parts, int4);
    std::printf("%s\n", one->name);
  }
}
