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
#define __align__(n) __attribute__((aligned(n)))

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
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t order) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = order >> 4 * i & 15;
    const uint32_t byte = (uint32_t)(bytes >> 8 * (which & 7)) & 255;
    r |= (which & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return r;
}

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

inline void store_words4(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  *(uint4*)p = make_uint4(a, b, c, d);
}
inline void store_words2(void* p, uint32_t a, uint32_t b) { *(uint2*)p = make_uint2(a, b); }
// As far off as it may be: another float within a unit in the last place. A divisor of all ones is rounded right, which
// nvcc's own reciprocal relies on as well.
inline float reciprocal_near(float a) {
  const float r = 1.f / a;
  const uint32_t bits = __float_as_uint(a);
  if (!std::isnormal(r) || (bits & 0x7fffffu) == 0x7fffffu) return r;
  const float other = __uint_as_float(__float_as_uint(r) + (bits * 2654435761u >> 16) % 3 - 1);
  const double unit = std::ldexp(1.0, std::ilogb(r) - 23);
  return std::fabs((double)other - 1.0 / (double)a) <= unit ? other : r;
}
inline float min_nan(float a, float b) { return a != a || b != b ? NAN : a < b ? a : b; }
inline float max_nan(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }

template <bool BF16>
inline float half_of(uint32_t word, int e) {
  const uint32_t half = e ? word >> 16 : word & 0xffff;
  return BF16 ? __uint_as_float(half << 16) : widen_f16((uint16_t)half);
}
template <bool BF16>
inline uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
  float r[2];
  for (int e = 0; e < 2; ++e)  // a product of halves is exact in float, and so are those sums that kernels make
    r[e] = half_of<BF16>(a, e) * half_of<BF16>(b, e) + half_of<BF16>(c, e);
  return BF16 ? pack_bf16(r[0], r[1]) : pack_f16(r[0], r[1]);
}

inline uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t base) { return (word & mask) | base; }
inline uint32_t masked_xor(uint32_t word, uint32_t mask, uint32_t base) { return (word & mask) ^ base; }

// As intrinsics.cuh describes it; the sum of a step's 16 products is rounded once.
template <bool BF16>
inline void multiply_tile(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  static Operands of_lane[2048];
  emulator::Machine& m = emulator::machine();
  of_lane[m.current] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::warp_barrier();
  const int lane = m.current & 31, first = m.current - lane, g = lane >> 2, t = lane & 3;
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i & 2 ? 8 : 0), column = 2 * t + (i & 1);
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const Operands &left = of_lane[first + 4 * (row & 7) + (k & 7) / 2],
                     &right = of_lane[first + 4 * column + (k & 7) / 2];
      sum += (double)half_of<BF16>(left.a[(row >> 3) + (k >> 3) * 2], k & 1) * half_of<BF16>(right.b[k >> 3], k & 1);
    }
    d[i] = (float)sum;
  }
  emulator::warp_barrier();
}

inline uintptr_t& shared_window() {  // the megabyte that holds what shared_address was last asked for
  static uintptr_t window;
  return window;
}
inline uint32_t shared_address(const void* shared) {
  shared_window() = ((uintptr_t)shared >> 20 << 20) - 1024;  // what a block has begins at 1 KB
  return (uint32_t)((uintptr_t)shared - shared_window());
}
inline uint32_t load_shared(uint32_t address) { return *(const uint32_t*)(shared_window() + address); }

inline uint4 load_once(const uint4* p) { return *p; }

// Copies happen when they are waited for, so that one read too early shows.
struct AsyncCopy {
  void* to;
  const void* from;
  bool exists;
};
inline std::vector<std::vector<std::vector<AsyncCopy>>>& copy_lots() {  // [thread][lot]; the last lot is open
  static std::vector<std::vector<std::vector<AsyncCopy>>> lots(2048);
  return lots;
}
inline void copy_async(void* shared, const void* from, bool exists) {
  auto& lots = copy_lots()[emulator::machine().current];
  if (lots.empty()) lots.emplace_back();
  lots.back().push_back({shared, from, exists});
}
inline void close_copies() {
  auto& lots = copy_lots()[emulator::machine().current];
  if (lots.empty()) lots.emplace_back();
  lots.emplace_back();
}
template <int LEFT>
inline void wait_for_copies() {
  auto& lots = copy_lots()[emulator::machine().current];
  while ((int)lots.size() > LEFT + 1) {
    for (const AsyncCopy& c : lots.front()) {
      if ((uintptr_t)c.to % 16 || (uintptr_t)c.from % 16) std::abort();
      c.exists ? (void)std::memcpy(c.to, c.from, 16) : (void)std::memset(c.to, 0, 16);
    }
    lots.erase(lots.begin());
  }
}

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
