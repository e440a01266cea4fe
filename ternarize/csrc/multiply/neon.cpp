// Products for AArch64 with the dot products of Armv8.2 (FEAT_DotProd); of int8 weights by plain loops.
#include <arm_neon.h>

#include "multiply/int8_plain.h"
#include "multiply/registers.h"

namespace ternarize {
namespace {
namespace lanes {

constexpr bool kLanes3 = false;
// By counting, see tile_of; never measured.
constexpr int64_t kDirect = 4, kFew = 12, kTile = 8, kSlice = 64;
struct Session {};

// Intrinsics as functions: in some compilers they are macros, which a fold cannot expand.
struct Vectors {
  using Vector = int32x4_t;
  static constexpr int kPeak = 12;
  static TERNARIZE_INLINE void hide(Vector& x) { __asm__ volatile("" : "+w"(x)); }
  static TERNARIZE_INLINE int8x16_t load(const int8_t* p) { return vld1q_s8(p); }
  static TERNARIZE_INLINE Vector load(const int32_t* p) { return vld1q_s32(p); }
  static TERNARIZE_INLINE void store(int32_t* to, Vector x) { vst1q_s32(to, x); }
  // sums += the four products of each lane's bytes, both signed.
  static TERNARIZE_INLINE void dot(Vector& sums, Vector u, Vector x) {
    sums = vdotq_s32(sums, vreinterpretq_s8_s32(u), vreinterpretq_s8_s32(x));
  }
};

// sums += the products of u and the four bytes of x that start at 4 lane. An instruction that stays
// where it is, and no loads across keep_order: compilers that may move either run out of registers.
template <int lane>
TERNARIZE_INLINE void dot_lane(int32x4_t& sums, int8x16_t u, int8x16_t x) {
  __asm__ volatile("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sums) : "w"(u), "w"(x), "i"(lane));
}
TERNARIZE_INLINE void keep_order() { __asm__ volatile("" ::: "memory"); }

// A block's quad is four vectors of four lanes. Activations come in vectors of four quads, of which
// an instruction takes the quad that it is told; so the loops below do four quads in a step. Behind
// the last quad they read what is multiplied by nothing, or by digits that are 0 (see Levels::q).

template <int lane, int... i>
TERNARIZE_INLINE void dot_all_lane(int32x4_t* sums, const int8x16_t* u, int8x16_t x,
                                   Indices<i...>) {
  (dot_lane<lane>(sums[i], u[i], x), ...);
}

// sums[4 r + i] += u[i] times quad `lane` of x[r]
template <int lane, int... r>
TERNARIZE_INLINE void dot_rows_lane(int32x4_t* sums, const int8x16_t* u, const int8x16_t* x,
                                    Indices<r...>) {
  (dot_all_lane<lane>(sums + r * 4, u, x[r], Count<4>{}), ...);
}

// The digits of a vector, those of fields 1 and 2 where they are: their sums are 4 and 16 times too
// large.
template <int n, int lane>
TERNARIZE_INLINE void add_vector(int32x4_t* s, const uint8_t* lanes, const int8x16_t* x) {
  keep_order();
  const uint8x16_t v = vld1q_u8(lanes);
  const int8x16_t digits[4] = {vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(3))),
                               vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(12))),
                               vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(48))),
                               vreinterpretq_s8_u8(vshrq_n_u8(v, 6))};
  dot_rows_lane<lane>(s, digits, x, Count<n>{});
}

template <int n, int lane, int... v>
TERNARIZE_INLINE void add_quad(int32x4_t* s, const uint8_t* lanes, const int8x16_t* x,
                               Indices<v...>) {
  (add_vector<n, lane>(s + v * n * 4, lanes + v * 16, x), ...);
}

TERNARIZE_INLINE void add_to(int32_t* sums, int32x4_t more) {
  vst1q_s32(sums, vaddq_s32(vld1q_s32(sums), more));
}

TERNARIZE_INLINE void add_fields(const int32x4_t* s, int32_t* to) {
  add_to(to, s[0]);
  add_to(to + 16, vshrq_n_s32(s[1], 2));
  add_to(to + 32, vshrq_n_s32(s[2], 4));
  add_to(to + 48, s[3]);
}

template <int... r>
TERNARIZE_INLINE void add_rows(const int32x4_t* s, int32_t* sums, int64_t stride,
                               Indices<r...>) {
  (add_fields(s + r * 4, sums + r * stride), ...);
}

template <int n, int... v>
TERNARIZE_INLINE void add_vectors(const int32x4_t* s, int32_t* sums, int64_t stride,
                                  Indices<v...>) {
  (add_rows(s + v * n * 4, sums + v * 4, stride, Count<n>{}), ...);
}

// sums[r, 16 f + i] += of a run of quads, for the lanes i of the vectors that start at `lanes`.
template <int n, int vectors>
TERNARIZE_INLINE void part_of_run(const uint8_t* lanes, int64_t quads, const int8_t* q,
                                  int64_t stride, int32_t* sums, int64_t sums_stride) {
  using All = Count<vectors>;
  int32x4_t s[vectors * n * 4];
  int8x16_t x[n];
  clear(s, Count<vectors * n * 4>{});
  int64_t i = 0;
  for (; i + 4 <= quads; i += 4, lanes += 256, q += 16) {
    load_all<Vectors>(x, q, stride, Count<n>{});
    add_quad<n, 0>(s, lanes, x, All{});
    add_quad<n, 1>(s, lanes + 64, x, All{});
    add_quad<n, 2>(s, lanes + 128, x, All{});
    add_quad<n, 3>(s, lanes + 192, x, All{});
  }
  for (; i < quads; ++i, lanes += 64, q += 4) {
    load_all<Vectors>(x, q, stride, Count<n>{});
    add_quad<n, 0>(s, lanes, x, All{});
  }
  add_vectors<n>(s, sums, sums_stride, All{});
}

constexpr int64_t kRun = 64;  // quads whose bytes stay in the first cache from part to part

template <int fields, int n>
void dots(const uint8_t* lanes, int64_t quads, const int8_t* q, int64_t stride, int32_t* sums,
          int64_t sums_stride) {
  static_assert(fields == 4, "Lanes2");
  // As many of a block's four vectors at once as have their sums in 16 of the 32 registers.
  constexpr int kVectors = n == 1 ? 4 : n == 2 ? 2 : 1;
  for (int r = 0; r < n; ++r)
    for (int i = 0; i < 64; ++i) sums[r * sums_stride + i] = 0;
  for (int64_t done = 0; done < quads; done += kRun)
    for (int v = 0; v < 4; v += kVectors)
      part_of_run<n, kVectors>(lanes + done * 64 + v * 16, smaller(kRun, quads - done),
                               q + done * 4, stride, sums + v * 4, sums_stride);
}

// With stores like any others: compilers have no common name for those past the caches.
template <int fields>
void stream(const float* all, float factor, float* to) {
  for (int i = 0; i < 16 * fields; ++i) to[i] = all[i] * factor;
}

// The digits themselves, for many rows of q.
template <int fields>
void open(const uint8_t* lanes, int64_t quads, uint8_t* panel) {
  static_assert(fields == 4, "Lanes2");
  const uint8x16_t m0 = vdupq_n_u8(3), none = vdupq_n_u8(0);
  for (int64_t i = 0; i < (quads + 15) / 16 * 16; ++i) {
    uint8_t* to = panel + i / 16 * 4096 + i % 16 * 64;
    for (int64_t at = 0; at < 64; at += 16) {
      const uint8x16_t v = i < quads ? vld1q_u8(lanes + i * 64 + at) : none;
      vst1q_u8(to + at, vandq_u8(v, m0));
      vst1q_u8(to + at + 1024, vandq_u8(vshrq_n_u8(v, 2), m0));
      vst1q_u8(to + at + 2048, vandq_u8(vshrq_n_u8(v, 4), m0));
      vst1q_u8(to + at + 3072, vshrq_n_u8(v, 6));
    }
  }
}

// Adds quad `lane` of x to the sums of one field.
template <int n, int lane>
TERNARIZE_INLINE void add_digits(int32x4_t* s, const int8_t* at, const int8x16_t* x) {
  keep_order();
  int8x16_t u[4];
  load_all<Vectors>(u, at, 16, Count<4>{});
  dot_rows_lane<lane>(s, u, x, Count<n>{});
}

// n rows of q and all fields, one after the other. Where four rows take 64 vector instructions here,
// they take 80 in `dots`; `open` takes 40 first. So a panel pays from about 10 rows on.
template <int n>
void tile_of(const uint8_t* panel, int64_t quads, const int8_t* q, int64_t stride, bool more,
             int32_t* sums, int64_t sums_stride) {
  const auto* digits = reinterpret_cast<const int8_t*>(panel);
  for (int f = 0; f < 4; ++f) {
    int32x4_t s[n * 4];
    int8x16_t x[n];
    if (more)
      load_rows<Vectors, 4>(s, sums + f * 16, sums_stride, Count<n>{});
    else
      clear(s, Count<n * 4>{});
    for (int64_t done = 0; done < quads; done += 4) {
      const int8_t* at = digits + done / 16 * 4096 + f * 1024 + done % 16 * 64;
      load_all<Vectors>(x, q + done * 4, stride, Count<n>{});
      add_digits<n, 0>(s, at, x);
      add_digits<n, 1>(s, at + 64, x);
      add_digits<n, 2>(s, at + 128, x);
      add_digits<n, 3>(s, at + 192, x);
    }
    store_rows<Vectors, 4>(s, sums + f * 16, sums_stride, Count<n>{});
  }
}

template <int fields>
void tile(int64_t n, const uint8_t* panel, int64_t quads, const int8_t* q, int64_t stride,
          bool more, int32_t* sums, int64_t sums_stride) {
  static_assert(fields == 4, "Lanes2");
  for (; n >= 4; n -= 4, q += 4 * stride, sums += 4 * sums_stride)
    tile_of<4>(panel, quads, q, stride, more, sums, sums_stride);
  if (n == 1) tile_of<1>(panel, quads, q, stride, more, sums, sums_stride);
  if (n == 2) tile_of<2>(panel, quads, q, stride, more, sums, sums_stride);
  if (n == 3) tile_of<3>(panel, quads, q, stride, more, sums, sums_stride);
}

}  // namespace lanes
}  // namespace
}  // namespace ternarize

#define TERNARIZE_PRODUCTS kNeonProducts
#include "multiply/table.h"
