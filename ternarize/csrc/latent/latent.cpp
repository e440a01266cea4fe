// The threads of latent weights.
#include "latent/latent.h"

#include "cpus/cpus.h"
#include "shared/parallel.h"

namespace ternarize {
namespace {

const Latent& of(Kind kind) { return kernels().latent[static_cast<int>(kind)]; }

}  // namespace

void read_latent(Kind kind, const Layout& x, const float* latent, const float* scales, void* out,
                 int threads) {
  parallel_for(x.rows, x.cols, threads, [&](int, int64_t first, int64_t last) {
    of(kind).read(x, first, last, latent, scales, out);
  });
}

void latent_gradients(Kind kind, const Layout& x, const float* latent, const float* scales,
                      const void* given, float edge, float* to_latent, float* to_scales,
                      int threads) {
  parallel_for(x.rows, x.cols, threads, [&](int, int64_t first, int64_t last) {
    of(kind).gradients(x, first, last, latent, scales, given, edge, to_latent, to_scales);
  });
}

}  // namespace ternarize
