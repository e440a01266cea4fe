// The threads of norms, gates, dense products and attention.
#include "decode/decode.h"

#include <algorithm>
#include <vector>

#include "cpus/cpus.h"
#include "shared/pool.h"

namespace ternarize {
namespace {

constexpr int64_t kOneThread = 1 << 16;  // multiplications that are not worth a second thread

const Decoding& of(Kind kind) { return kernels().decoding[static_cast<int>(kind)]; }

}  // namespace

void rms_norm(Kind kind, int64_t rows, int64_t n, const void* x, const void* weight, float epsilon,
              void* out, int threads) {
  const int64_t row = n * size_of(kind);
  const int64_t at_once = std::max<int64_t>(1, kOneThread / std::max<int64_t>(1, n));
  run_tasks(std::max(1, threads), ceil_div(rows, at_once), [&](int64_t task, int) {
    const int64_t first = task * at_once;
    of(kind).rms_norm(std::min(at_once, rows - first), n, static_cast<const char*>(x) + first * row,
                      weight, epsilon, static_cast<char*>(out) + first * row);
  });
}

void gate(Kind kind, Activation activation, int64_t n, const void* gate, const void* up, void* out,
          int threads) {
  constexpr int64_t kOfTask = 1 << 13;
  const int64_t size = size_of(kind);
  run_tasks(std::max(1, threads), ceil_div(n, kOfTask), [&](int64_t task, int) {
    const int64_t first = task * kOfTask;
    of(kind).gate(activation, std::min(kOfTask, n - first),
                  static_cast<const char*>(gate) + first * size,
                  static_cast<const char*>(up) + first * size,
                  static_cast<char*>(out) + first * size);
  });
}

void dense(Kind kind, int64_t tokens, int64_t rows, int64_t cols, const void* x, const void* w,
           void* out, int threads) {
  threads = std::clamp(threads, 1, 256);
  if (tokens * rows * cols < kOneThread) threads = 1;
  static thread_local std::vector<float> wide;
  wide.resize(static_cast<size_t>(tokens * cols));
  widen(kind, x, 0, tokens * cols, wide.data());
  const float* const in = wide.data();  // of this thread: others do not see its thread_local
  const int64_t chunk = std::max<int64_t>(1, rows / (threads > 1 ? 16 * threads : 1));
  run_tasks(threads, ceil_div(rows, chunk), [=](int64_t task, int) {
    of(kind).dense(tokens, rows, cols, in, w, task * chunk, std::min(rows, (task + 1) * chunk), out);
  });
}

void attend(Kind kind, const Attention& a, int threads) {
  threads = std::clamp(threads, 1, 256);
  if (2 * a.batch * a.heads * a.dim * (a.position + 1) < kOneThread) threads = 1;
  static thread_local std::vector<float> scratch;
  const int64_t each = ceil_div(a.scratch(), 16) * 16;
  if (static_cast<int64_t>(scratch.size()) < each * threads)
    scratch.resize(static_cast<size_t>(each * threads));
  float* const memory = scratch.data();  // of this thread: others do not see its thread_local
  run_tasks(threads, a.batch * a.kv_heads, [&, memory](int64_t pair, int worker) {
    of(kind).attend(a, pair, pair + 1, memory + worker * each);
  });
}

}  // namespace ternarize
