// The compiled core behind its binding: the functions of kernels.h over whole matrices, on threads.
// Sizes, alignment and kinds are the caller's promise; see kernels.h for the rest of the contract.
#pragma once

#include "int8.h"
#include "kernels.h"
#include "lanes.h"

namespace ternarize {

// The layout of a matrix. group_size N > 0: N consecutive weights of a row share a scale; -1: the
// row; 0: the matrix, which is packed like -1.
Layout layout_of(int64_t rows, int64_t cols, int64_t group_size);

// An instruction set: the functions for weights, and those for products. Some differ in one of them,
// and what has none for int8 weights has the portable ones.
struct Variant {
  const char* name;
  const Kernels* kernels;
  const Products* products;
  const Int8Products* int8 = nullptr;
};
// Those of this build that this CPU can run, best last; ends with a null name.
const Variant* variants();
// The one in use.
const Variant& variant();
inline const Kernels& kernels() { return *variant().kernels; }
inline const Products& products() { return *variant().products; }
inline const Int8Products& int8_products() {
  return variant().int8 ? *variant().int8 : kPortableInt8;
}
// Uses the named one from now on; false if there is none.
bool use(const char* name);

// Each returns what its namesake in kernels.h does, for all rows.
int64_t pack(const Layout&, const int8_t* trits, uint8_t* packed, int threads);
int64_t unpack(const Layout&, const uint8_t* packed, int8_t* trits, int threads);
int64_t check(const Layout&, const uint8_t* packed, uint8_t* nonzero, int threads);
void dequantize(const Layout&, const uint8_t* packed, const float* scales, int64_t scale_rows,
                Kind, void* out, int threads);
int64_t ternarize(Method, Kind, const Layout&, const void* weights, int8_t* trits, double* scales,
                  int threads);
bool levels(Kind, const Layout&, const void* weights, int8_t* trits, double* scales, int threads);

// Of the whole matrix; `rows` is scratch for one Distance per row.
Distance distance(Kind, const Layout&, const void* weights, const int8_t* trits,
                  const double* scales, int64_t scale_rows, Distance* rows, int threads);

// One scale for the matrix. `totals` is scratch for one Total per row.
int64_t ternarize_tensor(Method, Kind, const Layout&, const void* weights, int8_t* trits,
                         double* scale, Total* totals, int threads);
bool levels_tensor(Kind, const Layout&, const void* weights, int8_t* trits, double* scale,
                   int threads);

}  // namespace ternarize
