// One weight through one optimizer step: base direction, skew, move, clamp.
// `Rule` is the base optimizer (Sgd, AdamW); buffers a and b are its state.

struct Sgd {
  // What torch.optim.SGD subtracts from w, over lr. a is the momentum buffer; has_a: momentum != 0.
  template <class F, class Options>
  ASKEW_FN F descent(F g, F w, F& a, F&, bool has_a, const Options& o) {
    const Hyper& h = o.hyper;
    if (o.weight_decay()) g = g + h.weight_decay * w;
    if (has_a) {
      a = h.momentum * a + h.one_minus_dampening * g;
      g = o.nesterov() ? g + h.momentum * a : a;
    }
    return g;
  }
};

struct AdamW {
  // What torch.optim.AdamW subtracts from w, over lr. a, b: first and second moment.
  template <class F, class Options>
  ASKEW_FN F descent(F g, F w, F& a, F& b, bool, const Options& o) {
    const Hyper& h = o.hyper;
    a = a + h.one_minus_beta1 * (g - a);
    b = h.beta2 * b + h.one_minus_beta2 * (g * g);
    F denominator = divide(root(b), F{} + h.root_bias_correction2) + h.adam_eps;
    F step = divide(divide(a, F{} + h.bias_correction1), denominator);
    return o.weight_decay() ? step + h.weight_decay * w : step;
  }
};

// The step's switches as Hyper has them. The CPU loops have a second kind, with the usual ones known to the compiler.
struct AnyOptions {
  Hyper hyper;
  ASKEW_INLINE bool constrained() const { return hyper.eps < 1.f; }  // at eps = 1 all is feasible
  ASKEW_INLINE bool clamp() const { return hyper.clamp; }
  ASKEW_INLINE bool direction() const { return hyper.direction; }
  ASKEW_INLINE bool maximize() const { return hyper.maximize; }
  ASKEW_INLINE bool nesterov() const { return hyper.nesterov; }
  ASKEW_INLINE bool weight_decay() const { return hyper.weight_decay != 0.f; }
  ASKEW_INLINE bool skip_nonfinite() const { return hyper.skip_nonfinite; }
};

// The first half of a step, from the weight alone.
template <class F>
struct Placed {
  Push<F> push;
  F level;  // nearest level
};

template <class F, class Grid, class Options>
ASKEW_FN Placed<F> place_weight(F w, const Row<F, Grid>& row, const Options& o) {
  const F x = divide(clamp_hull(w, row), row.scale);
  const F free = F{} - __builtin_inff();
  if (!o.constrained()) return {{free, F{}, F{}}, row.grid.nearest(x)};
  const Offset<F> offset = row.grid.offset(x);
  return {push_of(offset, row.scale.value, o.hyper.eps, o.hyper.alpha, o.hyper.cap), offset.near};
}

// The second half: the new weight, before it is rounded to its storage type. g becomes -v: w moves by -lr * g.
template <class Rule, class F, class Grid, class Options>
ASKEW_FN F move_weight(F w, F& g, F& a, F& b, bool has_a, F kappa, F distance, const Row<F, Grid>& row,
                       const Options& o) {
  if (o.clamp()) w = clamp_hull(w, row);
  if (o.maximize()) g = 0.f - g;
  if (o.direction()) g = Rule::descent(g, w, a, b, has_a, o);
  if (o.constrained()) g = skew(g, kappa, distance);
  if (!o.direction()) g = Rule::descent(g, w, a, b, has_a, o);
  w = w - o.hyper.lr * g;
  return o.clamp() ? clamp_hull(w, row) : w;
}

template <class F>
struct Stepped {
  F w;        // the new weight, before it is rounded to its storage type
  F descent;  // -v: w moved by -lr * descent, then was clamped
  F excess;   // -h where the step started: positive where infeasible
  F level;    // nearest level there
};

template <class Rule, class F, class Grid, class Options>
ASKEW_FN Stepped<F> step_weight(F w, F g, F& a, F& b, bool has_a, const Row<F, Grid>& row, const Options& o) {
  const Placed<F> p = place_weight(w, row, o);
  const F moved = move_weight<Rule>(w, g, a, b, has_a, p.push.kappa, p.push.distance, row, o);
  return {moved, g, p.push.excess, p.level};
}
