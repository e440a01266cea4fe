// steps/: journals of steps (formats/steps.md). Random words with an address, and what steps that are
// made of them do to values. Integers: every CPU and any number of threads give the same values.
#pragma once

#include "shared/formats.h"

namespace ternarize {

// Some steps, one behind the other. Of step i the perturbations chosen[bounds[i] .. bounds[i + 1])
// are taken, each along its own direction (1) or against it (-1).
struct Steps {
  int64_t count;
  const int64_t* seeds;    // minus 2^63
  const int64_t* fields;   // (count, 3): number, bits of a cell, amount
  const int64_t* bounds;   // (count + 1)
  const int32_t* chosen;
  const int8_t* signs;
};

// Applies steps in their order to the values of a flat index from `first` on, n of them; each stays
// within -limit and limit.
void apply_steps(int8_t* values, int64_t n, uint64_t first, int limit, uint32_t purpose,
                 const Steps& steps, int threads);

// How much values gain along each perturbation i < k of a step, and against it, one non-zero after the
// other from the front, in double precision: out[2 i] is the sum of up where the sign is 1 and of -down
// where it is -1, out[2 i + 1] that of -down and up. `up` is what a value gains by one more, `down`
// what it loses by one less.
void align(const float* up, const float* down, int64_t n, uint64_t first, uint64_t seed,
           uint32_t number, int bits, uint32_t purpose, int64_t k, double* out, int threads);

}  // namespace ternarize
