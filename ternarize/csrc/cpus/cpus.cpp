// What this CPU and its system have.
#include "cpus/cpus.h"

#include <atomic>
#include <cstring>

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

}  // namespace

const Variant* variants() {
  static const Variant* const found = [] {
    static Variant list[6] = {{"portable", &kPortable, &kPortableProducts}};
#ifdef TERNARIZE_X86_VARIANTS
    int n = 1;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
      list[n++] = {"avx2", &kAvx2, &kAvx2Products};
#ifdef TERNARIZE_AVXVNNI
      unsigned a = 0, b = 0, c = 0, d = 0;
      if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4))
        list[n++] = {"avxvnni", &kAvx2, &kAvxVnniProducts};
#endif
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) {
        list[n++] = {"avx512", &kAvx512, &kAvx512Products};
#ifdef TERNARIZE_AMX
        if (amx_is_there()) list[n++] = {"amx", &kAvx512, &kAmxProducts};
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

Sha256Blocks sha256_blocks() {
#ifdef TERNARIZE_X86_VARIANTS
  static const bool found = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __builtin_cpu_init();
    return __builtin_cpu_supports("sse4.1") && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           (b & 1u << 29);
  }();
  if (found) return sha256_by_instructions;
#endif
  return nullptr;
}

}  // namespace ternarize
