// Scales of a list of tensors from the sums of their rows, in one launch; scales of the least squared error.
#include "device.cuh"

namespace askew {
namespace cuda {
namespace {

constexpr int64_t kMostInGrid = 0x7fffffff;  // blocks

// ---- from sums: a tensor of up to kWholeRows rows is one block's, a larger one that of several
// ------------------------

constexpr int kScaleThreads = 512;
constexpr int64_t kWholeRows = 4096, kPartRows = 1024;
// Of a launch. Its parameters are copied whole, so short lists have a kernel of their own.
constexpr int kScaleTensors = 544, kFewTensors = 64;

// Blocks of a tensor that are done, and above them the rows that they marked.
typedef unsigned long long Ticket;
constexpr int kTicketShift = 32;

struct ScaleEntry {  // a ScaleTensor
  const float* sums;
  float* scale;
  double cols, c_max, first, second;
  uint32_t rows;
  int16_t rule, type;
};

template <int N>
struct ScaleList {
  Ticket* tickets;  // one for each tensor; 0 before the launch where a tensor has several blocks
  int n;
  uint32_t first_block[N];
  ScaleEntry entry[N];
};
static_assert(sizeof(ScaleList<kScaleTensors>) <= 32764, "a kernel takes at most 32,764 bytes of parameters");

inline __host__ __device__ int64_t blocks_of_rows(int64_t rows) {
  return rows <= kWholeRows ? rows > 0 : (rows + kPartRows - 1) / kPartRows;
}

template <int RULE>
__device__ __forceinline__ float scale_of_row(const ScaleTensor& t, int64_t row) {
  const float* sums = t.sums + row * kRowSums;
  const double peak = (double)sums[kMaxAbs];
  if (RULE == kGiven) {
    const float top = guarded(peak / t.c_max, peak);
    return top > 0.f ? t.scale[row] : top;
  }
  const float s = guarded(rule_scale<RULE>((double)sums[kSumAbs], (double)sums[kSumSquares], peak, t), peak);
  return s > 0.f ? round_scale(s, t.type) : s;
}

// Writes a block's rows; how many of this thread's are marked.
template <int RULE>
__device__ __forceinline__ uint32_t write_rows(const ScaleTensor& t, int64_t begin, int64_t end) {
  uint32_t marked = 0;
  for (int64_t row = begin + threadIdx.x; row < end; row += kScaleThreads) {
    const float s = scale_of_row<RULE>(t, row);
    t.scale[row] = s;
    marked += s > 0.f ? 0 : 1;
  }
  return marked;
}

// run(row, scale) for all rows of a tensor, which other blocks may have written, with many loads under way at once.
template <class Run>
__device__ __forceinline__ void for_scales(const float* scale, int64_t rows, const Run& run) {
  constexpr int kAhead = 16;
  for (int64_t row = threadIdx.x; row < rows; row += kAhead * kScaleThreads) {
    float s[kAhead];
    ASKEW_EACH (u, kAhead)
      if (row + u * kScaleThreads < rows) s[u] = __ldcg(scale + row + u * kScaleThreads);
    ASKEW_EACH (u, kAhead)
      if (row + u * kScaleThreads < rows) run(row + u * kScaleThreads, s[u]);
  }
}

// The k-th smallest, from 0 on, of the scales that are not marked: digit by digit, since bits of positive floats are
// ordered as they are. Every thread of the block calls it.
__device__ float smallest(const float* scale, int64_t rows, uint32_t k) {
  constexpr int kDigit = 8, kBins = 1 << kDigit;
  static_assert(kBins <= kScaleThreads, "a thread for each bin");
  __shared__ uint32_t count[kBins], found[2];
  const int bin = threadIdx.x;
  uint32_t prefix = 0;
  for (int shift = 32 - kDigit; shift >= 0; shift -= kDigit) {
    if (bin < kBins) count[bin] = 0;
    __syncthreads();
    for_scales(scale, rows, [&](int64_t, float s) {
      const uint32_t bits = __float_as_uint(s) >> shift;
      if (s > 0.f && bits >> kDigit == prefix) atomicAdd(&count[bits & (kBins - 1)], 1u);
    });
    __syncthreads();
    for (int o = 1; o < kBins; o <<= 1) {  // how many are in a bin or below it
      const uint32_t below = bin < kBins && bin >= o ? count[bin - o] : 0;
      __syncthreads();
      if (bin < kBins) count[bin] += below;
      __syncthreads();
    }
    if (bin < kBins) {
      const uint32_t below = bin ? count[bin - 1] : 0;
      if (below <= k && k < count[bin]) {
        found[0] = bin;
        found[1] = below;
      }
    }
    __syncthreads();
    prefix = prefix << kDigit | found[0];
    k -= found[1];
    __syncthreads();
  }
  return __uint_as_float(prefix);
}

template <int N>
__global__ void __launch_bounds__(kScaleThreads) scales_kernel(const __grid_constant__ ScaleList<N> list) {
  __shared__ uint32_t marked_here;
  __shared__ int64_t marked_rows;  // of the tensor; -1 where its last block is another
  const int number = tensor_of_block(list);
  const ScaleEntry& e = list.entry[number];
  const ScaleTensor t{e.sums, e.scale, e.rows, e.cols, e.c_max, e.first, e.second, e.rule, e.type};
  const bool whole = t.rows <= kWholeRows;
  const int64_t begin = whole ? 0 : (int64_t)(blockIdx.x - list.first_block[number]) * kPartRows;
  const int64_t end = whole || t.rows < begin + kPartRows ? t.rows : begin + kPartRows;
  if (threadIdx.x == 0) marked_here = 0;
  __syncthreads();
  uint32_t marked = 0;
  switch (t.rule) {
    case kSawb:
      marked = write_rows<kSawb>(t, begin, end);
      break;
    case kMean:
      marked = write_rows<kMean>(t, begin, end);
      break;
    case kRms:
      marked = write_rows<kRms>(t, begin, end);
      break;
    case kGiven:
      marked = write_rows<kGiven>(t, begin, end);
      break;
    default:
      marked = write_rows<kAbsmax>(t, begin, end);
  }
  if (marked) atomicAdd(&marked_here, marked);
  if (!whole) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    marked_rows = marked_here;
    if (!whole) {
      const Ticket before = atomicAdd(list.tickets + number, (Ticket)marked_here << kTicketShift | 1);
      const bool last = (uint32_t)before + 1 == (uint32_t)blocks_of_rows(t.rows);
      marked_rows = last ? (int64_t)(before >> kTicketShift) + marked_here : -1;
      __threadfence();
    }
  }
  __syncthreads();
  if (marked_rows <= 0) return;
  const int64_t known = t.rows - marked_rows;
  const float median = known ? smallest(t.scale, t.rows, (uint32_t)((known - 1) / 2)) : 1.f;
  for_scales(t.scale, t.rows, [&](int64_t row, float s) {
    if (!(s > 0.f)) t.scale[row] = s == 0.f ? median : 1.f;
  });
}

template <int N>
cudaError_t launch_scales(const ScaleList<kScaleTensors>& all, uint32_t blocks, cudaStream_t stream) {
  ScaleList<N> list;
  list.tickets = all.tickets;
  list.n = all.n;
  for (int i = 0; i < all.n; ++i) {
    list.first_block[i] = all.first_block[i];
    list.entry[i] = all.entry[i];
  }
  return launch(scales_kernel<N>, blocks, kScaleThreads, stream, list);
}

// ---- E4M3: once all scales of a tensor are there, they are rounded in units of its own
// ------------------------------------

constexpr int64_t kUnitRows = 4096;  // of a block
constexpr int kUnitTensors = 64;     // of a launch

struct UnitEntry {
  float* scale;
  uint32_t rows;
};
struct UnitList {
  float* tops;  // the largest scale of each block's rows
  int n;
  uint32_t first_block[kUnitTensors];
  UnitEntry entry[kUnitTensors];
};

// The largest of what the block's threads have. Every thread calls it.
__device__ __forceinline__ float largest_of_block(float own) {
  __shared__ float of_thread[kScaleThreads];
  of_thread[threadIdx.x] = own;
  __syncthreads();
  for (int width = kScaleThreads / 2; width; width /= 2) {
    const int other = threadIdx.x + width;
    if (threadIdx.x < width && of_thread[other] > of_thread[threadIdx.x]) of_thread[threadIdx.x] = of_thread[other];
    __syncthreads();
  }
  return of_thread[0];
}

__global__ void __launch_bounds__(kScaleThreads) tops_kernel(const __grid_constant__ UnitList list) {
  const int number = tensor_of_block(list);
  const UnitEntry& e = list.entry[number];
  const int64_t begin = (int64_t)(blockIdx.x - list.first_block[number]) * kUnitRows;
  const int64_t end = e.rows < begin + kUnitRows ? e.rows : begin + kUnitRows;
  float top = 0.f;
  for (int64_t row = begin + threadIdx.x; row < end; row += kScaleThreads)
    top = e.scale[row] > top ? e.scale[row] : top;
  top = largest_of_block(top);
  if (threadIdx.x == 0) list.tops[blockIdx.x] = top;
}

__global__ void __launch_bounds__(kScaleThreads) units_kernel(const __grid_constant__ UnitList list) {
  const int number = tensor_of_block(list);
  const UnitEntry& e = list.entry[number];
  const float* tops = list.tops + list.first_block[number];
  const int blocks = (int)((e.rows + kUnitRows - 1) / kUnitRows);
  float top = 0.f;
  for (int i = threadIdx.x; i < blocks; i += kScaleThreads) top = tops[i] > top ? tops[i] : top;
  const float unit = scale_unit(largest_of_block(top));
  const int64_t begin = (int64_t)(blockIdx.x - list.first_block[number]) * kUnitRows;
  const int64_t end = e.rows < begin + kUnitRows ? e.rows : begin + kUnitRows;
  for (int64_t row = begin + threadIdx.x; row < end; row += kScaleThreads)
    e.scale[row] = round_to_units(e.scale[row], unit);
}

inline int64_t unit_blocks(const ScaleTensor& t) { return t.type == kScaleE4M3 ? ceil_div(t.rows, kUnitRows) : 0; }

cudaError_t round_in_units(const ScaleTensor* tensors, size_t n, float* tops, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  UnitList list;
  list.tops = tops;
  list.n = 0;
  uint32_t blocks = 0;
  const auto flush = [&] {
    if (!list.n) return;
    error = first_error(error, launch(tops_kernel, blocks, kScaleThreads, stream, list));
    error = first_error(error, launch(units_kernel, blocks, kScaleThreads, stream, list));
    list.n = 0;
    blocks = 0;
  };
  for (size_t i = 0; i < n; ++i) {
    const int64_t own = unit_blocks(tensors[i]);
    if (own == 0) continue;
    if (list.n == kUnitTensors || blocks + own > kMostInGrid) flush();
    list.first_block[list.n] = blocks;
    list.entry[list.n++] = {tensors[i].scale, (uint32_t)tensors[i].rows};
    blocks += (uint32_t)own;
  }
  flush();
  return error;
}

// ---- least squared error: a block takes one row, or one piece of a long row, and all candidates
// ------------------------

// kErrorLanes neighbouring threads share a candidate, and have kAtOnce of them.
constexpr int kAtOnce = 5, kErrorThreads = kScaleCandidates / kAtOnce * kErrorLanes;
static_assert(kErrorThreads % 32 == 0 && kScaleCandidates % kAtOnce == 0, "whole warps, no idle candidate");
constexpr int kErrorColumns = 4096;  // in shared memory at a time
static_assert(kErrorColumns % kErrorLanes == 0 && kSumPiece % kErrorColumns == 0, "lanes keep their places");

// The first of the candidates with the least error, counted from 1, for the first warp; the last where none is finite.
__device__ __forceinline__ int best_candidate(const double* errors) {
  double least = __builtin_inf();
  int best = kScaleCandidates;
  for (int j = threadIdx.x; j < kScaleCandidates; j += 32)
    if (errors[j] < least) {
      least = errors[j];
      best = j + 1;
    }
  for (int o = 16; o; o >>= 1) {
    const double other = __shfl_xor_sync(kWholeWarp, least, o);
    const int candidate = __shfl_xor_sync(kWholeWarp, best, o);
    if (other < least || (other == least && candidate < best)) {
      least = other;
      best = candidate;
    }
  }
  return best;
}

template <int T>
__device__ __forceinline__ float value_at(const void* from, int64_t i) {
  if (T == kFloat32) return ((const float*)from)[i];
  return Storage<T>::get(((const uint16_t*)from)[i], 0);
}

struct ErrorPass : MseArg {
  int64_t pieces;   // of a row
  double* partial;  // [rows][pieces][kScaleCandidates] where there are several
  float* scale;
};

template <int T, class Grid>
__global__ void __launch_bounds__(kErrorThreads) errors_kernel(const __grid_constant__ ErrorPass a) {
  __shared__ float x[kErrorColumns];
  __shared__ double errors[kScaleCandidates];
  const Grid grid = GridMaker<Grid>::make(a.grid);
  const int64_t row = blockIdx.x / (uint32_t)a.pieces, piece = blockIdx.x % (uint32_t)a.pieces;
  const int64_t first = piece * kSumPiece, last = a.m.cols < first + kSumPiece ? a.m.cols : first + kSumPiece;
  const int lane = threadIdx.x % kErrorLanes, group = threadIdx.x / kErrorLanes;
  const double peak = (double)a.sums[row * kRowSums + kMaxAbs];
  constexpr int kGroups = kErrorThreads / kErrorLanes;
  Row<float, Grid> rows[kAtOnce];
  double sum[kAtOnce];
  ASKEW_EACH (k, kAtOnce) {
    rows[k] = make_row(candidate_scale(1 + group + k * kGroups, peak, a), grid);
    sum[k] = 0;
  }
  for (int64_t c = first; c < last; c += kErrorColumns) {
    const int n = (int)(last - c < kErrorColumns ? last - c : kErrorColumns);
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kErrorThreads) x[i] = value_at<T>(a.w, row * a.m.cols + c + i);
    __syncthreads();
    for (int i = lane; i < n; i += kErrorLanes) {
      const float w = x[i];
      ASKEW_EACH (k, kAtOnce) {
        const double difference = (double)(w - quantize_dequantize(w, rows[k]));
        sum[k] =
            __fma_rn(difference, difference, sum[k]);  // the square of a float is exact: no other bits than unfused
      }
    }
  }
  ASKEW_EACH (k, kAtOnce) {
    for (int o = kErrorLanes / 2; o; o >>= 1) sum[k] += __shfl_xor_sync(kWholeWarp, sum[k], o);
    if (lane == 0) errors[group + k * kGroups] = sum[k];
  }
  __syncthreads();
  if (a.pieces > 1) {
    for (int j = threadIdx.x; j < kScaleCandidates; j += kErrorThreads)
      a.partial[(int64_t)blockIdx.x * kScaleCandidates + j] = errors[j];
    return;
  }
  if (threadIdx.x >= 32) return;
  const int best = best_candidate(errors);
  if (threadIdx.x == 0) a.scale[row] = candidate_scale(best, peak, a);
}

// Puts the pieces of long rows together, in their order; one block a row.
__global__ void __launch_bounds__(kErrorThreads) choose_kernel(const __grid_constant__ ErrorPass a) {
  __shared__ double errors[kScaleCandidates];
  const int64_t row = blockIdx.x;
  for (int j = threadIdx.x; j < kScaleCandidates; j += kErrorThreads) {
    const double* from = a.partial + row * a.pieces * kScaleCandidates + j;
    double error = 0;
    for (int64_t p = 0; p < a.pieces; ++p) error += from[p * kScaleCandidates];
    errors[j] = error;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int best = best_candidate(errors);
  if (threadIdx.x == 0) a.scale[row] = candidate_scale(best, (double)a.sums[row * kRowSums + kMaxAbs], a);
}

// The unit of a tensor from all of its rows; one block.
__global__ void __launch_bounds__(kScaleThreads) mse_unit_kernel(const __grid_constant__ MseArg a, float* unit) {
  float top = 0.f;
  for (int64_t row = threadIdx.x; row < a.m.rows; row += kScaleThreads) {
    const float own = largest_scale(row, a);
    top = own > top ? own : top;
  }
  top = largest_of_block(top);
  if (threadIdx.x == 0) *unit = scale_unit(top);
}

int64_t error_pieces(const MseArg& a) { return ceil_div(a.m.cols, kSumPiece); }

}  // namespace

namespace {
size_t tickets_scratch(const ScaleTensor* tensors, size_t n) {
  for (size_t i = 0; i < n; ++i)
    if (blocks_of_rows(tensors[i].rows) > 1) return n * sizeof(Ticket);
  return 0;
}
}  // namespace

size_t scales_scratch(const ScaleTensor* tensors, size_t n) {
  size_t tops = 0;
  for (size_t i = 0; i < n; ++i) tops += unit_blocks(tensors[i]);
  return tickets_scratch(tensors, n) + tops * sizeof(float);
}

cudaError_t scales(const ScaleTensor* tensors, size_t n, void* scratch, cudaStream_t stream) {
  const size_t bytes = tickets_scratch(tensors, n);
  cudaError_t error = bytes ? cudaMemsetAsync(scratch, 0, bytes, stream) : cudaSuccess;
  ScaleList<kScaleTensors> list;
  list.tickets = bytes ? (Ticket*)scratch : nullptr;
  list.n = 0;
  uint32_t blocks = 0;
  const auto flush = [&] {
    const auto run = list.n <= kFewTensors ? launch_scales<kFewTensors> : launch_scales<kScaleTensors>;
    error = first_error(error, run(list, blocks, stream));
    if (list.tickets) list.tickets += list.n;
    list.n = 0;
    blocks = 0;
  };
  for (size_t i = 0; i < n; ++i) {
    const ScaleTensor& t = tensors[i];
    const int64_t own = blocks_of_rows(t.rows);
    if (own == 0) continue;
    if (t.rows > kMostInGrid) return cudaErrorInvalidValue;
    if (list.n == kScaleTensors || blocks + own > kMostInGrid) flush();
    list.first_block[list.n] = blocks;
    list.entry[list.n++] = {t.sums,   t.scale,          t.cols,          t.c_max,        t.first,
                            t.second, (uint32_t)t.rows, (int16_t)t.rule, (int16_t)t.type};
    blocks += (uint32_t)own;
  }
  flush();
  return first_error(error, round_in_units(tensors, n, (float*)((char*)scratch + bytes), stream));
}

namespace {
size_t partial_scratch(const MseArg& a) {
  const int64_t pieces = error_pieces(a);
  return pieces > 1 ? (size_t)(a.m.rows * pieces) * kScaleCandidates * sizeof(double) : 0;
}
}  // namespace

size_t mse_scales_scratch(const MseArg& a) {
  return partial_scratch(a) + (a.scale_type == kScaleE4M3 ? sizeof(float) : 0);
}

cudaError_t mse_scales(const MseArg& a, float* scale, void* scratch, cudaStream_t stream) {
  const int64_t pieces = error_pieces(a) > 1 ? error_pieces(a) : 1;
  if (a.m.rows * pieces > kMostInGrid) return cudaErrorInvalidValue;
  ErrorPass p{a, pieces, (double*)scratch, scale};
  cudaError_t of_unit = cudaSuccess;
  if (a.scale_type == kScaleE4M3) {
    float* const unit = (float*)((char*)scratch + partial_scratch(a));
    of_unit = launch(mse_unit_kernel, 1, kScaleThreads, stream, a, unit);
    p.unit = unit;
  }
  const unsigned blocks = (unsigned)(a.m.rows * pieces);
  cudaError_t error = cudaErrorInvalidValue;
  ASKEW_BY_TYPE(a.type,
                ASKEW_BY_GRID(a.grid.kind, error = launch((errors_kernel<T, Grid>), blocks, kErrorThreads, stream, p)))
  error = first_error(of_unit, error);
  if (pieces > 1) error = first_error(error, launch(choose_kernel, (unsigned)a.m.rows, kErrorThreads, stream, p));
  return error;
}

}  // namespace cuda
}  // namespace askew
