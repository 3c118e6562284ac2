// The mixture of several quantizations of one tensor, y = sum_k p_k s_k Q_k(x / s_k), and its gradients. Included by
// loops.inl, whose streams and sums they use. Every candidate takes a band of columns that stays in the L1 cache, so
// memory sees x once whatever their number.

template <int T, class Grid>
ASKEW_FN auto candidate_loop(Stream x, Stream so_far, float p, bool first) {
  return vector_loop<T, 0, Row<vf, Grid>>(
      {x, so_far}, ASKEW_VECTOR {
        const vf y = p * quantize_dequantize(load<T>(s[0], i), row);
        store<kFloat32>(s[1], i, first ? y : load<kFloat32>(s[1], i) + y);
      });
}

// What each candidate adds to the gradients: its strength to the gate of x's where x is inside its hull, G Q to the sum
// that the strength's gradient is made of, and with `learned` G (Q - x/s) inside, G Q outside to the scale's.
template <int T, class Grid>
struct MixGradientLoop {
  static constexpr int kStreams = 3;
  Stream streams[kStreams];  // G, x, the gate so far (float)
  Row<vf, Grid> row;
  float p;
  bool first, clip, learned;
  Lanes16* sums;  // 2
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const MixGradientLoop l = *this;
    const vf low = Storage<T>::rounded(l.row.low), high = Storage<T>::rounded(l.row.high);  // as clamped x is stored
    vf strength[kVectors] = {}, scale[kVectors] = {};
    for (const int64_t end = i + n; i < end; i += 16)
      for (int k = 0; k < kVectors; ++k) {
        const int64_t at = i + k * ASKEW_LANES;
        const vf g = load<T>(l.streams[0], at), x = load<T>(l.streams[1], at);
        const vf placed = in_hull(x, l.row), q = l.row.grid.nearest(placed);
        const vi outside = (x < low) | (x > high);
        const vf gate = l.clip ? select(outside, vf{}, vf{} + l.p) : vf{} + l.p;
        store<kFloat32>(l.streams[2], at, l.first ? gate : load<kFloat32>(l.streams[2], at) + gate);
        strength[k] += g * q;
        if (l.learned) scale[k] += g * select(outside, q, q - placed);
      }
    for (int k = 0; k < kVectors; ++k) {
      l.sums[0].now[k] += strength[k];
      l.sums[1].now[k] += scale[k];
    }
  }
};

template <int T>
void mix_typed(const MixArg& m, void* y, Tile t) {
  constexpr int size = sizeof(typename Storage<T>::type);
  alignas(64) float sum[kBand];
  const Stream x{(void*)m.x, size, false}, out{y, size, true};
  for (int64_t r = t.row0; r < t.row1; ++r)
    for_bands(r * m.cols, t, [&](Columns c) {
      const Stream so_far{sum - c.first, 4, true};
      for (int k = 0; k < m.n; ++k)
        ASKEW_BY_CANDIDATE(m.grids[k].kind, {
          auto loop = candidate_loop<T, Grid>(x, so_far, m.strengths[k], !k);
          loop.row = candidate_row<vf, Grid>(m, k, r);
          for_columns(loop, c);
        })
      for_columns(vector_loop<T>({so_far, out}, ASKEW_VECTOR { store<T>(s[1], i, load<kFloat32>(s[0], i)); }), c);
    });
}

template <int T>
void mix_gradient_typed(const MixArg& m, const void* grad, void* out, Tile t, double* sums) {
  constexpr int size = sizeof(typename Storage<T>::type);
  alignas(64) float gate[kBand];
  const Stream x{(void*)m.x, size, false}, g{(void*)grad, size, false}, result{out, size, true};
  Lanes16 lanes[kMostCandidates][2];
  for (int64_t r = t.row0; r < t.row1; ++r, sums += 2 * m.n) {
    for (int k = 0; k < m.n; ++k) lanes[k][0] = lanes[k][1] = {};
    for_bands(r * m.cols, t, [&](Columns c) {
      const Stream so_far{gate - c.first, 4, true};
      for (int k = 0; k < m.n; ++k) {
        ASKEW_BY_CANDIDATE(
            m.grids[k].kind,
            for_columns(
                MixGradientLoop<T, Grid>{
                    {g, x, so_far}, candidate_row<vf, Grid>(m, k, r), m.strengths[k], !k, m.clip, m.learned, lanes[k]},
                c))
        for (Lanes16& l : lanes[k]) flush(l);
      }
      for_columns(
          vector_loop<T>(
              {g, so_far, result}, ASKEW_VECTOR { store<T>(s[2], i, load<T>(s[0], i) * load<kFloat32>(s[1], i)); }),
          c);
    });
    for (int k = 0; k < m.n; ++k)
      for (int j = 0; j < 2; ++j) sums[2 * k + j] = finish(lanes[k][j]);
  }
}

static void mix(const MixArg& m, void* y, Tile t) { ASKEW_BY_TYPE(m.type, mix_typed<T>(m, y, t)) }

static void mix_gradient(const MixArg& m, const void* grad, void* out, Tile t, double* sums) {
  ASKEW_BY_TYPE(m.type, mix_gradient_typed<T>(m, grad, out, t, sums))
}
