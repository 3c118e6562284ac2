// Grids: the nearest level and the bracket, in grid units (x = w / s).
//
// Each grid offers
//   low(), high()  the ends of the hull
//   nearest(x)     Q(x) for x in the hull, give or take a rounding: the nearest level, ties to even (uniform, as
//                  torch.round) or to the lower level (binary, codebook); NaN stays NaN
//   offset(x)      how far x, in the hull, stands from its nearest level
// No level is ever -0.

template <class F>
struct Offset {
  F near, far;  // the bracket's two ends; near as Q(x)
  F distance;   // x - near
  F u;          // |distance| over the bracket's length: 0 on a level, 1/2 midway
  F delta;      // length of the bracket
};

// Of x in the bracket between two neighbouring levels; a midpoint is the lower one's, NaN stays NaN.
template <class F>
ASKEW_FN Offset<F> offset_between(F x, F below, F above) {
  F middle = 0.5f * below + 0.5f * above, delta = above - below;
  F near = select(x > middle, above, below), far = select(x > middle, below, above);
  F d = x - near, u = divide(absolute(d), delta);
  return {select(x == x, near, x), far, d, select(u > 0.5f, F{} + 0.5f, u), delta};
}

// A NaN in x survives.
template <class F>
ASKEW_FN F clamp_between(F x, F lo, F hi) {
  x = select(x > hi, hi, x);
  return select(lo > x, lo, x);
}

// The smaller and the larger; the second where the first is NaN.
template <class F>
ASKEW_FN F lesser(F a, F b) {
  return select(a < b, a, b);
}
template <class F>
ASKEW_FN F greater(F a, F b) {
  return select(a > b, a, b);
}

struct UniformGrid {  // consecutive integers lo ... hi
  static constexpr bool kTiesToEven = true;
  float lo, hi;
  ASKEW_FN UniformGrid make(const GridArg& g) { return {g.lo, g.hi}; }
  ASKEW_INLINE float low() const { return lo; }
  ASKEW_INLINE float high() const { return hi; }
  template <class F>
  ASKEW_INLINE F nearest(F x) const {
    return round_even(x);
  }
  template <class F>
  ASKEW_INLINE Offset<F> offset(F x) const {
    F near = round_even(x), d = x - near, one = F{} + 1.f;
    return {near, near + negate_where_negative(one, d), d, absolute(d), one};
  }
};

struct BinaryGrid {  // -1, +1
  static constexpr bool kTiesToEven = false;
  ASKEW_FN BinaryGrid make(const GridArg&) { return {}; }
  ASKEW_INLINE float low() const { return -1.f; }
  ASKEW_INLINE float high() const { return 1.f; }
  template <class F>
  ASKEW_INLINE F nearest(F x) const {
    return select(x > 0.f, F{} + 1.f, select(x == x, F{} - 1.f, x));
  }
  template <class F>
  ASKEW_INLINE Offset<F> offset(F x) const {
    F near = nearest(x), d = x - near;
    return {near, 0.f - near, d, absolute(d) * 0.5f, F{} + 2.f};
  }
};

struct FloatGrid {  // every number is a level; taken with scale 1
  static constexpr bool kTiesToEven = false;
  ASKEW_FN FloatGrid make(const GridArg&) { return {}; }
  ASKEW_INLINE float low() const { return -__builtin_inff(); }
  ASKEW_INLINE float high() const { return __builtin_inff(); }
  template <class F>
  ASKEW_INLINE F nearest(F x) const {
    return x;
  }
};

struct CodebookGrid {
  static constexpr bool kTiesToEven = false;
  const float* levels;
  int n;
  ASKEW_FN CodebookGrid make(const GridArg& g) { return {g.levels, g.n_levels}; }
  ASKEW_INLINE float low() const { return levels[0]; }
  ASKEW_INLINE float high() const { return levels[n - 1]; }
  template <class F>
  ASKEW_INLINE F nearest(F x) const {
    F r = F{} + levels[0];
    for (int k = 1; k < n; ++k) {
      const float middle = 0.5f * levels[k - 1] + 0.5f * levels[k];
      r = select(x > middle, F{} + levels[k], r);
    }
    return select(x == x, r, x);
  }
  template <class F>
  ASKEW_INLINE Offset<F> offset(F x) const {
    F below = F{} + levels[0], above = F{} + levels[1];
    for (int k = 1; k + 1 < n; ++k) {
      below = select(x >= levels[k], F{} + levels[k], below);
      above = select(x >= levels[k], F{} + levels[k + 1], above);
    }
    return offset_between(x, below, above);
  }
};

// An exact midpoint as the lower level's, where `near` is the even one.
template <class F, class Grid>
ASKEW_FN Offset<F> lower_at_ties(const Offset<F>& o, const Grid&) {
  if (!Grid::kTiesToEven) return o;
  const auto up = both(o.u == 0.5f, o.distance < 0.f);
  return {select(up, o.far, o.near), select(up, o.near, o.far), select(up, 0.f - o.distance, o.distance), o.u, o.delta};
}

// What one row shares.
template <class F, class Grid>
struct Row {
  Grid grid;
  Divisor<F> scale;
  F low, high;  // the hull in weight units
};
template <class F, class Grid>
ASKEW_FN Row<F, Grid> make_row(const Divisor<F>& scale, const Grid& grid) {
  return {grid, scale, scale.value * grid.low(), scale.value * grid.high()};
}
template <class F, class Grid>
ASKEW_FN Row<F, Grid> make_row(F scale, const Grid& grid) {
  return make_row(divisor(scale), grid);
}

template <class F, class Grid>
ASKEW_FN Row<F, Grid> candidate_row(const MixArg& m, int k, int64_t row) {
  return make_row(F{} + (m.grids[k].kind == kFloat ? 1.f : m.scales[k * m.rows + row]), Grid::make(m.grids[k]));
}

// w moved into the hull [s c_0, s c_(K-1)]; NaN stays NaN.
template <class F, class Grid>
ASKEW_FN F clamp_hull(F w, const Row<F, Grid>& row) {
  return clamp_between(w, row.low, row.high);
}

// w / s moved into the hull.
template <class F, class Grid>
ASKEW_FN F in_hull(F w, const Row<F, Grid>& row) {
  return divide(clamp_hull(w, row), row.scale);
}
template <class F>
ASKEW_FN F in_hull(F w, const Row<F, FloatGrid>&) {
  return w;
}

// Q(w / s), for any w: +-inf gives an end, NaN stays NaN.
template <class F, class Grid>
ASKEW_FN F nearest_level(F w, const Row<F, Grid>& row) {
  return row.grid.nearest(in_hull(w, row));
}

// y = s * Q(w / s)
template <class F, class Grid>
ASKEW_FN F quantize_dequantize(F w, const Row<F, Grid>& row) {
  return row.scale.value * nearest_level(w, row);
}

// The gradient inside the hull, 0 outside. In weight units, s c_0 <= w <= s c_(K-1): a weight that was clamped stands
// exactly on an end, and w / s may round to just outside (callers with 16-bit storage round the row's ends to it, as a
// clamped weight is). NaN in w counts as inside.
template <class F, class Grid>
ASKEW_FN F pass_inside(F gradient, F w, const Row<F, Grid>& row) {
  return select(w < row.low, F{}, select(w > row.high, F{}, gradient));
}
