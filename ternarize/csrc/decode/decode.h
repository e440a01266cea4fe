// decode/: what decoding a token needs besides products with packed weights: norms, gates, attention to
// a cache, and products with a few dense weights. operations.h has the arithmetic, which is compiled
// once for each instruction set.
//
// Sums have one order: one by one, those of norms, softmax and dense products in lanes first. So all
// give the same bits. Numbers that a model keeps between two operations are rounded to its dtype, as
// torch does; those inside are floats.
//
// Memory is the caller's, dense, of the sizes below and of one kind. Threads may call these at once.
// Nothing fails but the allocation of scratch, by std::bad_alloc.
#pragma once

#include "shared/formats.h"

namespace ternarize {

constexpr int64_t kChunk = 64;  // tokens, and numbers of a head, that are worked on at once
constexpr TERNARIZE_INLINE int64_t in_chunks(int64_t n) {
  return (n + kChunk - 1) / kChunk * kChunk;
}

// Attention of one new token of each text to all tokens up to it. Everything is of one kind.
struct Attention {
  int64_t batch;  // texts
  int64_t heads;  // of the queries; a multiple of kv_heads
  int64_t kv_heads;
  int64_t dim;         // of a head, even
  int64_t capacity;    // tokens that the cache has room for
  int64_t position;    // of the new token: as many are before it
  float scaling;       // of the products of queries and keys
  const void* q;       // [batch, heads, dim]
  const void* k;       // [batch, kv_heads, dim]
  const void* v;       // [batch, kv_heads, dim]
  const void* cosine;  // [dim]: of the rotary embedding at `position`
  const void* sine;    // [dim]
  void* keys;          // [batch, kv_heads, dim, capacity]: rotated; the new one is written
  void* values;        // [batch, kv_heads, capacity, dim]
  void* out;           // [batch, heads, dim]

  // Floats that `attend` needs for itself.
  TERNARIZE_INLINE int64_t scratch() const {
    const int64_t wide = in_chunks(dim);
    return heads / kv_heads * (2 * wide + in_chunks(position + 1)) + (kChunk + 2) * wide;
  }
};

enum class Activation { Silu, Relu2 };  // x / (1 + e^-x), max(x, 0)^2

// The functions of one instruction set for one kind.
struct Decoding {
  // out[row] = weight * (x[row] / sqrt(mean(x[row]^2) + epsilon)), the bracket rounded first.
  void (*rms_norm)(int64_t rows, int64_t n, const void* x, const void* weight, float epsilon,
                   void* out);
  // out[i] = activation(gate[i]) * up[i], the first factor rounded first.
  void (*gate)(Activation, int64_t n, const void* gate, const void* up, void* out);
  // out[token, row] = the sum of x[token] * w[row] for the rows [first, last) of w[rows, cols];
  // x[tokens, cols] are floats.
  void (*dense)(int64_t tokens, int64_t rows, int64_t cols, const float* x, const void* w,
                int64_t first, int64_t last, void* out);
  // Of the pairs of text and key head in [first, last).
  void (*attend)(const Attention&, int64_t first, int64_t last, float* scratch);
};

// Each on threads.
void rms_norm(Kind, int64_t rows, int64_t n, const void* x, const void* weight, float epsilon,
              void* out, int threads);
void gate(Kind, Activation, int64_t n, const void* gate, const void* up, void* out, int threads);
void dense(Kind, int64_t tokens, int64_t rows, int64_t cols, const void* x, const void* w, void* out,
           int threads);
void attend(Kind, const Attention&, int threads);

}  // namespace ternarize
