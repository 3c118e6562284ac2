// One weight through one optimizer step: base direction, skew, move, clamp.
// `Rule` is the base optimizer (Sgd, AdamW); buffers a and b are its state.

struct Sgd {
  // The velocity -(torch.optim.SGD's update); a is the momentum buffer. has_a: momentum != 0.
  template <class F>
  ASKEW_FN F velocity(F g, F w, F& a, F&, bool has_a, const Hyper& h) {
    if (h.weight_decay != 0.f) g = g + h.weight_decay * w;
    if (has_a) {
      a = h.momentum * a + h.one_minus_dampening * g;
      g = h.nesterov ? g + h.momentum * a : a;
    }
    return 0.f - g;
  }
};

struct AdamW {
  // a, b: first and second moment.
  template <class F>
  ASKEW_FN F velocity(F g, F w, F& a, F& b, bool, const Hyper& h) {
    a = a + h.one_minus_beta1 * (g - a);
    b = h.beta2 * b + h.one_minus_beta2 * (g * g);
    F denominator = divide(root(b), F{} + h.root_bias_correction2) + h.adam_eps;
    F v = 0.f - divide(divide(a, F{} + h.bias_correction1), denominator);
    if (h.weight_decay != 0.f) v = v - h.weight_decay * w;
    return v;
  }
};

template <class F>
struct Stepped {
  F w;                      // the new weight, before it is rounded to its storage type
  F velocity;               // w moved by lr * velocity, then was clamped
  F violation, infeasible;  // at the point where the step started
  F level;                  // nearest level there
};

template <class Rule, class F, class Grid>
ASKEW_FN Stepped<F> step_weight(F w, F g, F& a, F& b, bool has_a, F scale, const Grid& grid, const Hyper& h) {
  if (h.clamp) w = clamp_hull(w, scale, grid);
  const F x = divide(w, scale);
  const Place<F> place = grid.place(x);
  F d = h.maximize ? g : 0.f - g, v;
  Skewed<F> s;
  if (h.direction) {
    s = skew_velocity(Rule::velocity(0.f - d, w, a, b, has_a, h), place, scale, h.eps, h.alpha, h.cap);
    v = s.velocity;
  } else {
    s = skew_velocity(d, place, scale, h.eps, h.alpha, h.cap);
    v = Rule::velocity(0.f - s.velocity, w, a, b, has_a, h);
  }
  w = w + h.lr * v;
  if (h.clamp) w = clamp_hull(w, scale, grid);
  return {w, v, s.violation, s.infeasible, grid.nearest(x)};
}
