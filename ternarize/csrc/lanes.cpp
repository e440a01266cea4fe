// Run-time layouts made and undone, and the threads of the products.

#include "lanes.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "core.h"
#include "pool.h"
#include "workspace.h"

namespace ternarize {
namespace {

constexpr int kPowers[2][5] = {{1, 4, 16, 64, 0}, {1, 3, 9, 28, 84}};
const int* powers_of(Form form) { return kPowers[form == Form::Lanes3]; }

// Each field's trit in a byte; 2 in bytes that `to_lanes` never writes.
struct Trits {
  int8_t of[5][256];
};

constexpr Trits make_trits(const int (&powers)[5], int fields) {
  Trits table{};
  for (int code = 0; code < 256; ++code) {
    bool valid = true;
    int rest = code;
    for (int f = fields - 1; f >= 0; --f) {
      table.of[f][code] = static_cast<int8_t>(rest / powers[f] - 1);
      valid = valid && rest / powers[f] < 3;
      rest %= powers[f];
    }
    for (int f = 0; f < fields && !valid; ++f) table.of[f][code] = 2;
  }
  return table;
}

constexpr Trits kTrits[2] = {make_trits(kPowers[0], 4), make_trits(kPowers[1], 5)};

// The lowest of the indices that were found, by whichever thread.
class Lowest {
 public:
  void add(int64_t index) {
    const auto candidate = static_cast<uint64_t>(index);  // kNone is the largest
    uint64_t now = found_.load(std::memory_order_relaxed);
    while (candidate < now && !found_.compare_exchange_weak(now, candidate)) {
    }
  }
  int64_t get() const { return static_cast<int64_t>(found_.load()); }

 private:
  std::atomic<uint64_t> found_{static_cast<uint64_t>(kNone)};
};

// Calls work(block, scratch) for all blocks; `bytes` of scratch for each thread.
template <class Work>
void for_blocks(const Lanes& x, int threads, int64_t bytes, Work work) {
  if (x.size() == 0) return;  // no columns: there would be no memory, which memset must have
  if (threads < 1) threads = 1;
  const int64_t chunk = std::max<int64_t>(1, x.blocks / (8 * threads));
  std::vector<uint8_t> scratch(static_cast<size_t>(bytes * threads));
  run_tasks(threads, (x.blocks + chunk - 1) / chunk, [&](int64_t task, int worker) {
    const int64_t end = std::min(x.blocks, (task + 1) * chunk);
    for (int64_t block = task * chunk; block < end; ++block)
      work(block, scratch.data() + worker * bytes);
  });
}

// The layout of one row of a matrix.
Layout one_row(const Layout& stored) {
  Layout row = stored;
  row.rows = 1;
  return row;
}

}  // namespace

Lanes lanes_of(Form form, const Layout& stored) {
  const int64_t block = 16 * static_cast<int64_t>(form);
  const int64_t group_quads = (stored.group + 3) / 4;
  const int64_t last = stored.groups ? stored.cols - (stored.groups - 1) * stored.group : 0;
  const int64_t quads = stored.groups ? (stored.groups - 1) * group_quads + (last + 3) / 4 : 0;
  return {form, stored, block, (stored.rows + block - 1) / block, group_quads, quads};
}

void ask_for_large_pages(uint8_t* bytes, int64_t n) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 1 << 21;
  const auto at = reinterpret_cast<uintptr_t>(bytes);
  const uintptr_t first = (at + kLarge - 1) / kLarge * kLarge;
  const uintptr_t last = (at + static_cast<uintptr_t>(n)) / kLarge * kLarge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(bytes);
  static_cast<void>(n);
#endif
}

int64_t to_lanes(const Lanes& x, const uint8_t* packed, uint8_t* lanes, int threads) {
  const Layout row_layout = one_row(x.stored);
  const int64_t cols = x.stored.cols, padded = x.quads * 4, fields = static_cast<int64_t>(x.form);
  const int* powers = powers_of(x.form);
  int zeros = 0;  // the byte whose trits are all 0
  for (int f = 0; f < fields; ++f) zeros += powers[f];
  Lowest bad;
  for_blocks(x, threads, 16 * padded + cols, [&](int64_t block, uint8_t* codes) {
    auto* trits = reinterpret_cast<int8_t*>(codes + 16 * padded);
    std::memset(codes, zeros, static_cast<size_t>(16 * padded));
    for (int64_t i = 0; i < x.block; ++i) {
      const int64_t row = block * x.block + i;
      if (row >= x.stored.rows) break;
      const int64_t found =
          kernels().unpack(row_layout, 0, 1, packed + row * x.stored.width, trits);
      if (found != kNone) return bad.add(row * x.stored.width + found);
      const int power = powers[i / 16];
      for (int64_t g = 0; g < x.stored.groups; ++g) {
        const int8_t* from = trits + g * x.stored.group;
        uint8_t* to = codes + i % 16 * padded + g * x.group_quads * 4;
        for (int64_t c = 0, n = x.cols_of(g); c < n; ++c)
          to[c] = static_cast<uint8_t>(to[c] + power * from[c]);
      }
    }
    uint8_t* out = lanes + block * x.quads * 64;
    for (int64_t quad = 0; quad < x.quads; ++quad)
      for (int64_t lane = 0; lane < 16; ++lane)
        std::memcpy(out + quad * 64 + lane * 4, codes + lane * padded + quad * 4, 4);
  });
  return bad.get();
}

int64_t from_lanes(const Lanes& x, const uint8_t* lanes, uint8_t* packed, int threads) {
  const Layout row_layout = one_row(x.stored);
  const int64_t cols = x.stored.cols, padded = x.quads * 4;
  const Trits& table = kTrits[x.form == Form::Lanes3];
  Lowest bad;
  for_blocks(x, threads, 16 * padded + cols, [&](int64_t block, uint8_t* codes) {
    auto* trits = reinterpret_cast<int8_t*>(codes + 16 * padded);
    const uint8_t* in = lanes + block * x.quads * 64;
    for (int64_t quad = 0; quad < x.quads; ++quad)
      for (int64_t lane = 0; lane < 16; ++lane)
        std::memcpy(codes + lane * padded + quad * 4, in + quad * 64 + lane * 4, 4);
    for (int64_t i = 0; i < x.block; ++i) {
      const int64_t row = block * x.block + i;
      if (row >= x.stored.rows) break;
      for (int64_t g = 0; g < x.stored.groups; ++g) {
        const uint8_t* from = codes + i % 16 * padded + g * x.group_quads * 4;
        int8_t* to = trits + g * x.stored.group;
        for (int64_t c = 0, n = x.cols_of(g); c < n; ++c) to[c] = table.of[i / 16][from[c]];
      }
      const int64_t found =
          kernels().pack(row_layout, 0, 1, trits, packed + row * x.stored.width);
      if (found != kNone) return bad.add(row * cols + found);
    }
  });
  return bad.get();
}

// ---------------------------------------------------------------------------------------------
// Products

namespace {

constexpr int64_t kBatch = 512;                // tokens that are worked on at once

// Bytes from one row of q to the next: whole cache lines, and no multiple of 512, because the rows
// that are read together would fall on the same few sets of the cache.
int64_t stride_of(const Lanes& x) {
  const int64_t bytes = lines(x.quads * 4);
  return bytes % 512 == 0 ? bytes + 64 : bytes;
}

// Tasks of the blocks of several matrices: a few for each thread, so that nobody waits long for the
// last. They are ranges of blocks of one matrix, and where there are few blocks also ranges of tokens.
struct Tasks {
  int64_t chunk;               // blocks of a task
  std::vector<int64_t> first;  // the first chunk of each matrix, and their number behind
  int64_t tokens;              // of a task

  Tasks(const Matrix* matrices, int count, int64_t all_tokens, int threads) : first{0} {
    const int64_t wanted = threads > 1 ? threads * 8 : 1;
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

void product_of_batch(const Matrix* matrices, int count, Kind kind, int parts, int64_t done,
                      int64_t tokens, const void* in, int threads) {
  const Products& use = products();
  const Lanes& x = matrices[0].x;  // what is said of columns below is the same for all
  int64_t weights = 0, scratch = 0;
  for (int m = 0; m < count; ++m) weights += matrices[m].x.stored.rows * x.stored.cols;
  if (tokens * weights < kOneThread) threads = 1;

  Levels levels{tokens, parts, stride_of(x), nullptr, nullptr, nullptr};
  const int64_t rows = ceil_div(tokens, kTokens) * kTokens * parts;
  const int64_t q_bytes = rows * levels.stride + 64;
  const int64_t sums_bytes = lines(rows * x.stored.groups * 4), factor_bytes = lines(tokens * 4);
  for (int m = 0; m < count; ++m)
    scratch = std::max(scratch, use.scratch(matrices[m].x, levels));
  static thread_local Workspace workspace;
  uint8_t* const memory =
      workspace.bytes(q_bytes + sums_bytes + factor_bytes + scratch * threads);
  levels.q = reinterpret_cast<int8_t*>(memory);
  levels.sums = reinterpret_cast<int32_t*>(memory + q_bytes);
  levels.factors = reinterpret_cast<float*>(memory + q_bytes + sums_bytes);
  uint8_t* const scratches = memory + q_bytes + sums_bytes + factor_bytes;
  // What lies between the numbers is multiplied by digits that are 0, or gives rows that are not kept.
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t used = row < tokens * parts ? x.quads * 4 : 0;
    std::memset(levels.q + row * levels.stride + used, 0,
                static_cast<size_t>(levels.stride - used));
  }
  std::memset(levels.q + rows * levels.stride, 0, 64);

  constexpr int64_t kTokensOfTask = 4;
  run_tasks(threads, ceil_div(tokens, kTokensOfTask), [&](int64_t task, int) {
    use.quantize(x, kind, in, task * kTokensOfTask,
                 std::min(tokens, (task + 1) * kTokensOfTask), levels);
  });

  const Tasks tasks(matrices, count, tokens, threads);
  const int64_t chunks = tasks.first.back(), size = size_of(kind);
  run_tasks(threads, chunks * ceil_div(tokens, tasks.tokens), [&](int64_t task, int worker) {
    int m = 0;
    while (task % chunks >= tasks.first[static_cast<size_t>(m) + 1]) ++m;
    const Matrix& one = matrices[m];
    const int64_t block = (task % chunks - tasks.first[static_cast<size_t>(m)]) * tasks.chunk;
    const int64_t token = task / chunks * tasks.tokens;
    use.multiply(one.x, one.lanes, one.scales, levels, token,
                 std::min(tokens, token + tasks.tokens), block,
                 std::min(one.x.blocks, block + tasks.chunk), kind,
                 static_cast<uint8_t*>(one.out) + done * one.x.stored.rows * size,
                 scratches + worker * scratch);
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
