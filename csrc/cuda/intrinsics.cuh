// The few machine instructions that CUDA C++ does not spell. tests/cuda_emulator has the same words for a CPU.
#ifndef ASKEW_INTRINSICS
#define ASKEW_INTRINSICS
#include <cuda_runtime.h>

#include <cstdint>

namespace askew {
namespace cuda {

// Two floats rounded (to nearest, ties to even) into the halves of a word; `low` goes to the lower address.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// 1 / a within one unit in the last place, for 2^-126 <= |a| <= 2^126.
__device__ __forceinline__ float reciprocal_near(float a) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}

#if __CUDA_ARCH__ >= 890
// Two floats as e4m3 (to nearest, ties to even, ends at 448) in the halves of 16 bits.
__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
#endif
__device__ __forceinline__ float widen_f16(uint16_t half) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(half));
  return r;
}

// Words to memory that is aligned to all of them. nvcc takes a store of a uint4 apart now and then.
__device__ __forceinline__ void store_words4(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(a), "r"(b), "r"(c), "r"(d));
}
__device__ __forceinline__ void store_words2(void* p, uint32_t a, uint32_t b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(a), "r"(b));
}

// The smaller and the larger of two; NaN where either is.
__device__ __forceinline__ float min_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

template <class... Args>
cudaError_t launch(void (*kernel)(Args...), unsigned blocks, unsigned threads, cudaStream_t stream, Args... args) {
  if (blocks == 0) return cudaSuccess;
  kernel<<<blocks, threads, 0, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace askew
#endif
