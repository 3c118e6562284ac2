// Elementwise passes: quantize-dequantize, the straight-through gradient, the projection.

template <int T, class Grid>
ASKEW_FN void quantize_columns(Stream x, Stream y, int y_type, const Row<vf, Grid>& row, Columns c) {
  for_vectors<T, 2>({x, y}, c, ASKEW_VECTOR { store_as(y_type, s[1], i, quantize_dequantize(load<T>(s[0], i), row)); });
}

template <int T, class Grid>
ASKEW_FN void stochastic_columns(Stream x, Stream y, int y_type, const Row<vf, Grid>& row, uint64_t seed, Columns c) {
  for_vectors<T>(
      {x, y}, c, ASKEW_VECTOR {
        vf uniform;
        for (int l = 0; l < ASKEW_LANES; ++l) {
          const uint64_t e = (uint64_t)(i + l);
          uniform[l] = uniform01(philox(seed, e >> 2).word[e & 3]);
        }
        store_as(y_type, s[1], i, row.scale.value * stochastic_level(load<T>(s[0], i), uniform, row));
      });
}

template <int T, class Grid>
ASKEW_FN void clip_columns(Stream g, Stream x, Stream y, const Row<vf, Grid>& stored, Columns c) {
  for_vectors<T, 3>(
      {g, x, y}, c, ASKEW_VECTOR { store<T>(s[2], i, pass_inside(load<T>(s[0], i), load<T>(s[1], i), stored)); });
}

template <int T, class Grid>
void quantize_typed(const QuantizeArg& a, Tile t) {
  const Stream x{(void*)a.x, type_size(T), false}, y{a.y, type_size(a.y_type), true};
  const float radius = feasible_radius((float)a.eps.value);
  for (int64_t r = t.row0; r < t.row1; ++r) {
    const Row<vf, Grid> row = make_row(vf{} + a.scale[r], Grid::make(a.grid));
    const Columns c{r * a.m.cols + t.col0, t.col1 - t.col0};
    switch (a.pass) {
      case kQuantize:
        quantize_columns<T>(x, y, a.y_type, row, c);
        break;
      case kStochastic:
        stochastic_columns<T>(x, y, a.y_type, row, a.seed, c);
        break;
      case kSteClip:
        clip_columns<T>({(void*)a.g, type_size(T), false}, x, y, with_stored_ends<T>(row), c);
        break;
      case kProject:
        for_vectors<T>({y}, c, ASKEW_VECTOR { store<T>(s[0], i, project_interval(load<T>(s[0], i), row, radius)); });
    }
  }
}

static void quantize(const QuantizeArg& a, Tile t) {
  ASKEW_BY_TYPE(a.type, ASKEW_BY_GRID(a.grid.kind, quantize_typed<T, Grid>(a, t)))
}
