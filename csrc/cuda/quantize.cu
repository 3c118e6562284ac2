// The passes with one read and one write: quantize-dequantize, straight-through clip, interval projection; row sums.
#include "device.cuh"
#include "../tuning.h"

namespace askew {
namespace cuda {
namespace {

constexpr int kResident = 3;  // blocks of an SM, at least: at most 80 registers

struct Pass : QuantizeArg {
  Cut cut;
};

template <int T, class Grid>
__global__ void __launch_bounds__(kThreads, kResident) quantize_kernel(const __grid_constant__ Pass p) {
  const Grid grid = GridMaker<Grid>::make(p.grid);
  for_slots<T, 4>({p.x}, p.scale, p.cut, blockIdx.x,
                  [&](const Words* in, float scale, const Spot& s, const Walk<T>& walk) {
                    const auto row = make_row(scale, grid);
                    float y[Walk<T>::kWidth];
                    ASKEW_EACH (j, Walk<T>::kWidth) y[j] = quantize_dequantize(element<T>(*in, j), row);
                    store_as(p.y_type, p.y, y, s, walk);
                  });
}

template <int T, class Grid>
__global__ void __launch_bounds__(kThreads, kResident) stochastic_kernel(const __grid_constant__ Pass p) {
  const Grid grid = GridMaker<Grid>::make(p.grid);
  for_slots<T, 2>(
      {p.x}, p.scale, p.cut, blockIdx.x, [&](const Words* in, float scale, const Spot& s, const Walk<T>& walk) {
        const auto row = make_row(scale, grid);
        float y[Walk<T>::kWidth];
        Philox4 random;
        ASKEW_EACH (j, Walk<T>::kWidth) {
          const uint64_t e = (uint64_t)(s.index + ((int64_t)j << walk.shift));
          uint32_t bits;
          if (walk.vectors) {  // e is a multiple of 4 where j is
            if (j % 4 == 0) random = philox(p.seed, e >> 2);
            bits = random.word[j % 4];
          } else {
            random = philox(p.seed, e >> 2);
            bits = e & 2 ? (e & 1 ? random.word[3] : random.word[2]) : (e & 1 ? random.word[1] : random.word[0]);
          }
          y[j] = row.scale.value * stochastic_level(element<T>(*in, j), uniform01(bits), row);
        }
        store_as(p.y_type, p.y, y, s, walk);
      });
}

template <int T, class Grid>
__global__ void __launch_bounds__(kThreads, kResident) ste_clip_kernel(const __grid_constant__ Pass p) {
  const Grid grid = GridMaker<Grid>::make(p.grid);
  for_slots<T, 2>(
      {p.g, p.x}, p.scale, p.cut, blockIdx.x, [&](const Words* in, float scale, const Spot& s, const Walk<T>& walk) {
        const auto row = with_stored_ends<T>(make_row(scale, grid));
        store(p.y, map_words<T>(in[0], in[1], [&](float g, float x) { return pass_inside(g, x, row); }), s, walk);
      });
}

template <int T, class Grid>
__global__ void __launch_bounds__(kThreads, kResident) project_interval_kernel(const __grid_constant__ Pass p) {
  const Grid grid = GridMaker<Grid>::make(p.grid);
  const float radius = feasible_radius((float)read(p.eps));
  for_slots<T, 4>(
      {p.y}, p.scale, p.cut, blockIdx.x, [&](const Words* w, float scale, const Spot& s, const Walk<T>& walk) {
        const auto row = make_row(scale, grid);
        store(p.y, map_words<T>(*w, *w, [&](float v, float) { return project_interval(v, row, radius); }), s, walk);
      });
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

template <int T, class Grid>
cudaError_t launch_pass(const Pass& p, cudaStream_t stream) {
  void (*const kernels[])(Pass) = {quantize_kernel<T, Grid>, stochastic_kernel<T, Grid>, ste_clip_kernel<T, Grid>,
                                   project_interval_kernel<T, Grid>};  // as QuantizePass counts them
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
  Finisher finisher;
  finisher.stream = stream;
  if (p.cut.pieces > 1) finisher.add((const double*)scratch, sums, a.m.rows, p.cut.pieces, kRowSums);
  finisher.run();
  return error != cudaSuccess ? error : finisher.error;
}

}  // namespace cuda
}  // namespace askew
