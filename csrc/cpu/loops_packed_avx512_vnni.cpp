// Compiled with AVX-512 and VNNI switched on where the compiler targets x86-64 (setup.py); empty elsewhere.
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#define ASKEW_LANES 16
#define ASKEW_ISA avx512_vnni
#include "packed.inl"

const askew::PackedLoops* askew::packed_avx512_vnni() { return &avx512_vnni::table; }
#else
#include "packed.h"
const askew::PackedLoops* askew::packed_avx512_vnni() { return nullptr; }
#endif
