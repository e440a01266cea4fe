// cpus/: the instruction sets. Which of them this CPU has, the choice of one, and the functions for
// weights of each: portable.cpp, avx2.cpp and avx512.cpp compile weights.h, which has those of pack/,
// ternarize/, latent/, decode/ and entropy/. Those of multiply/ have their own files there.
//
// A choice holds for all threads; a call that is under way may still use the one before.
#pragma once

#include "decode/decode.h"
#include "digest/digest.h"
#include "entropy/entropy.h"
#include "latent/latent.h"
#include "multiply/multiply.h"
#include "pack/pack.h"
#include "ternarize/ternarize.h"

namespace ternarize {

// The functions for weights of an instruction set; arrays have an element for each Kind.
struct Kernels {
  Packing packing;
  Ternarizing ternarizing[3];
  Latent latent[3];
  Decoding decoding[3];
  Entropy entropy;
};

extern const Kernels kPortable;
extern const Kernels kAvx2;  // x86-64 builds only, as the next
extern const Kernels kAvx512;

// An instruction set: the functions for weights, and those for products. Some differ in one of them.
struct Variant {
  const char* name;
  const Kernels* kernels;
  const Products* products;
};
// Those of this build that this CPU can run, best last; ends with a null name.
const Variant* variants();
// The one in use: at first the best.
const Variant& variant();
TERNARIZE_INLINE const Kernels& kernels() { return *variant().kernels; }
TERNARIZE_INLINE const Products& products() { return *variant().products; }
// Uses the named one from now on; false if there is none.
bool use(const char* name);

// SHA-256 by instructions of this CPU; null where it, or this build, has none.
Sha256Blocks sha256_blocks();

}  // namespace ternarize
