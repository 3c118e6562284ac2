// The interval constraint h >= 0, its projection and the skewed velocity (docs/mathematics.md, section 2).
//
// Written in the distance u to the nearest level instead of t: with q = u(1-u) = t(1-t), and |1-2t| = 1-2u,
//     h = eps - 16 q^2        |h'| = (32/Delta) q (1-2u)
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
  Offset<F> o = lower_at_ties(row.grid.offset(x), row.grid);
  F reach = radius * o.delta;
  return select(o.u > radius, row.scale.value * (o.near + negate_where_negative(reach, o.distance)), w);
}

// Between a weight (slack 1) and its level (slack 0): outside the hull a share `slack` of the way to the end is left;
// inside, the slope is 1 / slack around a bracket's midpoint and 0 around its levels.
struct Soft {
  float slack;
  float flat;  // the share of a bracket on either end where the slope is 0
  float slope;
};
ASKEW_FN Soft soft_of(float slack) { return {slack, 0.5f * (1.f - slack), divide(1.f, slack)}; }

template <class F, class Grid>
ASKEW_FN F soften(F w, const Row<F, Grid>& row, const Soft& soft) {
  F placed = clamp_hull(w, row);
  F x = divide(placed, row.scale);
  Offset<F> o = lower_at_ties(row.grid.offset(x), row.grid);
  F over = greater(o.u - soft.flat, F{});
  F reach = (soft.slope * over) * o.delta;
  return row.scale.value * (o.near + negate_where_negative(reach, o.distance)) + soft.slack * (w - placed);
}

// What the constraint asks of a weight, whatever the gradient is.
template <class F>
struct Push {
  F kappa;     // slowest allowed velocity towards the nearest level; -inf where the weight is free
  F distance;  // from the nearest level: its sign says where that is
  F excess;    // -h / 16: positive where infeasible
};

struct Division {  // how a step divides: a / b; anything where not `on`, where b may be 0
  template <class M, class F>
  ASKEW_FN F where(M, F a, F b) {
    return divide(a, b);
  }
};

// kappa = min(alpha (-h)/|h'|, Delta/(4 lr)); cap = 1/(4 lr), finite for lr = 0 too. A midpoint is free.
template <class Divide, class F>
ASKEW_FN Push<F> push_of(const Offset<F>& o, F scale, float eps, float alpha, float cap) {
  F q = o.u - o.u * o.u, to_middle = 0.5f - o.u;
  F excess = q * q - 0.0625f * eps;
  F length = scale * o.delta;
  F limit = length * cap;
  const auto constrained = lesser(excess, to_middle) > 0.f;  // one comparison for both being positive
  F kappa = Divide::where(constrained, excess * (length * (0.25f * alpha)), q * to_middle);
  kappa = lesser(kappa, limit);
  return {select(constrained, kappa, F{} - __builtin_inff()), o.distance, excess};
}

// The skewed velocity v = side * max(kappa, side * d), side = towards the nearest level, with the sign of a gradient:
// -v from g = -d. Where the weight is free that is g. A NaN in g survives.
template <class F>
ASKEW_FN F skew(F g, F kappa, F distance) {
  F towards = negate_where_negative(g, distance);
  return negate_where_negative(greater(kappa, towards), distance);
}
