// Products of every variant of this CPU against those of the portable one, bit for bit. It prints the
// names of the variants and a hash of all that the portable one gave, of products and of the functions
// for weights: the same on every machine. test_arm.py builds and runs this on two of them.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpus/cpus.h"

using namespace ternarize;

namespace {

std::mt19937 random_bits(1);
uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a

template <class T>
void add_to_hash(const std::vector<T>& values) {
  std::vector<uint8_t> bytes(values.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  for (const uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001b3u;
}

size_t size_of(int64_t n) { return static_cast<size_t>(n); }
int64_t bytes_of(Kind kind) { return kind == Kind::F32 ? 4 : 2; }

// A number of each format: its bits below the sign, those of the mantissa, and its exponent's bias.
struct Format {
  int bits, mantissa, bias;
};
Format format_of(Kind kind) {
  if (kind == Kind::F32) return {31, 23, 127};
  return kind == Kind::BF16 ? Format{15, 7, 127} : Format{15, 10, 15};
}

// Floats as bytes.
struct Numbers {
  Numbers(Kind kind_, int64_t n) : kind(kind_), bytes(size_of(n * bytes_of(kind_))) {}
  void set(int64_t i, uint32_t bits) {
    std::memcpy(bytes.data() + i * bytes_of(kind), &bits, size_of(bytes_of(kind)));
  }
  // Of the sign, the binary exponent and the upper bits of the mantissa.
  void set(int64_t i, bool negative, int exponent, uint32_t fraction) {
    const Format f = format_of(kind);
    set(i, static_cast<uint32_t>(negative) << f.bits |
               static_cast<uint32_t>(exponent + f.bias) << f.mantissa |
               fraction >> (32 - f.mantissa));
  }
  void set_random(int64_t i) {
    const auto bits = static_cast<uint32_t>(random_bits());
    if (bits % 32 == 0) return set(i, 0);
    set(i, bits & 1024, static_cast<int>(bits % 13) - 9, static_cast<uint32_t>(random_bits()));
  }
  Kind kind;
  std::vector<uint8_t> bytes;
};

// A matrix of random trits and scales, stored and as lanes.
struct Weights {
  Weights(int64_t rows, int64_t cols, int64_t group_size, bool half_)
      : stored(layout_of(rows, cols, group_size)),
        lanes(lanes_of(Form::Lanes2, stored)),
        half(half_),
        trits(size_of(rows * cols)),
        scale_bytes(size_of(lanes.blocks * stored.groups * lanes.block * (half ? 2 : 4))) {
    for (int8_t& trit : trits) trit = static_cast<int8_t>(random_bits() % 3) - 1;
    Numbers scales(half ? Kind::F16 : Kind::F32, lanes.blocks * stored.groups * lanes.block);
    for (int64_t at = 0; at < lanes.blocks * stored.groups * lanes.block; ++at) {
      const int exponent = static_cast<int>(random_bits() % 8) - 6;
      scales.set(at, false, exponent, static_cast<uint32_t>(random_bits()));
    }
    // a group of zeros with the scale 0
    if (stored.groups > 1)
      for (int64_t row = 0; row < rows; ++row) {
        std::memset(trits.data() + row * cols + stored.group, 0,
                    size_of(lanes.cols_of(1)));
        scales.set((row / lanes.block * stored.groups + 1) * lanes.block + row % lanes.block, 0);
      }
    scale_bytes = scales.bytes;
    lay_out();
  }

  void lay_out() {
    std::vector<uint8_t> packed(size_of(stored.rows * stored.width)), again(packed.size());
    bytes.resize(size_of(lanes.size()));
    if (pack(stored, trits.data(), packed.data(), 2) != kNone ||
        to_lanes(lanes, packed.data(), bytes.data(), 2) != kNone ||
        from_lanes(lanes, bytes.data(), again.data(), 2) != kNone || packed != again) {
      std::printf("layouts of %lld x %lld\n", static_cast<long long>(stored.rows),
                  static_cast<long long>(stored.cols));
      std::exit(1);
    }
    add_to_hash(packed);
    add_to_hash(bytes);
  }

  Layout stored;
  Lanes lanes;
  bool half;
  std::vector<int8_t> trits;
  std::vector<uint8_t> scale_bytes, bytes;
};

std::vector<uint8_t> product_of(const Weights& w, const Numbers& x, int64_t tokens, int parts,
                                int threads) {
  std::vector<uint8_t> out(size_of(tokens * w.stored.rows * bytes_of(x.kind)), 0xee);
  const Matrix one{w.lanes, w.bytes.data(), {w.scale_bytes.data(), w.half}, out.data()};
  product(&one, 1, x.kind, parts, tokens, x.bytes.data(), threads);
  return out;
}

// All variants but the portable one, with each number of threads, for the first tokens of x: what a
// token gives does not depend on those behind it.
void compare(const Weights& w, const Numbers& x, const std::vector<int64_t>& tokens, int parts,
             const std::vector<int>& threads) {
  use("portable");
  const std::vector<uint8_t> want = product_of(w, x, tokens.back(), parts, threads.front());
  add_to_hash(want);
  for (const Variant* one = variants() + 1; one->name; ++one) {
    use(one->name);
    for (const int64_t n : tokens)
      for (const int t : threads) {
        const std::vector<uint8_t> got = product_of(w, x, n, parts, t);
        if (std::memcmp(got.data(), want.data(), got.size()) == 0) continue;
        std::printf("%s is not portable: %lld x %lld, group %lld, kind %d, %lld tokens, %d parts, "
                    "%d threads\n",
                    one->name, static_cast<long long>(w.stored.rows),
                    static_cast<long long>(w.stored.cols), static_cast<long long>(w.stored.group),
                    static_cast<int>(x.kind), static_cast<long long>(n), parts, t);
        std::exit(1);
      }
  }
  use("portable");
}

Numbers random_inputs(Kind kind, int64_t n) {
  Numbers x(kind, n);
  for (int64_t i = 0; i < n; ++i) x.set_random(i);
  return x;
}

constexpr Kind kKinds[] = {Kind::F32, Kind::BF16, Kind::F16};
constexpr int kParts[] = {1, 3};

void groups_and_tails() {
  int turn = 0;
  for (const int64_t group_size : {1, 3, 5, 32, 64, 100, 128, -1, 0})
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {16, 3}, {64, 128},
                                     {70, 131}, {129, 259}, {65, 513}})
      for (const int parts : kParts) {
        const Weights w(rows, cols, group_size, turn % 2 == 0);
        compare(w, random_inputs(kKinds[++turn % 3], 14 * cols), {1, 2, 3, 4, 5, 14}, parts, {1});
      }
}

void batches() {
  const int64_t cols = 200;
  const Weights w(83, cols, 128, true);
  std::vector<int64_t> tokens;
  for (int64_t n = 1; n <= 40; ++n) tokens.push_back(n);
  for (const int64_t n : {128, 513}) tokens.push_back(n);
  for (const Kind kind : kKinds)
    for (const int parts : kParts)
      compare(w, random_inputs(kind, 513 * cols), tokens, parts, {2});
}

void threads() {
  const int64_t cols = 520;
  const Weights w(530, cols, 100, false);
  for (const int parts : kParts)
    compare(w, random_inputs(Kind::F32, 70 * cols), {1, 3, 16, 70}, parts, {1, 2, 7});
}

// Sums that are as large as they can be.
void saturated() {
  for (const auto& [cols, group_size] : {std::pair<int64_t, int64_t>{8192, -1}, {8192, 128},
                                         {kLongestGroup, -1}})
    for (const int sign : {-1, 1}) {
      Weights w(3, cols, group_size, true);
      for (int8_t& trit : w.trits) trit = static_cast<int8_t>(sign);
      w.lay_out();
      Numbers x(Kind::F32, 13 * cols);
      for (int64_t i = 0; i < 13 * cols; ++i) x.set(i, i / cols % 2, 0, 0);
      for (const int parts : kParts) compare(w, x, {1, 5, parts == 1 ? 13 : 5}, parts, {2});
    }
}

// Tokens of zeros, of subnormal numbers, and with numbers that are not finite.
void special_tokens() {
  const int64_t cols = 96;
  const Weights w(70, cols, 32, true);
  for (const Kind kind : kKinds) {
    Numbers x = random_inputs(kind, 16 * cols);
    const Format f = format_of(kind);
    const uint32_t infinity = (1u << f.bits) - (1u << f.mantissa);
    for (int64_t c = 0; c < cols; ++c) {
      x.set(cols + c, 0);
      x.set(4 * cols + c, static_cast<uint32_t>(random_bits()) >> (32 - f.mantissa));
      x.set(5 * cols + c, infinity - 1);
    }
    x.set(2 * cols + 5, infinity);
    x.set(3 * cols + 7, infinity + 1);
    for (const int parts : kParts) compare(w, x, {1, 6, 16}, parts, {1});
  }
}

// What the functions for weights give goes into the hash.
void weights() {
  for (const int64_t group_size : {1, 5, 128, -1})
    for (const Kind kind : kKinds) {
      const int64_t rows = 37, cols = 300;
      const Layout x = layout_of(rows, cols, group_size);
      const Numbers w = random_inputs(kind, rows * cols);
      std::vector<int8_t> trits(size_of(rows * cols));
      std::vector<double> scales(size_of(rows * x.groups));
      std::vector<Distance> distances(size_of(rows));
      std::vector<Total> totals(size_of(rows));
      for (const Method method : {Method::Absmean, Method::Twn, Method::Itf}) {
        ternarize::ternarize(method, kind, x, w.bytes.data(), trits.data(), scales.data(), 2);
        add_to_hash(trits);
        add_to_hash(scales);
        const Distance sum = distance(kind, x, w.bytes.data(), trits.data(), scales.data(), rows,
                                      distances.data(), 2);
        add_to_hash(std::vector<double>{sum.error, sum.energy});
        ternarize_tensor(method, kind, x, w.bytes.data(), trits.data(), scales.data(),
                         totals.data(), 2);
        add_to_hash(trits);
        add_to_hash(scales);
      }
      std::vector<uint8_t> packed(size_of(rows * x.width));
      std::vector<float> narrow(scales.begin(), scales.end());
      Numbers out(kind, rows * cols);
      pack(x, trits.data(), packed.data(), 2);
      dequantize(x, packed.data(), narrow.data(), rows, kind, out.bytes.data(), 2);
      add_to_hash(out.bytes);
    }
}

// Norms and attention of every variant, with each number of threads.
void decoding() {
  const int64_t batch = 2, heads = 6, key_heads = 2, dim = 72, capacity = 140, position = 130;
  const int64_t fresh = batch * key_heads * dim, cache = fresh * capacity;
  for (const Kind kind : kKinds) {
    const Numbers q = random_inputs(kind, batch * heads * dim), k = random_inputs(kind, fresh);
    const Numbers v = random_inputs(kind, fresh), cosine = random_inputs(kind, dim);
    const Numbers sine = random_inputs(kind, dim), keys = random_inputs(kind, cache);
    const Numbers values = random_inputs(kind, cache);
    std::vector<uint8_t> want;
    for (const Variant* one = variants(); one->name; ++one)
      for (const int threads : {1, 2, 7}) {
        use(one->name);
        Numbers new_keys = keys, new_values = values, y = q, norm = q;
        Attention a{};
        a.batch = batch, a.heads = heads, a.kv_heads = key_heads, a.dim = dim;
        a.capacity = capacity, a.position = position, a.scaling = 0.125f;
        a.q = q.bytes.data(), a.k = k.bytes.data(), a.v = v.bytes.data();
        a.cosine = cosine.bytes.data(), a.sine = sine.bytes.data();
        a.keys = new_keys.bytes.data(), a.values = new_values.bytes.data();
        a.out = y.bytes.data();
        attend(kind, a, threads);
        rms_norm(kind, batch * heads, dim, q.bytes.data(), k.bytes.data(), 1e-5f,
                 norm.bytes.data(), threads);
        Numbers gated = q;
        for (const Activation activation : {Activation::Silu, Activation::Relu2})
          gate(kind, activation, batch * heads * dim, gated.bytes.data(), q.bytes.data(),
               gated.bytes.data(), threads);
        Numbers some(kind, 3 * capacity);
        dense(kind, 3, capacity, dim, q.bytes.data(), keys.bytes.data(), some.bytes.data(), threads);
        std::vector<uint8_t> got;
        for (const Numbers* part : {&new_keys, &new_values, &y, &norm, &gated, &some})
          got.insert(got.end(), part->bytes.begin(), part->bytes.end());
        if (want.empty()) want = got;
        if (got == want) continue;
        std::printf("%s decodes otherwise than portable, with %d threads\n", one->name, threads);
        std::exit(1);
      }
    add_to_hash(want);
  }
  use("portable");
}

}  // namespace

int main() {
  groups_and_tails();
  batches();
  threads();
  saturated();
  special_tokens();
  weights();
  decoding();
  for (const Variant* one = variants(); one->name; ++one) std::printf("%s ", one->name);
  std::printf("%016llx\n", static_cast<unsigned long long>(hash));
}
