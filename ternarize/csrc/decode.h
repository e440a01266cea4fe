// The contract of what decoding a token needs besides products with packed weights: norms, gates,
// attention to a cache, and products with a few dense weights.
//
// decode.inc is compiled for each instruction set, as part of the tables in kernels.h. Sums have one
// order: one by one, those of norms, softmax and dense products in lanes first. So all give the same
// bits. Numbers that a model keeps between two operations are rounded to its dtype, as torch does;
// those inside are floats.
#pragma once

#include <cstdint>

// For the inner loops, so that what their caller knows of lengths and thresholds is compiled in. And
// for the functions in headers that sources of one instruction set include: they leave no copy that
// the linker could take for all (see kernels.inc).
#ifdef _MSC_VER
#define TERNARIZE_INLINE __forceinline
#else
#define TERNARIZE_INLINE inline __attribute__((always_inline))
#endif

namespace ternarize {

enum class Kind;

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

struct Decoding {
  // out[row] = weight * (x[row] / sqrt(mean(x[row]^2) + epsilon)), the bracket rounded first.
  void (*rms_norm)(Kind, int64_t rows, int64_t n, const void* x, const void* weight, float epsilon,
                   void* out);
  // out[i] = activation(gate[i]) * up[i], the first factor rounded first.
  void (*gate)(Kind, Activation, int64_t n, const void* gate, const void* up, void* out);
  // out[token, row] = the sum of x[token] * w[row] for the rows [first, last) of w[rows, cols], which
  // is of the kind; x[tokens, cols] are floats.
  void (*dense)(Kind, int64_t tokens, int64_t rows, int64_t cols, const float* x, const void* w,
                int64_t first, int64_t last, void* out);
  // Of the pairs of text and key head in [first, last).
  void (*attend)(Kind, const Attention&, int64_t first, int64_t last, float* scratch);
};

// Each on threads.
void rms_norm(Kind, int64_t rows, int64_t n, const void* x, const void* weight, float epsilon,
              void* out, int threads);
void gate(Kind, Activation, int64_t n, const void* gate, const void* up, void* out, int threads);
void dense(Kind, int64_t tokens, int64_t rows, int64_t cols, const void* x, const void* w, void* out,
           int threads);
void attend(Kind, const Attention&, int threads);

}  // namespace ternarize
