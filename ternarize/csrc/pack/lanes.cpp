// Run-time layouts made and undone.
#include "pack/lanes.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpus/cpus.h"
#include "shared/pool.h"

namespace ternarize {
namespace {

constexpr int kPowers[2][5] = {{1, 4, 16, 64, 0}, {1, 3, 9, 28, 84}};

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

// What each stored byte adds to the bytes of a layout if its row is that of field f: digit power_f of
// its five trits, and of three more that are 0, so that one store of eight bytes writes them and what
// pads a group. (243..255 add something.)
struct Added {
  uint64_t of[5][256];
};

constexpr Added make_added(const int (&powers)[5], int fields) {
  Added table{};
  for (int f = 0; f < fields; ++f)
    for (int code = 0; code < 256; ++code) {
      uint64_t bytes = 0;
      for (int k = 0, rest = code; k < 8; ++k, rest /= 3)
        bytes |= static_cast<uint64_t>(powers[f] * (k < 5 ? rest % 3 : 1)) << 8 * k;
      table.of[f][code] = bytes;
    }
  return table;
}

constexpr Added kAdded[2] = {make_added(kPowers[0], 4), make_added(kPowers[1], 5)};
constexpr uint8_t kZeroTrits = 121;  // a stored byte

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
  run_tasks(threads, ceil_div(x.blocks, chunk), [&](int64_t task, int worker) {
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

// The bytes of one lane of a block, in the order of the columns: `rows` of each of its fields.
template <int fields>
void fold(const Lanes& x, const uint8_t* const* rows, uint8_t* codes) {
  const auto& added = kAdded[fields == 5].of;
  const uint8_t* from[fields];  // of its own, which the stores below cannot change
  for (int f = 0; f < fields; ++f) from[f] = rows[f];
  int64_t byte = 0;
  for (int64_t g = 0; g < x.stored.groups; ++g) {
    uint8_t* to = codes + g * x.group_quads * 4;
    for (int64_t last = byte + ceil_div(x.cols_of(g), 5); byte < last; ++byte, to += 5) {
      uint64_t sum = 0;
      for (int f = 0; f < fields; ++f) sum += added[f][from[f][byte]];
      std::memcpy(to, &sum, 8);
    }
  }
}

// Of the codes of a lane, so that those of 16 do not all fall on the same lines of a cache: what the
// last store writes beyond the columns is in it too.
int64_t stride_of(const Lanes& x) { return x.quads * 4 + 64; }

}  // namespace

Lanes lanes_of(Form form, const Layout& stored) {
  const int64_t block = 16 * static_cast<int64_t>(form);
  const int64_t group_quads = ceil_div(stored.group, 4);
  const int64_t last = stored.groups ? stored.cols - (stored.groups - 1) * stored.group : 0;
  const int64_t quads = stored.groups ? (stored.groups - 1) * group_quads + ceil_div(last, 4) : 0;
  return {form, stored, block, ceil_div(stored.rows, block), group_quads, quads};
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

int64_t block_scratch(const Lanes& x) { return 16 * stride_of(x) + x.stored.width; }

void block_to_lanes(const Lanes& x, const uint8_t* packed, int64_t rows, uint8_t* lanes,
                    uint8_t* scratch) {
  const int64_t stride = stride_of(x), fields = static_cast<int64_t>(x.form);
  uint8_t* none = scratch + 16 * stride;  // a row beyond the last
  if (rows < x.block) std::memset(none, kZeroTrits, static_cast<size_t>(x.stored.width));
  for (int64_t lane = 0; lane < 16; ++lane) {
    const uint8_t* of[5];
    for (int64_t f = 0; f < fields; ++f) {
      const int64_t row = 16 * f + lane;
      of[f] = row < rows ? packed + row * x.stored.width : none;
    }
    if (x.form == Form::Lanes3)
      fold<5>(x, of, scratch + lane * stride);
    else
      fold<4>(x, of, scratch + lane * stride);
  }
  for (int64_t quad = 0; quad < x.quads; ++quad)
    for (int64_t lane = 0; lane < 16; ++lane)
      std::memcpy(lanes + quad * 64 + lane * 4, scratch + lane * stride + quad * 4, 4);
}

int64_t to_lanes(const Lanes& x, const uint8_t* packed, uint8_t* lanes, int threads) {
  const int64_t width = x.stored.width, scratch = block_scratch(x);
  Lowest bad;
  for_blocks(x, threads, scratch + x.block * x.stored.groups, [&](int64_t block, uint8_t* memory) {
    Layout part = x.stored;
    part.rows = std::min(x.block, x.stored.rows - block * x.block);
    const uint8_t* from = packed + block * x.block * width;
    const int64_t found =
        kernels().packing.check(part, 0, part.rows, from, memory + scratch);
    if (found != kNone) return bad.add(block * x.block * width + found);
    block_to_lanes(x, from, part.rows, lanes + block * x.quads * 64, memory);
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
          kernels().packing.pack(row_layout, 0, 1, trits, packed + row * x.stored.width);
      if (found != kNone) return bad.add(row * cols + found);
    }
  });
  return bad.get();
}

}  // namespace ternarize
