// The passes with one read and one write: quantize-dequantize, straight-through clip, interval projection; row sums.
#include "launch.cuh"
#include "../tuning.h"

namespace askew {
namespace cuda {
namespace {

// Calls run(words, scale, spot, taken) for every slot of x, with the loads of `Ahead` slots under way at once.
// scale may be null where run does not use it.
template <int T, int Ahead, class Run>
__device__ __forceinline__ void for_slots(const void* x, const float* scale, const Cut& cut, const Run& run) {
  Walk<T> walk(cut, blockIdx.x);
  for (int taken = 0; taken < walk.count; taken += Ahead) {
    Spot spot[Ahead];
    Words words[Ahead];
    float scales[Ahead];
#pragma unroll
    for (int u = 0; u < Ahead; ++u) {
      spot[u] = walk.take(taken + u);
      words[u] = load(x, spot[u], walk);
      scales[u] = spot[u].n && scale ? scale[spot[u].row] : 1.f;
    }
#pragma unroll
    for (int u = 0; u < Ahead; ++u) run(words[u], scales[u], spot[u], walk);
  }
}

constexpr int kResident = 3;  // blocks of an SM, at least: at most 80 registers

struct Pass {  // one matrix through one pass
  const void *x, *g;
  void* y;
  const float* scale;
  GridArg grid;
  int y_type;
  uint64_t seed;
  Scalar eps;
  Cut cut;
};

template <int T, class Grid>
__global__ void __launch_bounds__(kThreads, kResident) quantize_kernel(const __grid_constant__ Pass p) {
  const Grid grid = GridMaker<Grid>::make(p.grid);
  for_slots<T, 4>(p.x, p.scale, p.cut, [&](const Words& in, float scale, const Spot& s, const Walk<T>& walk) {
    const auto row = make_row(scale, grid);
    float y[Walk<T>::kWidth];
#pragma unroll
    for (int j = 0; j < Walk<T>::kWidth; ++j)
      y[j] = quantize_dequantize(Storage<T>::get(in.word[j / Storage<T>::kPerWord], j % Storage<T>::kPerWord), row);
    store_as(p.y_type, p.y, y, s, walk);
  });
}

template <int T, class Grid>
__global__ void __launch_bounds__(kThreads, kResident) stochastic_kernel(const __grid_constant__ Pass p) {
  const Grid grid = GridMaker<Grid>::make(p.grid);
  for_slots<T, 2>(p.x, p.scale, p.cut, [&](const Words& in, float scale, const Spot& s, const Walk<T>& walk) {
    const auto row = make_row(scale, grid);
    float y[Walk<T>::kWidth];
    Philox4 random;
#pragma unroll
    for (int j = 0; j < Walk<T>::kWidth; ++j) {
      const uint64_t e = (uint64_t)(s.index + ((int64_t)j << walk.shift));
      uint32_t bits;
      if (walk.vectors) {  // e is a multiple of 4 where j is
        if (j % 4 == 0) random = philox(p.seed, e >> 2);
        bits = random.word[j % 4];
      } else {
        random = philox(p.seed, e >> 2);
        bits = e & 2 ? (e & 1 ? random.word[3] : random.word[2]) : (e & 1 ? random.word[1] : random.word[0]);
      }
      const float w = Storage<T>::get(in.word[j / Storage<T>::kPerWord], j % Storage<T>::kPerWord);
      y[j] = row.scale.value * stochastic_level(w, uniform01(bits), row);
    }
    store_as(p.y_type, p.y, y, s, walk);
  });
}

// Applies `element` to each value of a slot in place.
template <int T, class Element>
__device__ __forceinline__ void map_words(Words& w, const Element& element) {
  constexpr int kPer = Storage<T>::kPerWord;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    float v[kPer];
#pragma unroll
    for (int e = 0; e < kPer; ++e) v[e] = element(Storage<T>::get(w.word[q], e), q, e);
    w.word[q] = Storage<T>::put(v);
  }
}

template <int T, class Grid>
__global__ void __launch_bounds__(kThreads, kResident) ste_clip_kernel(const __grid_constant__ Pass p) {
  constexpr int kAhead = 2;
  const Grid grid = GridMaker<Grid>::make(p.grid);
  Walk<T> walk(p.cut, blockIdx.x);
  for (int taken = 0; taken < walk.count; taken += kAhead) {
    Spot spot[kAhead];
    Words x[kAhead], g[kAhead];
    float scale[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      spot[u] = walk.take(taken + u);
      x[u] = load(p.x, spot[u], walk);
      g[u] = load(p.g, spot[u], walk);
      scale[u] = spot[u].n ? p.scale[spot[u].row] : 1.f;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      auto row = make_row(scale[u], grid);
      if (T != kFloat32) {  // the ends as a clamped weight is stored
        const float ends[2] = {row.low, row.high};
        const uint32_t stored = Storage<T>::put(ends);
        row.low = Storage<T>::get(stored, 0);
        row.high = Storage<T>::get(stored, 1);
      }
      map_words<T>(g[u], [&](float v, int q, int e) { return pass_inside(v, Storage<T>::get(x[u].word[q], e), row); });
      store(p.y, g[u], spot[u], walk);
    }
  }
}

__device__ __forceinline__ float read(const Scalar& s) {
  if (!s.device) return (float)s.value;
  return s.is_double ? (float)*(const double*)s.device : *(const float*)s.device;
}

template <int T, class Grid>
__global__ void __launch_bounds__(kThreads, kResident) project_interval_kernel(const __grid_constant__ Pass p) {
  const Grid grid = GridMaker<Grid>::make(p.grid);
  const float radius = feasible_radius(read(p.eps));
  for_slots<T, 4>(p.y, p.scale, p.cut, [&](Words w, float scale, const Spot& s, const Walk<T>& walk) {
    const auto row = make_row(scale, grid);
    map_words<T>(w, [&](float v, int, int) { return project_interval(v, row, radius); });
    store(p.y, w, s, walk);
  });
}

template <int T>
__global__ void __launch_bounds__(kThreads, kResident) row_sums_kernel(const __grid_constant__ Pass p) {
  Sums sums{0, 0, 0};
  for_slots<T, 4>(p.x, nullptr, p.cut, [&](const Words& in, float, const Spot& s, const Walk<T>&) {
#pragma unroll
    for (int j = 0; j < Walk<T>::kWidth; ++j)  // elements that do not exist were loaded as zeros
      add(sums, Storage<T>::get(in.word[j / Storage<T>::kPerWord], j % Storage<T>::kPerWord));
    if (s.ends_row) {
      finish_row(sums, p.cut, s.row, blockIdx.x, p.y);
      sums = {0, 0, 0};
    }
  });
}

// The cut for an elementwise pass over x (and others beside it) of one storage type.
Cut cut_for(Matrix m, int type, bool all_aligned) {
  const int width = per_vector(type);
  return make_cut(m, width, all_aligned && m.cols % width == 0, tuning.slots);
}
Cut cut_for_sums(Matrix m, int type, const void* x) {
  const int width = per_vector(type);
  return make_cut(m, width, aligned(x, type, width) && m.cols % width == 0);
}

}  // namespace

cudaError_t fake_quantize(const void* x, int x_type, void* y, int y_type, const float* scale, GridArg grid, Matrix m,
                          bool stochastic, uint64_t seed, cudaStream_t stream) {
  Pass p{};
  p.x = x;
  p.y = y;
  p.y_type = y_type;
  p.scale = scale;
  p.grid = grid;
  p.seed = seed;
  p.cut = cut_for(m, x_type, aligned(x, x_type, per_vector(x_type)) && aligned(y, y_type, per_vector(x_type)));
  const unsigned blocks = (unsigned)blocks_of(p.cut);
  if (stochastic) {
    ASKEW_BY_TYPE(x_type,
                  ASKEW_BY_GRID(grid.kind, return launch((stochastic_kernel<T, Grid>), blocks, kThreads, stream, p)))
  } else {
    ASKEW_BY_TYPE(x_type,
                  ASKEW_BY_GRID(grid.kind, return launch((quantize_kernel<T, Grid>), blocks, kThreads, stream, p)))
  }
  return cudaErrorInvalidValue;
}

cudaError_t ste_clip(const void* g, const void* x, int type, void* out, const float* scale, GridArg grid, Matrix m,
                     cudaStream_t stream) {
  Pass p{};
  p.g = g;
  p.x = x;
  p.y = out;
  p.scale = scale;
  p.grid = grid;
  const int width = per_vector(type);
  p.cut = cut_for(m, type, aligned(g, type, width) && aligned(x, type, width) && aligned(out, type, width));
  const unsigned blocks = (unsigned)blocks_of(p.cut);
  ASKEW_BY_TYPE(type, ASKEW_BY_GRID(grid.kind, return launch((ste_clip_kernel<T, Grid>), blocks, kThreads, stream, p)))
  return cudaErrorInvalidValue;
}

cudaError_t project_interval(void* w, int type, const float* scale, GridArg grid, Scalar eps, Matrix m,
                             cudaStream_t stream) {
  Pass p{};
  p.y = w;
  p.scale = scale;
  p.grid = grid;
  p.eps = eps;
  p.cut = cut_for(m, type, aligned(w, type, per_vector(type)));
  const unsigned blocks = (unsigned)blocks_of(p.cut);
  ASKEW_BY_TYPE(
      type, ASKEW_BY_GRID(grid.kind, return launch((project_interval_kernel<T, Grid>), blocks, kThreads, stream, p)))
  return cudaErrorInvalidValue;
}

size_t row_sums_scratch(const void* x, int type, Matrix m) {
  const Cut cut = cut_for_sums(m, type, x);
  return cut.pieces > 1 ? (size_t)(m.rows * cut.pieces) * kRowSums * sizeof(double) : 0;
}

cudaError_t row_sums(const void* x, int type, Matrix m, float* sums, void* scratch, cudaStream_t stream) {
  Pass p{};
  p.x = x;
  p.cut = cut_for_sums(m, type, x);
  if (m.cols == 0) return cudaMemsetAsync(sums, 0, (size_t)m.rows * kRowSums * sizeof(float), stream);
  p.y = p.cut.pieces > 1 ? scratch : (void*)sums;
  const unsigned blocks = (unsigned)blocks_of(p.cut);
  cudaError_t error = cudaSuccess;
  ASKEW_BY_TYPE(type, error = launch((row_sums_kernel<T>), blocks, kThreads, stream, p))
  Finisher finisher;
  finisher.stream = stream;
  if (p.cut.pieces > 1) finisher.add((const double*)scratch, sums, m.rows, p.cut.pieces, kRowSums);
  finisher.run();
  return error != cudaSuccess ? error : finisher.error;
}

}  // namespace cuda
}  // namespace askew
