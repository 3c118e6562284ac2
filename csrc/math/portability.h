// What lets one source of mathematics serve a CUDA thread and a CPU vector.
//
// The math headers are templates over F, "a float": `float` itself in CUDA, a vector of floats in the CPU
// loops. They use operators and the few functions of scalar.inl (cpu/vec.inl for vectors); every operation is
// IEEE and correctly rounded, so CPU (any instruction set), CUDA and the PyTorch reference agree bit for bit
// on quantized codes. Never compile them with -ffast-math, --use_fast_math or floating-point contraction.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define ASKEW_INLINE __host__ __device__ __forceinline__
#else
#define ASKEW_INLINE inline __attribute__((always_inline))
#endif
#define ASKEW_FN static ASKEW_INLINE
