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

// Calls run(row) for the quantization of candidate k with the scale of a row; not for the one that quantizes nothing.
template <class Run>
__device__ __forceinline__ void quantized(const MixArg& m, int k, int64_t row, const Run& run) {
  const float scale = m.scales[k * m.rows + row];
  if (m.grids[k].kind == kBinary)
    run(make_row(scale, BinaryGrid::make(m.grids[k])));
  else
    run(make_row(scale, UniformGrid::make(m.grids[k])));
}

template <int T>
__global__ void __launch_bounds__(kThreads, 2) mix_kernel(const __grid_constant__ MixPass p) {
  constexpr int kAhead = 2, kWidth = Walk<T>::kWidth;
  Walk<T> walk(p.cut, blockIdx.x);
  for (int taken = 0; taken < walk.count; taken += kAhead) {
    Spot spot[kAhead];
    Words x[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      spot[u] = walk.take(taken + u);
      x[u] = load(p.mix.x, spot[u], walk);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (spot[u].n == 0) continue;
      float y[kWidth] = {};
      for (int k = 0; k < p.mix.n; ++k) {
        const float strength = p.mix.strengths[k];
        const bool first = k == 0;  // 0 + -0 would lose a sign
        if (p.mix.grids[k].kind == kFloat) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            const float part = strength * element<T>(x[u], j);
            y[j] = first ? part : y[j] + part;
          }
        } else {
          quantized(p.mix, k, spot[u].row, [&](const auto& row) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
              const float part = strength * quantize_dequantize(element<T>(x[u], j), row);
              y[j] = first ? part : y[j] + part;
            }
          });
        }
      }
      store_converted<T>(p.out, y, spot[u], walk);
    }
  }
}

// Puts together the sums of a row's team and writes them. Every thread of the block calls it; the row of a team may
// lie outside the matrix.
__device__ __forceinline__ void finish_mix(const float (&sums)[kMostCandidates][kSums], const MixPass& p, int64_t row) {
  __shared__ float across[kThreads / 32][kMostCandidates * kSums];
  const bool whole_block = p.cut.team_shift > kWarpShift;
  const int shift = whole_block ? kWarpShift : p.cut.team_shift, width = p.mix.n * kSums;
  const bool writes = (threadIdx.x & ((1 << shift) - 1)) == 0;
  float* to = p.partial + (p.cut.pieces > 1 ? (int64_t)blockIdx.x : row) * width;
#pragma unroll
  for (int k = 0; k < kMostCandidates; ++k) {
    if (k >= p.mix.n) break;
#pragma unroll
    for (int j = 0; j < kSums; ++j) {
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
#pragma unroll
      for (int k = 0; k < kMostCandidates; ++k) {
        if (k >= p.mix.n) break;
        const float strength = p.mix.strengths[k];
        if (p.mix.grids[k].kind == kFloat) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            gate[j] += strength;
            sums[k][0] += element<T>(g, j) * element<T>(x, j);
          }
        } else {
          quantized(p.mix, k, spot.row, [&](const auto& row) {
            const auto stored = with_stored_ends<T>(row);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
              const float v = element<T>(x, j), placed = in_hull(v, row), q = row.grid.nearest(placed);
              const bool outside = v < stored.low || v > stored.high;
              gate[j] += p.mix.clip && outside ? 0.f : strength;
              sums[k][0] += element<T>(g, j) * q;
              sums[k][1] += element<T>(g, j) * (outside ? q : q - placed);
            }
          });
        }
      }
      float out[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) out[j] = element<T>(g, j) * gate[j];
      store_converted<T>(p.out, out, spot, walk);
    }
    if (spot.ends_row) {
      finish_mix(sums, p, spot.row);
#pragma unroll
      for (int k = 0; k < kMostCandidates; ++k) sums[k][0] = sums[k][1] = 0;
    }
  }
}

struct MixFinish {
  MixArg mix;
  const float* partial;
  int pieces, chunks;  // chunks: blocks of kThreads rows for each candidate
  float *to_strengths, *to_scales;
  double* of_chunk;  // [candidates][chunks]
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

__global__ void __launch_bounds__(kThreads) mix_strengths_kernel(const __grid_constant__ MixFinish p) {
  const int k = blockIdx.x;
  double part = 0;
  for (int i = threadIdx.x; i < p.chunks; i += kThreads) part += p.of_chunk[(int64_t)k * p.chunks + i];
  part = over_block(part);
  if (threadIdx.x == 0) p.to_strengths[k] = (float)part;
}

Cut mix_cut(const MixArg& m, const void* other, const void* third) {
  const int width = per_vector(m.type);
  const bool vectors = aligned(m.x, m.type, width) && aligned(other, m.type, width) && aligned(third, m.type, width);
  return make_cut({m.rows, m.cols}, width, vectors && m.cols % width == 0);
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
    const cudaError_t error = cudaMemsetAsync(to_scales, 0, (size_t)(m.n * m.rows) * sizeof(float), stream);
    return error != cudaSuccess ? error : cudaMemsetAsync(to_strengths, 0, (size_t)m.n * sizeof(float), stream);
  }
  MixFinish f{};
  f.mix = m;
  f.chunks = mix_chunks(m);
  f.of_chunk = (double*)scratch;
  f.to_strengths = to_strengths;
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
  return error != cudaSuccess ? error : launch(mix_strengths_kernel, (unsigned)m.n, kThreads, stream, f);
}

}  // namespace cuda
}  // namespace askew
