// Compiled with AVX2 switched on where the compiler targets x86-64 (setup.py); empty elsewhere.
#if defined(__AVX2__)
#include <immintrin.h>
#define ASKEW_LANES 8
#define ASKEW_ISA avx2
#include "../loops.inl"
#include "../packed.inl"
#endif
