// The threads of the products with int8 weights.

#include "int8.h"

#include <algorithm>
#include <cstring>

#include "core.h"
#include "pool.h"
#include "workspace.h"

namespace ternarize {
namespace {

constexpr int64_t kBatch = 128;        // tokens that are worked on at once: their panels stay in cache
constexpr int64_t kShortest = 32;      // groups for which a panel is worth its padding
constexpr int64_t kRowsOfTask = 32;    // a task has a multiple of these

void product_of_batch(const Int8Matrix& x, Kind kind, int parts, int64_t tokens, const void* in,
                      void* out, int threads) {
  const Int8Products& use = int8_products();
  const Lanes& lanes = x.lanes;
  if (tokens * x.rows() * x.cols() < kOneThread) threads = 1;
  const bool many = use.few > 0 && tokens > use.few && lanes.stored.group >= kShortest;

  Levels levels{tokens, parts, lines(lanes.quads * 4), nullptr, nullptr, nullptr};
  const int64_t blocks = many ? ceil_div(tokens, kLanes) : 0;
  // what is read beyond the last number meets weights that are taken as 0
  const int64_t q_bytes = tokens * parts * levels.stride + 64;
  const int64_t sums_bytes = lines(tokens * parts * lanes.stored.groups * 4);
  const int64_t factor_bytes = lines(tokens * 4), scratch = use.scratch(x);
  const int64_t panel = panel_size(lanes, parts);
  static thread_local Workspace workspace;
  uint8_t* memory = workspace.bytes(q_bytes + sums_bytes + factor_bytes + blocks * panel +
                                    scratch * threads);
  const auto take = [&](int64_t bytes) {
    uint8_t* const taken = memory;
    memory += bytes;
    return taken;
  };
  levels.q = reinterpret_cast<int8_t*>(take(q_bytes));
  levels.sums = reinterpret_cast<int32_t*>(take(sums_bytes));
  levels.factors = reinterpret_cast<float*>(take(factor_bytes));
  uint8_t* const panels = take(blocks * panel);
  uint8_t* const scratches = take(scratch * threads);

  constexpr int64_t kTokensOfTask = 4;
  run_tasks(threads, ceil_div(tokens, kTokensOfTask), [&](int64_t task, int) {
    products().quantize(lanes, kind, in, task * kTokensOfTask,
                        std::min(tokens, (task + 1) * kTokensOfTask), levels);
  });
  run_tasks(threads, blocks, [&](int64_t task, int) {
    use.arrange(lanes, levels, task, task + 1, panels);
  });
  // A few tasks for each thread, so that nobody waits long for the last.
  const int64_t wanted = threads > 1 ? threads * 8 : 1;
  const int64_t chunk = ceil_div(ceil_div(x.rows(), wanted), kRowsOfTask) * kRowsOfTask;
  run_tasks(threads, ceil_div(x.rows(), chunk), [&](int64_t task, int worker) {
    use.multiply(x, levels, many ? panels : nullptr, task * chunk,
                 std::min(x.rows(), (task + 1) * chunk), kind, out, scratches + worker * scratch);
  });
}

}  // namespace

void int8_product(const Int8Matrix& x, Kind kind, int parts, int64_t tokens, const void* in,
                  void* out, int threads) {
  if (x.rows() == 0) return;
  threads = std::clamp(threads, 1, 256);
  const int64_t size = size_of(kind);
  for (int64_t done = 0; done < tokens; done += kBatch)
    product_of_batch(x, kind, parts, std::min(kBatch, tokens - done),
                     static_cast<const uint8_t*>(in) + done * x.cols() * size,
                     static_cast<uint8_t*>(out) + done * x.rows() * size, threads);
}

}  // namespace ternarize
