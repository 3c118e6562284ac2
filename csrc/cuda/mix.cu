// The mixture of several quantizations of one tensor, y = sum_k p_k s_k Q_k(x / s_k), and its gradients: one read of x
// for all candidates.
//
// How many candidates there are and of which kind is known at run time; all threads take the same branch. The gradient
// leaves two sums of every candidate for each row, or piece of a long one; two small kernels put them together in a
// fixed order, so that the same call gives the same bits.
#include "device.cuh"

namespace askew {
namespace cuda {
namespace {

constexpr int kSums = 2;  // of a candidate: G Q, and what LSQ's gradient of the scale is made of

struct MixPass {
  MixArg mix;
  const void* g;
  void* out;
  float* partial;  // [rows or pieces of rows][candidates][kSums]
  Cut cut;
};

template <int T>
__global__ void __launch_bounds__(kThreads, 2) mix_kernel(const __grid_constant__ MixPass p) {
  const auto run = [&](const Words* x, float, const Spot& spot, const Walk<T>& walk) {
    if (spot.n == 0) return;
    float y[Walk<T>::kWidth] = {};
    for (int k = 0; k < p.mix.n; ++k) {
      const float strength = p.mix.strengths[k];
      const auto add = [&](const auto& row) {
        ASKEW_EACH (j, Walk<T>::kWidth) {
          const float part = strength * quantize_dequantize(element<T>(*x, j), row);
          y[j] = k == 0 ? part : y[j] + part;  // 0 + -0 would lose a sign
        }
      };
      ASKEW_BY_CANDIDATE(p.mix.grids[k].kind, add(candidate_row<float, Grid>(p.mix, k, spot.row)))
    }
    store_converted<T>(p.out, y, spot, walk);
  };
  for_slots<T, 2>({p.mix.x}, nullptr, p.cut, blockIdx.x, run);
}

// Puts together the sums of a row's team and writes them. Every thread of the block calls it; the row of a team may
// lie outside the matrix.
__device__ __forceinline__ void finish_mix(const float (&sums)[kMostCandidates][kSums], const MixPass& p, int64_t row) {
  __shared__ float across[kThreads / 32][kMostCandidates * kSums];
  const bool whole_block = p.cut.team_shift > kWarpShift;
  const int shift = whole_block ? kWarpShift : p.cut.team_shift, width = p.mix.n * kSums;
  const bool writes = (threadIdx.x & ((1 << shift) - 1)) == 0;
  float* to = p.partial + (p.cut.pieces > 1 ? (int64_t)blockIdx.x : row) * width;
  ASKEW_EACH (k, kMostCandidates) {
    if (k >= p.mix.n) break;
    ASKEW_EACH (j, kSums) {
      const float v = add_lanes(sums[k][j], shift);
      if (!writes) continue;
      if (whole_block)
        across[threadIdx.x >> 5][kSums * k + j] = v;
      else if (row < p.cut.rows)
        to[kSums * k + j] = v;
    }
  }
  if (!whole_block) return;
  __syncthreads();
  if ((int)threadIdx.x < width && row < p.cut.rows) {
    float v = 0;
    for (int w = 0; w < kThreads / 32; ++w) v += across[w][threadIdx.x];
    to[threadIdx.x] = v;
  }
  __syncthreads();
}

template <int T>
__global__ void __launch_bounds__(kThreads, 2) mix_gradient_kernel(const __grid_constant__ MixPass p) {
  constexpr int kWidth = Walk<T>::kWidth;
  Walk<T> walk(p.cut, blockIdx.x);
  float sums[kMostCandidates][kSums] = {};
  for (int taken = 0; taken < walk.count; ++taken) {
    const Spot spot = walk.take(taken);
    const Words x = load(p.mix.x, spot, walk), g = load(p.g, spot, walk);  // zeros where there is no element
    float gate[kWidth] = {};
    if (spot.n) {
      ASKEW_EACH (k, kMostCandidates) {
        if (k >= p.mix.n) break;
        const float strength = p.mix.strengths[k];
        const auto add = [&](const auto& row) {
          const auto stored = with_stored_ends<T>(row);
          ASKEW_EACH (j, kWidth) {
            const float v = element<T>(x, j), placed = in_hull(v, row), q = row.grid.nearest(placed);
            const bool outside = v < stored.low || v > stored.high;
            gate[j] += p.mix.clip && outside ? 0.f : strength;
            sums[k][0] += element<T>(g, j) * q;
            sums[k][1] += element<T>(g, j) * (outside ? q : q - placed);
          }
        };
        ASKEW_BY_CANDIDATE(p.mix.grids[k].kind, add(candidate_row<float, Grid>(p.mix, k, spot.row)))
      }
      float out[kWidth];
      ASKEW_EACH (j, kWidth) out[j] = element<T>(g, j) * gate[j];
      store_converted<T>(p.out, out, spot, walk);
    }
    if (spot.ends_row) {
      finish_mix(sums, p, spot.row);
      ASKEW_EACH (k, kMostCandidates) sums[k][0] = sums[k][1] = 0;
    }
  }
}

struct MixFinish {
  MixArg mix;
  const float* partial;
  int pieces, chunks;  // chunks: blocks of kThreads rows for each candidate
  float* to_scales;
  double* of_chunk;  // [candidates][chunks]: what the strengths' gradients are the sums of
};

// A thread takes a row: the gradient of its scale, and its part of the strength's.
__global__ void __launch_bounds__(kThreads) mix_rows_kernel(const __grid_constant__ MixFinish p) {
  const MixArg& m = p.mix;
  const int k = blockIdx.x / p.chunks;
  const int64_t row = (int64_t)(blockIdx.x % p.chunks) * kThreads + threadIdx.x;
  double part = 0;
  if (row < m.rows) {
    const bool is_float = m.grids[k].kind == kFloat;
    double sum[kSums] = {};
    for (int piece = 0; piece < p.pieces; ++piece)
      for (int j = 0; j < kSums; ++j) sum[j] += p.partial[((row * p.pieces + piece) * m.n + k) * kSums + j];
    part = (is_float ? 1.0 : (double)m.scales[k * m.rows + row]) * sum[0];
    p.to_scales[k * m.rows + row] = m.learned && !is_float ? (float)(m.strengths[k] * m.lsq[k] * sum[1]) : 0.f;
  }
  part = over_block(part);
  if (threadIdx.x == 0) p.of_chunk[blockIdx.x] = part;
}

Cut mix_cut(const MixArg& m, const void* g, const void* out) {
  return cut_for({m.rows, m.cols}, m.type, {m.x, g, out});
}

int mix_chunks(const MixArg& m) { return (int)ceil_div(m.rows, kThreads); }

}  // namespace

cudaError_t mix(const MixArg& m, void* y, cudaStream_t stream) {
  MixPass p{};
  p.mix = m;
  p.out = y;
  p.cut = mix_cut(m, y, y);
  const unsigned blocks = (unsigned)blocks_of(p.cut);
  ASKEW_BY_TYPE(m.type, return launch((mix_kernel<T>), blocks, kThreads, stream, p))
  return cudaErrorInvalidValue;
}

size_t mix_gradient_scratch(const MixArg& m, const void* g, const void* out) {
  return (size_t)m.n * mix_chunks(m) * sizeof(double) +
         (size_t)m.rows * mix_cut(m, g, out).pieces * m.n * kSums * sizeof(float);
}

cudaError_t mix_gradient(const MixArg& m, const void* g, void* out, float* to_strengths, float* to_scales,
                         void* scratch, cudaStream_t stream) {
  if (m.rows == 0 || m.cols == 0) {
    return first_error(cudaMemsetAsync(to_scales, 0, (size_t)(m.n * m.rows) * sizeof(float), stream),
                       cudaMemsetAsync(to_strengths, 0, (size_t)m.n * sizeof(float), stream));
  }
  MixFinish f{};
  f.mix = m;
  f.chunks = mix_chunks(m);
  f.of_chunk = (double*)scratch;
  f.to_scales = to_scales;
  MixPass p{};
  p.mix = m;
  p.g = g;
  p.out = out;
  p.cut = mix_cut(m, g, out);
  p.partial = (float*)(f.of_chunk + (size_t)m.n * f.chunks);
  f.partial = p.partial;
  f.pieces = p.cut.pieces;
  const unsigned blocks = (unsigned)blocks_of(p.cut);
  cudaError_t error = cudaErrorInvalidValue;
  ASKEW_BY_TYPE(m.type, error = launch((mix_gradient_kernel<T>), blocks, kThreads, stream, p))
  if (error == cudaSuccess) error = launch(mix_rows_kernel, (unsigned)(m.n * f.chunks), kThreads, stream, f);
  Finisher finisher{stream};
  finisher.add(f.of_chunk, to_strengths, m.n, f.chunks, 1);
  return first_error(error, finisher.run());
}

}  // namespace cuda
}  // namespace askew
