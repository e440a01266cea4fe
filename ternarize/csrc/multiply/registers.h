// Loops over registers, written out before the compiler decides what lives where: folds over plain
// pointers, because compilers keep what a loop or a closure refers to in memory. V has the
// instructions: load, store, prefetch, dot, four. Internal linkage, see shared/formats.h.
#pragma once

#include <utility>  // of it only types, no code

#include "shared/formats.h"

namespace ternarize {
namespace {

template <int n>
using Count = std::make_integer_sequence<int, n>;
template <int... i>
using Indices = std::integer_sequence<int, i...>;

template <class Vector, int... i>
TERNARIZE_INLINE void clear(Vector* sums, Indices<i...>) {
  ((sums[i] = Vector{}), ...);
}

template <class V, class Vector, class T, int... i>
TERNARIZE_INLINE void load_all(Vector* to, const T* from, int64_t stride, Indices<i...>) {
  ((to[i] = V::load(from + i * stride)), ...);
}

template <class V, class Vector, int... i>
TERNARIZE_INLINE void store_all(const Vector* from, int32_t* to, int64_t stride, Indices<i...>) {
  (V::store(to + i * stride, from[i]), ...);
}

// The same of rows of n vectors that lie side by side.
template <class V, int n, class Vector, int... r>
TERNARIZE_INLINE void load_rows(Vector* to, const int32_t* from, int64_t stride, Indices<r...>) {
  (load_all<V>(to + r * n, from + r * stride, sizeof(Vector) / 4, Count<n>{}), ...);
}

template <class V, int n, class Vector, int... r>
TERNARIZE_INLINE void store_rows(const Vector* from, int32_t* to, int64_t stride, Indices<r...>) {
  (store_all<V>(from + r * n, to + r * stride, sizeof(Vector) / 4, Count<n>{}), ...);
}

// dot(sums[i], u[i], x) for all i
template <class V, class Vector, int... i>
TERNARIZE_INLINE void dot_all(Vector* sums, const Vector* u, Vector x, Indices<i...>) {
  (V::dot(sums[i], u[i], x), ...);
}

// The same with row r of q, four numbers of it, for all rows and fields.
template <class V, int fields, class Vector, int... r>
TERNARIZE_INLINE void dot_rows(Vector* sums, const Vector* u, const int8_t* q, int64_t stride,
                               Indices<r...>) {
  (dot_all<V>(sums + r * fields, u, V::four(q + r * stride), Count<fields>{}), ...);
}

// dot(sums[r * rows], w, x[r]) for all r
template <class V, int rows, class Vector, int... r>
TERNARIZE_INLINE void dot_row(Vector* sums, Vector w, const Vector* x, Indices<r...>) {
  (V::dot(sums[r * rows], w, x[r]), ...);
}

// The same for each of `rows` rows of weights, of which `load` takes a vector.
template <class V, int n, class Vector, class Load, int... i>
TERNARIZE_INLINE void dot_weights(Vector* sums, const int8_t* weights, int64_t stride, Load load,
                                  const Vector* x, Indices<i...>) {
  (dot_row<V, sizeof...(i)>(sums + i, load(weights + i * stride), x, Count<n>{}), ...);
}

template <class V, int... i>
TERNARIZE_INLINE void prefetch_all(const int8_t* from, int64_t stride, Indices<i...>) {
  (V::prefetch(from + i * stride), ...);
}

}  // namespace
}  // namespace ternarize
