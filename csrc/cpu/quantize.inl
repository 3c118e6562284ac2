// Elementwise passes: quantize-dequantize, the straight-through gradient, the projection.

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

template <class Loop>
ASKEW_FN void for_rows(const QuantizeArg& a, Tile t, Loop loop) {
  for (int64_t r = t.row0; r < t.row1; ++r) {
    loop.row = make_row(vf{} + a.scale[r], decltype(loop.row.grid)::make(a.grid));
    for_columns(loop, r * a.m.cols, t.col0, t.col1);
  }
}

template <int T, class Grid>
void quantize_typed(const QuantizeArg& a, Tile t) {
  const Stream x{(void*)a.x, type_size(T), false}, y{a.y, type_size(a.y_type), true};
  switch (a.pass) {
    case kQuantize:
      return for_rows(a, t, QuantizeLoop<T, Grid>{{x, y}, a.y_type, {}});
    case kStochastic:
      return for_rows(a, t, StochasticLoop<T, Grid>{{x, y}, a.y_type, {}, a.seed});
    case kSteClip:
      return for_rows(a, t, SteClipLoop<T, Grid>{{{(void*)a.g, type_size(T), false}, x, y}, {}});
    case kProject:
      return for_rows(a, t, ProjectLoop<T, Grid>{{y}, feasible_radius((float)a.eps.value), {}});
  }
}

static void quantize(const QuantizeArg& a, Tile t) {
  ASKEW_BY_TYPE(a.type, ASKEW_BY_GRID(a.grid.kind, quantize_typed<T, Grid>(a, t)))
}
