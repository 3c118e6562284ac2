// Products of packed weights over shapes, forms and tokens, as chains in a CUDA graph over weights that no cache holds;
// the 4-bit ones are checked too. Form 14 is a table of 16 in one part (FP4), 24 in two (NF4).
//
//   nvcc -std=c++17 -O3 --fmad=false -arch=native -Icsrc/cuda benchmarks/kernels/products.cu -o /tmp/products &&
//   /tmp/products
#include <cstring>
#include <algorithm>
#include "packed_tiles.cu"
#include <cstdio>
#include <cstdlib>
#include <vector>
#include <cmath>
#include <string>
using namespace askew;
#define OK(x)                                                           \
  do {                                                                  \
    cudaError_t err_ = (x);                                             \
    if (err_ != cudaSuccess) {                                          \
      printf("error %s line %d\n", cudaGetErrorString(err_), __LINE__); \
      exit(1);                                                          \
    }                                                                   \
  } while (0)
static uint16_t bf(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static float fb(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
__global__ void copy_kernel(const uint4* a, uint4* b, size_t n) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
    b[i] = a[i];
}

template <class F>
float time_graph(cudaStream_t s, int launches, F f) {
  cudaGraph_t g;
  cudaGraphExec_t e;
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < launches; ++i) f(i);
  OK(cudaStreamEndCapture(s, &g));
  OK(cudaGraphInstantiate(&e, g, 0));
  cudaEvent_t a, b;
  cudaEventCreate(&a);
  cudaEventCreate(&b);
  OK(cudaGraphLaunch(e, s));
  float best = 1e9f;
  for (int r = 0; r < 4; ++r) {
    cudaEventRecord(a, s);
    OK(cudaGraphLaunch(e, s));
    cudaEventRecord(b, s);
    OK(cudaEventSynchronize(b));
    float ms;
    cudaEventElapsedTime(&ms, a, b);
    best = ms < best ? ms : best;
  }
  cudaGraphExecDestroy(e);
  cudaGraphDestroy(g);
  return best / launches * 1000;
}

int main(int argc, char** argv) {
  const bool brief = argc > 1 && std::string(argv[1]) == "brief";  // one and eight tokens alone
  cudaStream_t s;
  OK(cudaStreamCreate(&s));
  const size_t pool_bytes = 512u << 20;
  uint32_t* pool;
  OK(cudaMalloc(&pool, pool_bytes));
  std::vector<uint32_t> host(pool_bytes / 4);
  uint64_t r = 88172645463325252ull;
  for (auto& h : host) {
    r ^= r << 13;
    r ^= r >> 7;
    r ^= r << 17;
    h = (uint32_t)r;
  }
  OK(cudaMemcpy(pool, host.data(), pool_bytes, cudaMemcpyHostToDevice));
  const int most = 64, K_most = 11008, n_most = 8192;
  std::vector<uint16_t> x(most * (size_t)K_most), bias(n_most);
  for (auto& v : x) {
    r ^= r << 13;
    r ^= r >> 7;
    r ^= r << 17;
    v = bf((int)(r % 2001) / 1000.f - 1.f);
  }
  std::vector<float> scale(n_most * 700);
  for (auto& v : scale) {
    r ^= r << 13;
    r ^= r >> 7;
    r ^= r << 17;
    v = 0.5f + (r % 1000) / 1000.f;
  }
  float levels[16];
  for (int i = 0; i < 16; ++i) levels[i] = (i - 7) / 7.3f;
  uint16_t *dx, *dy;
  float *ds, *dl;
  void* scratch;
  OK(cudaMalloc(&dx, x.size() * 2));
  OK(cudaMalloc(&dy, most * (size_t)n_most * 2));
  OK(cudaMalloc(&ds, scale.size() * 4));
  OK(cudaMalloc(&dl, 64));
  OK(cudaMalloc(&scratch, 256 << 20));
  OK(cudaMemcpy(dx, x.data(), x.size() * 2, cudaMemcpyHostToDevice));
  OK(cudaMemcpy(ds, scale.data(), scale.size() * 4, cudaMemcpyHostToDevice));
  OK(cudaMemcpy(dl, levels, 64, cudaMemcpyHostToDevice));
  uint4* other;
  OK(cudaMalloc(&other, 256u << 20));
  float t = time_graph(
      s, 4, [&](int) { copy_kernel<<<132 * 16, 512, 0, s>>>((const uint4*)pool, other, (256u << 20) / 16); });
  printf("copy %.2f TB/s\n", 2. * (256u << 20) / t * 1e-6);
  const int shapes[][2] = {{8192, 8192}, {4096, 11008}, {1024, 4096}};
  for (auto& shape : shapes) {
    const int n = shape[0], K = shape[1];
    for (int form : {4, 2, 1, 3, 8, 14, 24}) {
      for (int groups : {1, K / 128, K / 32}) {
        if (groups > 1 && (form != 4 && form != 14)) continue;
        TilesArg a{};
        const size_t words = (size_t)(n / 16) * ((K + 255) / 256) * tile_bits(form) * 128;
        a.scale = ds;
        a.form = form;
        a.type = kBFloat16;
        a.n = n;
        a.cols = K;
        a.groups = groups;
        a.x = dx;
        a.y = dy;
        const int b = tile_bits(form);
        if (form > 8)
          a.grid = {kCodebook, 0, 0, dl, 16};
        else if (form == 1)
          a.grid = {kBinary, -1, 1, nullptr, 0};
        else
          a.grid = {kUniform, -(float)(1 << (b - 1)), (float)(1 << (b - 1)) - 1, nullptr, 0};
        const int copies = (int)(pool_bytes / (words * 4) < 64 ? pool_bytes / (words * 4) : 64);
        for (int tokens : {1, 2, 4, 8, 16, 32, 64}) {
          if (brief && tokens != 1 && tokens != 8) continue;
          if (tokens > 8 && form != 4) continue;
          a.batch = tokens;
          float us = time_graph(s, 48, [&](int i) {
            a.tiles = pool + (size_t)(i % copies) * words;
            OK(cuda::packed_tiles_linear(a, scratch, s));
          });
          printf("%5dx%-5d form %2d groups %4d tokens %2d: %7.2f us  %5.2f TB/s", n, K, form, groups, tokens, us,
                 words * 4. / us * 1e-6);
          // check a few outputs
          if (form == 4) {
            a.tiles = pool;
            OK(cuda::packed_tiles_linear(a, scratch, s));
            OK(cudaStreamSynchronize(s));
            std::vector<uint16_t> y((size_t)tokens * n);
            OK(cudaMemcpy(y.data(), dy, y.size() * 2, cudaMemcpyDeviceToHost));
            double worst = 0;
            const uint32_t rows16 = (uint32_t)((n + 15) / 16 * 16);
            for (int row : {0, 9, n / 2 + 3, n - 1})
              for (int tok : {0, tokens - 1}) {
                double sum = 0, size = 0;
                for (int k = 0; k < K; ++k) {
                  const int lane = 4 * (row % 8) + (k % 16) / 4, j = k % 256 / 16, h = row % 16 / 8, p = k % 4 / 2;
                  const uint32_t word =
                      host[(((size_t)(row / 16) * ((K + 255) / 256) + k / 256) * 4 + j / 4) * 128 + lane * 4 + j % 4];
                  const int code = word >> (4 * (h + 2 * p) + 16 * (k & 1)) & 15;
                  const double sc = groups > 1 ? scale[(size_t)(k / (K / groups)) * rows16 + row] : scale[row];
                  const double v = sc * (code - 8) * fb(x[(size_t)tok * K + k]);
                  sum += v;
                  size += std::fabs(v);
                }
                const double got = fb(y[(size_t)tok * n + row]);
                worst = std::max(worst, std::fabs(got - sum) / (size * K * 6e-8 + std::fabs(sum) / 256 + 1e-30));
              }
            printf("  error/bound %.2f%s", worst, worst <= 1 ? "" : "  WRONG");
          }
          printf("\n");
        }
      }
    }
  }
}
