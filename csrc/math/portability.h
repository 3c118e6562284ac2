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

// A loop over I = 0 ... N - 1 that is unrolled; else arrays of vectors would stay in memory.
#if defined(__CUDACC__)
#define ASKEW_UNROLL _Pragma("unroll")
#else
#define ASKEW_UNROLL _Pragma("GCC unroll 32")
#endif
#define ASKEW_EACH(I, N) ASKEW_UNROLL for (int I = 0; I < (N); ++I)
