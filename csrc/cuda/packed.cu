// Packed weights (docs/packed.md): decoding, and products with few inputs from the codes.
//
// A warp takes kRows rows of the weight; its lanes read 16 bytes of codes each, side by side, and the inputs that
// belong to them, which all warps share in the L1 cache. Integer levels are made without a conversion, of which an SM
// does only 16 a cycle: the code becomes the low bits of the float 2^23, or, with one bit, the sign of 1. PREDICTED,
// H200: at 4.3 TB/s an SM meets 38 codes of 4 bits in each cycle; shift and mask, insertion, subtraction and
// multiply-add are about 3.5 of its 128 lane-operations a code, so one input is bound by memory, two are by arithmetic.
#include "device.cuh"

namespace askew {
namespace cuda {
namespace {

constexpr int kRows = 2;      // of a warp
constexpr int kTogether = 4;  // inputs that one reading of the codes serves
constexpr int kWords = 4;     // of 32 bits that a lane reads at once

struct PackedPass : LinearArg {
  int length;  // columns of a group
  int tokens;
  bool code_vectors, x_vectors;  // 16-byte access is possible
};

__device__ __forceinline__ uint32_t code_at(const PackedArg& w, const uint8_t* row, int64_t k) {
  if (w.bits == kTrits) {
    uint32_t byte = min((int)row[k / kTritsInByte], kTopTrits);
    for (int digit = (int)(k % kTritsInByte); digit; --digit) byte /= 3;
    return byte % 3;
  }
  const int64_t at = k * w.bits;
  uint32_t bytes = row[at >> 3];
  if ((at & 7) + w.bits > 8) bytes |= (uint32_t)row[(at >> 3) + 1] << 8;
  return bytes >> (at & 7) & ((1u << w.bits) - 1);
}

// A code above the highest level counts as the highest.
__device__ __forceinline__ float level_of(const PackedArg& w, uint32_t code) {
  const int k = min((int)code, w.n_levels - 1);
  if (w.grid.kind == kCodebook) return w.grid.levels[k];
  return w.grid.lo + (float)grid_step(w.grid.kind) * (float)k;
}

__device__ __forceinline__ float scale_of(const PackedPass& p, int64_t row, int64_t k) {
  return p.w.scale[p.w.groups ? row * p.w.groups + (p.w.groups > 1 ? (int)k / p.length : 0) : 0];
}

template <int T>
__device__ __forceinline__ void store_one(void* p, int64_t i, float v) {
  const float pair[2] = {v, 0.f};
  if (T == kFloat32)
    ((float*)p)[i] = v;
  else
    ((uint16_t*)p)[i] = (uint16_t)Storage<T>::put(pair);
}
template <int T>
__device__ __forceinline__ float load_one(const void* p, int64_t i) {
  if (T == kFloat32) return ((const float*)p)[i];
  return Storage<T>::get(((const uint16_t*)p)[i], 0);
}

// ---- decoding -------------------------------------------------------------------------------------------------------

// Any format and shape: a thread takes one weight after the other of a row's piece, neighbours side by side.
constexpr int kDecoded = 8;  // weights of a thread
template <int T>
__global__ void __launch_bounds__(kThreads) packed_dequantize_kernel(const __grid_constant__ PackedPass p) {
  const int pieces = (int)((p.w.cols + kThreads * kDecoded - 1) / (kThreads * kDecoded));
  const int64_t row = blockIdx.x / (uint32_t)pieces;
  const int64_t first = (int64_t)(blockIdx.x % (uint32_t)pieces) * (kThreads * kDecoded) + threadIdx.x;
  const uint8_t* codes = p.w.codes + row * p.w.row_bytes;
  ASKEW_EACH (i, kDecoded) {
    const int64_t k = first + i * kThreads;
    if (k < p.w.cols)
      store_one<T>(p.y, row * p.w.cols + k, scale_of(p, row, k) * level_of(p.w, code_at(p.w, codes, k)));
  }
}

// Rows of whole runs of 8 weights, which share a scale: `teams` of 2^team_shift threads take a row, a thread kRuns
// runs.
constexpr int kRun = 8, kRuns = 4;
struct DecodePass : PackedPass {
  int team_shift, pieces, runs;  // blocks that share rows; runs of a row
  uint32_t per_group;            // group of run i: the high word of (i + 1) times it
  bool words;                    // codes are read in whole words
};

// The codes of run i as bits that follow each other; BITS = kTrits: as 2 bits, from the table of a byte's trits.
template <int BITS>
__device__ __forceinline__ void load_run(const DecodePass& p, const uint8_t* row, int i, const uint32_t* trits,
                                         uint32_t (&bits)[2]) {
  bits[0] = bits[1] = 0;
  if constexpr (BITS == kTrits) {
    const int first = i * kRun, at = first / kTritsInByte;  // 8 trits stand in 3 bytes at most
    ASKEW_EACH (b, 3)
      if (at + b < p.w.row_bytes) bits[0] |= trits[row[at + b]] << (2 * kTritsInByte * b);
    bits[0] >>= 2 * (first % kTritsInByte);
  } else {
    const uint8_t* at = row + (int64_t)i * BITS;
    if (BITS >= 4 && BITS % 4 == 0 && p.words) {
      ASKEW_EACH (w, BITS / 4) bits[w] = ((const uint32_t*)at)[w];
    } else {
      ASKEW_EACH (b, BITS) bits[b / 4] |= (uint32_t)at[b] << 8 * (b % 4);
    }
  }
}

// A level is made by one LOP3 and one multiply-add, without a conversion: bits of the code become low bits of 2^23, at
// the place where they stand. CLAMPS: there are fewer levels than codes.
template <int T, int BITS, bool TABLE, bool CLAMPS>
__global__ void __launch_bounds__(kThreads) packed_decode_kernel(const __grid_constant__ DecodePass p) {
  constexpr int kBits = BITS == kTrits ? 2 : BITS, kPerShift = 23 / kBits;
  constexpr uint32_t kMagic = 0x4b000000u, kMask = (1u << kBits) - 1;
  __shared__ uint32_t trits[BITS == kTrits ? 256 : 1];
  __shared__ float levels[TABLE ? 16 : 1];
  if (BITS == kTrits) {
    uint32_t byte = min((int)threadIdx.x, kTopTrits), codes = 0;
    ASKEW_EACH (d, kTritsInByte) {
      codes |= byte % 3 << 2 * d;
      byte /= 3;
    }
    trits[threadIdx.x] = codes;
  }
  if (TABLE && threadIdx.x < 16) levels[threadIdx.x] = level_of(p.w, threadIdx.x);
  if (TABLE || BITS == kTrits) __syncthreads();
  const int64_t row =
      (int64_t)(blockIdx.x / (uint32_t)p.pieces) * (kThreads >> p.team_shift) + (threadIdx.x >> p.team_shift);
  const int first =
      ((int)(blockIdx.x % (uint32_t)p.pieces) * kRuns << p.team_shift) + (threadIdx.x & ((1 << p.team_shift) - 1));
  if (row >= p.w.n) return;
  const uint8_t* codes = p.w.codes + row * p.w.row_bytes;
  uint32_t bits[kRuns][2];
  float scale[kRuns];
  ASKEW_EACH (r, kRuns) {
    const int i = first + (r << p.team_shift);
    if (i >= p.runs) continue;
    load_run<BITS>(p, codes, i, trits, bits[r]);
    const uint32_t group = p.w.groups > 1 ? (uint32_t)((uint64_t)(uint32_t)(i + 1) * p.per_group >> 32) : 0;
    scale[r] = p.w.scale[p.w.groups ? row * p.w.groups + group : 0];
  }
  const float step = (float)grid_step(p.w.grid.kind), low = p.w.grid.lo / step;
  const float top = low + (float)(p.w.n_levels - 1);
  ASKEW_EACH (r, kRuns) {
    const int i = first + (r << p.team_shift);
    if (i >= p.runs) continue;
    float v[kRun];
    ASKEW_EACH (j, kRun) {
      constexpr int kPerWord = 32 / kBits;
      const bool across = kBits == 3 ? false : j / kPerWord > 0;
      const uint32_t word = bits[r][across];
      const int q = across ? j % kPerWord : j;
      if constexpr (TABLE) {
        v[j] = levels[word >> kBits * q & kMask];
      } else {
        // binary levels are halves of a step, for which the lowest place has no bit
        const int place = kBits == 1 ? q + 1 : q % kPerShift * kBits;
        const uint32_t code = masked_or(kBits == 1 ? word << 1 : word >> (q * kBits - place), kMask << place, kMagic);
        v[j] = __fmaf_rn(__uint_as_float(code), 1.f / (float)(1 << place), low - 8388608.f / (float)(1 << place));
      }
    }
    if (CLAMPS)
      ASKEW_EACH (j, kRun) v[j] = v[j] > top ? top : v[j];
    const float factor = TABLE ? scale[r] : scale[r] * step;
    ASKEW_EACH (j, kRun) v[j] *= factor;
    constexpr int kPer = Storage<T>::kPerWord;
    uint32_t out[kRun / kPer];
    ASKEW_EACH (k, kRun / kPer) out[k] = Storage<T>::put(v + k * kPer);
    uint4* to = (uint4*)((char*)p.y + (row * p.w.cols + (int64_t)i * kRun) * type_size(T));
    ASKEW_EACH (k, kRun / kPer / 4) to[k] = make_uint4(out[4 * k], out[4 * k + 1], out[4 * k + 2], out[4 * k + 3]);
  }
}

template <int T, int BITS, bool TABLE = false>
cudaError_t launch_decode(const DecodePass& p, cudaStream_t stream) {
  const int64_t rows = ceil_div(p.w.n, kThreads >> p.team_shift);
  const unsigned blocks = (unsigned)(rows * p.pieces);
  if constexpr (BITS > 1 && !TABLE)
    if (p.w.n_levels < 1 << BITS)
      return launch((packed_decode_kernel<T, BITS, false, true>), blocks, kThreads, stream, p);
  return launch((packed_decode_kernel<T, BITS, TABLE, false>), blocks, kThreads, stream, p);
}

// Whether a kernel of whole runs serves; `error` is what its launch gave.
template <int T>
bool decodes_runs(const PackedPass& p, cudaStream_t stream, cudaError_t& error) {
  const PackedArg& w = p.w;
  if (w.cols % kRun || p.length % kRun || (uintptr_t)p.y % 16 || (w.grid.kind == kBinary && w.bits != 1)) return false;
  DecodePass d{};
  static_cast<PackedPass&>(d) = p;
  d.runs = (int)(w.cols / kRun);
  while (d.team_shift < kBlockShift && 1 << d.team_shift < d.runs) ++d.team_shift;
  d.pieces = (int)ceil_div(d.runs, (int64_t)kRuns << d.team_shift);
  d.per_group = (uint32_t)(UINT32_MAX / (p.length / kRun));
  d.words = (uintptr_t)w.codes % 4 == 0 && w.row_bytes % 4 == 0;
  if (w.grid.kind == kCodebook) {
    if (w.bits != 4) return false;
    error = launch_decode<T, 4, true>(d, stream);
    return true;
  }
  switch (w.bits) {
    case kTrits:
      error = launch_decode<T, kTrits>(d, stream);
      return true;
    case 1:
      error = launch_decode<T, 1>(d, stream);
      return true;
    case 2:
      error = launch_decode<T, 2>(d, stream);
      return true;
    case 3:
      error = launch_decode<T, 3>(d, stream);
      return true;
    case 4:
      error = launch_decode<T, 4>(d, stream);
      return true;
    case 8:
      error = launch_decode<T, 8>(d, stream);
      return true;
  }
  return false;
}

// ---- products -------------------------------------------------------------------------------------------------------

// 16 bytes of a row from `at`, zeros past its end.
__device__ __forceinline__ void load_codes(const uint8_t* row, int64_t at, const PackedPass& p, uint32_t* word) {
  if (p.code_vectors) {
    const uint4 v = at < p.w.row_bytes ? *(const uint4*)(row + at) : make_uint4(0, 0, 0, 0);
    word[0] = v.x;
    word[1] = v.y;
    word[2] = v.z;
    word[3] = v.w;
    return;
  }
  ASKEW_EACH (i, kWords) {
    word[i] = 0;
    ASKEW_EACH (b, 4)
      if (at + 4 * i + b < p.w.row_bytes) word[i] |= (uint32_t)row[at + 4 * i + b] << 8 * b;
  }
}

// N inputs of a token from column k, zeros past the end.
template <int T, int N>
__device__ __forceinline__ void load_inputs(const PackedPass& p, int64_t token, int64_t k, float* x) {
  typedef typename Storage<T>::type S;
  constexpr int kPer = Storage<T>::kPerVector, kPerWord = Storage<T>::kPerWord;
  const S* at = (const S*)p.x + token * p.w.cols + k;
  if (p.x_vectors && N % kPer == 0) {
#pragma unroll
    for (int i = 0; i < N; i += kPer) {
      const uint4 v = k + i < p.w.cols ? *(const uint4*)(at + i) : make_uint4(0, 0, 0, 0);
      const uint32_t word[4] = {v.x, v.y, v.z, v.w};
      ASKEW_EACH (j, kPer) x[i + j] = Storage<T>::get(word[j / kPerWord], j % kPerWord);
    }
    return;
  }
  ASKEW_EACH (i, N) x[i] = k + i < p.w.cols ? load_one<T>(at, i) : 0.f;
}

// Puts together a warp's parts of the product of a row with input m, for one lane to write.
template <int T>
__device__ __forceinline__ void finish_product(const PackedPass& p, float sum, int64_t row, int m, bool exists) {
  float y = add_lanes(sum, kWarpShift);
  if (threadIdx.x % 32 || !exists || m >= p.tokens) return;
  if (p.w.groups <= 1) y *= scale_of(p, row, 0);
  if (p.bias) y += load_one<T>(p.bias, row);
  store_one<T>(p.y, m * p.w.n + row, y);
}

// Codes of 1, 2, 4 or 8 bits, integer levels, groups that end with words.
template <int T, int BITS, int M>
__global__ void __launch_bounds__(kThreads) packed_words_kernel(const __grid_constant__ PackedPass p) {
  constexpr int kPer = 32 / BITS;
  const int lane = threadIdx.x & 31;
  const int64_t first = ((int64_t)blockIdx.x * (kThreads / 32) + (threadIdx.x >> 5)) * kRows;
  if (first >= p.w.n) return;
  const uint8_t* codes[kRows];
  int64_t row[kRows];
  ASKEW_EACH (r, kRows) {
    row[r] = first + r < p.w.n ? first + r : p.w.n - 1;  // past the end: the last one again
    codes[r] = p.w.codes + row[r] * p.w.row_bytes;
  }
  const float below = 8388608.f - p.w.grid.lo, top = p.w.grid.hi;
  float sum[kRows][M] = {};
  for (int64_t at = lane * (4 * kWords); at < p.w.row_bytes; at += 32 * 4 * kWords) {
    uint32_t word[kRows][kWords];
    ASKEW_EACH (r, kRows) load_codes(codes[r], at, p, word[r]);
    ASKEW_EACH (i, kWords) {
      const int64_t k = (at + 4 * i) * (8 / BITS);
      float x[M][kPer];
      ASKEW_EACH (m, M) load_inputs<T, kPer>(p, m, k, x[m]);
      float scale[kRows];
      ASKEW_EACH (r, kRows) scale[r] = p.w.groups > 1 && k < p.w.cols ? scale_of(p, row[r], k) : 1.f;
      ASKEW_EACH (r, kRows) {
        float part[M] = {};
        ASKEW_EACH (j, kPer) {
          float level;
          if (BITS == 1) {
            level = __uint_as_float(0xbf800000u ^ (word[r][i] << (31 - j) & 0x80000000u));
          } else {
            const uint32_t code = word[r][i] >> (BITS * j) & ((1u << BITS) - 1);
            level = __uint_as_float(code | 0x4b000000u) - below;
            level = level > top ? top : level;
          }
          ASKEW_EACH (m, M) part[m] = __fmaf_rn(level, x[m][j], part[m]);
        }
        ASKEW_EACH (m, M) sum[r][m] = __fmaf_rn(part[m], scale[r], sum[r][m]);
      }
    }
  }
  ASKEW_EACH (r, kRows)
    ASKEW_EACH (m, M) finish_product<T>(p, sum[r][m], row[r], m, first + r < p.w.n);
}

// Every other format: a warp takes a row, code by code.
template <int T>
__global__ void __launch_bounds__(kThreads) packed_codes_kernel(const __grid_constant__ PackedPass p) {
  const int lane = threadIdx.x & 31;
  const int64_t row = (int64_t)blockIdx.x * (kThreads / 32) + (threadIdx.x >> 5);
  if (row >= p.w.n) return;
  const uint8_t* codes = p.w.codes + row * p.w.row_bytes;
  float sum[kTogether] = {};
  for (int64_t k = lane; k < p.w.cols; k += 32) {
    float level = level_of(p.w, code_at(p.w, codes, k));
    if (p.w.groups > 1) level *= scale_of(p, row, k);
    ASKEW_EACH (m, kTogether)
      if (m < p.tokens) sum[m] = __fmaf_rn(level, load_one<T>(p.x, m * p.w.cols + k), sum[m]);
  }
  ASKEW_EACH (m, kTogether) finish_product<T>(p, sum[m], row, m, true);
}

template <int T, int BITS>
cudaError_t launch_words(const PackedPass& p, cudaStream_t stream) {
  const unsigned blocks = (unsigned)ceil_div(p.w.n, kRows * (kThreads / 32));
  if (p.tokens == 1) return launch((packed_words_kernel<T, BITS, 1>), blocks, kThreads, stream, p);
  return launch((packed_words_kernel<T, BITS, kTogether>), blocks, kThreads, stream, p);
}

template <int T>
cudaError_t launch_linear(const PackedPass& p, cudaStream_t stream) {
  const int bits = p.w.bits;
  const bool words = bits && 8 % bits == 0 && p.w.grid.kind != kCodebook;
  if (words && (p.w.groups <= 1 || p.length % (32 / bits) == 0)) {
    if (bits == 1) return launch_words<T, 1>(p, stream);
    if (bits == 2) return launch_words<T, 2>(p, stream);
    if (bits == 4) return launch_words<T, 4>(p, stream);
    return launch_words<T, 8>(p, stream);
  }
  return launch((packed_codes_kernel<T>), (unsigned)ceil_div(p.w.n, kThreads / 32), kThreads, stream, p);
}

PackedPass packed_pass(const LinearArg& a) {
  PackedPass p{};
  static_cast<LinearArg&>(p) = a;
  p.length = (int)(a.w.cols / (a.w.groups > 1 ? a.w.groups : 1));
  return p;
}

}  // namespace

cudaError_t packed_dequantize(const PackedArg& w, void* out, int type, cudaStream_t stream) {
  if (w.n == 0 || w.cols == 0) return cudaSuccess;
  const PackedPass p = packed_pass({w, nullptr, nullptr, out, 0, type});
  const unsigned blocks = (unsigned)(w.n * ceil_div(w.cols, kThreads * kDecoded));
  cudaError_t error = cudaSuccess;
  ASKEW_BY_TYPE(type, {
    if (decodes_runs<T>(p, stream, error)) return error;
    return launch((packed_dequantize_kernel<T>), blocks, kThreads, stream, p);
  })
  return cudaErrorInvalidValue;
}

// As many inputs at a time as one reading of the codes serves; a rest of two or three one after the other.
cudaError_t packed_linear(const LinearArg& a, cudaStream_t stream) {
  PackedPass p = packed_pass(a);
  const int64_t size = type_size(a.type);
  p.code_vectors = (uintptr_t)a.w.codes % 16 == 0 && a.w.row_bytes % 16 == 0;
  p.x_vectors = (uintptr_t)a.x % 16 == 0 && a.w.cols * size % 16 == 0;
  cudaError_t error = cudaSuccess;
  for (int64_t t = 0; t < a.batch && error == cudaSuccess; t += p.tokens) {
    p.tokens = a.batch - t >= kTogether ? kTogether : 1;
    p.x = (const char*)a.x + t * a.w.cols * size;
    p.y = (char*)a.y + t * a.w.n * size;
    ASKEW_BY_TYPE(a.type, error = launch_linear<T>(p, stream))
  }
  return error;
}

}  // namespace cuda
}  // namespace askew
