// Ternarizes and packs one matrix on threads: packed_bits METHOD KIND ROWS COLS GROUP THREADS < floats.
// It writes, for every variant of this CPU, the packed trits and then the scales as doubles.
// campaigns/determinism.py compares them, on two machines, with what the package makes of the matrix.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpus/cpus.h"

using namespace ternarize;

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  const Method method = !std::strcmp(argv[1], "absmean") ? Method::Absmean
                        : !std::strcmp(argv[1], "twn")   ? Method::Twn
                                                         : Method::Itf;
  const Kind kind = !std::strcmp(argv[2], "F32")    ? Kind::F32
                    : !std::strcmp(argv[2], "BF16") ? Kind::BF16
                                                    : Kind::F16;
  const int64_t rows = std::atoll(argv[3]), cols = std::atoll(argv[4]);
  const int64_t group_size = std::atoll(argv[5]);
  const int threads = std::atoi(argv[6]);
  const Layout layout = layout_of(rows, cols, group_size);
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  std::vector<uint8_t> weights(size(rows * cols * (kind == Kind::F32 ? 4 : 2)));
  if (std::fread(weights.data(), 1, weights.size(), stdin) != weights.size()) return 3;
  for (const Variant* one = variants(); one->name; ++one) {
    use(one->name);
    std::vector<int8_t> trits(size(rows * cols));
    std::vector<double> scales(size(group_size ? rows * layout.groups : 1));
    std::vector<Total> totals(size(rows));
    std::vector<uint8_t> packed(size(rows * layout.width));
    const int64_t bad =
        group_size ? ternarize::ternarize(method, kind, layout, weights.data(), trits.data(),
                                          scales.data(), threads)
                   : ternarize_tensor(method, kind, layout, weights.data(), trits.data(),
                                      scales.data(), totals.data(), threads);
    if (bad != kNone || pack(layout, trits.data(), packed.data(), threads) != kNone) return 4;
    std::fwrite(packed.data(), 1, packed.size(), stdout);
    std::fwrite(scales.data(), sizeof(double), scales.size(), stdout);
  }
}
