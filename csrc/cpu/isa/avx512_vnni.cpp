// AVX-512 with VNNI, which only products of packed codes with int8 activations use: no other loops here.
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#define ASKEW_LANES 16
#define ASKEW_ISA avx512_vnni
#include "../packed.inl"
#endif
