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

// a * b + c in both halves of words, bfloat16 or float16.
template <bool BF16>
__device__ __forceinline__ uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  if (BF16)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// (word & mask) | base and (word & mask) ^ base, one instruction each.
__device__ __forceinline__ uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t base) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(word), "r"(mask), "r"(base));
  return r;
}
__device__ __forceinline__ uint32_t masked_xor(uint32_t word, uint32_t mask, uint32_t base) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(r) : "r"(word), "r"(mask), "r"(base));
  return r;
}

// d = A B + c on the matrix units of a warp, sums in float32. A (16, 16): lane 4 g + t has rows g, g + 8 of columns 2
// t, 2 t + 1 in a[0], a[1], of columns 2 t + 8, 2 t + 9 in a[2], a[3]. B (16, 8): rows 2 t, 2 t + 1 and 2 t + 8, 2 t +
// 9 of column g. c, d (16, 8): columns 2 t, 2 t + 1 of row g, then of row g + 8.
template <bool BF16>
__device__ __forceinline__ void multiply_tile(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                              const float (&c)[4]) {
  if (BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// 16 bytes that nobody will read again: they do not displace others in the L1 cache.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// Shared memory by its own address, of 32 bits.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return (uint32_t)__cvta_generic_to_shared(shared);
}
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t r;
  asm("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(address));
  return r;
}

// 16 bytes of device memory into shared memory without a register; zeros where they do not exist. Those that a thread
// has asked for up to close_copies are one lot; wait_for_copies returns when at most LEFT of its lots are under way.
__device__ __forceinline__ void copy_async(void* shared, const void* from, bool exists) {
  const int size = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from), "r"(size)
               : "memory");
}
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
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
