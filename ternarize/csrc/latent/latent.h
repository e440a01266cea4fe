// latent/: latent weights read as ternary ones, and the gradients of that, in one pass over memory each
// (ternarize/qat/rounding.py has the formulas). loops.h has the arithmetic, which is compiled once for
// each instruction set; the contract is that of pack/pack.h.
#pragma once

#include "pack/pack.h"

namespace ternarize {

// The functions of one instruction set for one Kind of what is read and of its gradient, of the rows
// [first, last) of a matrix; the pointers are those of the whole matrix. Scales are [rows, groups].
struct Latent {
  // out = s t, t = sign(v) where |v| > s / 2, else 0.
  void (*read)(const Layout&, int64_t first, int64_t last, const float* latent, const float* scales,
               void* out);

  // Of the gradient by out: that by the latent weights, 0 where |v / s| >= edge, and that by the
  // scales, the sum of t - (v / s where |v / s| < edge, else 0) times it.
  void (*gradients)(const Layout&, int64_t first, int64_t last, const float* latent,
                    const float* scales, const void* given, float edge, float* to_latent,
                    float* to_scales);
};

// Each does what its namesake above does, for all rows.
void read_latent(Kind, const Layout&, const float* latent, const float* scales, void* out,
                 int threads);
void latent_gradients(Kind, const Layout&, const float* latent, const float* scales,
                      const void* given, float edge, float* to_latent, float* to_scales,
                      int threads);

}  // namespace ternarize
