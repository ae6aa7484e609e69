// What this CPU and this operating system can run.
#include <cstring>

#include "path.h"

#if defined(__x86_64__) || defined(_M_X64)
#define ZS_X86 1
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace zs {

#ifdef ZS_X86
static void cpuid(uint32_t leaf, uint32_t sub, uint32_t out[4]) {
#ifdef _MSC_VER
  int r[4];
  __cpuidex(r, (int)leaf, (int)sub);
  for (int i = 0; i < 4; i++) out[i] = (uint32_t)r[i];
#else
  __cpuid_count(leaf, sub, out[0], out[1], out[2], out[3]);
#endif
}

static uint64_t enabled_state() {  // XCR0: which registers the system saves
#ifdef _MSC_VER
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
#endif
}

// Linux hands out the 8 KiB of tile registers on request only, per process.
static bool tiles_allowed() {
#if defined(__linux__)
  const long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

static bool bit(uint32_t word, int n) { return word >> n & 1; }

static uint32_t detect() {
  uint32_t r[4];
  cpuid(0, 0, r);
  if (r[0] < 7) return 0;
  cpuid(1, 0, r);
  const uint32_t basic = r[2];
  if (!bit(basic, 27)) return 0;  // OSXSAVE
  const uint64_t state = enabled_state();
  cpuid(7, 0, r);
  const uint32_t ebx = r[1], ecx = r[2], edx = r[3];
  uint32_t found = 0;
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
  const bool tiles = (state & 0x60000) == 0x60000;
  if (ymm && bit(basic, 12) && bit(basic, 29) && bit(basic, 23) && bit(ebx, 5) && bit(ebx, 8))
    found |= kAvx2;
  if ((found & kAvx2) && zmm && bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31) &&
      bit(ecx, 6))
    found |= kAvx512;
  if (found & kAvx512) {
    if (bit(ecx, 11)) found |= kAvx512Vnni;
    if (bit(edx, 23)) found |= kAvx512Fp16;
    if (tiles && bit(edx, 22) && bit(edx, 24) && bit(edx, 25) && bit(ecx, 11) && tiles_allowed())
      found |= kAmx;
    cpuid(7, 1, r);
    if (bit(r[0], 5)) found |= kAvx512Bf16;
  }
  return found;
}
#elif defined(__aarch64__) || defined(_M_ARM64)
static uint32_t detect() {
  uint32_t found = kNeon;
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found |= kNeonDot;
#elif defined(__APPLE__)
  found |= kNeonDot;  // every Apple silicon has it
#endif
  return found;
}
#else
static uint32_t detect() { return 0; }
#endif

uint32_t cpu_features() {
  static const uint32_t found = detect();
  return found;
}

uint32_t features_up_to(const char* name) {
  const uint32_t avx512 = kAvx2 | kAvx512 | kAvx512Vnni | kAvx512Bf16 | kAvx512Fp16;
  const struct {
    const char* name;
    uint32_t features;
  } sets[] = {{"portable", 0},
              {"avx2", kAvx2},
              {"avx512", avx512},
              {"amx", avx512 | kAmx},
              {"neon", kNeon | kNeonDot}};
  for (const auto& set : sets)
    if (!strcmp(name, set.name)) return set.features;
  return ~0u;
}

}  // namespace zs

extern "C" const char* zs_instruction_sets(void) {
  uint32_t built = 0;  // what at least one kernel of this build needs
  const zs::PathList paths = zs::all_paths();
  for (const zs::Path* const* p = paths.begin; p != paths.end; p++) built |= (*p)->needs;
  const uint32_t usable = built & zs::cpu_features();
  const bool amx = usable & zs::kAmx, avx512 = usable & zs::kAvx512, avx2 = usable & zs::kAvx2;
  if (usable & zs::kNeon) return "neon portable";
  if (amx) return avx512 ? "amx avx512 avx2 portable" : "amx avx2 portable";
  if (avx512) return avx2 ? "avx512 avx2 portable" : "avx512 portable";
  return avx2 ? "avx2 portable" : "portable";
}
