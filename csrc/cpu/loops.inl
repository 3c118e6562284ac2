// The CPU loops, included once per instruction set with ASKEW_LANES (floats per vector) and ASKEW_ISA (a
// namespace) defined. Sees no torch header and no standard library, so that nothing compiled for AVX-512 can be
// picked by the linker for an older CPU.
//
// Sums are the same on every instruction set: 16 float lanes (16 / ASKEW_LANES vectors) collect kBlock
// columns, then go to 16 double lanes, which one fixed tree adds up at the end of the tile's row.
#include "loops.h"
#include "../math/portability.h"

namespace askew {
namespace ASKEW_ISA {

#include "../math/scalar.inl"
#include "vec.inl"
#include "../math/math.inl"

constexpr int kVectors = 16 / ASKEW_LANES;  // vectors in a stripe of 16 columns
constexpr int64_t kBlock = 1024;            // columns summed in float before they go to double

// One of the storage types, chosen at run time (outputs whose type is not a template argument).
ASKEW_FN void store_as(int type, void* p, int64_t i, vf v) {
  if (type == kFloat32) Storage<kFloat32>::store((float*)p + i, v);
  else if (type == kBFloat16) Storage<kBFloat16>::store((uint16_t*)p + i, v);
  else Storage<kFloat16>::store((uint16_t*)p + i, v);
}
ASKEW_FN int64_t type_size(int type) { return type == kFloat32 ? 4 : 2; }

// A vector of which only the first n lanes exist in memory.
template <int T>
ASKEW_FN vf load_part(const typename Storage<T>::type* p, int n) {
  typename Storage<T>::type t[ASKEW_LANES] = {};
  __builtin_memcpy(t, p, n * sizeof(t[0]));
  return Storage<T>::load(t);
}
template <int T>
ASKEW_FN void store_part(typename Storage<T>::type* p, vf v, int n) {
  typename Storage<T>::type t[ASKEW_LANES];
  Storage<T>::store(t, v);
  __builtin_memcpy(p, t, n * sizeof(t[0]));
}
ASKEW_FN void store_part_as(int type, void* p, int64_t i, vf v, int n) {
  float t[ASKEW_LANES];
  store_as(type, t, 0, v);
  __builtin_memcpy((char*)p + i * type_size(type), t, n * type_size(type));
}
ASKEW_FN vi first_lanes(int n) {
  vi lane;
  for (int i = 0; i < ASKEW_LANES; ++i) lane[i] = i;
  return lane < n;
}

// Calls body(i, lane group, n) for the columns [c0, c1) of the row that starts at element `base`:
// full vectors with n = ASKEW_LANES (a constant for the compiler), then a partial one.
template <class Body>
ASKEW_FN void for_columns(int64_t base, int64_t c0, int64_t c1, const Body& body) {
  int64_t c = c0;
  for (; c + 16 <= c1; c += 16)
    for (int k = 0; k < kVectors; ++k) body.full(base + c + k * ASKEW_LANES, k);
  for (int k = 0; c < c1; c += ASKEW_LANES, ++k) {
    if (c + ASKEW_LANES <= c1) body.full(base + c, k);
    else body.part(base + c, k, (int)(c1 - c));
  }
}

// ---- sums ---------------------------------------------------------------------------------------------------

struct Lanes16 {  // float lanes of one block, double lanes of one row
  vf now[kVectors];
  double total[16];
};
ASKEW_FN void clear(Lanes16& s) {
  for (int k = 0; k < kVectors; ++k) s.now[k] = vf{};
  for (int i = 0; i < 16; ++i) s.total[i] = 0;
}
ASKEW_FN void flush_add(Lanes16& s) {
  for (int k = 0; k < kVectors; ++k) {
    float t[ASKEW_LANES];
    __builtin_memcpy(t, &s.now[k], sizeof t);
    for (int i = 0; i < ASKEW_LANES; ++i) s.total[k * ASKEW_LANES + i] += (double)t[i];
    s.now[k] = vf{};
  }
}
ASKEW_FN double finish_add(Lanes16& s) {
  flush_add(s);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) s.total[i] += s.total[i + width];
  return s.total[0];
}
ASKEW_FN double finish_max(const Lanes16& s) {  // a NaN wins
  float m = 0;
  for (int k = 0; k < kVectors; ++k)
    for (int i = 0; i < ASKEW_LANES; ++i) {
      const float v = s.now[k][i];
      m = (v > m || v != v) ? v : m;
      if (m != m) return (double)m;
    }
  return (double)m;
}
ASKEW_FN vf maximum_nan(vf a, vf b) { return select(both(b <= a, b == b) | (a != a), a, b); }

struct RowSums {
  Lanes16 abs, squares, peak;
};
ASKEW_FN void clear(RowSums& s) {
  clear(s.abs);
  clear(s.squares);
  clear(s.peak);
}
ASKEW_FN void add(RowSums& s, int k, vf w) {
  vf a = absolute(w);
  s.abs.now[k] += a;
  s.squares.now[k] += w * w;
  s.peak.now[k] = maximum_nan(s.peak.now[k], a);
}
ASKEW_FN void flush(RowSums& s) {
  flush_add(s.abs);
  flush_add(s.squares);
}
ASKEW_FN void finish(RowSums& s, double* out) {
  out[kSumAbs] = finish_add(s.abs);
  out[kSumSquares] = finish_add(s.squares);
  out[kMaxAbs] = finish_max(s.peak);
}

template <int T>
struct RowSumsBody {
  const typename Storage<T>::type* x;
  RowSums& sums;
  ASKEW_INLINE void full(int64_t i, int k) const { add(sums, k, Storage<T>::load(x + i)); }
  ASKEW_INLINE void part(int64_t i, int k, int n) const { add(sums, k, load_part<T>(x + i, n)); }
};

template <int T>
void row_sums_typed(const void* x, int64_t cols, Tile t, double* out) {
  for (int64_t r = t.row0; r < t.row1; ++r, out += kRowSums) {
    RowSums sums;
    clear(sums);
    for (int64_t c = t.col0; c < t.col1; c += kBlock) {
      const int64_t end = c + kBlock < t.col1 ? c + kBlock : t.col1;
      for_columns(r * cols, c, end, RowSumsBody<T>{(const typename Storage<T>::type*)x, sums});
      flush(sums);
    }
    finish(sums, out);
  }
}

// ---- elementwise passes -------------------------------------------------------------------------------------

template <int T, class Grid>
struct QuantizeBody {
  const typename Storage<T>::type* x;
  void* y;
  int y_type;
  vf scale;
  Grid grid;
  ASKEW_INLINE void full(int64_t i, int) const {
    store_as(y_type, y, i, quantize_dequantize(Storage<T>::load(x + i), scale, grid));
  }
  ASKEW_INLINE void part(int64_t i, int, int n) const {
    store_part_as(y_type, y, i, quantize_dequantize(load_part<T>(x + i, n), scale, grid), n);
  }
};

template <int T, class Grid>
struct StochasticBody {
  const typename Storage<T>::type* x;
  void* y;
  int y_type;
  vf scale;
  Grid grid;
  uint64_t seed;
  ASKEW_INLINE vf value(int64_t i, vf w) const {
    float u[ASKEW_LANES];
    for (int l = 0; l < ASKEW_LANES; ++l) {
      const uint64_t e = (uint64_t)(i + l);
      u[l] = uniform01(philox(seed, e >> 2).word[e & 3]);
    }
    vf uniform;
    __builtin_memcpy(&uniform, u, sizeof uniform);
    return scale * stochastic_level(divide(w, scale), uniform, grid);
  }
  ASKEW_INLINE void full(int64_t i, int) const { store_as(y_type, y, i, value(i, Storage<T>::load(x + i))); }
  ASKEW_INLINE void part(int64_t i, int, int n) const {
    store_part_as(y_type, y, i, value(i, load_part<T>(x + i, n)), n);
  }
};

template <int T, class Grid>
struct SteClipBody {
  typedef typename Storage<T>::type S;
  const S *g, *x;
  S* out;
  vf scale;
  Grid grid;
  ASKEW_INLINE void full(int64_t i, int) const {
    Storage<T>::store(out + i, pass_inside(Storage<T>::load(g + i), Storage<T>::load(x + i), scale, grid));
  }
  ASKEW_INLINE void part(int64_t i, int, int n) const {
    store_part<T>(out + i, pass_inside(load_part<T>(g + i, n), load_part<T>(x + i, n), scale, grid), n);
  }
};

template <int T, class Grid>
struct ProjectBody {
  typename Storage<T>::type* w;
  vf scale;
  Grid grid;
  float radius;
  ASKEW_INLINE void full(int64_t i, int) const {
    Storage<T>::store(w + i, project_interval(Storage<T>::load(w + i), scale, grid, radius));
  }
  ASKEW_INLINE void part(int64_t i, int, int n) const {
    store_part<T>(w + i, project_interval(load_part<T>(w + i, n), scale, grid, radius), n);
  }
};

// ---- the update: one read and one write of everything -------------------------------------------------------

template <int T, class Rule, class Grid>
struct UpdateBody {
  typedef typename Storage<T>::type S;
  S* w;
  const S* g;
  S *a, *b;
  void* dequantized;
  int dequantized_type;
  vf scale;
  Grid grid;
  const Hyper& h;
  RowSums* row_sums;
  Lanes16* totals;  // [kTotals] or null

  // Everything for one vector that is already in registers; lanes beyond n hold zeros.
  ASKEW_INLINE vf process(vf old, vf grad, vf& va, vf& vb, int k, vi valid, vf& copy) const {
    vf ga = va, gb = vb;
    Stepped<vf> s = step_weight<Rule>(old, grad, va, vb, a != nullptr, scale, grid, h);
    vi finite = absolute(grad) < __builtin_inff();
    vf stored = s.w;
    if (h.skip_nonfinite) {
      stored = select(finite, stored, old);
      s.velocity = select(finite, s.velocity, vf{});
      va = select(finite, va, ga);
      vb = select(finite, vb, gb);
      grad = select(finite, grad, vf{});
    }
    stored = select(valid, Storage<T>::rounded(stored), vf{});
    if (row_sums) add(*row_sums, k, stored);
    vf level;
    if (dequantized || totals) level = grid.nearest(divide(stored, scale));
    if (dequantized) copy = scale * level;
    if (totals) {
      totals[kInfeasible].now[k] += select(valid, s.infeasible, vf{});
      totals[kViolation].now[k] += select(valid, s.violation, vf{});
      totals[kVelocity2].now[k] += select(valid, s.velocity * s.velocity, vf{});
      totals[kGradVelocity].now[k] += select(valid, grad * s.velocity, vf{});
      totals[kFlips].now[k] += select(both(valid, level != s.level), vf{} + 1.f, vf{});
      totals[kNonfinite].now[k] += select(both(valid, ~finite), vf{} + 1.f, vf{});
    }
    return stored;
  }
  ASKEW_INLINE void full(int64_t i, int k) const {
    vf va{}, vb{}, copy{};
    if (a) va = Storage<T>::load(a + i);
    if (b) vb = Storage<T>::load(b + i);
    vf stored = process(Storage<T>::load(w + i), Storage<T>::load(g + i), va, vb, k, vi{} - 1, copy);
    Storage<T>::store(w + i, stored);
    if (a) Storage<T>::store(a + i, va);
    if (b) Storage<T>::store(b + i, vb);
    if (dequantized) store_as(dequantized_type, dequantized, i, copy);
  }
  ASKEW_INLINE void part(int64_t i, int k, int n) const {
    vf va{}, vb{}, copy{};
    if (a) va = load_part<T>(a + i, n);
    if (b) vb = load_part<T>(b + i, n);
    vf stored = process(load_part<T>(w + i, n), load_part<T>(g + i, n), va, vb, k, first_lanes(n), copy);
    store_part<T>(w + i, stored, n);
    if (a) store_part<T>(a + i, va, n);
    if (b) store_part<T>(b + i, vb, n);
    if (dequantized) store_part_as(dequantized_type, dequantized, i, copy, n);
  }
};

template <int T, class Rule, class Grid>
void update_typed(const UpdateTensor& t, const Hyper& h, Tile tile, double* row_sums, double* totals) {
  typedef typename Storage<T>::type S;
  Lanes16 lanes[kTotals];
  if (totals)
    for (int j = 0; j < kTotals; ++j) clear(lanes[j]);
  RowSums sums;
  int64_t since_flush = 0;
  for (int64_t r = tile.row0; r < tile.row1; ++r) {
    if (row_sums) clear(sums);
    for (int64_t c = tile.col0; c < tile.col1; c += kBlock) {
      const int64_t end = c + kBlock < tile.col1 ? c + kBlock : tile.col1;
      for_columns(r * t.cols, c, end,
                  UpdateBody<T, Rule, Grid>{(S*)t.w, (const S*)t.g, (S*)t.a, (S*)t.b, t.dequantized, t.dequantized_type,
                                            vf{} + t.scale[r], Grid::make(t.grid), h, row_sums ? &sums : nullptr,
                                            totals ? lanes : nullptr});
      if (row_sums) flush(sums);
      since_flush += end - c;
      if (totals && since_flush >= kBlock) {
        for (int j = 0; j < kTotals; ++j) flush_add(lanes[j]);
        since_flush = 0;
      }
    }
    if (row_sums) {
      finish(sums, row_sums);
      row_sums += kRowSums;
    }
  }
  if (totals)
    for (int j = 0; j < kTotals; ++j) totals[j] = finish_add(lanes[j]);
}

// ---- choosing the template: storage type x grid (x rule) ----------------------------------------------------

#define ASKEW_BY_GRID(GRID, CALL)                                        \
  switch ((GRID).kind) {                                                 \
    case kUniform: { typedef UniformGrid Grid; CALL; break; }            \
    case kBinary: { typedef BinaryGrid Grid; CALL; break; }              \
    default: { typedef CodebookGrid Grid; CALL; break; }                 \
  }
#define ASKEW_BY_TYPE(TYPE, CALL)                                        \
  switch (TYPE) {                                                        \
    case kFloat32: { constexpr int T = kFloat32; CALL; break; }          \
    case kBFloat16: { constexpr int T = kBFloat16; CALL; break; }        \
    default: { constexpr int T = kFloat16; CALL; break; }                \
  }

template <class Body>
ASKEW_FN void for_tile(int64_t cols, Tile t, const float* scale, Body body) {
  for (int64_t r = t.row0; r < t.row1; ++r) {
    body.scale = vf{} + scale[r];
    for_columns(r * cols, t.col0, t.col1, body);
  }
}

static void fake_quantize(const void* x, int x_type, void* y, int y_type, const float* scale, GridArg g, int64_t cols,
                          Tile t) {
  ASKEW_BY_TYPE(x_type, ASKEW_BY_GRID(g, (for_tile(cols, t, scale,
      QuantizeBody<T, Grid>{(const typename Storage<T>::type*)x, y, y_type, vf{}, Grid::make(g)}))))
}

static void stochastic_quantize(const void* x, int x_type, void* y, int y_type, const float* scale, GridArg g,
                                int64_t cols, Tile t, uint64_t seed) {
  ASKEW_BY_TYPE(x_type, ASKEW_BY_GRID(g, (for_tile(cols, t, scale,
      StochasticBody<T, Grid>{(const typename Storage<T>::type*)x, y, y_type, vf{}, Grid::make(g), seed}))))
}

static void ste_clip(const void* g, const void* x, int type, void* out, const float* scale, GridArg grid, int64_t cols,
                     Tile t) {
  ASKEW_BY_TYPE(type, ASKEW_BY_GRID(grid, (for_tile(cols, t, scale,
      SteClipBody<T, Grid>{(const typename Storage<T>::type*)g, (const typename Storage<T>::type*)x,
                           (typename Storage<T>::type*)out, vf{}, Grid::make(grid)}))))
}

static void project_interval_pass(void* w, int type, const float* scale, GridArg g, float eps, int64_t cols, Tile t) {
  const float radius = feasible_radius(eps);
  ASKEW_BY_TYPE(type, ASKEW_BY_GRID(g, (for_tile(cols, t, scale,
      ProjectBody<T, Grid>{(typename Storage<T>::type*)w, vf{}, Grid::make(g), radius}))))
}

static void row_sums(const void* x, int type, int64_t cols, Tile t, double* sums) {
  ASKEW_BY_TYPE(type, row_sums_typed<T>(x, cols, t, sums))
}

static void update(const UpdateTensor& t, int rule, const Hyper& h, Tile tile, double* row_sums, double* totals) {
  if (rule == kSgd) {
    ASKEW_BY_TYPE(t.type, ASKEW_BY_GRID(t.grid, (update_typed<T, Sgd, Grid>(t, h, tile, row_sums, totals))))
  } else {
    ASKEW_BY_TYPE(t.type, ASKEW_BY_GRID(t.grid, (update_typed<T, AdamW, Grid>(t, h, tile, row_sums, totals))))
  }
}

static const Loops table = {ASKEW_ISA_NAME, fake_quantize, stochastic_quantize, ste_clip, project_interval_pass, row_sums, update};

}  // namespace ASKEW_ISA
}  // namespace askew
