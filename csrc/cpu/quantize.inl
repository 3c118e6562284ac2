// Elementwise passes: quantize-dequantize, the straight-through gradient, the projection.

template <int T, class Grid>
ASKEW_FN auto quantize_loop(Stream x, Stream y, int y_type) {
  const bool levels = holds_levels(y_type);
  return vector_loop<T, 2, Row<vf, Grid>>(
      {x, y}, ASKEW_VECTOR {
        const vf level = nearest_level(load<T>(s[0], i), row);
        store_as(y_type, s[1], i, levels ? level : row.scale.value * level);
      });
}

// A row whose ends are as a clamped weight is stored.
template <int T, class Grid>
ASKEW_FN Row<vf, Grid> with_stored_ends(Row<vf, Grid> row) {
  row.low = Storage<T>::rounded(row.low);
  row.high = Storage<T>::rounded(row.high);
  return row;
}

template <int T, class Loop>
ASKEW_FN void for_rows(const QuantizeArg& a, Tile t, Loop loop) {
  for (int64_t r = t.row0; r < t.row1; ++r) {
    loop.row = make_row(vf{} + a.scale[r], decltype(loop.row.grid)::make(a.grid));
    if (a.pass == kSteClip) loop.row = with_stored_ends<T>(loop.row);
    for_columns(loop, {r * a.m.cols + t.col0, t.col1 - t.col0});
  }
}

template <int T, class Grid>
void quantize_typed(const QuantizeArg& a, Tile t) {
  typedef Row<vf, Grid> R;
  const Stream g{(void*)a.g, type_size(T), false}, x{(void*)a.x, type_size(T), false};
  const Stream y{a.y, type_size(a.y_type), true};
  const int y_type = a.y_type;
  const uint64_t seed = a.seed;
  const float radius = feasible_radius((float)a.eps.value);
  const Soft soft = soft_of((float)a.eps.value);
  switch (a.pass) {
    case kQuantize:
      return for_rows<T>(a, t, quantize_loop<T, Grid>(x, y, y_type));
    case kStochastic:
      return for_rows<T>(a, t,
                         vector_loop<T, 0, R>(
                             {x, y}, ASKEW_VECTOR {
                               vf uniform;
                               for (int l = 0; l < ASKEW_LANES; ++l) {
                                 const uint64_t e = (uint64_t)(i + l);
                                 uniform[l] = uniform01(philox(seed, e >> 2).word[e & 3]);
                               }
                               const vf level = stochastic_level(load<T>(s[0], i), uniform, row);
                               store_as(y_type, s[1], i, row.scale.value * level);
                             }));
    case kSteClip:
      return for_rows<T>(
          a, t,
          vector_loop<T, 3, R>(
              {g, x, y}, ASKEW_VECTOR { store<T>(s[2], i, pass_inside(load<T>(s[0], i), load<T>(s[1], i), row)); }));
    case kProject:
      return for_rows<T>(
          a, t,
          vector_loop<T, 0, R>(
              {y}, ASKEW_VECTOR { store<T>(s[0], i, project_interval(load<T>(s[0], i), row, radius)); }));
    case kSoften:
      return for_rows<T>(
          a, t, vector_loop<T, 2, R>({x, y}, ASKEW_VECTOR { store<T>(s[1], i, soften(load<T>(s[0], i), row, soft)); }));
  }
}

static void quantize(const QuantizeArg& a, Tile t) {
  ASKEW_BY_TYPE(a.type, ASKEW_BY_GRID(a.grid.kind, quantize_typed<T, Grid>(a, t)))
}

// What becomes of the gradient of y = s Q(x/s) in a learned scale's: g (Q - x/s) inside the hull, g c_end outside; and
// the straight-through gradient in the same pass.
template <int T, class Grid>
struct ScaleGradientLoop {
  static constexpr int kStreams = 3;
  Stream streams[kStreams];  // g, x, y (may be g, or absent)
  Row<vf, Grid> row;
  Lanes16* sums;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const ScaleGradientLoop l = *this;
    const Row<vf, Grid> stored = with_stored_ends<T>(l.row);
    const bool clips = l.streams[2].data != nullptr;
    const int64_t ahead = tuning.prefetch_columns;
    vf sum[kVectors] = {};
    for (const int64_t end = i + n; i < end; i += 16)
      for (int k = 0; k < kVectors; ++k) {
        const int64_t at = i + k * ASKEW_LANES;
        for (int s = 0; s < 2; ++s) prefetch<T>(l.streams[s], at, ahead);
        const vf g = load<T>(l.streams[0], at), x = load<T>(l.streams[1], at);
        const vf placed = in_hull(x, l.row), q = l.row.grid.nearest(placed);
        const vi outside = (x < stored.low) | (x > stored.high);
        sum[k] += g * select(outside, q, q - placed);
        if (clips) store<T>(l.streams[2], at, select(outside, vf{}, g));
      }
    for (int k = 0; k < kVectors; ++k) l.sums->now[k] += sum[k];
  }
};

template <int T, class Grid>
void scale_gradient_typed(const QuantizeArg& a, Tile t, double* sums) {
  constexpr int size = type_size(T);
  const Grid grid = Grid::make(a.grid);
  for (int64_t r = t.row0; r < t.row1; ++r, ++sums) {
    Lanes16 lanes{};
    const ScaleGradientLoop<T, Grid> loop{{{(void*)a.g, size, false}, {(void*)a.x, size, false}, {a.y, size, true}},
                                          make_row(vf{} + a.scale[r], grid),
                                          &lanes};
    for_bands(r * a.m.cols, t, [&](Columns c) {
      for_columns(loop, c);
      flush(lanes);
    });
    *sums = finish(lanes);
  }
}

static void scale_gradient(const QuantizeArg& a, Tile t, double* sums) {
  ASKEW_BY_TYPE(a.type, ASKEW_BY_GRID(a.grid.kind, scale_gradient_typed<T, Grid>(a, t, sums)))
}
