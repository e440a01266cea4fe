// Products for x86-64 with AVX-512 and AMX with 8-bit integers: many tokens by tiles.
#include "multiply/avx512.h"

namespace ternarize {
namespace {

struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// While it lives, the thread's eight tiles have 16 rows of 64 bytes.
struct Tiles {
  Tiles() {
    static constexpr Shapes shapes{};
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
};

namespace lanes {

// A tile holds 16 rows of 64 bytes: 16 quads of 16 lanes of one field, 16 quads of 16 tokens, or the
// sums of 16 tokens and 16 lanes.
constexpr int64_t kTile = 32;
constexpr int64_t kSlice = 256;  // of less, sums would go through memory more often

struct Session {
  Tiles tiles;
  ~Session() { _mm_sfence(); }  // after `stream`
};

template <int fields>
void open(const uint8_t* lanes, int64_t quads, uint8_t* panel) {
  open_for<fields, true>(lanes, quads, panel);
}

// The sums of one or two tiles of tokens and of fields: of two, what is loaded is used twice.
template <int fields, int tokens, int used>
TERNARIZE_INLINE void square(const uint8_t* panel, int64_t quads, const int8_t* q, size_t stride,
                             bool more, int32_t* sums, size_t to) {
  const int8_t* q16 = q + 16 * stride;
  int32_t* sums16 = sums + 16 * to / sizeof(int32_t);
  if (more) {
    _tile_loadd(0, sums, to);
    if constexpr (used == 2) _tile_loadd(1, sums + 16, to);
    if constexpr (tokens == 2) _tile_loadd(2, sums16, to);
    if constexpr (tokens == 2 && used == 2) _tile_loadd(3, sums16 + 16, to);
  } else {
    _tile_zero(0);
    if constexpr (used == 2) _tile_zero(1);
    if constexpr (tokens == 2) _tile_zero(2);
    if constexpr (tokens == 2 && used == 2) _tile_zero(3);
  }
  for (int64_t i = 0; i < quads; i += 16, panel += fields * 1024) {
    _tile_loadd(4, q + i * 4, stride);
    _tile_loadd(6, panel, 64);
    if constexpr (used == 2) _tile_loadd(7, panel + 1024, 64);
    if constexpr (tokens == 2) _tile_loadd(5, q16 + i * 4, stride);
    _tile_dpbsud(0, 4, 6);
    if constexpr (used == 2) _tile_dpbsud(1, 4, 7);
    if constexpr (tokens == 2) _tile_dpbsud(2, 5, 6);
    if constexpr (tokens == 2 && used == 2) _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums, to);
  if constexpr (used == 2) _tile_stored(1, sums + 16, to);
  if constexpr (tokens == 2) _tile_stored(2, sums16, to);
  if constexpr (tokens == 2 && used == 2) _tile_stored(3, sums16 + 16, to);
}

template <int fields, int tokens>
void tile_of(const uint8_t* panel, int64_t quads, const int8_t* q, size_t stride, bool more,
             int32_t* sums, size_t to) {
  square<fields, tokens, 2>(panel, quads, q, stride, more, sums, to);
  square<fields, tokens, 2>(panel + 2048, quads, q, stride, more, sums + 32, to);
  if constexpr (fields == 5)
    square<fields, tokens, 1>(panel + 4096, quads, q, stride, more, sums + 64, to);
}

template <int fields>
void tile(int64_t n, const uint8_t* panel, int64_t quads, const int8_t* q, int64_t stride,
          bool more, int32_t* sums, int64_t sums_stride) {
  const auto from = static_cast<size_t>(stride);
  const size_t to = static_cast<size_t>(sums_stride) * sizeof(int32_t);
  if (n <= 16) return tile_of<fields, 1>(panel, quads, q, from, more, sums, to);
  tile_of<fields, 2>(panel, quads, q, from, more, sums, to);
}

}  // namespace lanes

namespace int8 {

// Two tiles of 16 rows of weights, straight from memory, with the panels of up to three times 16
// tokens: six tiles of sums, and one each to load weights and a panel.
constexpr int64_t kTileRows = 32;
constexpr int32_t kPanelOffset = 0;

using Session = Tiles;

template <int n>
void tile(const int8_t* weights, int64_t weights_stride, int64_t cols, const uint8_t* panel,
          int64_t panel_stride, int32_t* sums) {
  const auto stride = static_cast<size_t>(weights_stride);
  const int8_t* weights16 = weights + 16 * weights_stride;
  _tile_zero(0);
  _tile_zero(3);
  if constexpr (n > 1) {
    _tile_zero(1);
    _tile_zero(4);
  }
  if constexpr (n > 2) {
    _tile_zero(2);
    _tile_zero(5);
  }
  for (int64_t c = 0; c < cols; c += 64, panel += 1024) {
    _tile_loadd(6, weights + c, stride);
    _tile_loadd(7, panel, 64);
    _tile_dpbssd(0, 6, 7);
    if constexpr (n > 1) {
      _tile_loadd(7, panel + panel_stride, 64);
      _tile_dpbssd(1, 6, 7);
    }
    if constexpr (n > 2) {
      _tile_loadd(7, panel + 2 * panel_stride, 64);
      _tile_dpbssd(2, 6, 7);
    }
    _tile_loadd(6, weights16 + c, stride);
    if constexpr (n > 2) {
      _tile_dpbssd(5, 6, 7);
      _tile_loadd(7, panel, 64);
    } else if constexpr (n > 1) {
      _tile_dpbssd(4, 6, 7);
      _tile_loadd(7, panel, 64);
    }
    _tile_dpbssd(3, 6, 7);
    if constexpr (n > 2) {
      _tile_loadd(7, panel + panel_stride, 64);
      _tile_dpbssd(4, 6, 7);
    }
  }
  constexpr int64_t kPanel = kTileRows * 16;  // sums of a panel
  _tile_stored(0, sums, 64);
  _tile_stored(3, sums + 256, 64);
  if constexpr (n > 1) {
    _tile_stored(1, sums + kPanel, 64);
    _tile_stored(4, sums + kPanel + 256, 64);
  }
  if constexpr (n > 2) {
    _tile_stored(2, sums + 2 * kPanel, 64);
    _tile_stored(5, sums + 2 * kPanel + 256, 64);
  }
}

}  // namespace int8
}  // namespace
}  // namespace ternarize

#define TERNARIZE_PRODUCTS kAmxProducts
#include "multiply/table.h"
