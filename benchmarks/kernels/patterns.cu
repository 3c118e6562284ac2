// What memory gives to an elementwise step (2 reads, 1 write, 12 bytes an element), by access pattern and by
// instructions.
//
//   nvcc -std=c++17 -O3 --fmad=false -arch=native benchmarks/kernels/patterns.cu -o /tmp/patterns && /tmp/patterns
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

enum { kPlain, kStreaming, kNoL1 };  // hints to loads and stores

template <int HINT>
__device__ __forceinline__ float4 load(const float4* p) {
  if (HINT == kStreaming) return __ldcs(p);
  if (HINT == kNoL1) {
    float4 v;
    asm volatile("ld.global.L1::no_allocate.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p));
    return v;
  }
  return *p;
}
template <int HINT>
__device__ __forceinline__ void store(float4* p, float4 v) {
  if (HINT == kStreaming)
    __stcs(p, v);
  else
    *p = v;
}

// 2 PAIRS + 1 instructions: multiplication and addition, one after the other.
template <int PAIRS>
__device__ __forceinline__ float work(float w, float g, float lr) {
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) w = __fadd_rn(__fmul_rn(w, 1.0009765625f), g);
  return __fmaf_rn(-lr, g, w);
}
template <int PAIRS>
__device__ __forceinline__ float4 work(float4 w, float4 g, float lr) {
  return {work<PAIRS>(w.x, g.x, lr), work<PAIRS>(w.y, g.y, lr), work<PAIRS>(w.z, g.z, lr), work<PAIRS>(w.w, g.w, lr)};
}

// A thread takes SLOTS vectors, AHEAD of which are loaded before the first is used; PIPELINED: the next ones too.
template <int AHEAD, int SLOTS, int HINT, int PAIRS, int THREADS, bool PIPELINED>
__global__ void __launch_bounds__(THREADS) step(float4* w, const float4* g, float lr) {
  const int64_t base = (int64_t)blockIdx.x * (THREADS * SLOTS) + threadIdx.x;
  float4 a[AHEAD], b[AHEAD], next_a[AHEAD], next_b[AHEAD];
  const auto fetch = [&](int s, float4* to_a, float4* to_b) {
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      to_a[u] = load<HINT>(w + base + (s + u) * THREADS);
      to_b[u] = load<HINT>(g + base + (s + u) * THREADS);
    }
  };
  if (PIPELINED) fetch(0, a, b);
#pragma unroll 1
  for (int s = 0; s < SLOTS; s += AHEAD) {
    if (!PIPELINED) fetch(s, a, b);
    if (PIPELINED && s + AHEAD < SLOTS) fetch(s + AHEAD, next_a, next_b);
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) store<HINT>(w + base + (s + u) * THREADS, work<PAIRS>(a[u], b[u], lr));
    if (PIPELINED)
#pragma unroll
      for (int u = 0; u < AHEAD; ++u) a[u] = next_a[u], b[u] = next_b[u];
  }
}

template <int BYTES>
struct Parameters {
  char bytes[BYTES];
};
template <int BYTES>
__global__ void tiny(const __grid_constant__ Parameters<BYTES> p, float* out) {
  if (threadIdx.x == 0) out[0] = p.bytes[blockIdx.x & 63];
}

constexpr int64_t kElements = 64 << 20;
float4 *w, *g;
cudaEvent_t begin, end;
float copy_ms;

template <class F>
float milliseconds(F f) {
  f(), f();
  std::vector<float> times;
  for (int turn = 0; turn < 7; ++turn) {
    cudaEventRecord(begin);
    for (int i = 0; i < 3; ++i) f();
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float ms;
    cudaEventElapsedTime(&ms, begin, end);
    times.push_back(ms / 3);
  }
  std::sort(times.begin(), times.end());
  return times[3];
}
template <int AHEAD, int SLOTS, int HINT, int PAIRS, int THREADS, bool PIPELINED = false>
void row() {
  const float ms = milliseconds([] {
    step<AHEAD, SLOTS, HINT, PAIRS, THREADS, PIPELINED><<<kElements / 4 / (SLOTS * THREADS), THREADS>>>(w, g, 1e-3f);
  });
  printf("%2d slots, %d ahead%s, hint %d, %2d instructions, %d threads: %.4f ms, %.3f of copy\n", SLOTS, AHEAD,
         PIPELINED ? " pipelined" : "", HINT, 2 * PAIRS + 1, THREADS, ms, 12 / ms / (8 / copy_ms));
}
template <int BYTES>
void launches() {
  static Parameters<BYTES> p;
  const float ms = milliseconds([] {
    for (int i = 0; i < 200; ++i) tiny<BYTES><<<64, 64>>>(p, (float*)w);
  });
  printf("a launch with %d bytes of parameters, of 200 in a row: %.2f us\n", BYTES, ms * 5);
}

int main() {
  std::vector<float> values(kElements);
  uint32_t random = 1;
  cudaMalloc(&w, kElements * 4), cudaMalloc(&g, kElements * 4);
  for (float4* p : {w, g}) {
    for (float& v : values) random = random * 1664525u + 1013904223u, v = (random >> 8) * 0x1p-24f - 0.5f;
    cudaMemcpy(p, values.data(), kElements * 4, cudaMemcpyHostToDevice);
  }
  cudaEventCreate(&begin), cudaEventCreate(&end);
  copy_ms = milliseconds([] { cudaMemcpyAsync(w, g, kElements * 4, cudaMemcpyDeviceToDevice); });
  printf("copy: %.4f ms, %.2f TB/s\n", copy_ms, kElements * 8 / copy_ms / 1e9);
  row<1, 1, kPlain, 0, 256>(), row<1, 4, kPlain, 0, 256>(), row<2, 4, kPlain, 0, 256>(), row<4, 4, kPlain, 0, 256>();
  row<1, 16, kPlain, 0, 256>(), row<2, 16, kPlain, 0, 256>(), row<4, 16, kPlain, 0, 256>();
  row<1, 16, kPlain, 0, 256, true>(), row<2, 16, kPlain, 0, 256, true>();
  row<1, 1, kStreaming, 0, 256>(), row<4, 16, kStreaming, 0, 256>(), row<4, 16, kNoL1, 0, 256>();
  row<2, 4, kPlain, 0, 128>(), row<2, 4, kPlain, 0, 512>();
  row<1, 1, kPlain, 16, 256>(), row<1, 16, kPlain, 16, 256>();
  row<1, 1, kPlain, 32, 256>(), row<1, 16, kPlain, 32, 256>(), row<1, 16, kPlain, 48, 256>();
  launches<128>(), launches<4000>(), launches<32000>();
  cudaDeviceSynchronize();
  const cudaError_t error = cudaGetLastError();
  if (error) printf("%s\n", cudaGetErrorString(error));
  return error != cudaSuccess;
}
