// The update: one read and one write of everything.
//
// A band of at most kBand columns is taken through short loops one after the other while it stays in the L1 cache:
// step, sums of the new weights, quantize-dequantize, totals. Memory sees one pass; each loop is short enough for
// the processor to overlap several of its iterations, which one long loop is not (docs/notes.md).

// Between the loops of a band: what the totals are made of. Each row starts at a multiple of 16, gaps hold zeros.
struct Trace {
  alignas(64) float level[kBand], excess[kBand], descent[kBand], gradient[kBand];
};

// The usual step: plain gradients, no options of the rule's, clamped exactly where it is constrained, no totals.
template <class R, bool CONSTRAINED>
struct UsualOptions {
  static constexpr bool kUsual = true;
  Hyper hyper;
  R rule;
  ASKEW_INLINE bool constrained() const { return CONSTRAINED; }
  ASKEW_INLINE bool clamp() const { return CONSTRAINED; }
  ASKEW_INLINE bool direction() const { return false; }
  ASKEW_INLINE bool maximize() const { return false; }
  ASKEW_INLINE bool skip_nonfinite() const { return false; }
};

// What a band of the step reads and writes.
struct StepStreams {
  Stream w, g, state[kMostBuffers];
  Stream excess, descent, gradient;  // the trace; null if not traced
};

// The step itself. It also brings in what comes next, so that memory keeps busy while this is computed.
template <int T, class Grid, class Options, int BUFFERS>
struct StepLoop {
  static constexpr int kStreams = 5 + BUFFERS, kTrace = 2 + BUFFERS;
  Stream streams[kStreams];  // w, g, the buffers, the trace
  Row<vf, Grid> row;
  Options options;

  // One vector or pair; returns the new weights as they are stored.
  template <class F>
  ASKEW_INLINE F step(int64_t i, const Row<F, Grid>& row, int64_t ahead) const {
    for (int k = 0; k < kTrace; ++k)
      for (unsigned c = 0; c < sizeof(F) / 4; c += ASKEW_LANES) prefetch<T>(streams[k], i + c, ahead);
    F old, g, state[kMostBuffers], before[kMostBuffers];
    load<T>(streams[0], i, old);
    load<T>(streams[1], i, g);
    for (int k = 0; k < BUFFERS; ++k) {
      load<T>(streams[2 + k], i, state[k]);
      before[k] = state[k];
    }
    Stepped<F> s = step_weight(old, g, state, BUFFERS > 0, row, options);
    if (options.skip_nonfinite()) {
      const auto finite = absolute(g) < __builtin_inff();
      s.w = select(finite, s.w, old);
      s.descent = select(finite, s.descent, F{});
      for (int k = 0; k < BUFFERS; ++k) state[k] = select(finite, state[k], before[k]);
    }
    store<T>(streams[0], i, s.w);
    for (int k = 0; k < BUFFERS; ++k) store<T>(streams[2 + k], i, state[k]);
    if (!Options::kUsual && streams[kTrace].data) {
      store<kFloat32>(streams[kTrace], i, s.excess);
      store<kFloat32>(streams[kTrace + 1], i, s.descent);
      store<kFloat32>(streams[kTrace + 2], i, g);
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

template <int T, class Grid>
using Step = void (*)(const StepStreams&, const Row<vf, Grid>&, const Hyper&, int64_t base, int64_t c0, int64_t c1);

template <int T, class Grid, class Options, int BUFFERS>
static void step_columns(const StepStreams& s, const Row<vf, Grid>& row, const Hyper& h, int64_t base, int64_t c0,
                         int64_t c1) {
  StepLoop<T, Grid, Options, BUFFERS> loop{{s.w, s.g}, row, {h, rule_of<decltype(Options::rule)>(h)}};
  for (int k = 0; k < BUFFERS; ++k) loop.streams[2 + k] = s.state[k];
  Stream* const trace = loop.streams + loop.kTrace;
  trace[0] = s.excess;
  trace[1] = s.descent;
  trace[2] = s.gradient;
  for_columns(loop, base, c0, c1);
}

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

// Everything around the step, which is the same for every rule.
template <int T, class Grid>
static void update_typed(const UpdateTensor& t, const Hyper& h, Step<T, Grid> step, Tile tile, double* row_sums,
                         double* totals) {
  constexpr int size = sizeof(typename Storage<T>::type);
  Lanes16 lanes[kTotals];
  if (totals)
    for (int j = 0; j < kTotals; ++j) clear(lanes[j]);
  Trace trace;
  alignas(64) char mean[2 * kBand * size];  // of two gradients; twice as long for what StepLoop brings in ahead
  int64_t traced = 0;                       // columns of the trace in use
  const Stream w{t.w, size, true}, w_read{t.w, size, false}, g{(void*)t.g, size, false};
  for (int64_t r = tile.row0; r < tile.row1; ++r) {
    RowSums sums;
    if (row_sums) clear(sums);
    const Row<vf, Grid> row = make_row(vf{} + t.scale[r], Grid::make(t.grid));
    const int64_t base = r * t.m.cols;
    for (int64_t c = tile.col0; c < tile.col1; c += kBand) {
      const int64_t n = c + kBand < tile.col1 ? kBand : tile.col1 - c, padded = (n + 15) / 16 * 16;
      StepStreams streams{w, g};
      for (int k = 0; k < kMostBuffers; ++k) streams.state[k] = {t.state[k], size, true};
      if (t.kept) for_columns(CopyLoop<T, false>{{w, {(void*)t.kept, size, false}}}, base, c, c + n);
      if (t.first) {
        streams.g = {mean - (base + c) * size, size, true};
        for_columns(SamMeanLoop<T>{{streams.g, g, {(void*)t.first, size, false}}}, base, c, c + n);
      }
      if (totals && traced + padded > kBand) {
        add_trace(trace, traced, h.skip_nonfinite, lanes);
        traced = 0;
      }
      const auto part = [&](float* of) { return Stream{of + traced - (base + c), 4, true}; };  // at an element's index
      const Stream level = part(trace.level);
      if (totals) {
        streams.excess = part(trace.excess);
        streams.descent = part(trace.descent);
        streams.gradient = part(trace.gradient);
        for_columns(LevelsLoop<T, Grid>{{w_read, level}, row}, base, c, c + n);
      }
      step(streams, row, h, base, c, c + n);
      if (totals) {
        for_columns(FlipsLoop<T, Grid>{{w_read, level}, row}, base, c, c + n);
        for (float* of : {trace.excess, trace.level, trace.descent, trace.gradient})
          for (int64_t gap = n; gap < padded; ++gap) of[traced + gap] = 0;
        traced += padded;
      }
      if (row_sums) {
        for_columns(RowSumsLoop<T>{{w_read}, &sums}, base, c, c + n);
        flush(sums);
      }
      if (t.dequantized) {
        const Stream copy{t.dequantized, type_size(t.dequantized_type), true};
        for_columns(QuantizeLoop<T, Grid>{{w_read, copy}, t.dequantized_type, row}, base, c, c + n);
      }
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

template <class Rule, int BUFFERS>
static void update_rule(const UpdateTensor& t, const Hyper& h, Tile tile, double* row_sums, double* totals) {
  const bool usual = !totals && !h.direction && !h.maximize && !h.skip_nonfinite && rule_of<Rule>(h).usual() &&
                     h.clamp == (h.eps < 1.f) && t.type == kFloat32 && t.grid.kind == kUniform;
  if (usual)
    update_typed<kFloat32, UniformGrid>(t, h,
                                        h.clamp
                                            ? step_columns<kFloat32, UniformGrid, UsualOptions<Rule, true>, BUFFERS>
                                            : step_columns<kFloat32, UniformGrid, UsualOptions<Rule, false>, BUFFERS>,
                                        tile, row_sums, totals);
  else
    ASKEW_BY_TYPE(t.type, ASKEW_BY_GRID(t.grid.kind,
                                        (update_typed<T, Grid>(t, h, step_columns<T, Grid, AnyOptions<Rule>, BUFFERS>,
                                                               tile, row_sums, totals))))
}

static void update(const UpdateTensor& t, const Hyper& h, Tile tile, double* row_sums, double* totals) {
  with_rule(h.rule, Rules{}, [&](auto rule) {
    typedef decltype(rule) Rule;
    if constexpr (Rule::kOptional)
      if (!t.state[0]) return update_rule<Rule, 0>(t, h, tile, row_sums, totals);
    update_rule<Rule, Rule::kBuffers>(t, h, tile, row_sums, totals);
  });
}
