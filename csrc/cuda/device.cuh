// What the kernels share: how a matrix is cut, 16-byte access, storage types, sums.
//
// GEOMETRY. A matrix of rows that share a scale is cut along its rows, so that a thread finds its scale without a
// division and a row's sums stay together. A *team* of 8 to 32 neighbouring lanes (a whole block of 256 threads for
// long rows) takes one row, or one piece of a long row, in *slots*: in each slot every thread handles 16 bytes of
// parameters (4 floats or 8 halves), neighbours side by side, so a warp touches whole 128-byte lines. Short rows:
// several teams a block, several rows a team. The cut depends on the shape alone, never on the device or on the other
// tensors of a list, and so do the results. Rows that do not start at multiples of 16 bytes (odd cols, shifted views)
// use the same slots with single-element accesses, neighbours still side by side.
//
// On an H200 (132 SMs, copy 4.15 TB/s, some 18 bytes a cycle and SM), measured:
// MEMORY. Kernels of 1 to 4 slots a thread reach 1.0 of copy, of 16 slots 0.96 to 0.98; more loads under way at once
// change nothing where 40 of 64 warps are resident. So passes that sum nothing take few slots, and registers count: 48
// for 40 warps. Blocks are not persistent, and blocks of all tensors of a list stand in one launch, so no SM waits for
// another tensor's tail.
// ARITHMETIC. An SM issues 128 lane-operations a cycle: 82 a weight for fp32 SGD (12 B), 138 with momentum (20 B), but
// only 41 for bf16 SGD (6 B) and 27 for a bf16 quantization (4 B). With 24 warps and long bodies (instruction cache)
// 0.6 to 0.7 of that is reached, with 40 and short ones nearly all. Hence division by the scale through its correctly
// rounded reciprocal (math/scalar.inl), clamps of two instructions, and 32-bit index arithmetic inside a block.
#pragma once
#include <initializer_list>

#include "intrinsics.cuh"
#include "kernels.h"
#include "../math/choose.h"

namespace askew {
namespace cuda {
namespace {

#include "../math/scalar.inl"
// In place of math's template, half its instructions: NaN in x survives as there.
__device__ __forceinline__ float clamp_between(float x, float lo, float hi) { return max_nan(lo, min_nan(x, hi)); }
__device__ __forceinline__ float lesser(float a, float b) { return fminf(a, b); }     // no b is NaN alone
__device__ __forceinline__ float greater(float a, float b) { return max_nan(a, b); }  // no a is NaN
#include "../math/math.inl"

constexpr int kBlockShift = 8, kThreads = 1 << kBlockShift, kWarpShift = 5;
constexpr unsigned kWholeWarp = 0xffffffffu;

// ---- storage types ------------------------------------------------------------------------------------------

// Elements live in 32-bit words as they came from memory: one float, or two halves.
template <int T>
struct Storage {
  typedef uint16_t type, bits;
  static constexpr int kPerWord = 2, kPerVector = 8;
  static __device__ __forceinline__ float get(uint32_t word, int e) {
    if (T == kBFloat16) return __uint_as_float(e ? word & 0xffff0000u : word << 16);
    return widen_f16((uint16_t)(e ? word >> 16 : word));
  }
  static __device__ __forceinline__ uint32_t put(const float* v) {
    return T == kBFloat16 ? pack_bf16(v[0], v[1]) : pack_f16(v[0], v[1]);
  }
};
template <>
struct Storage<kFloat32> {
  typedef float type;
  typedef uint32_t bits;
  static constexpr int kPerWord = 1, kPerVector = 4;
  static __device__ __forceinline__ float get(uint32_t word, int) { return __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t put(const float* v) { return __float_as_uint(v[0]); }
};

inline int per_vector(int type) { return 16 / type_size(type); }

// Four levels in a word.
template <>
struct Storage<kInt8> {
  typedef uint8_t type, bits;
  static constexpr int kPerWord = 4, kPerVector = 16;
  static __device__ __forceinline__ uint32_t put(const float* v) {
    uint32_t word = 0;
    ASKEW_EACH (e, 4)  // the low byte of an integer that was rounded by adding; NaN is 0
      word |= (__float_as_uint(v[e] == v[e] ? v[e] + kRounding : 0.f) & 0xffu) << (8 * e);
    return word;
  }
};

// Ties to even, gradual underflow, ends at 448; NaN is 0x7f.
__device__ __forceinline__ uint32_t narrow_e4m3(float v) {
  const uint32_t bits = __float_as_uint(v), sign = (bits >> 24) & 0x80u, a = bits & 0x7fffffffu;
  if (a > 0x7f800000u) return 0x7fu;
  if (a > 0x43e00000u) return sign | 0x7eu;
  if (a < 0x3c800000u) return sign | (__float_as_uint(fabsf(v) + 16384.f) - 0x46800000u);  // multiples of 2^-9
  return sign | ((a - 0x3c000000u + 0x7ffffu + ((a >> 20) & 1u)) >> 20);
}
template <>
struct Storage<kFloat8> {
  typedef uint8_t type, bits;
  static constexpr int kPerWord = 4, kPerVector = 16;
  static __device__ __forceinline__ uint32_t put(const float* v) {
#if __CUDA_ARCH__ >= 890
    return pack_e4m3(v[0], v[1]) | pack_e4m3(v[2], v[3]) << 16;
#else
    return narrow_e4m3(v[0]) | narrow_e4m3(v[1]) << 8 | narrow_e4m3(v[2]) << 16 | narrow_e4m3(v[3]) << 24;
#endif
  }
};

struct Words {  // 16 bytes of one tensor
  uint32_t word[4];
};

// ---- geometry -----------------------------------------------------------------------------------------------

struct Cut {
  int16_t team_shift;     // log2 of the threads that share a row: of a warp at most, or of the block
  int16_t slots;          // vectors that a thread takes of one row, or of one piece of a row
  int16_t rows_per_team;  // rows that a team takes one after the other; 1 where rows are in pieces
  bool vectors;           // 16-byte access is possible everywhere
  int32_t pieces;         // blocks that share a row; > 1 only with team = block
  int64_t rows, cols;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// vectors: every pointer is aligned to its vector and cols is a multiple of `width`, elements in a vector.
// most_slots: of a thread, where the matrix is large; the order of sums depends on it, so passes that sum leave it.
inline Cut make_cut(Matrix m, int width, bool vectors, int64_t most_slots = kSumSlots) {
  Cut c{};
  c.vectors = vectors;
  c.rows = m.rows;
  c.cols = m.cols;
  c.pieces = 1;
  // small matrices are spread over more blocks
  const int64_t depth = m.rows * m.cols >= (1 << 21) ? most_slots : 4;
  if (m.rows == 0 || m.cols == 0) return c;
  const int64_t units = vectors ? m.cols / width : m.cols;  // what neighbouring threads take
  const int64_t per_thread = vectors ? 1 : width;           // units in a thread's slot
  if (units > 32 * 2 * depth * per_thread) {
    c.team_shift = kBlockShift;
    c.pieces = (int32_t)ceil_div(units, kThreads * per_thread * depth);
    c.slots = (int16_t)ceil_div(units, kThreads * per_thread * c.pieces);
    c.pieces = (int32_t)ceil_div(units, kThreads * per_thread * c.slots);
    c.rows_per_team = (int16_t)(c.pieces > 1 ? 1 : depth / c.slots);
    return c;
  }
  int64_t idle_best = -1;
  for (int shift = 0; shift <= kWarpShift; ++shift) {
    const int64_t team = (int64_t)1 << shift, slots = ceil_div(units, team * per_thread);
    // 8 lanes make a full line; fewer serve only rows that are shorter
    if (shift < 3 && team < units) continue;
    if (shift < kWarpShift && slots > depth) continue;
    const int64_t idle = slots * team * per_thread - units;
    if (idle_best < 0 || idle <= idle_best) {
      idle_best = idle;
      c.team_shift = (int16_t)shift;
      c.slots = (int16_t)slots;
    }
    if (team >= units) break;
  }
  c.rows_per_team = (int16_t)(c.slots < depth ? depth / c.slots : 1);
  return c;
}

inline int64_t rows_per_block(const Cut& c) { return (int64_t)c.rows_per_team << (kBlockShift - c.team_shift); }
inline int64_t blocks_of(const Cut& c) {
  if (c.rows == 0 || c.cols == 0) return 0;
  return c.pieces > 1 ? c.rows * c.pieces : ceil_div(c.rows, rows_per_block(c));
}

inline bool aligned(const void* p, int type, int width) {
  const int bytes = width * type_size(type);
  return (uintptr_t)p % (bytes < 16 ? bytes : 16) == 0;
}

// The cut of a matrix of one storage type, for a pass over `all` tensors of its shape and type (null: absent).
inline Cut cut_for(Matrix m, int type, std::initializer_list<const void*> all, bool others_aligned = true,
                   int64_t most_slots = kSumSlots) {
  const int width = per_vector(type);
  bool vectors = others_aligned && m.cols % width == 0;
  for (const void* p : all) vectors = vectors && aligned(p, type, width);
  return make_cut(m, width, vectors, most_slots);
}

// One slot of one thread.
struct Spot {
  int64_t row, index;  // element j stands at index + (j << shift)
  int n;               // elements that exist; 0 to a vector
  bool starts_row;     // the first slot of its row (or piece)
  bool ends_row;       // the last slot of its row (or piece); the same for all threads of the block
};

// Where a thread stands: its slots come one after the other, row by row. Every thread of the block has the same
// number of slots, `count`, so that sums may use shuffles and barriers.
template <int T>
struct Walk {
  static constexpr int kWidth = Storage<T>::kPerVector;
  const Cut& cut;
  int64_t row, base;         // base: index of the row's first element in this block
  int rows_left, rows_step;  // rows_left <= 0: past the last row, of the block or of the matrix
  int columns, first, col,
      step;  // within the piece of a row that the block has; 32 bits, which index in 64 do not need
  int count, slot, slots, shift;
  bool vectors;

  __device__ __forceinline__ Walk(const Cut& c, uint32_t block) : cut(c) {
    const int lane = threadIdx.x & ((1 << c.team_shift) - 1), team = threadIdx.x >> c.team_shift;
    vectors = c.vectors;
    shift = vectors ? 0 : c.team_shift;
    step = kWidth << c.team_shift;
    slots = c.slots;
    slot = 0;
    count = slots * c.rows_per_team;
    rows_step = kThreads >> c.team_shift;
    first = col = vectors ? lane * kWidth : lane;
    int64_t begin = 0;
    row = (int64_t)block * (rows_step * c.rows_per_team) + team;
    if (c.pieces > 1) {
      row = block / (uint32_t)c.pieces;
      begin = (int64_t)(block % (uint32_t)c.pieces) * (slots * step);
    }
    base = row * c.cols + begin;
    columns = (int)(c.cols - begin < slots * step ? c.cols - begin : slots * step);
    const int own = rows_step * c.rows_per_team - team;
    rows_left = c.rows - row < own ? (int)(c.rows - row) : own;
  }
  // The next slot; `taken` counts from 0, beyond `count` slots are empty.
  __device__ __forceinline__ Spot take(int taken) {
    Spot s{row, base + col, 0, slot == 0, slot == slots - 1 && taken < count};
    const int left = rows_left > 0 ? columns - col : 0;
    s.n = vectors ? kWidth : min(kWidth, (left + (1 << shift) - 1) >> shift);
    if (left <= 0) s.n = 0;
    col += step;
    if (++slot == slots) {
      slot = 0;
      col = first;
      next_row();
    }
    return s;
  }
  __device__ __forceinline__ void next_row() {
    row += rows_step;
    base += rows_step * cut.cols;
    rows_left -= rows_step;
  }
};

// ---- access -------------------------------------------------------------------------------------------------

template <int T>
__device__ __forceinline__ Words load(const void* p, const Spot& s, const Walk<T>& walk) {
  typedef typename Storage<T>::type S;
  const S* at = (const S*)p + s.index;
  Words w{{0, 0, 0, 0}};
  if (walk.vectors) {
    if (s.n) {
      const uint4 v = *(const uint4*)at;
      w = {{v.x, v.y, v.z, v.w}};
    }
  } else {
    ASKEW_EACH (j, Storage<T>::kPerVector)
      if (j < s.n) {
        if (T == kFloat32)
          w.word[j / Storage<T>::kPerWord] = ((const uint32_t*)at)[j << walk.shift];
        else
          w.word[j / Storage<T>::kPerWord] |= (uint32_t)((const uint16_t*)at)[j << walk.shift] << (16 * (j & 1));
      }
  }
  return w;
}

// N neighbouring elements as floats: a vector's, or one.
template <int T, int N>
__device__ __forceinline__ void load_elements(const void* p, int64_t index, float (&v)[N]) {
  const typename Storage<T>::type* at = (const typename Storage<T>::type*)p + index;
  if constexpr (N == 1) {
    v[0] = Storage<T>::get(*(const typename Storage<T>::bits*)at, 0);
  } else {
    const uint4 words = *(const uint4*)at;
    const Words w{{words.x, words.y, words.z, words.w}};
    ASKEW_EACH (j, N) v[j] = Storage<T>::get(w.word[j / Storage<T>::kPerWord], j % Storage<T>::kPerWord);
  }
}
// Of values as they are stored.
template <int S, int N>
__device__ __forceinline__ void store_elements(void* p, int64_t index, const float (&v)[N]) {
  constexpr int kPer = Storage<S>::kPerWord, kWords = (N + kPer - 1) / kPer;
  typename Storage<S>::type* at = (typename Storage<S>::type*)p + index;
  uint32_t word[kWords];
  float padded[kWords * kPer] = {};
  ASKEW_EACH (j, N) padded[j] = v[j];
  ASKEW_EACH (q, kWords) word[q] = Storage<S>::put(padded + q * kPer);
  if constexpr (N < kPer)
    *(typename Storage<S>::bits*)at = (typename Storage<S>::bits)word[0];
  else if constexpr (kWords == 1)
    *(uint32_t*)at = word[0];
  else if constexpr (kWords == 2)
    store_words2(at, word[0], word[1]);
  else
    ASKEW_EACH (q, kWords / 4)
      store_words4((uint4*)at + q, word[4 * q], word[4 * q + 1], word[4 * q + 2], word[4 * q + 3]);
}
template <int N>  // the type chosen at run time
__device__ __forceinline__ void store_elements_as(int type, void* p, int64_t index, const float (&v)[N]) {
  switch (type) {
    case kFloat32:
      return store_elements<kFloat32>(p, index, v);
    case kBFloat16:
      return store_elements<kBFloat16>(p, index, v);
    case kFloat16:
      return store_elements<kFloat16>(p, index, v);
    case kInt8:
      return store_elements<kInt8>(p, index, v);
    default:
      return store_elements<kFloat8>(p, index, v);
  }
}
// The values as they will be read again.
template <int T, int N>
__device__ __forceinline__ void round_to_storage(float (&v)[N]) {
  if constexpr (T != kFloat32)
    ASKEW_EACH (j, N) {
      const float pair[2] = {v[j], v[j]};
      v[j] = Storage<T>::get(Storage<T>::put(pair), 0);
    }
}

// A slot's values, of a walk over type T, as words of type S: 2, 4 or 8 of them.
template <int S, int T>
__device__ __forceinline__ void store_words(void* p, const uint32_t* word, const Spot& s, const Walk<T>& walk) {
  constexpr int kPer = Storage<S>::kPerWord, kWords = Storage<T>::kPerVector / kPer;
  typedef typename Storage<S>::type Element;
  Element* at = (Element*)p + s.index;
  if (walk.vectors) {
    if (s.n == 0) return;
    if (kWords == 1) *(uint32_t*)at = word[0];
    if (kWords == 2) *(uint2*)at = make_uint2(word[0], word[1]);
#pragma unroll
    for (int q = 0; q + 3 < kWords; q += 4)
      ((uint4*)at)[q / 4] = make_uint4(word[q], word[q + 1], word[q + 2], word[q + 3]);
  } else {
    ASKEW_EACH (j, Storage<T>::kPerVector)
      if (j < s.n) {
        if (S == kFloat32)
          ((uint32_t*)at)[j << walk.shift] = word[j / kPer];
        else
          at[j << walk.shift] = (Element)(word[j / kPer] >> (8 * (int)sizeof(Element) * (j % kPer)));
      }
  }
}
template <int T>
__device__ __forceinline__ void store(void* p, const Words& w, const Spot& s, const Walk<T>& walk) {
  store_words<T>(p, w.word, s, walk);
}
template <int S, int T>
__device__ __forceinline__ void store_converted(void* p, const float* v, const Spot& s, const Walk<T>& walk) {
  constexpr int kPer = Storage<S>::kPerWord, kWords = Storage<T>::kPerVector / kPer;
  uint32_t word[kWords];
  ASKEW_EACH (q, kWords) word[q] = Storage<S>::put(v + q * kPer);
  store_words<S>(p, word, s, walk);
}
template <int T>  // the type chosen at run time
__device__ __forceinline__ void store_as(int type, void* p, const float* v, const Spot& s, const Walk<T>& walk) {
  if (type == kFloat32)
    store_converted<kFloat32>(p, v, s, walk);
  else if (type == kBFloat16)
    store_converted<kBFloat16>(p, v, s, walk);
  else if (type == kFloat16)
    store_converted<kFloat16>(p, v, s, walk);
  else if (type == kInt8)
    store_converted<kInt8>(p, v, s, walk);
  else
    store_converted<kFloat8>(p, v, s, walk);
}

// Value j of a slot.
template <int T>
__device__ __forceinline__ float element(const Words& w, int j) {
  return Storage<T>::get(w.word[j / Storage<T>::kPerWord], j % Storage<T>::kPerWord);
}
// The words of a slot with f(element of a, element of b) in place of a.
template <int T, class F>
__device__ __forceinline__ Words map_words(const Words& a, const Words& b, const F& f) {
  constexpr int kPer = Storage<T>::kPerWord;
  Words out;
  ASKEW_EACH (q, 4) {
    float v[kPer];
    ASKEW_EACH (e, kPer) v[e] = f(Storage<T>::get(a.word[q], e), Storage<T>::get(b.word[q], e));
    out.word[q] = Storage<T>::put(v);
  }
  return out;
}

// A row whose ends are as a clamped weight is stored.
template <int T, class Row>
__device__ __forceinline__ Row with_stored_ends(Row row) {
  const float ends[2] = {row.low, row.high};
  if (T == kFloat32) return row;
  const uint32_t stored = Storage<T>::put(ends);
  row.low = Storage<T>::get(stored, 0);
  row.high = Storage<T>::get(stored, 1);
  return row;
}

// The tensor of a list that this block belongs to: the last one that starts at it or before.
template <class List>
__device__ __forceinline__ int tensor_of_block(const List& list) {
  int low = 0, high = list.n - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (blockIdx.x >= list.first_block[middle])
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__device__ __forceinline__ double read(const Scalar& s) {
  if (!s.device) return s.value;
  return s.is_double ? *(const double*)s.device : (double)*(const float*)s.device;
}

// Calls run(words of every source, scale of the row, spot, walk) for every slot, with the loads of `Ahead` slots of all
// N sources under way at once. scale may be null where run does not use it.
template <int T, int Ahead, int N, class Run>
__device__ __forceinline__ void for_slots(const void* const (&from)[N], const float* scale, const Cut& cut,
                                          uint32_t block, const Run& run) {
  Walk<T> walk(cut, block);
  for (int taken = 0; taken < walk.count; taken += Ahead) {
    Spot spot[Ahead];
    Words words[Ahead][N];
    float scales[Ahead];
    ASKEW_EACH (u, Ahead) {
      spot[u] = walk.take(taken + u);
      ASKEW_EACH (k, N) words[u][k] = load(from[k], spot[u], walk);
      scales[u] = spot[u].n && scale ? scale[spot[u].row] : 1.f;
    }
    ASKEW_EACH (u, Ahead) run(words[u], scales[u], spot[u], walk);
  }
}

// ---- grids --------------------------------------------------------------------------------------------------

// Uniform or binary, as the kernel finds when it runs; for steps that only round to levels.
struct IntegerGrid {
  float lo, hi;
  bool binary;
  static __device__ __forceinline__ IntegerGrid make(const GridArg& g) {
    const bool binary = g.kind == kBinary;
    return {binary ? -1.f : g.lo, binary ? 1.f : g.hi, binary};
  }
  __device__ __forceinline__ float low() const { return lo; }
  __device__ __forceinline__ float high() const { return hi; }
  __device__ __forceinline__ float nearest(float x) const { return binary ? BinaryGrid{}.nearest(x) : round_even(x); }
};

constexpr int kMaxLevels = 256;

// math's CodebookGrid with its levels in shared memory and a binary search instead of a pass over them.
struct SharedCodebook {
  static constexpr bool kTiesToEven = false;
  const float* table;  // the levels, then +inf up to a power of two
  int n, half;         // half of that power of two
  __device__ __forceinline__ float low() const { return table[0]; }
  __device__ __forceinline__ float high() const { return table[n - 1]; }
  // The bracket of x: the last level <= x, but not the last of all.
  __device__ __forceinline__ int below(float x) const {
    int k = 0;
    for (int step = half; step; step >>= 1)
      if (x >= table[k + step]) k += step;
    return k < n - 2 ? k : n - 2;
  }
  __device__ __forceinline__ float nearest(float x) const {
    const int k = below(x);
    const float lower = table[k], upper = table[k + 1];
    const float r = x > 0.5f * lower + 0.5f * upper ? upper : lower;
    return x == x ? r : x;
  }
  __device__ __forceinline__ Offset<float> offset(float x) const {
    const int k = below(x);
    return offset_between(x, table[k], table[k + 1]);
  }
};

typedef SharedCodebook Codebook;

// The grid of a block. Every thread of the block calls it, before anything that may return early.
template <class Grid>
struct GridMaker {
  static __device__ __forceinline__ Grid make(const GridArg& g) { return Grid::make(g); }
};
template <>
struct GridMaker<SharedCodebook> {
  static __device__ __forceinline__ SharedCodebook make(const GridArg& g) {
    __shared__ float table[kMaxLevels];
    for (int k = threadIdx.x; k < kMaxLevels; k += blockDim.x)
      table[k] = k < g.n_levels ? g.levels[k] : __int_as_float(0x7f800000);
    __syncthreads();
    int half = 1;
    while (2 * half < g.n_levels) half *= 2;
    return {table, g.n_levels, half};
  }
};

// ---- sums ---------------------------------------------------------------------------------------------------

struct Sums {  // of one thread over one row or piece
  float abs, squares;
  uint32_t peak;  // bits of max |w|; as integers a NaN is the largest
};
__device__ __forceinline__ void add(Sums& s, float w) {
  const float a = absolute(w);
  s.abs += a;
  s.squares += w * w;
  s.peak = max(s.peak, __float_as_uint(a));
}

__device__ __forceinline__ float add_lanes(float v, int shift) {
  for (int o = 1 << shift >> 1; o; o >>= 1) v += __shfl_xor_sync(kWholeWarp, v, o);
  return v;
}
__device__ __forceinline__ uint32_t max_lanes(uint32_t v, int shift) {
  for (int o = 1 << shift >> 1; o; o >>= 1) v = max(v, __shfl_xor_sync(kWholeWarp, v, o));
  return v;
}

// Puts together the sums of a row's team and writes them: to `out` as floats, or to `partial` as doubles. The order of
// additions is fixed. Every thread of the block calls it; the row of a team may lie outside the matrix.
__device__ __forceinline__ void finish_row(Sums s, const Cut& cut, int64_t row, uint32_t block, void* out) {
  __shared__ double across[kThreads / 32][kRowSums];
  const int shift = min((int)cut.team_shift, kWarpShift);
  double sum[kRowSums] = {add_lanes(s.abs, shift), add_lanes(s.squares, shift),
                          __uint_as_float(max_lanes(s.peak, shift))};
  bool writes = (threadIdx.x & ((1 << shift) - 1)) == 0;
  if (cut.team_shift > kWarpShift) {
    if (writes)
      for (int c = 0; c < kRowSums; ++c) across[threadIdx.x >> 5][c] = sum[c];
    __syncthreads();
    writes = threadIdx.x == 0;
    if (writes)
      for (int w = 1; w < kThreads / 32; ++w) {
        sum[kSumAbs] += across[w][kSumAbs];
        sum[kSumSquares] += across[w][kSumSquares];
        if (!(across[w][kMaxAbs] <= sum[kMaxAbs]) && sum[kMaxAbs] == sum[kMaxAbs]) sum[kMaxAbs] = across[w][kMaxAbs];
      }
    __syncthreads();
  }
  if (!writes || row >= cut.rows) return;
  for (int c = 0; c < kRowSums; ++c) {
    if (cut.pieces > 1)
      ((double*)out)[(int64_t)block * kRowSums + c] = sum[c];
    else
      ((float*)out)[row * kRowSums + c] = (float)sum[c];
  }
}

// The block's sums of N numbers, added in a fixed order.
template <int N>
__device__ __forceinline__ void finish_block(const float (&sum)[N], double* out) {
  __shared__ float across[kThreads / 32][N];
  ASKEW_EACH (c, N) {
    const float v = add_lanes(sum[c], kWarpShift);
    if (threadIdx.x % 32 == 0) across[threadIdx.x / 32][c] = v;
  }
  __syncthreads();
  if (threadIdx.x < N) {
    double v = 0;
    for (int w = 0; w < kThreads / 32; ++w) v += across[w][threadIdx.x];
    out[threadIdx.x] = v;
  }
}

// ---- the second kernel: partial sums put together -----------------------------------------------------------

struct Finish {           // one row of partial sums per output row
  const double* partial;  // [rows][parts][width]
  void* out;              // [rows][width]
  bool floats;            // of out; else doubles
  int64_t parts;
  uint32_t first_block;
  int width;  // kRowSums: the last is a maximum
};
constexpr int kFinishes = 256;
struct FinishList {
  Finish item[kFinishes];
  int n;
};

__device__ __forceinline__ double combine(double a, double b, bool maximum) {
  if (!maximum) return a + b;
  return a != a || b <= a ? a : b;
}

// The sum, or the maximum, of v over the block, for thread 0; combined in a fixed order. Every thread calls it.
__device__ __forceinline__ double over_block(double v, bool maximum = false) {
  __shared__ double lanes[kThreads];
  __syncthreads();  // lanes may still be read from the last call
  lanes[threadIdx.x] = v;
  __syncthreads();
  for (int o = kThreads / 2; o; o >>= 1) {
    if ((int)threadIdx.x < o) lanes[threadIdx.x] = combine(lanes[threadIdx.x], lanes[threadIdx.x + o], maximum);
    __syncthreads();
  }
  return lanes[0];
}

// One block for each output row; parts are added in a fixed order.
__global__ void __launch_bounds__(kThreads) finish_sums(const __grid_constant__ FinishList list) {
  int i = 0;
  while (i + 1 < list.n && blockIdx.x >= list.item[i + 1].first_block) ++i;
  const Finish& f = list.item[i];
  const int64_t row = blockIdx.x - f.first_block;
  const double* from = f.partial + row * f.parts * f.width;
  for (int c = 0; c < f.width; ++c) {
    const bool maximum = f.width == kRowSums && c == kMaxAbs;
    double v = 0;
    for (int64_t k = threadIdx.x; k < f.parts; k += kThreads) v = combine(v, from[k * f.width + c], maximum);
    v = over_block(v, maximum);
    if (threadIdx.x) continue;
    if (f.floats)
      ((float*)f.out)[row * f.width + c] = (float)v;
    else
      ((double*)f.out)[row * f.width + c] = v;
  }
}

inline cudaError_t first_error(cudaError_t a, cudaError_t b) { return a != cudaSuccess ? a : b; }

// Collects what finish_sums has to do and launches it whenever a list is full.
struct Finisher {
  cudaStream_t stream;
  FinishList list{};
  uint32_t blocks = 0;
  cudaError_t error = cudaSuccess;
  template <class Out>
  void add(const double* partial, Out* out, int64_t rows, int64_t parts, int width) {
    if (rows == 0) return;
    if (list.n == kFinishes) run();
    list.item[list.n++] = {partial, out, sizeof(Out) == sizeof(float), parts, blocks, width};
    blocks += (uint32_t)rows;
  }
  cudaError_t run() {  // the first error of all
    error = first_error(error, launch(finish_sums, blocks, kThreads, stream, list));
    list.n = 0;
    blocks = 0;
    return error;
  }
};

}  // namespace

}  // namespace cuda
}  // namespace askew
