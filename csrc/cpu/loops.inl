// The CPU loops, included once per instruction set with ASKEW_LANES (floats per vector) and ASKEW_ISA (a
// namespace) defined. Sees no torch header and no standard library, so that nothing compiled for AVX-512 can be
// picked by the linker for an older CPU.
//
// A loop is a struct with its streams (what it reads and writes) and run(i, n): columns i ... i + n of the streams,
// n a multiple of 16. for_columns feeds it a row; the last columns of a row, fewer than 16, go through a padded
// stage, so every loop is written once.
//
// Sums are the same on every instruction set: 16 float lanes (16 / ASKEW_LANES vectors) collect at most kBand
// columns, then go to 16 double lanes, which one fixed tree adds up at the end of the tile's row.
#include "loops.h"
#include "../math/portability.h"
#include "../tuning.h"

#include <initializer_list>  // braces in range-for; declares no function that could be linked

namespace askew {
namespace ASKEW_ISA {

#include "../math/scalar.inl"
#include "vec.inl"
#include "../math/math.inl"

#define ASKEW_LOOP __attribute__((noinline))

constexpr int kVectors = 16 / ASKEW_LANES;  // vectors in a stripe of 16 columns
constexpr int64_t kBand = 512;              // columns that a chain of loops takes while they stay in the L1 cache

struct Stream {
  void* data;
  int size;  // bytes of an element
  bool written;
  template <class S>
  ASKEW_INLINE S* at(int64_t i) const {
    return (S*)data + i;
  }
};

ASKEW_FN int type_size(int type) { return type == kFloat32 ? 4 : 2; }

// Runs the loop over columns [c0, c1) of the row that starts at element `base`.
template <class Loop>
ASKEW_FN void for_columns(const Loop& loop, int64_t base, int64_t c0, int64_t c1) {
  const int64_t full = (c1 - c0) / 16 * 16;
  if (full) loop.run(base + c0, full);
  const int64_t rest = c1 - c0 - full;
  if (!rest) return;
  const int64_t first = base + c0 + full;
  Loop staged = loop;
  alignas(64) char stage[Loop::kStreams][64] = {};
  for (int k = 0; k < Loop::kStreams; ++k) {
    if (!loop.streams[k].data) continue;
    __builtin_memcpy(stage[k], (const char*)loop.streams[k].data + first * loop.streams[k].size,
                     rest * loop.streams[k].size);
    staged.streams[k].data = stage[k] - first * loop.streams[k].size;  // run() sees the row's own indices
  }
  staged.run(first, 16);
  for (int k = 0; k < Loop::kStreams; ++k)
    if (loop.streams[k].data && loop.streams[k].written)
      __builtin_memcpy((char*)loop.streams[k].data + first * loop.streams[k].size, stage[k],
                       rest * loop.streams[k].size);
}

// One of the storage types, chosen at run time (outputs whose type is not a template argument).
ASKEW_FN void store_as(int type, const Stream& s, int64_t i, vf v) {
  if (type == kFloat32)
    Storage<kFloat32>::store(s.at<float>(i), v);
  else if (type == kBFloat16)
    Storage<kBFloat16>::store(s.at<uint16_t>(i), v);
  else
    Storage<kFloat16>::store(s.at<uint16_t>(i), v);
}
template <int T>
ASKEW_FN vf load(const Stream& s, int64_t i) {
  return Storage<T>::load(s.at<typename Storage<T>::type>(i));
}
template <int T>
ASKEW_FN void store(const Stream& s, int64_t i, vf v) {
  Storage<T>::store(s.at<typename Storage<T>::type>(i), v);
}
template <int T>
ASKEW_FN void load(const Stream& s, int64_t i, vf& v) {
  v = load<T>(s, i);
}
template <int T>
ASKEW_FN void load(const Stream& s, int64_t i, Pair& v) {
  v = {load<T>(s, i), load<T>(s, i + ASKEW_LANES)};
}
template <int T>
ASKEW_FN void store(const Stream& s, int64_t i, Pair v) {
  store<T>(s, i, v.lo);
  store<T>(s, i + ASKEW_LANES, v.hi);
}
// Brings in what stands `ahead` columns later, so that memory keeps busy during the arithmetic. Never of null: that
// costs a failed page walk.
template <int T>
ASKEW_FN void prefetch(const Stream& s, int64_t i, int64_t ahead) {
  __builtin_prefetch(s.at<typename Storage<T>::type>(i + ahead));
}
template <class Grid>
ASKEW_FN Row<Pair, Grid> pair_of(const Row<vf, Grid>& r) {
  return {r.grid, {{r.scale.value, r.scale.value}, r.scale}, {r.low, r.low}, {r.high, r.high}};
}

// ---- sums ---------------------------------------------------------------------------------------------------

struct Lanes16 {  // float lanes of one band, double lanes of one row
  vf now[kVectors];
  double total[16];
};
ASKEW_FN void clear(Lanes16& s) {
  for (int k = 0; k < kVectors; ++k) s.now[k] = vf{};
  for (int i = 0; i < 16; ++i) s.total[i] = 0;
}
ASKEW_FN void flush(Lanes16& s) {
  for (int k = 0; k < kVectors; ++k) {
    float t[ASKEW_LANES];
    __builtin_memcpy(t, &s.now[k], sizeof t);
    for (int i = 0; i < ASKEW_LANES; ++i) s.total[k * ASKEW_LANES + i] += (double)t[i];
    s.now[k] = vf{};
  }
}
ASKEW_FN double finish(Lanes16& s) {
  flush(s);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) s.total[i] += s.total[i + width];
  return s.total[0];
}

struct RowSums {
  Lanes16 abs, squares;
  vf peak[kVectors];
};
ASKEW_FN void clear(RowSums& s) {
  clear(s.abs);
  clear(s.squares);
  for (int k = 0; k < kVectors; ++k) s.peak[k] = vf{};
}
ASKEW_FN void flush(RowSums& s) {
  flush(s.abs);
  flush(s.squares);
}
ASKEW_FN void finish(RowSums& s, double* out) {
  out[kSumAbs] = finish(s.abs);
  out[kSumSquares] = finish(s.squares);
  float m = 0;
  for (int k = 0; k < kVectors; ++k)
    for (int i = 0; i < ASKEW_LANES; ++i) m = s.peak[k][i] > m ? s.peak[k][i] : m;
  out[kMaxAbs] = out[kSumAbs] == out[kSumAbs] ? (double)m : out[kSumAbs];  // the peak passes over NaN, the sum does not
}

// One vector's part of a band's sums, in registers while a loop runs.
struct VectorSums {
  vf abs{}, squares{}, peak{};
};
ASKEW_FN void add(VectorSums& s, vf w) {
  const vf a = absolute(w);
  s.abs += a;
  s.squares += w * w;
  s.peak = select(a > s.peak, a, s.peak);
}
ASKEW_FN void add(RowSums* to, const VectorSums* vectors) {
  for (int k = 0; k < kVectors; ++k) {
    to->abs.now[k] += vectors[k].abs;
    to->squares.now[k] += vectors[k].squares;
    to->peak[k] = select(vectors[k].peak > to->peak[k], vectors[k].peak, to->peak[k]);
  }
}

template <int T>
struct RowSumsLoop {
  static constexpr int kStreams = 1;
  Stream streams[kStreams];
  RowSums* sums;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const Stream x = streams[0];
    VectorSums vectors[kVectors];
    for (const int64_t end = i + n; i < end; i += 16)
      for (int k = 0; k < kVectors; ++k) add(vectors[k], load<T>(x, i + k * ASKEW_LANES));
    add(sums, vectors);
  }
};

template <int T>
void row_sums_typed(const void* x, int64_t cols, Tile t, double* out) {
  for (int64_t r = t.row0; r < t.row1; ++r, out += kRowSums) {
    RowSums sums;
    clear(sums);
    const RowSumsLoop<T> loop{{{(void*)x, type_size(T), false}}, &sums};
    for (int64_t c = t.col0; c < t.col1; c += kBand) {
      for_columns(loop, r * cols, c, c + kBand < t.col1 ? c + kBand : t.col1);
      flush(sums);
    }
    finish(sums, out);
  }
}

// ---- elementwise passes -------------------------------------------------------------------------------------

template <int T, class Grid>
struct QuantizeLoop {
  static constexpr int kStreams = 2;
  Stream streams[kStreams];  // x, y
  int y_type;
  Row<vf, Grid> row;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const QuantizeLoop l = *this;
    const int64_t ahead = tuning.prefetch_columns;
    for (const int64_t end = i + n; i < end; i += ASKEW_LANES) {
      prefetch<T>(l.streams[0], i, ahead);
      prefetch<T>(l.streams[1], i, ahead);
      store_as(l.y_type, l.streams[1], i, quantize_dequantize(load<T>(l.streams[0], i), l.row));
    }
  }
};

template <int T, class Grid>
struct StochasticLoop {
  static constexpr int kStreams = 2;
  Stream streams[kStreams];  // x, y
  int y_type;
  Row<vf, Grid> row;
  uint64_t seed;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    for (const int64_t end = i + n; i < end; i += ASKEW_LANES) {
      float u[ASKEW_LANES];
      for (int l = 0; l < ASKEW_LANES; ++l) {
        const uint64_t e = (uint64_t)(i + l);
        u[l] = uniform01(philox(seed, e >> 2).word[e & 3]);
      }
      vf uniform;
      __builtin_memcpy(&uniform, u, sizeof uniform);
      store_as(y_type, streams[1], i, row.scale.value * stochastic_level(load<T>(streams[0], i), uniform, row));
    }
  }
};

template <int T, class Grid>
struct SteClipLoop {
  static constexpr int kStreams = 3;
  Stream streams[kStreams];  // grad, x, out
  Row<vf, Grid> row;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    SteClipLoop l = *this;
    l.row.low = Storage<T>::rounded(l.row.low);  // the ends as a clamped weight is stored
    l.row.high = Storage<T>::rounded(l.row.high);
    const int64_t ahead = tuning.prefetch_columns;
    for (const int64_t end = i + n; i < end; i += ASKEW_LANES) {
      for (const Stream& s : l.streams) prefetch<T>(s, i, ahead);
      store<T>(l.streams[2], i, pass_inside(load<T>(l.streams[0], i), load<T>(l.streams[1], i), l.row));
    }
  }
};

template <int T, class Grid>
struct ProjectLoop {
  static constexpr int kStreams = 1;
  Stream streams[kStreams];
  float radius;
  Row<vf, Grid> row;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const ProjectLoop l = *this;
    for (const int64_t end = i + n; i < end; i += ASKEW_LANES)
      store<T>(l.streams[0], i, project_interval(load<T>(l.streams[0], i), l.row, l.radius));
  }
};

#define ASKEW_BY_GRID(GRID, CALL) \
  switch ((GRID).kind) {          \
    case kUniform: {              \
      typedef UniformGrid Grid;   \
      CALL;                       \
      break;                      \
    }                             \
    case kBinary: {               \
      typedef BinaryGrid Grid;    \
      CALL;                       \
      break;                      \
    }                             \
    default: {                    \
      typedef CodebookGrid Grid;  \
      CALL;                       \
      break;                      \
    }                             \
  }
#define ASKEW_BY_TYPE(TYPE, CALL)  \
  switch (TYPE) {                  \
    case kFloat32: {               \
      constexpr int T = kFloat32;  \
      CALL;                        \
      break;                       \
    }                              \
    case kBFloat16: {              \
      constexpr int T = kBFloat16; \
      CALL;                        \
      break;                       \
    }                              \
    default: {                     \
      constexpr int T = kFloat16;  \
      CALL;                        \
      break;                       \
    }                              \
  }

#include "sam_loops.inl"
#include "mix_loops.inl"

// ---- the update: one read and one write of everything -------------------------------------------------------
//
// A band of at most kBand columns is taken through short loops one after the other while it stays in the L1 cache:
// step, sums of the new weights, quantize-dequantize, totals. Memory sees one pass; each loop is short enough for
// the processor to overlap several of its iterations, which one long loop is not (docs/notes.md).

// Between the loops of a band: what the totals are made of. Each row starts at a multiple of 16, gaps hold zeros.
struct Trace {
  alignas(64) float level[kBand], excess[kBand], descent[kBand], gradient[kBand];
};

// The usual step: plain gradients, no weight decay, clamped exactly where it is constrained, no totals.
template <bool CONSTRAINED>
struct UsualOptions {
  static constexpr bool kTraces = false;
  Hyper hyper;
  ASKEW_INLINE bool constrained() const { return CONSTRAINED; }
  ASKEW_INLINE bool clamp() const { return CONSTRAINED; }
  ASKEW_INLINE bool direction() const { return false; }
  ASKEW_INLINE bool maximize() const { return false; }
  ASKEW_INLINE bool nesterov() const { return false; }
  ASKEW_INLINE bool weight_decay() const { return false; }
  ASKEW_INLINE bool skip_nonfinite() const { return false; }
};

// The step itself. It also brings in what comes next, so that memory keeps busy while this is computed.
template <int T, class Rule, class Grid, class Options, bool STATEFUL>
struct StepLoop {
  static constexpr int kStreams = 7;
  Stream streams[kStreams];  // w, g, a, b, trace: excess, descent, gradient (null if not traced)
  Row<vf, Grid> row;
  Options options;

  // One vector or pair; returns the new weights as they are stored.
  template <class F>
  ASKEW_INLINE F step(int64_t i, const Row<F, Grid>& row, int64_t ahead) const {
    const bool has_b = STATEFUL && streams[3].data, traced = Options::kTraces && streams[4].data;
    for (int k = 0; k < (has_b ? 4 : STATEFUL ? 3 : 2); ++k)
      for (unsigned c = 0; c < sizeof(F) / 4; c += ASKEW_LANES) prefetch<T>(streams[k], i + c, ahead);
    F old, g, a{}, b{};
    load<T>(streams[0], i, old);
    load<T>(streams[1], i, g);
    if (STATEFUL) load<T>(streams[2], i, a);
    if (has_b) load<T>(streams[3], i, b);
    const F before_a = a, before_b = b;
    Stepped<F> s = step_weight<Rule>(old, g, a, b, STATEFUL, row, options);
    if (options.skip_nonfinite()) {
      const auto finite = absolute(g) < __builtin_inff();
      s.w = select(finite, s.w, old);
      s.descent = select(finite, s.descent, F{});
      a = select(finite, a, before_a);
      b = select(finite, b, before_b);
    }
    store<T>(streams[0], i, s.w);
    if (STATEFUL) store<T>(streams[2], i, a);
    if (has_b) store<T>(streams[3], i, b);
    if (traced) {
      store<kFloat32>(streams[4], i, s.excess);
      store<kFloat32>(streams[5], i, s.descent);
      store<kFloat32>(streams[6], i, g);
    }
    return s.w;
  }
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const StepLoop l = *this;  // what a store cannot change
    const Row<Pair, Grid> twice = pair_of(l.row);
    const int64_t end = i + n, ahead = tuning.prefetch_columns;
    for (; i + 2 * ASKEW_LANES <= end; i += 2 * ASKEW_LANES) l.step(i, twice, ahead);
    if (i < end) l.step(i, l.row, ahead);
  }
};

// The levels where the step starts, for the trace.
template <int T, class Grid>
struct LevelsLoop {
  static constexpr int kStreams = 2;
  Stream streams[kStreams];  // w, level
  Row<vf, Grid> row;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const LevelsLoop l = *this;
    for (const int64_t end = i + n; i < end; i += ASKEW_LANES)
      store<kFloat32>(l.streams[1], i, nearest_level(load<T>(l.streams[0], i), l.row));
  }
};

// Replaces the old levels of the trace by 1 where the level has changed, 0 elsewhere.
template <int T, class Grid>
struct FlipsLoop {
  static constexpr int kStreams = 2;
  Stream streams[kStreams];  // w, level
  Row<vf, Grid> row;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const FlipsLoop l = *this;
    for (const int64_t end = i + n; i < end; i += ASKEW_LANES) {
      vi changed = nearest_level(load<T>(l.streams[0], i), l.row) != load<kFloat32>(l.streams[1], i);
      store<kFloat32>(l.streams[1], i, select(changed, vf{} + 1.f, vf{}));
    }
  }
};

static ASKEW_LOOP void add_trace(const Trace& trace, int64_t columns, bool skip_nonfinite, Lanes16* totals) {
  vf sum[kTotals][kVectors] = {};
  for (int64_t c = 0; c < columns; c += 16)
    for (int k = 0; k < kVectors; ++k) {
      const int64_t at = c + k * ASKEW_LANES;
      vf e = Storage<kFloat32>::load(trace.descent + at), g = Storage<kFloat32>::load(trace.gradient + at);
      vf excess = Storage<kFloat32>::load(trace.excess + at);
      vi finite = absolute(g) < __builtin_inff();
      sum[kInfeasible][k] += select(excess > 0.f, vf{} + 1.f, vf{});
      sum[kViolation][k] += select(excess > 0.f, 16.f * excess, vf{});
      sum[kVelocity2][k] += e * e;
      sum[kGradVelocity][k] -= (skip_nonfinite ? select(finite, g, vf{}) : g) * e;
      sum[kFlips][k] += Storage<kFloat32>::load(trace.level + at);
      sum[kNonfinite][k] += select(finite, vf{}, vf{} + 1.f);
    }
  for (int j = 0; j < kTotals; ++j) {
    for (int k = 0; k < kVectors; ++k) totals[j].now[k] = sum[j][k];
    flush(totals[j]);
  }
}

template <int T, class Rule, class Grid, class Options, bool STATEFUL>
void update_typed(const UpdateTensor& t, const Hyper& h, Tile tile, double* row_sums, double* totals) {
  constexpr int size = sizeof(typename Storage<T>::type);
  Lanes16 lanes[kTotals];
  if (totals)
    for (int j = 0; j < kTotals; ++j) clear(lanes[j]);
  Trace trace;
  alignas(64) char mean[2 * kBand * size];  // of two gradients; twice as long for what StepLoop brings in ahead
  int64_t traced = 0;                       // columns of the trace in use
  for (int64_t r = tile.row0; r < tile.row1; ++r) {
    RowSums sums;
    if (row_sums) clear(sums);
    const Row<vf, Grid> row = make_row(vf{} + t.scale[r], Grid::make(t.grid));
    const int64_t base = r * t.cols;
    const Stream w{t.w, size, true}, g{(void*)t.g, size, false}, a{t.a, size, true}, b{t.b, size, true};
    for (int64_t c = tile.col0; c < tile.col1; c += kBand) {
      const int64_t n = c + kBand < tile.col1 ? kBand : tile.col1 - c, padded = (n + 15) / 16 * 16;
      if (totals && traced + padded > kBand) {
        add_trace(trace, traced, h.skip_nonfinite, lanes);
        traced = 0;
      }
      const int64_t start = totals ? traced : 0;
      const auto part = [&](float* of) { return Stream{of + start - (base + c), 4, true}; };  // at an element's index
      const Stream w_read{t.w, size, false}, level = part(trace.level), none{};
      if (t.kept) for_columns(CopyLoop<T, false>{{w, {(void*)t.kept, size, false}}}, base, c, c + n);
      Stream descent = g;
      if (t.first) {
        descent = {mean - (base + c) * size, size, true};
        for_columns(SamMeanLoop<T>{{descent, g, {(void*)t.first, size, false}}}, base, c, c + n);
      }
      if (totals) for_columns(LevelsLoop<T, Grid>{{w_read, level}, row}, base, c, c + n);
      for_columns(StepLoop<T, Rule, Grid, Options, STATEFUL>{{w, descent, a, b, totals ? part(trace.excess) : none,
                                                              totals ? part(trace.descent) : none,
                                                              totals ? part(trace.gradient) : none},
                                                             row,
                                                             {h}},
                  base, c, c + n);
      if (totals) {
        for_columns(FlipsLoop<T, Grid>{{w_read, level}, row}, base, c, c + n);
        for (float* of : {trace.excess, trace.level, trace.descent, trace.gradient})
          for (int64_t gap = n; gap < padded; ++gap) of[start + gap] = 0;
        traced += padded;
      }
      if (row_sums) {
        for_columns(RowSumsLoop<T>{{{t.w, size, false}}, &sums}, base, c, c + n);
        flush(sums);
      }
      if (t.dequantized)
        for_columns(
            QuantizeLoop<T, Grid>{
                {{t.w, size, false}, {t.dequantized, type_size(t.dequantized_type), true}}, t.dequantized_type, row},
            base, c, c + n);
    }
    if (row_sums) {
      finish(sums, row_sums);
      row_sums += kRowSums;
    }
  }
  if (totals) {
    add_trace(trace, traced, h.skip_nonfinite, lanes);
    for (int j = 0; j < kTotals; ++j) totals[j] = finish(lanes[j]);
  }
}

// ---- choosing the template: storage type x grid (x rule) ----------------------------------------------------

template <class Loop>
ASKEW_FN void for_tile(int64_t cols, Tile t, const float* scale, const GridArg& grid, Loop loop) {
  for (int64_t r = t.row0; r < t.row1; ++r) {
    loop.row = make_row(vf{} + scale[r], decltype(loop.row.grid)::make(grid));
    for_columns(loop, r * cols, t.col0, t.col1);
  }
}

static void fake_quantize(const void* x, int x_type, void* y, int y_type, const float* scale, GridArg g, int64_t cols,
                          Tile t) {
  const Stream in{(void*)x, type_size(x_type), false}, out{y, type_size(y_type), true};
  ASKEW_BY_TYPE(x_type, ASKEW_BY_GRID(g, (for_tile(cols, t, scale, g, QuantizeLoop<T, Grid>{{in, out}, y_type, {}}))))
}

static void stochastic_quantize(const void* x, int x_type, void* y, int y_type, const float* scale, GridArg g,
                                int64_t cols, Tile t, uint64_t seed) {
  const Stream in{(void*)x, type_size(x_type), false}, out{y, type_size(y_type), true};
  ASKEW_BY_TYPE(x_type,
                ASKEW_BY_GRID(g, (for_tile(cols, t, scale, g, StochasticLoop<T, Grid>{{in, out}, y_type, {}, seed}))))
}

static void ste_clip(const void* grad, const void* x, int type, void* out, const float* scale, GridArg g, int64_t cols,
                     Tile t) {
  const int size = type_size(type);
  const Stream in{(void*)grad, size, false}, point{(void*)x, size, false}, result{out, size, true};
  ASKEW_BY_TYPE(type, ASKEW_BY_GRID(g, (for_tile(cols, t, scale, g, SteClipLoop<T, Grid>{{in, point, result}, {}}))))
}

static void project(void* w, int type, const float* scale, GridArg g, float eps, int64_t cols, Tile t) {
  const float radius = feasible_radius(eps);
  const Stream s{w, type_size(type), true};
  ASKEW_BY_TYPE(type, ASKEW_BY_GRID(g, (for_tile(cols, t, scale, g, ProjectLoop<T, Grid>{{s}, radius, {}}))))
}

static void row_sums(const void* x, int type, int64_t cols, Tile t, double* sums) {
  ASKEW_BY_TYPE(type, row_sums_typed<T>(x, cols, t, sums))
}

template <class Rule, bool STATEFUL>
static void update_rule(const UpdateTensor& t, const Hyper& h, Tile tile, double* row_sums, double* totals) {
  const bool usual = !totals && !h.direction && !h.maximize && !h.nesterov && h.weight_decay == 0.f &&
                     !h.skip_nonfinite && h.clamp == (h.eps < 1.f) && t.type == kFloat32 && t.grid.kind == kUniform;
  if (usual && h.clamp)
    update_typed<kFloat32, Rule, UniformGrid, UsualOptions<true>, STATEFUL>(t, h, tile, row_sums, totals);
  else if (usual)
    update_typed<kFloat32, Rule, UniformGrid, UsualOptions<false>, STATEFUL>(t, h, tile, row_sums, totals);
  else
    ASKEW_BY_TYPE(
        t.type,
        ASKEW_BY_GRID(t.grid, (update_typed<T, Rule, Grid, AnyOptions, STATEFUL>(t, h, tile, row_sums, totals))))
}

static void update(const UpdateTensor& t, int rule, const Hyper& h, Tile tile, double* row_sums, double* totals) {
  if (rule == kAdamW)
    update_rule<AdamW, true>(t, h, tile, row_sums, totals);
  else if (t.a)
    update_rule<Sgd, true>(t, h, tile, row_sums, totals);
  else
    update_rule<Sgd, false>(t, h, tile, row_sums, totals);
}

static const Loops table = {ASKEW_ISA_NAME, fake_quantize, stochastic_quantize, ste_clip,    project,     row_sums,
                            update,         sam_norm,      sam_perturb,         sam_restore, sam_average, mix,
                            mix_gradient};

}  // namespace ASKEW_ISA
}  // namespace askew
