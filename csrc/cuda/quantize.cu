// The passes with one read and one write: quantize-dequantize, straight-through clip, interval projection; row sums.
#include "device.cuh"
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

struct Pass : QuantizeArg {
  Cut cut;
};

template <int T, class Grid>
__global__ void __launch_bounds__(kThreads, kResident) quantize_kernel(const __grid_constant__ Pass p) {
  const Grid grid = GridMaker<Grid>::make(p.grid);
  for_slots<T, 4>(p.x, p.scale, p.cut, [&](const Words& in, float scale, const Spot& s, const Walk<T>& walk) {
    const auto row = make_row(scale, grid);
    float y[Walk<T>::kWidth];
#pragma unroll
    for (int j = 0; j < Walk<T>::kWidth; ++j) y[j] = quantize_dequantize(element<T>(in, j), row);
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
      y[j] = row.scale.value * stochastic_level(element<T>(in, j), uniform01(bits), row);
    }
    store_as(p.y_type, p.y, y, s, walk);
  });
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
      const auto row = with_stored_ends<T>(make_row(scale[u], grid));
      g[u] = map_words<T>(g[u], x[u], [&](float v, float w) { return pass_inside(v, w, row); });
      store(p.y, g[u], spot[u], walk);
    }
  }
}

template <int T, class Grid>
__global__ void __launch_bounds__(kThreads, kResident) project_interval_kernel(const __grid_constant__ Pass p) {
  const Grid grid = GridMaker<Grid>::make(p.grid);
  const float radius = feasible_radius((float)read(p.eps));
  for_slots<T, 4>(p.y, p.scale, p.cut, [&](const Words& w, float scale, const Spot& s, const Walk<T>& walk) {
    const auto row = make_row(scale, grid);
    store(p.y, map_words<T>(w, w, [&](float v, float) { return project_interval(v, row, radius); }), s, walk);
  });
}

template <int T>
__global__ void __launch_bounds__(kThreads, kResident) row_sums_kernel(const __grid_constant__ Pass p) {
  Sums sums{0, 0, 0};
  for_slots<T, 4>(p.x, nullptr, p.cut, [&](const Words& in, float, const Spot& s, const Walk<T>&) {
#pragma unroll
    for (int j = 0; j < Walk<T>::kWidth; ++j)  // elements that do not exist were loaded as zeros
      add(sums, element<T>(in, j));
    if (s.ends_row) {
      finish_row(sums, p.cut, s.row, blockIdx.x, p.y);
      sums = {0, 0, 0};
    }
  });
}

template <int T, class Grid>
cudaError_t launch_pass(const Pass& p, cudaStream_t stream) {
  const unsigned blocks = (unsigned)blocks_of(p.cut);
  switch (p.pass) {
    case kQuantize:
      return launch((quantize_kernel<T, Grid>), blocks, kThreads, stream, p);
    case kStochastic:
      return launch((stochastic_kernel<T, Grid>), blocks, kThreads, stream, p);
    case kSteClip:
      return launch((ste_clip_kernel<T, Grid>), blocks, kThreads, stream, p);
    default:
      return launch((project_interval_kernel<T, Grid>), blocks, kThreads, stream, p);
  }
}

Pass with_cut(const QuantizeArg& a, int64_t most_slots) {
  const int width = per_vector(a.type);
  const bool vectors = aligned(a.x, a.type, width) && aligned(a.g, a.type, width) && aligned(a.y, a.y_type, width);
  return {a, make_cut(a.m, width, vectors && a.m.cols % width == 0, most_slots)};
}

}  // namespace

cudaError_t quantize(const QuantizeArg& a, cudaStream_t stream) {
  const Pass p = with_cut(a, tuning.slots);
  ASKEW_BY_TYPE(a.type, ASKEW_BY_GRID(a.grid.kind, return launch_pass<T, Grid>(p, stream)))
  return cudaErrorInvalidValue;
}

size_t row_sums_scratch(const QuantizeArg& a) {
  const Cut cut = with_cut(a, kSumSlots).cut;
  return cut.pieces > 1 ? (size_t)(a.m.rows * cut.pieces) * kRowSums * sizeof(double) : 0;
}

cudaError_t row_sums(const QuantizeArg& a, float* sums, void* scratch, cudaStream_t stream) {
  if (a.m.cols == 0) return cudaMemsetAsync(sums, 0, (size_t)a.m.rows * kRowSums * sizeof(float), stream);
  Pass p = with_cut(a, kSumSlots);
  p.y = p.cut.pieces > 1 ? scratch : (void*)sums;
  cudaError_t error = cudaSuccess;
  ASKEW_BY_TYPE(a.type, error = launch((row_sums_kernel<T>), (unsigned)blocks_of(p.cut), kThreads, stream, p))
  Finisher finisher;
  finisher.stream = stream;
  if (p.cut.pieces > 1) finisher.add((const double*)scratch, sums, a.m.rows, p.cut.pieces, kRowSums);
  finisher.run();
  return error != cudaSuccess ? error : finisher.error;
}

}  // namespace cuda
}  // namespace askew
