// Compiled with AVX2 switched on where the compiler targets x86-64 (setup.py); empty elsewhere.
#if defined(__AVX2__)
#include <immintrin.h>
#define ASKEW_LANES 8
#define ASKEW_ISA avx2
#define ASKEW_ISA_NAME "avx2"
#include "loops.inl"

const askew::Loops* askew::loops_avx2() { return &avx2::table; }
#else
#include "loops.h"
const askew::Loops* askew::loops_avx2() { return nullptr; }
#endif
