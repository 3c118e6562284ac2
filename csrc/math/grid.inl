// Grids: the nearest level and the bracket, in grid units (x = w / s).
//
// Three kinds. Each offers, for x of any value:
//   low(), high()  the ends of the hull
//   clamp(x)     x moved into the hull; NaN stays NaN
//   nearest(x)   Q(x): the nearest level, ties to even (uniform, as torch.round) or to the lower level
//                (binary, codebook); NaN stays NaN; +-inf gives an end
//   place(x)     where x in the hull stands between its two neighbouring levels
// No level is ever -0.

template <class F>
struct Place {
  F near;   // nearest level; of an exact midpoint, the lower one
  F u;      // distance to it over the bracket's length: 0 on a level, 1/2 midway
  F side;   // direction from x towards it: +1 or -1
  F delta;  // length of the bracket
};

template <class F>
ASKEW_FN F clamp_between(F x, F lo, F hi) {
  return select(x < lo, lo, select(x > hi, hi, x));
}

struct UniformGrid {  // consecutive integers lo ... hi
  float lo, hi;
  ASKEW_FN UniformGrid make(const GridArg& g) { return {g.lo, g.hi}; }
  ASKEW_INLINE float low() const { return lo; }
  ASKEW_INLINE float high() const { return hi; }
  template <class F>
  ASKEW_INLINE F clamp(F x) const { return clamp_between(x, F{} + lo, F{} + hi); }
  template <class F>
  ASKEW_INLINE F nearest(F x) const { return round_even(clamp(x)); }
  template <class F>
  ASKEW_INLINE Place<F> place(F x) const {
    F r = nearest(x), d = clamp(x) - r;  // exact: r is within 1/2
    F up = select(d == -0.5f, F{} + 1.f, F{});  // the tie that was rounded up: take the lower level
    r = r - up;
    d = d + up;
    return {r, absolute(d), select(d > 0.f, F{} - 1.f, F{} + 1.f), F{} + 1.f};
  }
};

struct BinaryGrid {  // -1, +1
  ASKEW_FN BinaryGrid make(const GridArg&) { return {}; }
  ASKEW_INLINE float low() const { return -1.f; }
  ASKEW_INLINE float high() const { return 1.f; }
  template <class F>
  ASKEW_INLINE F clamp(F x) const { return clamp_between(x, F{} - 1.f, F{} + 1.f); }
  template <class F>
  ASKEW_INLINE F nearest(F x) const {
    return select(x > 0.f, F{} + 1.f, select(x == x, F{} - 1.f, x));
  }
  template <class F>
  ASKEW_INLINE Place<F> place(F x) const {
    F r = nearest(x), d = clamp(x) - r;
    return {r, absolute(d) * 0.5f, select(d > 0.f, F{} - 1.f, F{} + 1.f), F{} + 2.f};
  }
};

struct CodebookGrid {
  const float* levels;
  int n;
  ASKEW_FN CodebookGrid make(const GridArg& g) { return {g.levels, g.n_levels}; }
  ASKEW_INLINE float low() const { return levels[0]; }
  ASKEW_INLINE float high() const { return levels[n - 1]; }
  template <class F>
  ASKEW_INLINE F clamp(F x) const { return clamp_between(x, F{} + low(), F{} + high()); }
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
  ASKEW_INLINE Place<F> place(F x) const {
    F c = clamp(x), r = F{} + levels[0], below = r, above = F{} + levels[1];
    for (int k = 1; k < n; ++k) {
      const float middle = 0.5f * levels[k - 1] + 0.5f * levels[k];
      r = select(c > middle, F{} + levels[k], r);
      if (k + 1 < n) {
        below = select(c >= levels[k], F{} + levels[k], below);
        above = select(c >= levels[k], F{} + levels[k + 1], above);
      }
    }
    F d = c - r, delta = above - below, u = divide(absolute(d), delta);
    return {select(x == x, r, x), select(u > 0.5f, F{} + 0.5f, u), select(d > 0.f, F{} - 1.f, F{} + 1.f), delta};
  }
};

// y = s * Q(w / s)
template <class F, class Grid>
ASKEW_FN F quantize_dequantize(F w, F scale, const Grid& grid) {
  return scale * grid.nearest(divide(w, scale));
}

// w moved into the hull [s c_0, s c_(K-1)]; NaN stays NaN.
template <class F, class Grid>
ASKEW_FN F clamp_hull(F w, F scale, const Grid& grid) {
  return clamp_between(w, scale * grid.low(), scale * grid.high());
}

// Inside the hull, ends included: where a straight-through gradient passes. NaN counts as inside.
template <class F, class Grid>
ASKEW_FN F pass_inside(F gradient, F w, F scale, const Grid& grid) {
  F x = divide(w, scale), c = grid.clamp(x);
  return select(c == x, gradient, select(x == x, F{}, gradient));
}
