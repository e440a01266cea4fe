// Stored tensors read, hashed, checked and laid out in one pass.
#include "files/files.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#ifndef _WIN32
#include <cerrno>
#include <fcntl.h>
#include <unistd.h>
#endif

#include "cpus/cpus.h"
#include "digest/digest.h"
#include "entropy/rans.h"

namespace ternarize {

#ifdef _WIN32

bool can_read_stored() { return false; }
bool read_stored(const char* const*, const Stored*, int64_t, bool, uint8_t*, uint8_t*, const uint8_t*,
                 int) {
  return false;
}

#else

namespace {

constexpr int64_t kPiece = 1 << 18;  // bytes, which stay in a core's own cache

bool read_at(int file, int64_t at, uint8_t* out, int64_t n) {
  while (n > 0) {
    const ssize_t got =
        pread(file, out, static_cast<size_t>(smaller(n, 1 << 30)), static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    at += got, out += got, n -= got;
  }
  return true;
}

// The loops over stored scales of one dtype.
struct ScaleLoops {
  // Whether n of them are finite and not negative, and 0 exactly where their groups have no trit but 0.
  bool (*fit)(const uint8_t* scales, const uint8_t* used, int64_t n);
  // Puts them in the order of a run-time layout.
  void (*lay_out)(const Stored& x, const uint8_t* scales);
};

// Those above 0 have bits from `least` to `most`; a run-time layout has the same bits, shifted.
template <class Bits, class Out, uint32_t least, uint32_t most, int shift>
struct Scales {
  static bool fit(const uint8_t* scales, const uint8_t* used, int64_t n) {
    const auto* bits = reinterpret_cast<const Bits*>(scales);
    bool bad = false;
    for (int64_t i = 0; i < n; ++i) {
      const bool above = bits[i] >= least && bits[i] <= most;
      bad |= used[i] != 0 ? !above : bits[i] != 0;
    }
    return !bad;
  }

  static void lay_out(const Stored& x, const uint8_t* scales) {
    const Lanes& lanes = x.lanes;
    const int64_t groups = lanes.stored.groups, block = lanes.block;
    const auto* bits = reinterpret_cast<const Bits*>(scales);
    auto* out = static_cast<Out*>(x.scale_out);
    for (int64_t first = 0; first < lanes.blocks * block; first += block, out += groups * block)
      for (int64_t i = 0; i < block; ++i) {
        const int64_t row = first + i;
        const bool none = row >= lanes.stored.rows;
        const auto* from = bits + (none || x.one_scale ? 0 : row * groups);
        for (int64_t g = 0; g < groups; ++g)
          out[g * block + i] = static_cast<Out>(none ? 0 : static_cast<Out>(from[g]) << shift);
      }
  }

  static constexpr ScaleLoops loops{fit, lay_out};
};

const ScaleLoops& loops_of(ScaleKind kind) {
  switch (kind) {
    case ScaleKind::F16: return Scales<uint16_t, uint16_t, 1, 0x7bff, 0>::loops;
    case ScaleKind::BF16: return Scales<uint16_t, uint32_t, 1, 0x7f7f, 16>::loops;
    case ScaleKind::F32: return Scales<uint32_t, uint32_t, 1, 0x7f7fffff, 0>::loops;
    default: return Scales<uint8_t, uint16_t, 8, 247, 7>::loops;
  }
}

// A file that a thread has open, the last that it has read of.
class Opened {
 public:
  Opened() = default;
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;
  ~Opened() { close(); }

  // Its descriptor, or -1.
  int of(const char* const* files, int64_t which) {
    if (which != which_) {
      close();
      file_ = open(files[which], O_RDONLY | O_CLOEXEC);
      which_ = file_ < 0 ? -1 : which;
    }
    return file_;
  }

 private:
  void close() {
    if (file_ >= 0) ::close(file_);
  }

  int file_ = -1;
  int64_t which_ = -1;
};

// Memory with room for n bytes at the least.
uint8_t* grown(std::vector<uint8_t>& memory, int64_t n) {
  if (static_cast<int64_t>(memory.size()) < n) memory.resize(static_cast<size_t>(n));
  return memory.data();
}

// Memory for a stream: bytes of chunks, what comes of them in the order in which they are coded, and rows.
struct Buffers {
  std::vector<uint8_t> coded, ordered, rows;
};

// What a thread has: files and memory.
struct ThreadState {
  const uint8_t* stop;
  Opened file, scale_file;
  int data = -1, beside = -1;  // descriptors, of the tensor that is read
  std::vector<uint8_t> piece, scales, used, scratch;
  Buffers of_trits, of_scales;
  bool stopped() const { return __atomic_load_n(stop, __ATOMIC_RELAXED) != 0; }
};

// The classes of the columns of packed rows: bytes that hold as many trits are of one, those with the
// most of class 0.
std::vector<uint8_t> classes_of_trits(const Layout& x) {
  std::vector<uint8_t> classes;
  bool there[6] = {};
  for (int64_t left = x.cols; left > 0; left -= x.group)
    for (int64_t n = smaller(left, x.group); n > 0; n -= 5) {
      classes.push_back(static_cast<uint8_t>(smaller(n, 5)));
      there[classes.back()] = true;
    }
  for (uint8_t& held : classes)
    held = static_cast<uint8_t>(std::count(there + held + 1, there + 6, true));
  return classes;
}

// A stream in a file, whose rows are asked for in their order, each once.
class Stream {
 public:
  Stream(int file, int64_t start, int64_t nbytes, int64_t rows, std::vector<uint8_t> classes,
         Buffers& buffers)
      : file_(file), start_(start), nbytes_(nbytes), classes_(std::move(classes)), buffers_(buffers) {
    const int count = *std::max_element(classes_.begin(), classes_.end()) + 1;
    x_ = {rows, static_cast<int64_t>(classes_.size()), 1, classes_.data(), count};
  }

  // Reads tables and sizes, which are checked before there is memory for what they promise.
  Read open() {
    constexpr int64_t kLargest = 1 << 16;  // bytes of the rows in a chunk
    std::vector<uint8_t> head(static_cast<size_t>(smaller(nbytes_, 4 + x_.count * 544)));
    const auto size = static_cast<int64_t>(head.size());
    if (size < 4) return Read::BadStream;
    if (!read_at(file_, start_, head.data(), size)) return Read::Unreadable;
    uint32_t chunk_rows;
    std::memcpy(&chunk_rows, head.data(), 4);
    const int64_t most = kLargest / x_.width;
    if (chunk_rows == 0 || chunk_rows > most) return Read::BadStream;
    if (chunk_rows >= x_.rows && chunk_rows != most) return Read::BadStream;  // of one chunk
    x_.chunk_rows = chunk_rows;
    table_.resize(static_cast<size_t>(kRansTotal * x_.count));
    int64_t at = 4;
    for (int which = 0; which < x_.count; ++which) {
      if (at + 32 > size) return Read::BadStream;
      uint16_t frequencies[256] = {};
      int64_t total = 0, from = at + 32;
      for (int byte = 0; byte < 256; ++byte) {
        if (!(head[static_cast<size_t>(at + byte / 8)] >> byte % 8 & 1)) continue;
        if (from + 2 > size) return Read::BadStream;
        std::memcpy(&frequencies[byte], head.data() + from, 2);
        if (frequencies[byte] == 0) return Read::BadStream;
        total += frequencies[byte];
        from += 2;
      }
      if (total != kRansTotal) return Read::BadStream;
      rans_slots(frequencies, table_.data() + kRansTotal * which);
      at = from;
    }
    const int64_t chunks = x_.chunks();
    if (chunks > (nbytes_ - at) / (4 + kRansHead)) return Read::BadStream;
    std::vector<uint32_t> sizes(static_cast<size_t>(chunks));
    if (!read_at(file_, start_ + at, reinterpret_cast<uint8_t*>(sizes.data()), 4 * chunks))
      return Read::Unreadable;
    ends_ = {at + 4 * chunks};
    const int64_t longest = kRansHead + 2 * x_.chunk_rows * x_.width;
    for (const uint32_t each : sizes) {
      if (each < kRansHead || each > longest) return Read::BadStream;
      ends_.push_back(ends_.back() + each);
    }
    if (ends_.back() != nbytes_) return Read::BadStream;
    decoder_.emplace(x_, table_.data(), buffers_.ordered);
    return Read::Done;
  }

  // Where n rows from `first` on are, until more are asked for.
  Read rows(int64_t first, int64_t n, const uint8_t*& found) {
    if (first + n > held_) {  // those that were asked for make room
      if (first < held_)
        std::memmove(buffers_.rows.data(), row(first), static_cast<size_t>((held_ - first) * x_.width));
      begin_ = first;
    }
    while (first + n > held_) {
      const Read decoded = next(held_ / x_.chunk_rows);
      if (decoded != Read::Done) return decoded;
    }
    found = row(first);
    return Read::Done;
  }

 private:
  uint8_t* row(int64_t which) { return buffers_.rows.data() + (which - begin_) * x_.width; }

  // Decodes chunks from this one on, behind the rows that there are.
  Read next(int64_t chunk) {
    const int64_t count = rans_at_once(x_.chunks() - chunk);
    const int64_t* const ends = ends_.data() + chunk;
    uint8_t* const coded = grown(buffers_.coded, ends[count] - ends[0]);
    if (!read_at(file_, start_ + ends[0], coded, ends[count] - ends[0])) return Read::Unreadable;
    const int64_t stop = smaller(x_.rows, (chunk + count) * x_.chunk_rows);
    grown(buffers_.rows, (stop - begin_) * x_.width);
    if (decoder_->decode(chunk, count, coded, ends, row(held_)) != kNone) return Read::BadStream;
    held_ = stop;
    return Read::Done;
  }

  int file_;
  int64_t start_, nbytes_;
  std::vector<uint8_t> classes_;
  Classed x_;
  std::vector<uint32_t> table_;
  std::vector<int64_t> ends_;
  std::optional<RansDecoder> decoder_;
  Buffers& buffers_;
  int64_t begin_ = 0, held_ = 0;  // rows that are decoded and there: from, to
};

// The scales of a tensor: `found`, in the memory of the thread.
Read read_scales(const Stored& x, ThreadState& own, const uint8_t*& found) {
  const int64_t size = size_of(x.scale_kind), rows = x.one_scale ? 1 : x.lanes.stored.rows;
  const int64_t bytes = x.scales() * size;
  if (!x.scales_coded) {
    uint8_t* const plain = grown(own.scales, bytes);
    found = plain;
    return read_at(own.beside, x.scale_start, plain, bytes) ? Read::Done : Read::Unreadable;
  }
  std::vector<uint8_t> classes(static_cast<size_t>(bytes / rows));
  for (size_t i = 0; i < classes.size(); ++i)
    classes[i] = static_cast<uint8_t>(i % static_cast<size_t>(size));
  Stream stream(own.beside, x.scale_start, x.scale_bytes, rows, std::move(classes),
                own.of_scales);
  const Read opened = stream.open();
  return opened == Read::Done ? stream.rows(0, rows, found) : opened;
}

Read read_raw(const Stored& x, Sha256* sha, ThreadState& own) {
  for (int64_t at = 0; at < x.nbytes; at += kPiece) {
    if (own.stopped()) return Read::Stopped;
    const int64_t n = smaller(kPiece, x.nbytes - at);
    uint8_t* to = x.out ? x.out + at : grown(own.piece, n);
    if (!read_at(own.data, x.start + at, to, n)) return Read::Unreadable;
    if (sha) sha->update(to, n);
  }
  return Read::Done;
}

Read read_trits(const Stored& x, Sha256* sha, ThreadState& own) {
  const Lanes& lanes = x.lanes;
  const Layout& all = lanes.stored;
  const bool to_lanes = x.form == Stored::Form::Lanes;
  std::optional<Stream> stream;
  if (x.coded) {
    stream.emplace(own.data, x.start, x.nbytes, all.rows, classes_of_trits(all), own.of_trits);
    const Read opened = stream->open();
    if (opened != Read::Done) return opened;
  }
  const uint8_t* scales;
  const Read beside = read_scales(x, own, scales);
  if (beside != Read::Done) return beside;
  const int64_t scale_size = size_of(x.scale_kind);
  const ScaleLoops& loops = loops_of(x.scale_kind);
  // Whole blocks of a run-time layout, each of which begins where a row does.
  const int64_t unit = to_lanes ? lanes.block : 1;
  const int64_t rows = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, all.width * unit)) * unit;
  uint8_t any = 0;  // of one scale for all
  for (int64_t first = 0; first < all.rows; first += rows) {
    if (own.stopped()) return Read::Stopped;
    Layout part = all;
    part.rows = smaller(rows, all.rows - first);
    const bool kept = x.out && !to_lanes;
    const int64_t bytes = part.rows * all.width;
    const uint8_t* piece;
    if (stream) {
      const Read decoded = stream->rows(first, part.rows, piece);
      if (decoded != Read::Done) return decoded;
      if (kept) std::memcpy(x.out + first * all.width, piece, static_cast<size_t>(bytes));
    } else {
      uint8_t* const to = kept ? x.out + first * all.width : grown(own.piece, bytes);
      if (!read_at(own.data, x.start + first * all.width, to, bytes)) return Read::Unreadable;
      piece = to;
    }
    if (sha) sha->update(piece, bytes);
    const int64_t groups = part.rows * all.groups;
    uint8_t* used = grown(own.used, groups);
    if (kernels().packing.check(part, 0, part.rows, piece, used) != kNone) return Read::NoCode;
    if (x.one_scale) {
      for (int64_t i = 0; i < groups; ++i) any |= used[i];
    } else if (sha && !loops.fit(scales + first * all.groups * scale_size, used, groups)) {
      return Read::BadScale;
    }
    if (!to_lanes) continue;
    uint8_t* scratch = grown(own.scratch, block_scratch(lanes));
    for (int64_t row = 0; row < part.rows; row += lanes.block)
      block_to_lanes(lanes, piece + row * all.width, smaller(lanes.block, part.rows - row),
                     x.out + (first + row) / lanes.block * lanes.quads * 64, scratch);
  }
  if (sha && x.one_scale && !loops.fit(scales, &any, 1)) return Read::BadScale;
  if (sha) sha->update(scales, x.scales() * scale_size);
  if (to_lanes)
    loops.lay_out(x, scales);
  else if (x.scale_out)
    std::memcpy(x.scale_out, scales, static_cast<size_t>(x.scales() * scale_size));
  return Read::Done;
}

Read read_one(const char* const* files, const Stored& x, Sha256* sha, ThreadState& own) {
  own.data = own.file.of(files, x.file);
  if (own.data < 0) return Read::Unreadable;
  if (x.form == Stored::Form::Raw) return read_raw(x, sha, own);
  own.beside = x.scale_file == x.file ? own.data : own.scale_file.of(files, x.scale_file);
  return own.beside < 0 ? Read::Unreadable : read_trits(x, sha, own);
}

}  // namespace

bool can_read_stored() { return sha256_blocks() != nullptr; }

bool read_stored(const char* const* files, const Stored* tensors, int64_t n, bool checked,
                 uint8_t* states, uint8_t* digests, const uint8_t* stop, int threads) {
  const Sha256Blocks blocks = sha256_blocks();
  if (!blocks) return false;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    ThreadState own{};
    own.stop = stop;
    for (int64_t i; (i = next.fetch_add(1)) < n;) {
      const Stored& x = tensors[i];
      Read state = Read::Stopped;
      if (!own.stopped()) {
        Sha256 sha(blocks);
        Sha256* hash = checked ? &sha : nullptr;
        try {
          state = read_one(files, x, hash, own);
        } catch (const std::bad_alloc&) {
          state = Read::NoMemory;
        } catch (...) {
          state = Read::Failed;
        }
        if (checked) sha.finish(digests + 32 * i);
      }
      __atomic_store_n(states + i, static_cast<uint8_t>(state), __ATOMIC_RELEASE);
    }
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(std::max(0, threads)));
  for (int64_t i = 1; i < smaller(threads, n); ++i) {
    try {
      others.emplace_back(work);
    } catch (const std::exception&) {  // no more threads, or memory for one: those there do it
      break;
    }
  }
  work();
  for (std::thread& other : others) other.join();
  return true;
}

#endif

}  // namespace ternarize
