// The passes with one read and one write: quantize-dequantize, straight-through clip, interval projection; row sums,
// and the clip that leaves a learned scale's gradient.
#include <type_traits>

#include "device.cuh"
#include "../tuning.h"

namespace askew {
namespace cuda {
namespace {

constexpr int kResident = 3;  // blocks of an SM, at least: at most 80 registers
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kLookedUpClip = 2;  // for which 80 are too few there
#else
constexpr int kLookedUpClip = kResident;
#endif

struct Pass : QuantizeArg {
  Cut cut;
};

// Element j of a slot's part of the random numbers; `random` is kept from one j to the next.
template <int T>
__device__ __forceinline__ float uniform_at(uint64_t seed, const Spot& s, const Walk<T>& walk, int j, Philox4& random) {
  const uint64_t e = (uint64_t)(s.index + ((int64_t)j << walk.shift));
  if (!walk.vectors || j % 4 == 0) random = philox(seed, e >> 2);
  if (walk.vectors) return uniform01(random.word[j % 4]);  // e is a multiple of 4 where j is
  return uniform01(e & 2 ? (e & 1 ? random.word[3] : random.word[2]) : (e & 1 ? random.word[1] : random.word[0]));
}

template <int T, class Grid, QuantizePass PASS>
__global__ void __launch_bounds__(kThreads,
                                  PASS == kSteClip && std::is_same_v<Grid, Codebook> ? kLookedUpClip : kResident)
    quantize_kernel(const __grid_constant__ Pass p) {
  constexpr int kAhead = PASS == kQuantize || PASS == kProject ? 4 : 2;
  const Grid grid = GridMaker<Grid>::make(p.grid);
  const float radius = PASS == kProject ? feasible_radius((float)read(p.eps)) : 0.f;
  const Soft soft = PASS == kSoften ? soft_of((float)read(p.eps)) : Soft{};
  const auto run = [&](const Words* in, float scale, const Spot& s, const Walk<T>& walk) {
    const auto row = make_row(scale, grid);
    if constexpr (PASS == kSteClip) {
      const auto stored = with_stored_ends<T>(row);
      store(p.y, map_words<T>(in[0], in[1], [&](float g, float x) { return pass_inside(g, x, stored); }), s, walk);
    } else if constexpr (PASS == kSoften) {
      store(p.y, map_words<T>(*in, *in, [&](float w, float) { return soften(w, row, soft); }), s, walk);
    } else if constexpr (PASS == kProject) {
      store(p.y, map_words<T>(*in, *in, [&](float w, float) { return project_interval(w, row, radius); }), s, walk);
    } else {
      float y[Walk<T>::kWidth];
      Philox4 random;
      ASKEW_EACH (j, Walk<T>::kWidth) {
        const float x = element<T>(*in, j);
        const float level = PASS == kQuantize ? nearest_level(x, row)
                                              : stochastic_level(x, uniform_at(p.seed, s, walk, j, random), row);
        y[j] = PASS == kQuantize && holds_levels(p.y_type) ? level : row.scale.value * level;
      }
      store_as(p.y_type, p.y, y, s, walk);
    }
  };
  if constexpr (PASS == kSteClip)
    for_slots<T, kAhead>({p.g, p.x}, p.scale, p.cut, blockIdx.x, run);
  else
    for_slots<T, kAhead>({PASS == kProject ? p.y : p.x}, p.scale, p.cut, blockIdx.x, run);
}

template <int T>
__global__ void __launch_bounds__(kThreads, kResident) row_sums_kernel(const __grid_constant__ Pass p) {
  Sums sums{0, 0, 0};
  for_slots<T, 4>({p.x}, nullptr, p.cut, blockIdx.x, [&](const Words* in, float, const Spot& s, const Walk<T>&) {
    ASKEW_EACH (j, Walk<T>::kWidth)  // elements that do not exist were loaded as zeros
      add(sums, element<T>(*in, j));
    if (s.ends_row) {
      finish_row(sums, p.cut, s.row, blockIdx.x, p.y);
      sums = {0, 0, 0};
    }
  });
}

struct GradientPass : QuantizeArg {
  Cut cut;
  double factor;
  void* sums;  // floats of rows, or doubles of pieces of rows
};

// Puts together one sum of a row's team, in a fixed order. Every thread of the block calls it; the row of a team may
// lie outside the matrix.
__device__ __forceinline__ void finish_gradient(float sum, const GradientPass& p, int64_t row) {
  __shared__ double across[kThreads / 32];
  const int shift = min((int)p.cut.team_shift, kWarpShift);
  double v = add_lanes(sum, shift);
  bool writes = (threadIdx.x & ((1 << shift) - 1)) == 0;
  if (p.cut.team_shift > kWarpShift) {
    if (writes) across[threadIdx.x >> 5] = v;
    __syncthreads();
    writes = threadIdx.x == 0;
    if (writes)
      for (int w = 1; w < kThreads / 32; ++w) v += across[w];
    __syncthreads();
  }
  if (!writes || row >= p.cut.rows) return;
  if (p.cut.pieces > 1)
    ((double*)p.sums)[blockIdx.x] = p.factor * v;
  else
    ((float*)p.sums)[row] = (float)(p.factor * v);
}

template <int T, class Grid>
__global__ void __launch_bounds__(kThreads, kResident) scale_gradient_kernel(const __grid_constant__ GradientPass p) {
  const Grid grid = GridMaker<Grid>::make(p.grid);
  float sum = 0;
  const auto run = [&](const Words* in, float scale, const Spot& s, const Walk<T>& walk) {
    const auto row = make_row(scale, grid);
    const auto stored = with_stored_ends<T>(row);
    ASKEW_EACH (j, Walk<T>::kWidth) {  // elements that do not exist were loaded as zeros
      const float x = element<T>(in[1], j), placed = in_hull(x, row), q = row.grid.nearest(placed);
      const bool outside = x < stored.low || x > stored.high;
      sum += element<T>(in[0], j) * (outside ? q : q - placed);
    }
    if (p.y)
      store(p.y, map_words<T>(in[0], in[1], [&](float g, float x) { return pass_inside(g, x, stored); }), s, walk);
    if (s.ends_row) {
      finish_gradient(sum, p, s.row);
      sum = 0;
    }
  };
  for_slots<T, 2>({p.g, p.x}, p.scale, p.cut, blockIdx.x, run);
}

template <int T, class Grid>
cudaError_t launch_pass(const Pass& p, cudaStream_t stream) {
  void (*const kernels[])(Pass) = {quantize_kernel<T, Grid, kQuantize>, quantize_kernel<T, Grid, kStochastic>,
                                   quantize_kernel<T, Grid, kSteClip>, quantize_kernel<T, Grid, kProject>,
                                   quantize_kernel<T, Grid, kSoften>};  // as QuantizePass counts them
  return launch(kernels[p.pass], (unsigned)blocks_of(p.cut), kThreads, stream, p);
}

Pass with_cut(const QuantizeArg& a, int64_t most_slots) {
  const bool y_aligned = aligned(a.y, a.y_type, per_vector(a.type));
  return {a, cut_for(a.m, a.type, {a.x, a.g}, y_aligned, most_slots)};
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
  Finisher finisher{stream};
  if (p.cut.pieces > 1) finisher.add((const double*)scratch, sums, a.m.rows, p.cut.pieces, kRowSums);
  return first_error(error, finisher.run());
}

size_t scale_gradient_scratch(const QuantizeArg& a) {
  const Cut cut = with_cut(a, kSumSlots).cut;
  return cut.pieces > 1 ? (size_t)(a.m.rows * cut.pieces) * sizeof(double) : 0;
}

cudaError_t scale_gradient(const QuantizeArg& a, double factor, float* out, void* scratch, cudaStream_t stream) {
  if (a.m.cols == 0) return cudaMemsetAsync(out, 0, (size_t)a.m.rows * sizeof(float), stream);
  const Cut cut = with_cut(a, kSumSlots).cut;
  const GradientPass p{a, cut, factor, cut.pieces > 1 ? scratch : (void*)out};
  cudaError_t error = cudaSuccess;
  const unsigned blocks = (unsigned)blocks_of(cut);
  ASKEW_BY_TYPE(
      a.type, ASKEW_BY_GRID(a.grid.kind, error = launch((scale_gradient_kernel<T, Grid>), blocks, kThreads, stream, p)))
  Finisher finisher{stream};
  if (cut.pieces > 1) finisher.add((const double*)scratch, out, a.m.rows, cut.pieces, 1);
  return first_error(error, finisher.run());
}

}  // namespace cuda
}  // namespace askew
