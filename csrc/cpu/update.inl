// The update: one read and one write of everything.
//
// A band of at most kBand columns is taken through short loops one after the other while it stays in the L1 cache:
// step, sums of the new weights, quantize-dequantize, totals. Memory sees one pass; each loop is short enough for
// the processor to overlap several of its iterations, which one long loop is not (docs/notes.md).

// Between the loops of a band: what the totals are made of. Each row starts at a multiple of 16, gaps hold zeros.
struct Trace {
  alignas(64) float level[kBand], excess[kBand], descent[kBand], gradient[kBand];
};

// The streams of a step. Excess, descent and gradient are the trace, null if not traced; from kState on, the buffers.
enum StepStream : int { kW, kG, kExcess, kDescent, kGradient, kState, kMostStreams = kState + kMostBuffers };

// The step as everything around it sees it, whatever the rule.
template <int T, class Grid>
struct Step {
  Stream streams[kMostStreams];
  const Row<vf, Grid>* row;
  const Hyper* hyper;
  RowSums* sums;  // what the step adds up on its way; may be null
  void (*columns)(const Step&, Columns);
};

// The step itself. It also brings in what comes next, so that memory keeps busy while this is computed.
template <int T, class Grid, class Options, int BUFFERS>
struct StepLoop : Step<T, Grid> {
  static constexpr int kStreams = kState + BUFFERS;
  using Step<T, Grid>::streams;
  using Step<T, Grid>::sums;

  // One vector or pair.
  template <class F>
  ASKEW_INLINE F step(int64_t i, const Row<F, Grid>& row, const Row<F, Grid>& stored, const Options& options,
                      int64_t ahead) const {
    for (unsigned c = 0; c < sizeof(F) / 4; c += ASKEW_LANES) {
      prefetch<T>(streams[kW], i + c, ahead);
      prefetch<T>(streams[kG], i + c, ahead);
      for (int k = kState; k < kStreams; ++k) prefetch<T>(streams[k], i + c, ahead);
    }
    F old, g, state[kMostBuffers], before[kMostBuffers];
    load<T>(streams[kW], i, old);
    load<T>(streams[kG], i, g);
    if (options.ste_clip()) g = pass_inside(g, old, stored);
    for (int k = 0; k < BUFFERS; ++k) {
      load<T>(streams[kState + k], i, state[k]);
      before[k] = state[k];
    }
    Stepped<F> s = step_weight(old, g, state, BUFFERS > 0, row, options);
    if (options.skip_nonfinite()) {
      const auto finite = absolute(g) < __builtin_inff();
      s.w = select(finite, s.w, old);
      s.descent = select(finite, s.descent, F{});
      for (int k = 0; k < BUFFERS; ++k) state[k] = select(finite, state[k], before[k]);
    }
    store<T>(streams[kW], i, s.w);
    for (int k = 0; k < BUFFERS; ++k) store<T>(streams[kState + k], i, state[k]);
    if (!Options::kUsual && streams[kExcess].data) {
      store<kFloat32>(streams[kExcess], i, s.excess);
      store<kFloat32>(streams[kDescent], i, s.descent);
      store<kFloat32>(streams[kGradient], i, g);
    }
    return s.w;
  }
  // Steps, and sums of the new weights in the order of RowSumsLoop: the step hides what they take.
  static constexpr bool kSums = Options::kUsual && T == kFloat32 && ASKEW_LANES >= 8;
  ASKEW_LOOP void run_with_sums(int64_t i, int64_t n) const {
    const StepLoop l = *this;
    const Row<vf, Grid> once = *l.row;
    const Row<Pair, Grid> twice = pair_of(once);
    const Options options{*l.hyper, rule_of<typename Options::Rule>(*l.hyper)};
    const int64_t end = i + n, ahead = tuning.prefetch_columns;
    VectorSums vectors[kVectors];
    for (; i + 2 * ASKEW_LANES <= end; i += 2 * ASKEW_LANES) {
      const Pair w = l.step(i, twice, twice, options, ahead);
      add(vectors[0], w.lo);
      add(vectors[kVectors - 1], w.hi);
    }
    if (i < end) add(vectors[0], l.step(i, once, once, options, ahead));
    add(l.sums, vectors);
  }
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    if constexpr (kSums)
      if (sums) return run_with_sums(i, n);
    const StepLoop l = *this;  // what a store cannot change
    const Row<vf, Grid> once = *l.row;
    const Row<Pair, Grid> twice = pair_of(once);
    const Row<vf, Grid> stored = with_stored_ends<T>(once);
    const Row<Pair, Grid> stored_twice = pair_of(stored);
    const Options options{*l.hyper, rule_of<typename Options::Rule>(*l.hyper)};
    const int64_t end = i + n, ahead = tuning.prefetch_columns;
    for (; i + 2 * ASKEW_LANES <= end; i += 2 * ASKEW_LANES) l.step(i, twice, stored_twice, options, ahead);
    if (i < end) l.step(i, once, stored, options, ahead);
  }
  static void over(const Step<T, Grid>& step, Columns c) { for_columns(static_cast<const StepLoop&>(step), c); }
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

// Elements as they are, by their size.
ASKEW_FN void copy_past_caches(Stream from, Stream to, Columns c) {
  if (to.size == 4)
    copy_columns<kFloat32, true>(from, to, c);
  else if (to.size == 2)
    copy_columns<kBFloat16, true>(from, to, c);
  else
    copy_columns<kInt8, true>(from, to, c);
}

// Everything around the step, which is the same for every rule.
template <int T, class Grid>
static void update_typed(const UpdateTensor& t, const Hyper& h, Step<T, Grid>& step, bool sums_on_the_way, Tile tile,
                         double* row_sums, double* totals) {
  constexpr int size = sizeof(typename Storage<T>::type);
  Lanes16 lanes[kTotals];
  if (totals)
    for (Lanes16& l : lanes) l = {};
  Trace trace;
  alignas(64) char mean[2 * kBand * size];  // of two gradients; twice as long for what StepLoop brings in ahead
  alignas(64) char made[2 * kBand * 4];     // of a copy that goes past the caches
  alignas(64) char held[2 * kBand * size];  // of a weight that does; as long as `mean`, for the same reason
  int64_t traced = 0;                       // columns of the trace in use
  const Stream stored{t.w, size, true}, g{(void*)t.g, size, false};
  Stream* const streams = step.streams;
  streams[kG] = g;
  for (const StepStream k : {kExcess, kDescent, kGradient}) streams[k] = {};
  for (int k = 0; k < kMostBuffers; ++k) streams[kState + k] = {t.state[k], size, true};
  step.hyper = &h;
  const bool one_band = tile.col1 - tile.col0 <= kBand;
  for (int64_t r = tile.row0; r < tile.row1; ++r) {
    RowSums sums;
    if (row_sums) sums = {};
    const Row<vf, Grid> weights = make_row(vf{} + t.scale[r], Grid::make(t.grid));
    step.row = &weights;
    for_bands(r * t.m.cols, tile, [&](Columns c) {
      const int64_t padded = (c.count + 15) / 16 * 16;
      const Stream w = t.weight_past_caches ? Stream{held - c.first * size, size, true} : stored;
      const Stream w_read{w.data, size, false};
      streams[kW] = w;
      if (t.kept) copy_columns<T, false>({(void*)t.kept, size, false}, w, c);
      if (t.first) {
        streams[kG] = {mean - c.first * size, size, true};
        mean_columns<T>(g, {(void*)t.first, size, false}, streams[kG], c);
      }
      if (totals && traced + padded > kBand) {
        add_trace(trace, traced, h.skip_nonfinite, lanes);
        traced = 0;
      }
      const auto part = [&](float* of) { return Stream{of + traced - c.first, 4, true}; };  // at an element's index
      const Stream level = part(trace.level);
      if (totals) {
        streams[kExcess] = part(trace.excess);
        streams[kDescent] = part(trace.descent);
        streams[kGradient] = part(trace.gradient);
        for_columns(
            vector_loop<T>(
                {w_read, level}, ASKEW_VECTOR { store<kFloat32>(s[1], i, nearest_level(load<T>(s[0], i), weights)); }),
            c);
      }
      const bool summed = row_sums && sums_on_the_way && c.count % 16 == 0;  // a tail's padding does not count
      step.sums = summed ? &sums : nullptr;
      step.columns(step, c);
      if (totals) {
        for_columns(vector_loop<T>(
                        {w_read, level},
                        ASKEW_VECTOR {  // 1 where the level has changed
                          const vf now = nearest_level(load<T>(s[0], i), weights);
                          store<kFloat32>(s[1], i, select(now != load<kFloat32>(s[1], i), vf{} + 1.f, vf{}));
                        }),
                    c);
        for (float* of : {trace.excess, trace.level, trace.descent, trace.gradient})
          for (int64_t gap = c.count; gap < padded; ++gap) of[traced + gap] = 0;
        traced += padded;
      }
      if (row_sums) {
        if (!summed) for_columns(RowSumsLoop<T>{{w_read}, &sums}, c);
        if (!one_band) flush(sums);
      }
      if (t.dequantized) {
        const int bytes = type_size(t.dequantized_type);
        const Stream copy{t.dequantized, bytes, true}, staged{made - c.first * bytes, bytes, true};
        auto loop = quantize_loop<T, Grid>(w_read, t.past_caches ? staged : copy, t.dequantized_type);
        loop.row = weights;
        for_columns(loop, c);
        if (t.past_caches) copy_past_caches(staged, copy, c);
      }
      if (t.weight_past_caches) copy_columns<T, true>(w, stored, c);
    });
    if (row_sums) {
      finish(sums, row_sums, one_band);
      row_sums += kRowSums;
    }
  }
  finish_stores(t.past_caches || t.weight_past_caches);
  if (totals) {
    add_trace(trace, traced, h.skip_nonfinite, lanes);
    for (int j = 0; j < kTotals; ++j) totals[j] = finish(lanes[j]);
  }
}

template <int T, class Grid, class Options, int BUFFERS>
static void update_by(const UpdateTensor& t, const Hyper& h, Tile tile, double* row_sums, double* totals) {
  StepLoop<T, Grid, Options, BUFFERS> loop;
  loop.columns = loop.over;
  update_typed<T, Grid>(t, h, loop, loop.kSums, tile, row_sums, totals);
}

template <class R, int BUFFERS>
static void update_rule(const UpdateTensor& t, const Hyper& h, Tile tile, double* row_sums, double* totals) {
  const bool usual = !totals && !h.direction && !h.maximize && !h.skip_nonfinite && rule_of<R>(h).usual() &&
                     h.clamp == (h.eps < 1.f) && t.type == kFloat32 && t.grid.kind == kUniform;
  if (usual && h.clamp)
    update_by<kFloat32, UniformGrid, StepOptions<R, kConstrainedStep>, BUFFERS>(t, h, tile, row_sums, totals);
  else if (usual)
    update_by<kFloat32, UniformGrid, StepOptions<R, kFreeStep>, BUFFERS>(t, h, tile, row_sums, totals);
  else
    ASKEW_BY_TYPE(t.type,
                  ASKEW_BY_GRID(t.grid.kind, update_by<T, Grid, StepOptions<R>, BUFFERS>(t, h, tile, row_sums, totals)))
}

static void update(const UpdateTensor& t, const Hyper& h, Tile tile, double* row_sums, double* totals) {
  with_rule(h.rule, Rules{}, [&](auto rule) {
    typedef decltype(rule) Rule;
    if constexpr (Rule::kOptional)
      if (!t.state[0]) return update_rule<Rule, 0>(t, h, tile, row_sums, totals);
    update_rule<Rule, Rule::kBuffers>(t, h, tile, row_sums, totals);
  });
}
