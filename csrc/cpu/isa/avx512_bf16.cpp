// AVX-512 with VBMI and BF16, for products of many inputs with packed codes: no other loops here.
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include <immintrin.h>
#define ASKEW_LANES 16
#define ASKEW_ISA avx512_bf16
#define ASKEW_WITH_PANELS
#define ASKEW_PANELS_ONLY
#include "../packed.inl"
#endif
