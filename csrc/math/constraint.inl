// The interval constraint h >= 0, its projection and the skewed velocity (docs/mathematics.md, section 2).
//
// Written in the distance u to the nearest level instead of t: t(1-t) = u(1-u), and |1-2t| = 1-2u. With p = 4u(1-u),
//     h  = eps - p^2        |h'| = (8/Delta) p (1-2u)
// which has no cancellation near the upper level.

// r / Delta: how far from its nearest level a feasible point may stand, in bracket lengths.
// (1 - sqrt(1 - q)) / 2 with q = sqrt(eps), in the form that does not cancel for small eps.
ASKEW_FN float feasible_radius(float eps) {
  const float q = root(eps);
  return divide(0.5f * q, 1.f + root(1.f - q));
}

// Clamp to the hull, then to the nearest feasible point; an exact midpoint goes to the lower side.
template <class F, class Grid>
ASKEW_FN F project_interval(F w, const Row<F, Grid>& row, float radius) {
  w = clamp_hull(w, row);
  F x = divide(w, row.scale);
  Offset<F> o = row.grid.offset(x);
  F reach = radius * o.delta;
  F below = select(o.distance > 0.f, o.near, o.far);  // of an exact midpoint, whichever end is called near
  F target = select(o.u == 0.5f, below + reach, o.near + negate_where_negative(reach, o.distance));
  return select(o.u > radius, row.scale.value * target, w);
}

template <class F>
struct Skewed {
  F descent;  // -v
  F excess;   // -h: positive where infeasible
};

// The skewed velocity v, with the sign of a gradient (descent = -v, from g = -d):
//   v = d                            where feasible, on a midpoint, or outside the hull
//     = side * max(kappa, side * d)  elsewhere: side = towards the nearest level, kappa = min(alpha (-h)/|h'|, Delta/(4
//     lr))
// cap = 1/(4 lr), +inf for lr = 0. A NaN in g survives.
template <class F>
ASKEW_FN Skewed<F> skew(F g, const Offset<F>& o, F scale, float eps, float alpha, float cap) {
  F p = (4.f * o.u) * (1.f - o.u);
  F excess = p * p - eps;
  F length = scale * o.delta;
  F kappa = divide(excess * (length * (0.125f * alpha)), p * (1.f - (o.u + o.u)));
  F limit = length * cap;
  kappa = select(kappa < limit, kappa, limit);
  F towards = negate_where_negative(g, o.distance);  // side * d
  towards = select(both(excess > 0.f, o.u < 0.5f), select(kappa > towards, kappa, towards), towards);
  return {negate_where_negative(towards, o.distance), excess};
}
