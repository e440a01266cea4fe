// The threads of the products.
#include "multiply/multiply.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpus/cpus.h"
#include "shared/pool.h"
#include "shared/workspace.h"

namespace ternarize {
namespace {

constexpr int64_t kOneThread = 1 << 18;  // multiplications that are not worth a second thread
constexpr int64_t kBatch = 512, kInt8Batch = 128;  // tokens at once; of int8 panels stay in cache
constexpr int64_t kShortest = 32;    // groups of int8 weights for which a panel is worth its padding
constexpr int64_t kRowsOfTask = 32;  // a task of int8 weights has a multiple of these; as many of int4 are open

// A few tasks for each thread, so that nobody waits long for the last.
int64_t tasks_of(int threads) { return threads > 1 ? threads * 8 : 1; }

// Bytes from one row of q to the next: whole cache lines, and no multiple of 512, because the rows
// that are read together would fall on the same few sets of the cache.
int64_t stride_of(const Lanes& x) {
  const int64_t bytes = lines(x.quads * 4);
  return bytes % 512 == 0 ? bytes + 64 : bytes;
}

// Tasks of the blocks of several matrices: ranges of blocks of one matrix, and where there are few
// blocks also ranges of tokens.
struct Tasks {
  int64_t chunk;               // blocks of a task
  std::vector<int64_t> first;  // the first chunk of each matrix, and their number behind
  int64_t tokens;              // of a task

  Tasks(const Matrix* matrices, int count, int64_t all_tokens, int threads) : first{0} {
    const int64_t wanted = tasks_of(threads);
    int64_t blocks = 0;
    for (int m = 0; m < count; ++m) blocks += matrices[m].x.blocks;
    chunk = std::max<int64_t>(1, ceil_div(blocks, wanted));
    for (int m = 0; m < count; ++m)
      first.push_back(first.back() + ceil_div(matrices[m].x.blocks, chunk));
    tokens = all_tokens;
    while (tokens > 64 && first.back() * ceil_div(all_tokens, tokens) < wanted / 2)
      tokens = lines(tokens / 2);
  }
};

// Inputs as integers, and memory behind them, aligned to 64 bytes. Both are valid until the next call
// of this thread.
struct Rounded {
  Levels levels;
  uint8_t* memory;
};

Rounded round_inputs(const Lanes& x, Kind kind, int parts, int64_t tokens, const void* in,
                     int64_t memory, int threads) {
  static thread_local Workspace workspace;
  const int64_t stride = stride_of(x), rows = ceil_div(tokens, kTokens) * kTokens * parts;
  const int64_t q = rows * stride + 64, sums = lines(rows * x.stored.groups * 4);
  uint8_t* const all = workspace.bytes(q + sums + lines(tokens * 4) + memory);
  const Levels levels{tokens,
                      parts,
                      stride,
                      reinterpret_cast<int8_t*>(all),
                      reinterpret_cast<int32_t*>(all + q),
                      reinterpret_cast<float*>(all + q + sums)};
  constexpr int64_t kTokensOfTask = 4;
  run_tasks(threads, ceil_div(tokens, kTokensOfTask), [&](int64_t task, int) {
    products().quantize(x, kind, in, task * kTokensOfTask,
                        std::min(tokens, (task + 1) * kTokensOfTask), levels);
  });
  return {levels, all + q + sums + lines(tokens * 4)};
}

void product_of_batch(const Matrix* matrices, int count, Kind kind, int parts, int64_t done,
                      int64_t tokens, const void* in, int threads) {
  const Products& use = products();
  int64_t weights = 0, scratch = 0;
  for (int m = 0; m < count; ++m) {
    const Lanes& x = matrices[m].x;
    weights += x.stored.rows * x.stored.cols;
    scratch = std::max(scratch, use.scratch(x, Levels{tokens, parts, 0, nullptr, nullptr, nullptr}));
  }
  if (tokens * weights < kOneThread) threads = 1;
  // what the integers depend on is the same for all matrices
  const Rounded rounded =
      round_inputs(matrices[0].x, kind, parts, tokens, in, scratch * threads, threads);

  const Tasks tasks(matrices, count, tokens, threads);
  const int64_t chunks = tasks.first.back(), size = size_of(kind);
  run_tasks(threads, chunks * ceil_div(tokens, tasks.tokens), [&](int64_t task, int worker) {
    int m = 0;
    while (task % chunks >= tasks.first[static_cast<size_t>(m) + 1]) ++m;
    const Matrix& one = matrices[m];
    const int64_t block = (task % chunks - tasks.first[static_cast<size_t>(m)]) * tasks.chunk;
    const int64_t token = task / chunks * tasks.tokens;
    use.multiply(one.x, one.lanes, one.scales, rounded.levels, token,
                 std::min(tokens, token + tasks.tokens), block,
                 std::min(one.x.blocks, block + tasks.chunk), kind,
                 static_cast<uint8_t*>(one.out) + done * one.x.stored.rows * size,
                 rounded.memory + worker * scratch);
  });
}

void int8_product_of_batch(const Int8Matrix& x, Kind kind, int parts, int64_t tokens,
                           const void* in, void* out, int threads) {
  const Products& use = products();
  const Lanes& lanes = x.lanes;
  const int64_t width = half_width(lanes);
  if (tokens * x.rows() * x.cols() < kOneThread) threads = 1;
  const bool many =
      use.int8_few > 0 && tokens > use.int8_few && lanes.stored.group >= kShortest;
  const int64_t own = use.int8_scratch(x), opened = kRowsOfTask * x.cols();
  const int64_t scratch = own + (x.halves ? lines(opened + 64) : 0);
  const int64_t blocks = many ? ceil_div(tokens, kLanes) : 0;
  const int64_t panels_size = blocks * panel_size(lanes, parts);
  const Rounded rounded =
      round_inputs(lanes, kind, parts, tokens, in, panels_size + scratch * threads, threads);
  uint8_t *const panels = rounded.memory, *const scratches = panels + panels_size;
  run_tasks(threads, blocks, [&](int64_t task, int) {
    use.int8_arrange(lanes, rounded.levels, task, task + 1, panels);
  });
  const int64_t chunk = ceil_div(ceil_div(x.rows(), tasks_of(threads)), kRowsOfTask) * kRowsOfTask;
  run_tasks(threads, ceil_div(x.rows(), chunk), [&](int64_t task, int worker) {
    uint8_t* const mine = scratches + worker * scratch;
    const uint8_t* const met = many ? panels : nullptr;
    const int64_t first = task * chunk, end = std::min(x.rows(), first + chunk);
    if (!x.halves) return use.int8_multiply(x, rounded.levels, met, first, end, kind, out, mine);
    Int8Matrix part = x;
    part.weights = reinterpret_cast<int8_t*>(mine + own);
    std::memset(mine + own + opened, 0, 64);
    for (int64_t row = first; row < end; row += kRowsOfTask) {
      const int64_t row_end = std::min(end, row + kRowsOfTask);
      part.first = row;
      use.int4_open(lanes, x.halves + row * width, row_end - row,
                    reinterpret_cast<int8_t*>(mine + own));
      use.int8_multiply(part, rounded.levels, met, row, row_end, kind, out, mine);
    }
  });
}

}  // namespace

void product(const Matrix* matrices, int count, Kind kind, int parts, int64_t tokens,
             const void* in, int threads) {
  threads = std::clamp(threads, 1, 256);
  const int64_t row = matrices[0].x.stored.cols * size_of(kind);
  for (int64_t done = 0; done < tokens; done += kBatch)
    product_of_batch(matrices, count, kind, parts, done, std::min(kBatch, tokens - done),
                     static_cast<const uint8_t*>(in) + done * row, threads);
}

void int8_product(const Int8Matrix& x, Kind kind, int parts, int64_t tokens, const void* in,
                  void* out, int threads) {
  if (x.rows() == 0) return;
  threads = std::clamp(threads, 1, 256);
  const int64_t size = size_of(kind);
  for (int64_t done = 0; done < tokens; done += kInt8Batch)
    int8_product_of_batch(x, kind, parts, std::min(kInt8Batch, tokens - done),
                          static_cast<const uint8_t*>(in) + done * x.cols() * size,
                          static_cast<uint8_t*>(out) + done * x.rows() * size, threads);
}

uint64_t read_all(const uint8_t* bytes, int64_t n, int threads) {
  threads = std::clamp(threads, 1, 256);
  const int64_t tasks = threads > 1 ? threads * 8 : 1, part = n / tasks / 64 * 64;
  std::atomic<uint64_t> all{0};
  run_tasks(threads, tasks, [&](int64_t task, int) {
    const int64_t end = task == tasks - 1 ? n : (task + 1) * part;
    all ^= products().read(bytes + task * part, end - task * part);
  });
  return all;
}

int64_t dot_peak(int64_t rounds, int threads) {
  std::atomic<int64_t> all{0};
  run_tasks(std::clamp(threads, 1, 256), threads,
            [&](int64_t, int) { all += products().dot_peak(rounds); });
  return all;
}

}  // namespace ternarize
