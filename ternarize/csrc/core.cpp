// Threads and the choice of the instruction set; no arithmetic on weights but the means of tensors
// with one scale.

#include "core.h"

#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>

#ifdef TERNARIZE_X86_VARIANTS
#include <cpuid.h>
#endif
#ifdef TERNARIZE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(TERNARIZE_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace ternarize {
namespace {

// A thread should have enough to do to be worth its start (tens of microseconds).
constexpr int64_t kWeightsPerThread = 1 << 18;
constexpr int kMostThreads = 256;

// Calls work(part, first, last) for consecutive parts of the rows, each on its own thread, and
// returns the number of parts. Which rows a part has never changes a result.
template <class Work>
int parallel_for(const Layout& x, int threads, Work work) {
  int64_t parts = x.rows * x.cols / kWeightsPerThread + 1;
  if (parts > threads) parts = threads;
  if (parts > x.rows) parts = x.rows;
  if (parts > kMostThreads) parts = kMostThreads;
  if (parts < 1) parts = 1;
  std::thread started[kMostThreads];
  const auto run = [&](int64_t part) {
    work(static_cast<int>(part), x.rows * part / parts, x.rows * (part + 1) / parts);
  };
  for (int64_t part = 1; part < parts; ++part) {
    try {
      started[part] = std::thread(run, part);
    } catch (const std::system_error&) {  // no more threads to be had: this one does it
      run(part);
    }
  }
  run(0);
  for (int64_t part = 1; part < parts; ++part)
    if (started[part].joinable()) started[part].join();
  return static_cast<int>(parts);
}

// The lowest index of those that work(first, last) finds. Each part stops at its own first one, and
// the parts are in order.
template <class Work>
int64_t first_of(const Layout& x, int threads, Work work) {
  int64_t found[kMostThreads];
  const int parts = parallel_for(x, threads, [&](int part, int64_t first, int64_t last) {
    found[part] = work(first, last);
  });
  for (int part = 0; part < parts; ++part)
    if (found[part] != kNone) return found[part];
  return kNone;
}

// True if work(first, last) is true for all parts.
template <class Work>
bool all_of(const Layout& x, int threads, Work work) {
  return first_of(x, threads, [&](int64_t first, int64_t last) {
           return work(first, last) ? kNone : first;
         }) == kNone;
}

const Variant* best() {
  const Variant* last = variants();
  while (last[1].name) ++last;
  return last;
}

std::atomic<const Variant*>& chosen() {
  static std::atomic<const Variant*> variant{best()};
  return variant;
}

#ifdef TERNARIZE_AMX
// The system has to be asked for the registers of AMX, once for the process; it may refuse.
bool amx_is_there() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  if (!(d & kTile) || !(d & kInt8)) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

#ifdef TERNARIZE_NEON
// Whether the CPU has Armv8.2's dot products of bytes.
bool dotprod_is_there() {
#if defined(__linux__)
  constexpr unsigned long kDotProd = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProd;
#elif defined(__APPLE__)
  return true;  // every Mac with an Arm CPU
#else
  return false;
#endif
}
#endif

// Sum and count of all |w| above a threshold; the rows' sums are summed in the fixed order too.
Total tensor_total(Kind kind, const Layout& x, const void* weights, double threshold,
                   Total* totals, int threads) {
  parallel_for(x, threads, [&](int, int64_t first, int64_t last) {
    kernels().row_totals(kind, x, first, last, weights, threshold, totals);
  });
  int64_t count = 0;
  for (int64_t row = 0; row < x.rows; ++row) count += totals[row].count;
  constexpr int64_t kStride = sizeof(Total) / sizeof(double);
  return {x.rows ? kernels().fixed_sum(&totals->sum, x.rows, kStride) : 0.0, count};
}

double mean(Total t) { return t.count ? t.sum / static_cast<double>(t.count) : 0.0; }

}  // namespace

Layout layout_of(int64_t rows, int64_t cols, int64_t group_size) {
  const int64_t group = group_size > 0 && group_size < cols ? group_size : cols;
  const int64_t groups = group ? (cols + group - 1) / group : 0;
  const int64_t whole = group ? cols / group : 0, rest = cols - whole * group;
  return {rows, cols, group, groups, whole * ((group + 4) / 5) + (rest + 4) / 5};
}

const Variant* variants() {
  static const Variant* const found = [] {
    static Variant list[6] = {{"portable", &kPortable, &kPortableProducts, &kPortableInt8}};
#ifdef TERNARIZE_X86_VARIANTS
    int n = 1;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
      list[n++] = {"avx2", &kAvx2, &kAvx2Products, &kAvx2Int8};
#ifdef TERNARIZE_AVXVNNI
      unsigned a = 0, b = 0, c = 0, d = 0;
      if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4))
        list[n++] = {"avxvnni", &kAvx2, &kAvxVnniProducts, &kAvxVnniInt8};
#endif
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) {
        list[n++] = {"avx512", &kAvx512, &kAvx512Products, &kAvx512Int8};
#ifdef TERNARIZE_AMX
        if (amx_is_there()) list[n++] = {"amx", &kAvx512, &kAmxProducts, &kAmxInt8};
#endif
      }
    }
#endif
#ifdef TERNARIZE_NEON
    if (dotprod_is_there()) list[1] = {"neon", &kPortable, &kNeonProducts};
#endif
    return list;
  }();
  return found;
}

const Variant& variant() { return *chosen().load(std::memory_order_relaxed); }

bool use(const char* name) {
  for (const Variant* one = variants(); one->name; ++one)
    if (std::strcmp(one->name, name) == 0) {
      chosen().store(one);
      return true;
    }
  return false;
}

int64_t pack(const Layout& x, const int8_t* trits, uint8_t* packed, int threads) {
  return first_of(x, threads, [&](int64_t first, int64_t last) {
    return kernels().pack(x, first, last, trits, packed);
  });
}

int64_t unpack(const Layout& x, const uint8_t* packed, int8_t* trits, int threads) {
  return first_of(x, threads, [&](int64_t first, int64_t last) {
    return kernels().unpack(x, first, last, packed, trits);
  });
}

int64_t check(const Layout& x, const uint8_t* packed, uint8_t* nonzero, int threads) {
  return first_of(x, threads, [&](int64_t first, int64_t last) {
    return kernels().check(x, first, last, packed, nonzero);
  });
}

void dequantize(const Layout& x, const uint8_t* packed, const float* scales, int64_t scale_rows,
                Kind kind, void* out, int threads) {
  if (x.rows == 0) return;
  parallel_for(x, threads, [&](int, int64_t first, int64_t last) {
    kernels().dequantize(x, first, last, packed, scales, x.rows / scale_rows, kind, out);
  });
}

int64_t ternarize(Method method, Kind kind, const Layout& x, const void* weights, int8_t* trits,
                  double* scales, int threads) {
  return first_of(x, threads, [&](int64_t first, int64_t last) {
    return kernels().ternarize(method, kind, x, first, last, weights, trits, scales);
  });
}

bool levels(Kind kind, const Layout& x, const void* weights, int8_t* trits, double* scales,
            int threads) {
  // An ordinary tensor ends here, before any thread is started.
  const int64_t few = x.rows < 1 ? x.rows : 1;
  return kernels().levels(kind, x, 0, few, weights, trits, scales) &&
         all_of(x, threads, [&](int64_t first, int64_t last) {
           return kernels().levels(kind, x, first, last, weights, trits, scales);
         });
}

Distance distance(Kind kind, const Layout& x, const void* weights, const int8_t* trits,
                  const double* scales, int64_t scale_rows, Distance* rows, int threads) {
  if (x.rows == 0) return {0.0, 0.0, 0};
  parallel_for(x, threads, [&](int, int64_t first, int64_t last) {
    kernels().distances(kind, x, first, last, weights, trits, scales, x.rows / scale_rows, rows);
  });
  int64_t nonzero = 0;
  for (int64_t row = 0; row < x.rows; ++row) nonzero += rows[row].nonzero;
  constexpr int64_t kStride = sizeof(Distance) / sizeof(double);
  return {kernels().fixed_sum(&rows->error, x.rows, kStride),
          kernels().fixed_sum(&rows->energy, x.rows, kStride), nonzero};
}

// The steps of method_scale in kernels.inc, each a pass over the tensor.
int64_t ternarize_tensor(Method method, Kind kind, const Layout& x, const void* weights,
                         int8_t* trits, double* scale, Total* totals, int threads) {
  const int64_t bad = first_of(x, threads, [&](int64_t first, int64_t last) {
    return kernels().first_not_finite(kind, x, first, last, weights);
  });
  if (bad != kNone) return bad;
  const auto above = [&](double threshold) {
    return tensor_total(kind, x, weights, threshold, totals, threads);
  };
  *scale = mean(above(-1.0));
  double threshold = *scale / 2;
  if (method != Method::Absmean) {
    threshold = 0.7 * *scale;
    Total now = above(threshold);
    for (int i = 0; method == Method::Itf && i < 100; ++i) {
      const Total then = above(mean(now) / 2);
      if (then.count == now.count) break;
      threshold = mean(now) / 2;
      now = then;
    }
    *scale = mean(now);
  }
  parallel_for(x, threads, [&](int, int64_t first, int64_t last) {
    kernels().cut(kind, x, first, last, weights, threshold, trits);
  });
  return kNone;
}

bool levels_tensor(Kind kind, const Layout& x, const void* weights, int8_t* trits, double* scale,
                   int threads) {
  const double magnitude = kernels().first_magnitude(kind, x, weights);
  if (magnitude < 0) return false;
  *scale = magnitude;
  const int64_t few = x.rows < 1 ? x.rows : 1;
  return kernels().levels_of(kind, x, 0, few, weights, magnitude, trits) &&
         all_of(x, threads, [&](int64_t first, int64_t last) {
           return kernels().levels_of(kind, x, first, last, weights, magnitude, trits);
         });
}

}  // namespace ternarize
