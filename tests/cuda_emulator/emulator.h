// CUDA on one CPU thread: enough of the language for csrc/cuda/*.cu to be compiled by g++ and run, block by block.
//
// Included before a .cu file. The threads of a block are fibers that run one after the other until they
// meet at __syncthreads or at a shuffle, so an exchange that not every thread reaches is reported instead of hanging.
// Blocks run in descending order, lanes in ascending order: code that relied on another order would show.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

// ---- the runtime's types; "device" memory is ordinary memory ---------------------------------------------------

typedef int cudaError_t;
typedef struct Stream* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

struct Index3 {
  unsigned x = 0;
};

namespace emulator {

// ---- fibers -----------------------------------------------------------------------------------------------------

constexpr size_t kStack = 256 << 10;

struct Fiber {
  void* sp = nullptr;
  std::vector<char> stack;
  bool done = false;
};

#if defined(__x86_64__)
// Saves the callee-saved registers on the present stack, keeps its pointer in *from, goes on at `to`.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm("push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret");
}
#else
#error "the emulator switches stacks on x86-64 only"
#endif

struct Machine {
  std::vector<Fiber> fibers;
  void* scheduler = nullptr;
  int current = 0, threads = 0;
  const std::function<void()>* body = nullptr;
  // barrier and shuffle
  int arrived = 0, generation = 0;
  std::vector<int> lane_arrived, lane_generation;
  std::vector<uint64_t> exchange;  // [threads], written before, read after all lanes have arrived
  bool progress = false;
};
inline Machine& machine() {
  static Machine m;
  return m;
}

}  // namespace emulator

static Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

inline void yield() {
  Machine& m = machine();
  const int self = m.current;
  switch_stack(&m.fibers[self].sp, m.scheduler);
  threadIdx.x = (unsigned)self;
}

inline void entry() {
  Machine& m = machine();
  (*m.body)();
  m.fibers[m.current].done = true;
  m.progress = true;
  switch_stack(&m.fibers[m.current].sp, m.scheduler);
  std::abort();
}

inline void run_block(int threads, const std::function<void()>& body) {
  Machine& m = machine();
  if ((int)m.fibers.size() < threads) m.fibers.resize(threads);
  m.threads = threads;
  m.body = &body;
  m.arrived = 0;
  m.lane_arrived.assign((threads + 31) / 32, 0);
  m.lane_generation.assign((threads + 31) / 32, 0);
  m.exchange.assign(threads, 0);
  for (int t = 0; t < threads; ++t) {
    Fiber& f = m.fibers[t];
    if (f.stack.empty()) f.stack.resize(kStack);
    f.done = false;
    uintptr_t top = (uintptr_t)(f.stack.data() + kStack) & ~(uintptr_t)15;
    void** sp = (void**)top;
    *--sp = nullptr;        // keeps the stack aligned as after a call
    *--sp = (void*)&entry;  // popped by ret
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    f.sp = sp;
  }
  for (int left = threads; left;) {
    left = 0;
    m.progress = false;
    for (int t = 0; t < threads; ++t) {
      if (m.fibers[t].done) continue;
      ++left;
      m.current = t;
      threadIdx.x = (unsigned)t;
      switch_stack(&m.scheduler, m.fibers[t].sp);
    }
    if (left && !m.progress) {
      std::fprintf(stderr, "cuda emulator: threads wait at a barrier or shuffle that others never reach\n");
      std::abort();
    }
  }
}

inline void barrier() {
  Machine& m = machine();
  const int mine = m.generation;
  m.progress = true;
  if (++m.arrived == m.threads) {
    m.arrived = 0;
    ++m.generation;
    return;
  }
  while (m.generation == mine) yield();
}

inline void warp_barrier() {
  Machine& m = machine();
  const int warp = m.current / 32, lanes = std::min(32, m.threads - 32 * warp), mine = m.lane_generation[warp];
  m.progress = true;
  if (++m.lane_arrived[warp] == lanes) {
    m.lane_arrived[warp] = 0;
    ++m.lane_generation[warp];
    return;
  }
  while (m.lane_generation[warp] == mine) yield();
}

}  // namespace emulator

// ---- what kernels call ------------------------------------------------------------------------------------------

inline void __syncthreads() { emulator::barrier(); }

template <class V>
inline V __shfl_xor_sync(unsigned mask, V v, int lane_mask) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8, "4- and 8-byte shuffles");
  if (mask != 0xffffffffu) std::abort();
  emulator::Machine& m = emulator::machine();
  std::memcpy(&m.exchange[m.current], &v, sizeof v);
  emulator::warp_barrier();
  V r;
  std::memcpy(&r, &m.exchange[m.current ^ lane_mask], sizeof r);
  emulator::warp_barrier();
  return r;
}

// Fibers of one thread take turns only at barriers and shuffles.
template <class V>
inline V atomicAdd(V* at, V v) {
  const V before = *at;
  *at += v;
  return before;
}
inline void __threadfence() {}
inline float __ldcg(const float* at) { return *at; }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }

inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __uint_as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float __int_as_float(int i) { return __uint_as_float((uint32_t)i); }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }

// ---- the words of intrinsics.cuh ----------------------------------------------------------------------------------

#define ASKEW_INTRINSICS
namespace askew {
namespace cuda {

inline uint32_t round_bf16(float f) {
  const uint32_t u = __float_as_uint(f);
  if (f != f) return 0x7fff;  // as cvt.rn.bf16x2
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
inline uint32_t round_f16(float f) {
  if (f != f) return 0x7fff;
  const _Float16 h = (_Float16)f;
  uint16_t u;
  std::memcpy(&u, &h, 2);
  return u;
}
inline uint32_t pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
inline uint32_t pack_f16(float low, float high) { return round_f16(low) | round_f16(high) << 16; }
inline float widen_f16(uint16_t half) {
  _Float16 h;
  std::memcpy(&h, &half, 2);
  return (float)h;
}

// by the distances to all 127 numbers of a sign, as nothing else here does it
inline uint32_t round_e4m3(float f) {
  if (f != f) return 0x7f;
  uint32_t best = 0;
  double least = INFINITY;
  for (uint32_t code = 0; code < 127; ++code) {
    const int exponent = code >> 3, fraction = code & 7;
    const double value = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
    const double distance = std::fabs(std::fmin(std::fabs((double)f), 448.0) - value);
    if (distance < least || (distance == least && code % 2 == 0)) {
      best = code;
      least = distance;
    }
  }
  return best | (std::signbit(f) ? 0x80u : 0u);
}
inline uint32_t pack_e4m3(float low, float high) { return round_e4m3(low) | round_e4m3(high) << 8; }

inline float min_nan(float a, float b) { return a != a || b != b ? NAN : a < b ? a : b; }
inline float max_nan(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }

template <class... Args>
cudaError_t launch(void (*kernel)(Args...), unsigned blocks, unsigned threads, cudaStream_t, Args... args) {
  gridDim.x = blocks;
  blockDim.x = threads;
  for (unsigned b = blocks; b-- > 0;) {
    blockIdx.x = b;
    emulator::run_block((int)threads, [&] { kernel(args...); });
  }
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace askew
