// Compiled with AVX-512 (F, BW, DQ, VL) switched on where the compiler targets x86-64 (setup.py); empty elsewhere.
#if defined(__AVX512F__)
#include <immintrin.h>
#define ASKEW_LANES 16
#define ASKEW_ISA avx512
#define ASKEW_WITH_PANELS
#include "../loops.inl"
#include "../packed.inl"
#endif
