// Products with packed weights on the matrix units (docs/packed.md).
//
// The codes stand in tiles of kTileRows x kTileColumns, in the order in which mma.m16n8k16 wants its left operand: a
// lane's 16-byte loads are neighbours of the other lanes', and shifts, masks and one multiply-add in pairs make levels
// of bfloat16 or float16 of them, which are exact. Sums are float32; a scale is applied once a group, or once at all.
#include "device.cuh"

namespace askew {
namespace cuda {
namespace {

constexpr int kSteps = kTileColumns / 16;  // products of the matrix units for a tile
constexpr int kFewTokens = 8;              // columns of such a product
constexpr int kPairsOfStep = 4;            // words of its left operand
// Of a block. 8 bits want registers, and so does a scale after each step.
ASKEW_FN constexpr int most_warps(int form, int segment) { return form == kTiles8 || segment == 1 ? 8 : 16; }

struct TilesPass : TilesArg {
  float* part;  // (splits, batch, n), where several blocks share a row
  int chunks;   // tiles of a row
  int splits, warps, segment;
  int token_tiles;  // of 8, that a block takes; 0: at most 8 tokens in all
  int64_t blocks;
  uint32_t rows;       // of tiles
  uint32_t per_group;  // d segments a group: k / d is the high word of (k + 1) times it, (2^32 - 1) / d rounded down
};

// ---- levels ---------------------------------------------------------------------------------------------------------

__device__ constexpr uint32_t twice(uint32_t half) { return half << 16 | half; }

// What the halves of a word are: bfloat16 or float16, of `kMantissa` bits, where kMagic is the number whose last bit
// counts 1.
template <int T>
struct Halves {
  static constexpr bool kBF16 = T == kBFloat16;
  static constexpr int kMantissa = kBF16 ? 7 : 10;
  static constexpr uint32_t kMagic = twice(kBF16 ? 0x4300 : 0x6400), kOne = twice(kBF16 ? 0x3f80 : 0x3c00);
  static constexpr uint32_t kMinusOne = kOne | 0x80008000u;
  static __device__ constexpr uint32_t power(int e) { return twice(kBF16 ? (0x7f + e) << 7 : (15 + e) << 10); }
  static __device__ __forceinline__ uint32_t pair(float a, float b) {
    const float v[2] = {a, b};
    return Storage<T>::put(v);
  }
};

// Makes the left operand of each step from a lane's codes of a tile. FORM 1, 2, 3, 4, 8: pair number q of a word, or
// for 3 bits of three words, is bits BITS q ... of both halves of the word; the pairs of a step follow each other.
template <int T, int FORM>
struct Levels {
  typedef Halves<T> H;
  static constexpr int kBits = tile_bits(FORM), kParts = FORM == kTilesTable2 ? 2 : 1;
  static constexpr bool kTable = FORM >= kTilesTable;
  static constexpr bool kWide = kBits > H::kMantissa;                 // a code does not fit the mantissa
  static constexpr int kPerShift = kWide ? 1 : H::kMantissa / kBits;  // pairs that one shift brings into it
  uint32_t below[kPerShift];  // the lowest level minus kMagic, for a code that counts 2^(BITS i)
  uint32_t table;             // codebook: where the lane's copies stand of 16 levels, both parts in a word

  __device__ __forceinline__ explicit Levels(const GridArg& g) {
    const float lo = FORM == kTiles8 ? (g.lo < 0 ? -128.f : 0.f) : g.lo;
    ASKEW_EACH (i, kPerShift) {
      const float magic = (float)(1 << H::kMantissa) / (float)(1 << (kBits * i % 16));
      below[i] = kWide ? H::pair(lo - 256.f, lo - 256.f) : H::pair(lo - magic, lo - magic);
    }
    if constexpr (kTable) {
      // 2 KB that begin where 2 KB do, so that a code's bits can be set in an address: what a block has begins at 1 KB
      constexpr uint32_t kSize = 16 * 32 * 4;
      __shared__ uint32_t room[2 * 16 * 32];
      const uint32_t skipped = (0u - shared_address(room)) % kSize;
      uint32_t* levels = room + skipped / 4;
      for (int i = threadIdx.x; i < 16 * 32; i += blockDim.x) {
        const float v = g.levels[min(i / 32, g.n_levels - 1)];
        const uint32_t high = H::pair(v, 0.f);
        levels[i] = H::pair(Storage<T>::get(high, 0), v - Storage<T>::get(high, 0));
      }
      __syncthreads();
      table = (shared_address(room) + skipped) | 4 * (threadIdx.x & 31);
    }
  }

  // Pair q of bits that `word` has.
  __device__ __forceinline__ uint32_t from_bits(uint32_t word, int q) const {
    [[maybe_unused]] constexpr uint32_t kMask = (1u << kBits) - 1;
    if (kBits == 1) return masked_xor(word << (15 - q), 0x80008000u, H::kMinusOne);
    if (kWide) {  // 7 bits in the mantissa; the eighth makes 256 of 128
      const uint32_t moved = word >> kBits * q;
      const uint32_t low = masked_or(moved, twice(0x7f), H::kMagic), high = masked_xor(moved, twice(128), H::kMagic);
      return fma_pairs<H::kBF16>(fma_pairs<H::kBF16>(low, H::kOne, below[0]), H::kOne, high);
    }
    const int i = q % kPerShift;
    const uint32_t code = masked_or(word >> kBits * (q - i), twice(kMask << kBits * i), H::kMagic);
    return fma_pairs<H::kBF16>(code, H::power(-kBits * i), below[i]);
  }

  // The looked up level of the code whose bits begin at bit `at`.
  __device__ __forceinline__ uint32_t looked_up(uint32_t word, int at) const {
    return load_shared(masked_or(at < 7 ? word << (7 - at) : word >> (at - 7), 15 * 128, table));
  }

  // The left operand of step j, of part 0, and for two parts of part 1. word: kBits * 4, of the lane and tile.
  __device__ __forceinline__ void step(const uint32_t* word, int j, uint32_t (&a)[kParts][kPairsOfStep]) const {
    if (kTable) {
      ASKEW_EACH (i, kPairsOfStep) {
        const uint32_t low = looked_up(word[j], 4 * i), high = looked_up(word[j], 4 * i + 16);
        a[0][i] = __byte_perm(low, high, 0x5410);
        if (kParts == 2) a[kParts - 1][i] = __byte_perm(low, high, 0x7632);
      }
      return;
    }
    ASKEW_EACH (i, kPairsOfStep) {
      if (kBits == 3) {
        const uint32_t* three = word + j / 4 * 3;
        const int q = j % 4 * kPairsOfStep + i;
        const uint32_t last = (three[0] >> 15 & twice(1)) | (three[1] >> 14 & twice(2)) | (three[2] >> 13 & twice(4));
        a[0][i] = q < 15 ? from_bits(three[q / 5], q % 5) : from_bits(last, 0);
      } else {
        constexpr int kPairs = 16 / kBits;  // of a word
        const int q = j * kPairsOfStep + i;
        a[0][i] = from_bits(word[q / kPairs], q % kPairs);
      }
    }
  }
};

// ---- 1 to 8 tokens --------------------------------------------------------------------------------------------------

// Leaves v where there is no tile.
template <int V>
__device__ __forceinline__ void load_tile(const uint4* at, bool exists, uint4 (&v)[V]) {
  ASKEW_EACH (i, V)
    if (exists) v[i] = load_once(at + 32 * i);
}

template <int T>
__device__ __forceinline__ void store_result(const TilesPass& p, float sum, int64_t token, int64_t row) {
  if (p.groups <= 1) sum *= p.scale[p.groups ? row : 0];
  if (p.bias) sum += Storage<T>::get(((const uint16_t*)p.bias)[row], 0);
  const float pair[2] = {sum, 0.f};
  ((uint16_t*)p.y)[token * p.n + row] = (uint16_t)Storage<T>::put(pair);
}

// A block takes kTileRows rows; its warps take the tiles of these, or of one of `splits` parts, in turn, and their sums
// are added in the order of the warps. SEGMENT: steps after which a scale is applied, a divisor of a group's; 0: at the
// end.
template <int T, int FORM, int SEGMENT>
__global__ void __launch_bounds__(32 * most_warps(FORM, SEGMENT), 1)
    tiles_few_kernel(const __grid_constant__ TilesPass p) {
  typedef Levels<T, FORM> L;
  constexpr int kVectors = L::kBits, kSegments = SEGMENT ? kSteps / SEGMENT : 1, kSegment = kSteps / kSegments;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, g = lane >> 2, t = lane & 3;
  const uint32_t tile = blockIdx.x / (uint32_t)p.splits, split = blockIdx.x % (uint32_t)p.splits;
  const int each = (p.chunks + p.splits - 1) / p.splits, end = min(p.chunks, ((int)split + 1) * each);
  int c = (int)split * each + warp;
  const uint4* at = (const uint4*)p.tiles + ((int64_t)tile * p.chunks + c) * (kVectors * 32) + lane;
  uint4 next[kVectors] = {};
  load_tile(at, c < end, next);

  __shared__ __align__(16) uint16_t tail[kFewTokens][kTileColumns];  // the last columns of the inputs, then zeros
  const int whole = (int)(p.cols / kTileColumns);                    // tiles before it
  if (end > whole) {
    for (int i = threadIdx.x; i < kFewTokens * kTileColumns; i += blockDim.x) {
      const int64_t token = i / kTileColumns, k = (int64_t)whole * kTileColumns + i % kTileColumns;
      tail[token][i % kTileColumns] = token < p.batch && k < p.cols ? ((const uint16_t*)p.x)[token * p.cols + k] : 0;
    }
    __syncthreads();
  }
  const L levels(p.grid);
  const int64_t token = g < (int)p.batch ? g : 0;  // past the last: the first again, for results that nobody takes
  const uint16_t* last = &tail[token][4 * t];
  const uint16_t* x = c < whole ? (const uint16_t*)p.x + token * p.cols + (int64_t)c * kTileColumns + 4 * t : last;
  const float* scales = p.scale + tile * kTileRows + g;
  float sum[4] = {};
  for (; c < end; c += warps) {
    uint32_t word[4 * kVectors];
    ASKEW_EACH (i, kVectors) {
      word[4 * i] = next[i].x;
      word[4 * i + 1] = next[i].y;
      word[4 * i + 2] = next[i].z;
      word[4 * i + 3] = next[i].w;
    }
    at += warps * (kVectors * 32);
    load_tile(at, c + warps < end, next);
    ASKEW_EACH (s, kSegments) {
      float part[4] = {}, scale[2];
      float (&of_segment)[4] = SEGMENT ? part : sum;
      if (SEGMENT) {
        const uint32_t group = (uint32_t)((uint64_t)(uint32_t)(c * kSegments + s + 1) * p.per_group >> 32);
        const float* of_rows = scales + group * p.rows;
        ASKEW_EACH (h, 2) scale[h] = of_rows[8 * h];
      }
      ASKEW_EACH (i, kSegment) {
        const int j = s * kSegment + i;
        const uint2 b = *(const uint2*)(x + 16 * j);
        uint32_t a[L::kParts][kPairsOfStep];
        levels.step(word, j, a);
        ASKEW_EACH (k, L::kParts) multiply_tile<Halves<T>::kBF16>(of_segment, a[k], b.x, b.y, of_segment);
      }
      if (SEGMENT)
        ASKEW_EACH (i, 4) sum[i] = __fmaf_rn(part[i], scale[i / 2], sum[i]);
    }
    x = c + warps < whole ? x + warps * kTileColumns : last;
  }
  __shared__ float sums[most_warps(FORM, SEGMENT)][kTileRows * kFewTokens];
  ASKEW_EACH (i, 4) sums[warp][(2 * t + (i & 1)) * kTileRows + g + 8 * (i / 2)] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kTileRows * kFewTokens; i += blockDim.x) {
    const int token = i / kTileRows;
    const int64_t at_row = (int64_t)tile * kTileRows + i % kTileRows;
    if (token >= p.batch || at_row >= p.n) continue;
    float v = 0.f;
    for (int w = 0; w < warps; ++w) v += sums[w][i];
    if (p.splits > 1)
      p.part[((int64_t)split * p.batch + token) * p.n + at_row] = v;
    else
      store_result<T>(p, v, token, at_row);
  }
}

// ---- 9 tokens and more ----------------------------------------------------------------------------------------------

constexpr int kManyWarps = 8;       // of a block, each with its own rows
constexpr int kStageColumns = 128;  // of the inputs that the block brings into shared memory at once
constexpr int kStageSteps = kStageColumns / 16;
constexpr int kStageRow = kStageColumns * 2 + 32;  // bytes; lanes that read together meet different banks
constexpr int kManyTokens = 64;                    // at most, of a block

// What a thread brings of the block's inputs: 16 bytes of every kTokensApart-th token, zeros past the ends.
constexpr int kTokensApart = kManyWarps * 32 / (kStageColumns / 8);
template <int TOKENS>
struct StageCopies {
  static constexpr int kEach = TOKENS / kTokensApart;
  const uint16_t* from;
  int64_t apart;  // of tokens, in elements
  int column, end, place;
  bool exists[kEach];
  __device__ __forceinline__ StageCopies(const TilesPass& p, int64_t token, int first, int end) : end(end) {
    const int row = threadIdx.x / (kStageColumns / 8), vector = threadIdx.x % (kStageColumns / 8);
    column = first + 8 * vector;
    apart = kTokensApart * p.cols;
    from = (const uint16_t*)p.x + (token + row) * p.cols + column;
    place = row * kStageRow + 16 * vector;
    ASKEW_EACH (i, kEach) exists[i] = token + row + i * kTokensApart < p.batch;
  }
  __device__ __forceinline__ void next(char* stage) {
    ASKEW_EACH (i, kEach)
      copy_async(stage + place + i * (kTokensApart * kStageRow), from + i * apart, exists[i] && column < end);
    close_copies();
    column += kStageColumns;
    from += kStageColumns;
  }
};

// A block takes kManyWarps tiles of rows, 8 TILES tokens and one of `splits` parts of the columns. SEGMENT: as above.
template <int T, int FORM, int SEGMENT, int TILES>
__global__ void __launch_bounds__(kManyWarps * 32, 1) tiles_many_kernel(const __grid_constant__ TilesPass p) {
  typedef Levels<T, FORM> L;
  constexpr int kVectors = L::kBits, kStages = TILES == 8 ? 2 : 4;
  __shared__ __align__(16) char stages[kStages][8 * TILES * kStageRow];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const uint32_t token_tiles = (uint32_t)((p.batch + 8 * TILES - 1) / (8 * TILES));
  const int64_t token = (int64_t)(blockIdx.x % token_tiles) * (8 * TILES);
  const uint32_t split = blockIdx.x / token_tiles % (uint32_t)p.splits;
  const uint32_t tile = blockIdx.x / token_tiles / (uint32_t)p.splits * kManyWarps + warp;
  const bool works = tile < p.rows / kTileRows;
  const int each = (p.chunks + p.splits - 1) / p.splits, end = min(p.chunks, ((int)split + 1) * each);
  int c = (int)split * each;
  const uint4* at = (const uint4*)p.tiles + ((int64_t)tile * p.chunks + c) * (kVectors * 32) + lane;
  uint4 next[kVectors] = {};
  load_tile(at, works && c < end, next);
  StageCopies<8 * TILES> copies(p, token, c * kTileColumns, min((int)p.cols, end * kTileColumns));
  ASKEW_EACH (s, kStages - 1) copies.next(stages[s]);
  const L levels(p.grid);
  const float* scales = p.scale + (works ? tile * kTileRows + g : 0);
  float sum[TILES][4] = {};
  int stage = 0;
  for (; c < end; ++c) {
    uint32_t word[4 * kVectors];
    ASKEW_EACH (i, kVectors) {
      word[4 * i] = next[i].x;
      word[4 * i + 1] = next[i].y;
      word[4 * i + 2] = next[i].z;
      word[4 * i + 3] = next[i].w;
    }
    at += kVectors * 32;
    load_tile(at, works && c + 1 < end, next);
    float part[TILES][4] = {}, scale[2] = {};
    const char* x = nullptr;
    ASKEW_EACH (j, kSteps) {
      if (j % kStageSteps == 0) {
        wait_for_copies<kStages - 2>();
        __syncthreads();
        copies.next(stages[(stage + kStages - 1) % kStages]);
        x = stages[stage] + g * kStageRow + 8 * t;
        stage = (stage + 1) % kStages;
      }
      if (SEGMENT && j % SEGMENT == 0) {
        const uint32_t segment = (uint32_t)(c * (kSteps / SEGMENT) + j / SEGMENT);
        const float* of_rows = scales + (uint32_t)((uint64_t)(segment + 1) * p.per_group >> 32) * p.rows;
        ASKEW_EACH (h, 2) scale[h] = of_rows[8 * h];
      }
      uint32_t a[L::kParts][kPairsOfStep];
      levels.step(word, j, a);
      ASKEW_EACH (i, TILES) {
        const uint2 b = *(const uint2*)(x + 8 * i * kStageRow + j % kStageSteps * 32);
        float (&d)[4] = SEGMENT ? part[i] : sum[i];
        ASKEW_EACH (k, L::kParts) multiply_tile<Halves<T>::kBF16>(d, a[k], b.x, b.y, d);
      }
      if (SEGMENT && (j + 1) % SEGMENT == 0) {
        ASKEW_EACH (i, TILES)
          ASKEW_EACH (e, 4) {
            sum[i][e] = __fmaf_rn(part[i][e], scale[e / 2], sum[i][e]);
            part[i][e] = 0.f;
          }
      }
    }
  }
  wait_for_copies<0>();
  if (!works) return;
  ASKEW_EACH (i, TILES)
    ASKEW_EACH (e, 4) {
      const int64_t m = token + 8 * i + 2 * t + (e & 1), row = (int64_t)tile * kTileRows + g + 8 * (e / 2);
      if (m >= p.batch || row >= p.n) continue;
      if (p.splits > 1)
        p.part[((int64_t)split * p.batch + m) * p.n + row] = sum[i][e];
      else
        store_result<T>(p, sum[i][e], m, row);
    }
}

// ---- around them ----------------------------------------------------------------------------------------------------

// Adds the parts in their order.
template <int T>
__global__ void __launch_bounds__(kThreads) tiles_finish_kernel(const __grid_constant__ TilesPass p) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x, size = p.batch * p.n;
  if (i >= size) return;
  float v = 0.f;
  for (int s = 0; s < p.splits; ++s) v += p.part[s * size + i];
  store_result<T>(p, v, i / p.n, i % p.n);
}

// Rows of x one after the other, each filled up with zeros to `to` columns.
struct PadPass {
  const uint16_t* x;
  uint16_t* out;
  int64_t batch, cols, to;
};
__global__ void __launch_bounds__(kThreads) tiles_pad_kernel(const __grid_constant__ PadPass p) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i >= p.batch * p.to) return;
  const int64_t row = i / p.to, column = i % p.to;
  p.out[i] = column < p.cols ? p.x[row * p.cols + column] : (uint16_t)0;
}

int64_t padded_columns(const TilesArg& a) {  // 0 where x is read where it stands
  return (uintptr_t)a.x % 16 == 0 && a.cols % 8 == 0 ? 0 : ceil_div(a.cols, 8) * 8;
}

// How blocks and warps share the tiles depends on the shape alone, and with it the order of the sums.
constexpr int64_t kEnoughWarps = 2048;  // that keep a GPU's memory busy
TilesPass tiles_pass(const TilesArg& a) {
  TilesPass p{};
  static_cast<TilesArg&>(p) = a;
  const int64_t tiles = ceil_div(a.n, kTileRows);
  p.rows = (uint32_t)(tiles * kTileRows);
  p.chunks = (int)ceil_div(a.cols, kTileColumns);
  const bool many = a.batch > kFewTokens;
  if (a.groups > 1) {
    const int64_t steps = a.cols / a.groups / 16;
    p.segment = steps % 4 == 0 ? 4 : steps % 2 == 0 && !many ? 2 : 1;
    p.per_group = (uint32_t)(UINT32_MAX / (steps / p.segment));
  }
  p.splits = 1;
  if (many) {
    p.token_tiles = a.batch > 16 && p.segment != 1 ? 8 : 2;
    p.blocks = ceil_div(tiles, kManyWarps) * ceil_div(a.batch, 8 * p.token_tiles);
    p.warps = kManyWarps;
  } else {
    for (p.warps = 2; p.warps < most_warps(a.form, p.segment) && p.warps < p.chunks && p.warps * tiles < kEnoughWarps;)
      p.warps *= 2;
    p.blocks = tiles;
  }
  // a part has tiles for every warp; parts of few tokens cost a second kernel, which does not pay for half the warps
  const int64_t least = many ? 1 : p.warps, enough = many ? kEnoughWarps : kEnoughWarps / 2;
  while (p.splits * p.warps * p.blocks < enough && 2 * p.splits * least <= p.chunks) p.splits *= 2;
  p.blocks *= p.splits;
  return p;
}

template <int T, int FORM>
cudaError_t launch_many(const TilesPass& p, cudaStream_t stream) {
  const unsigned blocks = (unsigned)p.blocks, threads = 32 * kManyWarps;
  if (p.segment == 1) return launch((tiles_many_kernel<T, FORM, 1, 2>), blocks, threads, stream, p);
  if (p.segment) {
    if (p.token_tiles == 2) return launch((tiles_many_kernel<T, FORM, 4, 2>), blocks, threads, stream, p);
    return launch((tiles_many_kernel<T, FORM, 4, 8>), blocks, threads, stream, p);
  }
  if (p.token_tiles == 2) return launch((tiles_many_kernel<T, FORM, 0, 2>), blocks, threads, stream, p);
  return launch((tiles_many_kernel<T, FORM, 0, 8>), blocks, threads, stream, p);
}

template <int T, int FORM>
cudaError_t launch_tiles(const TilesPass& p, cudaStream_t stream) {
  if (p.token_tiles) return launch_many<T, FORM>(p, stream);
  const unsigned blocks = (unsigned)p.blocks, threads = (unsigned)(32 * p.warps);
  switch (p.segment) {
    case 0:
      return launch((tiles_few_kernel<T, FORM, 0>), blocks, threads, stream, p);
    case 1:
      return launch((tiles_few_kernel<T, FORM, 1>), blocks, threads, stream, p);
    case 2:
      return launch((tiles_few_kernel<T, FORM, 2>), blocks, threads, stream, p);
  }
  return launch((tiles_few_kernel<T, FORM, 4>), blocks, threads, stream, p);
}

template <int T>
cudaError_t launch_form(const TilesPass& p, cudaStream_t stream) {
  switch (p.form) {
    case kTiles1:
      return launch_tiles<T, kTiles1>(p, stream);
    case kTiles2:
      return launch_tiles<T, kTiles2>(p, stream);
    case kTiles3:
      return launch_tiles<T, kTiles3>(p, stream);
    case kTiles4:
      return launch_tiles<T, kTiles4>(p, stream);
    case kTiles8:
      return launch_tiles<T, kTiles8>(p, stream);
    case kTilesTable:
      return launch_tiles<T, kTilesTable>(p, stream);
    case kTilesTable2:
      return launch_tiles<T, kTilesTable2>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <int T>
cudaError_t tiles_linear(const TilesPass& p, cudaStream_t stream) {
  const cudaError_t error = launch_form<T>(p, stream);
  if (error != cudaSuccess || p.splits == 1) return error;
  return launch((tiles_finish_kernel<T>), (unsigned)ceil_div(p.batch * p.n, kThreads), kThreads, stream, p);
}

size_t padded_bytes(const TilesArg& a) { return (size_t)ceil_div(a.batch * padded_columns(a) * 2, 16) * 16; }

}  // namespace

size_t packed_tiles_scratch(const TilesArg& a) {
  const TilesPass p = tiles_pass(a);
  return padded_bytes(a) + (p.splits > 1 ? sizeof(float) * p.splits * p.n * p.batch : 0);
}

cudaError_t packed_tiles_linear(const TilesArg& a, void* scratch, cudaStream_t stream) {
  if (a.n == 0 || a.batch == 0) return cudaSuccess;
  TilesPass p = tiles_pass(a);
  p.part = (float*)((char*)scratch + padded_bytes(a));
  if (const int64_t to = padded_columns(a)) {
    const PadPass pad{(const uint16_t*)a.x, (uint16_t*)scratch, a.batch, a.cols, to};
    const cudaError_t error =
        launch(tiles_pad_kernel, (unsigned)ceil_div(a.batch * to, kThreads), kThreads, stream, pad);
    if (error != cudaSuccess) return error;
    p.x = scratch;
    p.cols = to;
  }
  return a.type == kBFloat16 ? tiles_linear<kBFloat16>(p, stream) : tiles_linear<kFloat16>(p, stream);
}

}  // namespace cuda
}  // namespace askew
