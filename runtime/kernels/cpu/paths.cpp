// The table of all kernels of this build.
#include "path.h"

namespace zs {

#ifdef ZS_HAVE_AVX2
extern const Path avx2_dot;
extern const Path avx2_tile;
extern const Path avx2_gather;
extern const Path avx2_skip;
extern const Path avx2_throughput;
extern const Path avx2_int8;
extern const Path avx2_int8_dot;
#endif
#ifdef ZS_HAVE_NEON
extern const Path neon_dot;
extern const Path neon_tile;
extern const Path neon_skip;
extern const Path neon_int8;
#endif
#ifdef ZS_HAVE_NEON_DOTPROD
extern const Path neon_dotprod_int8;
#endif
extern const Path portable_dot;
extern const Path portable_int8;
extern const Path portable_int8_tokens;
extern const Path portable_tokens;
#ifdef ZS_HAVE_AVX512
extern const Path avx512_dot;
extern const Path avx512_gather;
extern const Path avx512_int8_dot;
extern const Path avx512_int8_throughput;
extern const Path avx512_int8_tile;
extern const Path avx512_throughput;
extern const Path avx512_tile;
#endif
#ifdef ZS_HAVE_AMX
extern const Path amx_bfloat16;
extern const Path amx_int8;
#endif

static const Path* const kPaths[] = {
#ifdef ZS_HAVE_AVX2
    &avx2_dot,
    &avx2_tile,
    &avx2_gather,
    &avx2_skip,
    &avx2_throughput,
    &avx2_int8,
    &avx2_int8_dot,
#endif
#ifdef ZS_HAVE_NEON
    &neon_dot,
    &neon_tile,
    &neon_skip,
    &neon_int8,
#endif
#ifdef ZS_HAVE_NEON_DOTPROD
    &neon_dotprod_int8,
#endif
    &portable_dot,
    &portable_int8,
    &portable_int8_tokens,
    &portable_tokens,
#ifdef ZS_HAVE_AVX512
    &avx512_dot,
    &avx512_gather,
    &avx512_int8_dot,
    &avx512_int8_throughput,
    &avx512_int8_tile,
    &avx512_throughput,
    &avx512_tile,
#endif
#ifdef ZS_HAVE_AMX
    &amx_bfloat16,
    &amx_int8,
#endif
};

PathList all_paths() { return {kPaths, kPaths + sizeof(kPaths) / sizeof(kPaths[0])}; }

}  // namespace zs
