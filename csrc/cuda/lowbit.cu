// Products of levels of a byte: inputs become levels row by row (one read, one write of a byte), and sums of products
// become outputs.
//
// A row of inputs is a warp's where it is short, else a block's. Its first kKept vectors of each thread stay in
// registers between the two looks at the row, for the largest magnitude and for the levels; what is longer is read
// again, from the cache. PREDICTED, H200: bfloat16 moves 3 bytes a value, 45 instructions' time at 4.3 TB/s.
#include "device.cuh"

namespace askew {
namespace cuda {
namespace {

constexpr int kKept = 4;            // vectors of 16 bytes
constexpr int kWarpColumns = 1024;  // up to which a warp takes a row
// Neighbours in a row that a thread takes.
__host__ __device__ constexpr int sums_of_thread(int type) { return type == kInt8 || type == kFloat8 ? 8 : 4; }

struct TokenPass : TokenArg {
  int team_shift;  // of a warp or of the block
  bool vectors;    // 16-byte access is possible
};

template <int T>
__device__ __forceinline__ Words load_row(const TokenPass& p, int64_t base, int64_t col) {
  typedef typename Storage<T>::type S;
  constexpr int kPer = Storage<T>::kPerWord;
  const S* at = (const S*)p.x + base + col;
  Words w{{0, 0, 0, 0}};
  if (p.vectors) {
    if (col < p.m.cols) {
      const uint4 v = *(const uint4*)at;
      w = {{v.x, v.y, v.z, v.w}};
    }
    return w;
  }
  ASKEW_EACH (j, Storage<T>::kPerVector)
    if (col + j < p.m.cols) {
      if (T == kFloat32)
        w.word[j / kPer] = ((const uint32_t*)at)[j];
      else
        w.word[j / kPer] |= (uint32_t)((const uint16_t*)at)[j] << (16 * (j & 1));
    }
  return w;
}

// The largest of the team's numbers, for all of it; NaN where one is. The same for every thread of a block's team.
__device__ __forceinline__ float team_max(float v, int team_shift) {
  __shared__ float parts[kThreads >> kWarpShift];
  for (int o = 1 << kWarpShift >> 1; o; o >>= 1) v = max_nan(v, __shfl_xor_sync(kWholeWarp, v, o));
  if (team_shift == kWarpShift) return v;
  if (threadIdx.x % 32 == 0) parts[threadIdx.x >> kWarpShift] = v;
  __syncthreads();
  v = parts[0];
#pragma unroll
  for (int k = 1; k < kThreads >> kWarpShift; ++k) v = max_nan(v, parts[k]);
  return v;
}

template <class Grid>
__device__ __forceinline__ float level_of_input(float x, const Row<float, Grid>& row, float) {
  return nearest_level(x, row);
}
__device__ __forceinline__ float level_of_input(float x, const Row<float, FloatGrid>& row, float top) {
  return clamp_between(divide(x, row.scale), -top, top);
}

// e4m3 as float32: its bits in the place of float32's, where they count 2^120 less.
__device__ __forceinline__ float widen_e4m3(uint32_t code) {
  const float v = __uint_as_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f;
  return (code & 0x7fu) == 0x7fu ? __int_as_float(0x7fc00000) : v;
}

// Levels of one vector, 4 or 8 bytes.
template <int T, class Grid>
__device__ __forceinline__ void store_levels(const TokenPass& p, const Words& w, const Row<float, Grid>& row,
                                             int64_t base, int64_t col) {
  constexpr int kWidth = Storage<T>::kPerVector;
  uint32_t word[kWidth / 4];
  ASKEW_EACH (q, kWidth / 4) {
    float level[4];
    ASKEW_EACH (e, 4) level[e] = level_of_input(element<T>(w, 4 * q + e), row, p.top);
    word[q] = p.levels_type == kInt8 ? Storage<kInt8>::put(level) : Storage<kFloat8>::put(level);
  }
  uint8_t* at = (uint8_t*)p.q + base + col;
  if (p.vectors) {
    if (col >= p.m.cols) return;
    if (kWidth == 4)
      *(uint32_t*)at = word[0];
    else
      *(uint2*)at = make_uint2(word[0], word[kWidth / 4 - 1]);
    return;
  }
  ASKEW_EACH (j, kWidth)
    if (col + j < p.m.cols) at[j] = (uint8_t)(word[j / 4] >> (8 * (j % 4)));
}

template <int T, class Grid>
__global__ void __launch_bounds__(kThreads, 4) token_levels_kernel(const __grid_constant__ TokenPass p) {
  constexpr int kWidth = Storage<T>::kPerVector;
  const Grid grid = GridMaker<Grid>::make(p.grid);
  const int lane = threadIdx.x & ((1 << p.team_shift) - 1);
  const int64_t row = ((int64_t)blockIdx.x << (kBlockShift - p.team_shift)) + (threadIdx.x >> p.team_shift);
  const int64_t base = row * p.m.cols, step = (int64_t)kWidth << p.team_shift;
  const bool exists = row < p.m.rows;
  Words kept[kKept];
  float most = 0.f;
  if (exists) {
    ASKEW_EACH (v, kKept) kept[v] = load_row<T>(p, base, lane * kWidth + v * step);
    ASKEW_EACH (v, kKept)
      ASKEW_EACH (j, kWidth) most = max_nan(most, fabsf(element<T>(kept[v], j)));
    for (int64_t col = lane * kWidth + kKept * step; col < p.m.cols; col += step) {
      const Words w = load_row<T>(p, base, col);
      ASKEW_EACH (j, kWidth) most = max_nan(most, fabsf(element<T>(w, j)));
    }
  }
  most = team_max(most, p.team_shift);
  if (!exists) return;
  const float finite = most < __int_as_float(0x7f800000) ? most : __int_as_float(0x7fc00000);
  float scale = divide(finite, p.top);
  if (scale == 0.f) scale = 1.f;
  if (lane == 0) p.scale[row] = scale;
  const auto levels = make_row(scale, grid);
  ASKEW_EACH (v, kKept) store_levels<T>(p, kept[v], levels, base, lane * kWidth + v * step);
  for (int64_t col = lane * kWidth + kKept * step; col < p.m.cols; col += step)
    store_levels<T>(p, load_row<T>(p, base, col), levels, base, col);
}

template <int S>
__device__ __forceinline__ float sum_at(const void* sums, int64_t i) {
  if (S == kInt32) return (float)((const int32_t*)sums)[i];
  if (S == kInt8) return (float)((const int8_t*)sums)[i];
  if (S == kFloat8) return widen_e4m3(((const uint8_t*)sums)[i]);
  return ((const float*)sums)[i];
}

__device__ __forceinline__ float widened(int type, const void* p, int64_t i) {
  if (type == kFloat32) return ((const float*)p)[i];
  const uint32_t half = ((const uint16_t*)p)[i];
  return type == kBFloat16 ? Storage<kBFloat16>::get(half, 0) : Storage<kFloat16>::get(half, 0);
}

struct SumsPass : SumsArg {
  bool vectors;  // the sums of a thread are aligned, and all there
};

template <int S>
__global__ void __launch_bounds__(kThreads) scaled_sums_kernel(const __grid_constant__ SumsPass p) {
  constexpr int kEach = sums_of_thread(S);
  const int64_t across = (p.m.cols + kEach - 1) / kEach, all = across * p.m.rows;
  const int64_t at = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (at >= all) return;
  const int64_t row = all <= 0x7fffffff ? (uint32_t)at / (uint32_t)across : at / across;
  const int64_t col = (at - row * across) * kEach, i = row * p.m.cols + col;
  const float token = p.token_scale[row];
  float y[kEach], scale[kEach];
  if (p.vectors) {
    if (S == kInt8 || S == kFloat8) {
      const uint2 v = *(const uint2*)((const uint8_t*)p.sums + i);
      ASKEW_EACH (j, kEach) {
        const uint32_t code = (j < 4 ? v.x : v.y) >> (8 * (j % 4)) & 0xffu;
        y[j] = S == kInt8 ? (float)(int8_t)code : widen_e4m3(code);
      }
    } else {
      const uint4 v = *(const uint4*)((const uint32_t*)p.sums + i);
      const uint32_t word[4] = {v.x, v.y, v.z, v.w};
      ASKEW_EACH (j, 4) y[j] = S == kInt32 ? (float)(int32_t)word[j] : __uint_as_float(word[j]);
    }
  } else {
    ASKEW_EACH (j, kEach) y[j] = col + j < p.m.cols ? sum_at<S>(p.sums, i + j) : 0.f;
  }
  if (p.each && p.vectors) {
#pragma unroll
    for (int j = 0; j < kEach; j += 4) {
      const uint4 v = *(const uint4*)(p.scale + col + j);
      const uint32_t word[4] = {v.x, v.y, v.z, v.w};
      ASKEW_EACH (k, 4) scale[j + k] = __uint_as_float(word[k]);
    }
  } else {
    ASKEW_EACH (j, kEach) scale[j] = p.scale[p.each && col + j < p.m.cols ? col + j : 0];
  }
  ASKEW_EACH (j, kEach) {
    y[j] = y[j] * token * scale[j];
    if (p.bias && col + j < p.m.cols) y[j] += widened(p.bias_type, p.bias, col + j);
  }
  if (p.vectors) {
#pragma unroll
    for (int j = 0; j < kEach; j += 4) {
      if (p.y_type == kFloat32)
        *(uint4*)((float*)p.y + i + j) = make_uint4(__float_as_uint(y[j]), __float_as_uint(y[j + 1]),
                                                    __float_as_uint(y[j + 2]), __float_as_uint(y[j + 3]));
      else if (p.y_type == kBFloat16)
        *(uint2*)((uint16_t*)p.y + i + j) = make_uint2(pack_bf16(y[j], y[j + 1]), pack_bf16(y[j + 2], y[j + 3]));
      else
        *(uint2*)((uint16_t*)p.y + i + j) = make_uint2(pack_f16(y[j], y[j + 1]), pack_f16(y[j + 2], y[j + 3]));
    }
    return;
  }
  ASKEW_EACH (j, kEach) {
    if (col + j >= p.m.cols) return;
    if (p.y_type == kFloat32)
      ((float*)p.y)[i + j] = y[j];
    else
      ((uint16_t*)p.y)[i + j] = (uint16_t)(p.y_type == kBFloat16 ? pack_bf16(y[j], 0.f) : pack_f16(y[j], 0.f));
  }
}

}  // namespace

cudaError_t token_levels(const TokenArg& a, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  if (a.m.rows == 0) return cudaSuccess;
  TokenPass p{};
  static_cast<TokenArg&>(p) = a;
  const int width = per_vector(a.type);
  p.vectors = a.m.cols % width == 0 && aligned(a.x, a.type, width) && (uintptr_t)a.q % width == 0;
  p.team_shift = a.m.cols <= kWarpColumns ? kWarpShift : kBlockShift;
  const int64_t blocks = ceil_div(a.m.rows, (int64_t)1 << (kBlockShift - p.team_shift));
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  ASKEW_BY_TYPE(
      a.type, if (a.grid.kind == kFloat) return launch((token_levels_kernel<T, FloatGrid>), (unsigned)blocks, kThreads,
                                                       stream, p);
      ASKEW_BY_GRID(a.grid.kind, return launch((token_levels_kernel<T, Grid>), (unsigned)blocks, kThreads, stream, p)))
  return cudaErrorInvalidValue;
}

cudaError_t scaled_sums(const SumsArg& a, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  if (a.m.rows == 0 || a.m.cols == 0) return cudaSuccess;
  SumsPass p{};
  static_cast<SumsArg&>(p) = a;
  const int each = sums_of_thread(a.sums_type);
  p.vectors = a.m.cols % each == 0 && (uintptr_t)a.sums % (each == 8 ? 8 : 16) == 0 && aligned(a.y, a.y_type, 4) &&
              (!a.each || (uintptr_t)a.scale % 16 == 0);
  const int64_t blocks = ceil_div(ceil_div(a.m.cols, each) * a.m.rows, kThreads);
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  switch (a.sums_type) {
    case kInt32:
      return launch(scaled_sums_kernel<kInt32>, (unsigned)blocks, kThreads, stream, p);
    case kInt8:
      return launch(scaled_sums_kernel<kInt8>, (unsigned)blocks, kThreads, stream, p);
    case kFloat8:
      return launch(scaled_sums_kernel<kFloat8>, (unsigned)blocks, kThreads, stream, p);
    default:
      return launch(scaled_sums_kernel<kFloat32>, (unsigned)blocks, kThreads, stream, p);
  }
}

}  // namespace cuda
}  // namespace askew
