// The interval constraint h >= 0, its projection and the skewed velocity (docs/mathematics.md, section 2).
//
// Written in the distance u to the nearest level instead of t: t(1-t) = u(1-u), and |1-2t| = 1-2u, so
//     h  = eps - 16 u^2 (1-u)^2        |h'| = (32/Delta) u (1-u)(1-2u)
// which has no cancellation near the upper level.

// r / Delta: how far from its nearest level a feasible point may stand, in bracket lengths.
// (1 - sqrt(1 - q)) / 2 with q = sqrt(eps), in the form that does not cancel for small eps.
ASKEW_FN float feasible_radius(float eps) {
  const float q = root(eps);
  return divide(0.5f * q, 1.f + root(1.f - q));
}

// Clamp to the hull, then to the nearest feasible point; an exact midpoint goes to the lower side.
template <class F, class Grid>
ASKEW_FN F project_interval(F w, F scale, const Grid& grid, float radius) {
  w = clamp_hull(w, scale, grid);
  Place<F> p = grid.place(divide(w, scale));
  return select(p.u > radius, scale * (p.near - p.side * (radius * p.delta)), w);
}

template <class F>
struct Skewed {
  F velocity;
  F violation;   // max(0, -h)
  F infeasible;  // 1 where h < 0, else 0
};

// v = d                            where feasible, on a midpoint, or outside the hull
//   = side * max(kappa, side * d)  elsewhere, kappa = min(alpha (-h)/|h'|, Delta/(4 lr))
// cap = 1/(4 lr), +inf for lr = 0. A NaN in d survives.
template <class F>
ASKEW_FN Skewed<F> skew_velocity(F d, const Place<F>& p, F scale, float eps, float alpha, float cap) {
  F q = p.u * (1.f - p.u);
  F h = eps - 16.f * (q * q);
  F length = scale * p.delta;
  F kappa = divide((alpha * (0.f - h)) * length, (32.f * q) * (1.f - 2.f * p.u));
  F limit = length * cap;
  kappa = select(kappa < limit, kappa, limit);
  F towards = p.side * d;
  F skewed = p.side * select(kappa > towards, kappa, towards);
  auto act = both(h < 0.f, p.u < 0.5f);
  return {select(act, skewed, d), select(h < 0.f, 0.f - h, F{}), select(h < 0.f, F{} + 1.f, F{})};
}
