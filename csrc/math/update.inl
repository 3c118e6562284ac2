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
    F step = divide(a * h.first_correction, root(b) * h.root_second_correction + h.adam_eps);
    return o.weight_decay() ? step + h.weight_decay * w : step;
  }
};

// The step's switches as Hyper has them. The CPU loops have a second kind, with the usual ones known to the compiler.
struct AnyOptions {
  static constexpr bool kTraces = true;
  Hyper hyper;
  ASKEW_INLINE bool constrained() const { return hyper.eps < 1.f; }  // at eps = 1 all is feasible
  ASKEW_INLINE bool clamp() const { return hyper.clamp; }
  ASKEW_INLINE bool direction() const { return hyper.direction; }
  ASKEW_INLINE bool maximize() const { return hyper.maximize; }
  ASKEW_INLINE bool nesterov() const { return hyper.nesterov; }
  ASKEW_INLINE bool weight_decay() const { return hyper.weight_decay != 0.f; }
  ASKEW_INLINE bool skip_nonfinite() const { return hyper.skip_nonfinite; }
};

template <class F>
struct Stepped {
  F w;        // the new weight, before it is rounded to its storage type
  F descent;  // -v: w moved by -lr * descent, then was clamped
  F excess;   // -h / 16 where the step started: positive where infeasible
};

template <class Rule, class F, class Grid, class Options>
ASKEW_FN Stepped<F> step_weight(F w, F g, F& a, F& b, bool has_a, const Row<F, Grid>& row, const Options& o) {
  const F inside = clamp_hull(w, row);
  if (o.clamp()) w = inside;
  if (o.maximize()) g = 0.f - g;
  if (o.direction()) g = Rule::descent(g, w, a, b, has_a, o);
  F excess{};
  if (o.constrained()) {
    // Where in its bracket w stands is not a matter of the last bit; its level is, and is taken from the exact
    // quotient.
    const Push<F> push = push_of(row.grid.offset(divide_roughly(inside, row.scale)), row.scale.value, o.hyper.eps,
                                 o.hyper.alpha, o.hyper.cap);
    g = skew(g, push.kappa, push.distance);
    excess = push.excess;
  }
  if (!o.direction()) g = Rule::descent(g, w, a, b, has_a, o);
  w = w - o.hyper.lr * g;
  return {o.clamp() ? clamp_hull(w, row) : w, g, excess};
}
