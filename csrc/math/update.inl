// One weight through one optimizer step: base direction, skew, move, clamp.
//
// A rule is what its optimizer subtracts from w, over lr. Its members are floats, made once a step from the numbers of
// its row in askew_kernels/ops/rules.py; kBuffers are its state beside each weight. `usual`: nothing that
// descent<true> leaves out is asked for. A new rule is a struct here and its name in Rules.

struct Sgd {  // torch.optim.SGD; state: the momentum buffer, or none
  static constexpr const char* kOperator = "skew_sgd_";
  static constexpr int kBuffers = 1, kNumbers = 4;
  static constexpr bool kOptional = true, kCounts = false;  // does without its buffers; needs the number of the step
  float momentum, one_minus_dampening, weight_decay, nesterov;
  ASKEW_FN Sgd make(const double* n, double) { return {(float)n[0], (float)(1 - n[1]), (float)n[2], (float)n[3]}; }
  ASKEW_INLINE bool usual() const { return weight_decay == 0.f && nesterov == 0.f; }
  template <bool USUAL, class F>
  ASKEW_INLINE F descent(F g, F w, F* state, bool stateful) const {
    if (!USUAL && weight_decay != 0.f) g = g + weight_decay * w;
    if (!stateful) return g;
    state[0] = momentum * state[0] + one_minus_dampening * g;
    return !USUAL && nesterov != 0.f ? g + momentum * state[0] : state[0];
  }
};

struct AdamW {  // torch.optim.AdamW; state: first and second moment
  static constexpr const char* kOperator = "skew_adamw_";
  static constexpr int kBuffers = 2, kNumbers = 4;
  static constexpr bool kOptional = false, kCounts = true;
  float one_minus_beta1, beta2, one_minus_beta2, adam_eps, weight_decay, first_correction, root_second_correction;
  ASKEW_FN AdamW make(const double* n, double step) {  // 1 - beta rounded once, from double
    return {(float)(1.0 - n[0]),
            (float)n[1],
            (float)(1.0 - n[1]),
            (float)n[2],
            (float)n[3],
            (float)(1.0 / (1.0 - power(n[0], step))),
            (float)(1.0 / root(1.0 - power(n[1], step)))};
  }
  ASKEW_INLINE bool usual() const { return weight_decay == 0.f; }
  template <bool USUAL, class F>
  ASKEW_INLINE F descent(F g, F w, F* state, bool) const {
    state[0] = state[0] + one_minus_beta1 * (g - state[0]);
    state[1] = beta2 * state[1] + one_minus_beta2 * (g * g);
    const F step = divide(state[0] * first_correction, root(state[1]) * root_second_correction + adam_eps);
    return USUAL || weight_decay == 0.f ? step : step + weight_decay * w;
  }
};

struct Lion {  // Chen et al., 2023; state: the moving average of gradients
  static constexpr const char* kOperator = "skew_lion_";
  static constexpr int kBuffers = 1, kNumbers = 3;
  static constexpr bool kOptional = false, kCounts = false;
  float beta1, one_minus_beta1, beta2, one_minus_beta2, weight_decay;
  ASKEW_FN Lion make(const double* n, double) {
    return {(float)n[0], (float)(1.0 - n[0]), (float)n[1], (float)(1.0 - n[1]), (float)n[2]};
  }
  ASKEW_INLINE bool usual() const { return weight_decay == 0.f; }
  template <bool USUAL, class F>
  ASKEW_INLINE F descent(F g, F w, F* state, bool) const {
    const F c = beta1 * state[0] + one_minus_beta1 * g, one = F{} + 1.f;
    state[0] = beta2 * state[0] + one_minus_beta2 * g;
    const F sign = select(c > 0.f, one, select(c < 0.f, F{} - one, select(c == c, F{}, c)));  // NaN stays NaN
    return USUAL || weight_decay == 0.f ? sign : sign + weight_decay * w;
  }
};

template <class... Rule>
struct RuleList {
  static constexpr int kCount = sizeof...(Rule);
};
typedef RuleList<Sgd, AdamW, Lion> Rules;  // the number of a rule is its place
template <class Rule, class... All>
static constexpr int number_of(RuleList<All...>) {
  int number = 0;
  (void)((__is_same(Rule, All) || (++number, false)) || ...);
  return number;
}

// body(Rule{}) of the rule with this number; on the host.
template <class... Rule, class Body>
static inline void with_rule(int number, RuleList<Rule...>, const Body& body) {
  int place = 0;
  ((place++ == number ? body(Rule{}) : void()), ...);
}

template <class Rule>
ASKEW_FN Rule rule_of(const Hyper& h) {
  static_assert(sizeof(Rule) <= sizeof(h.constants), "Hyper has room for the rule");
  Rule rule;
  __builtin_memcpy(&rule, h.constants, sizeof(Rule));
  return rule;
}

// The members of Hyper that follow from numbers that may stand on the device.
template <class Rule>
ASKEW_FN void set_rates(Hyper& h, double lr, double eps, double step, const double* numbers) {
  h.lr = (float)lr;
  h.eps = (float)eps;
  h.cap = divide(1.f, 4.f * (h.lr > kLeastRate ? h.lr : kLeastRate));
  const Rule rule = Rule::make(numbers, step);
  __builtin_memcpy(h.constants, &rule, sizeof(Rule));
}

// The usual step, known to the compiler: plain gradients, clamped exactly where it is constrained (at eps = 1 all is
// feasible), no totals; PLAIN: nothing but descent<true> of the rule. For any other the switches are as Hyper has them.
enum StepKind : int { kAnyStep, kFreeStep, kConstrainedStep };

template <class R, StepKind KIND = kAnyStep, class DIVISION = Division, bool PLAIN = KIND != kAnyStep>
struct StepOptions {
  typedef R Rule;
  typedef DIVISION Divide;
  static constexpr bool kUsual = KIND != kAnyStep, kPlain = PLAIN, kFree = KIND == kFreeStep;
  Hyper hyper;
  R rule;
  ASKEW_INLINE bool constrained() const { return kUsual ? KIND == kConstrainedStep : hyper.eps < 1.f; }
  ASKEW_INLINE bool clamp() const { return kUsual ? constrained() : hyper.clamp; }
  ASKEW_INLINE bool direction() const { return !kUsual && hyper.direction; }
  ASKEW_INLINE bool maximize() const { return !kUsual && hyper.maximize; }
  ASKEW_INLINE bool skip_nonfinite() const { return !kUsual && hyper.skip_nonfinite; }
  ASKEW_INLINE bool ste_clip() const { return hyper.ste_clip; }
};

template <class F>
struct Stepped {
  F w;        // the new weight, before it is rounded to its storage type
  F descent;  // -v: w moved by -lr * descent, then was clamped
  F excess;   // -h / 16 where the step started: positive where infeasible
};

// `state`: the rule's buffers, where it is stateful; they are replaced.
template <class F, class Grid, class Options>
ASKEW_FN Stepped<F> step_weight(F w, F g, F* state, bool stateful, const Row<F, Grid>& row, const Options& o) {
  const F inside = clamp_hull(w, row);
  if (o.clamp()) w = inside;
  if (o.maximize()) g = 0.f - g;
  if (o.direction()) g = o.rule.template descent<Options::kPlain>(g, w, state, stateful);
  F excess{};
  if constexpr (!Options::kFree)
    if (o.constrained()) {
      // Where in its bracket w stands is not a matter of the last bit; its level is, and is taken from the exact
      // quotient.
      const Offset<F> offset = row.grid.offset(divide_roughly(inside, row.scale));
      const Push<F> push =
          push_of<typename Options::Divide>(offset, row.scale.value, o.hyper.eps, o.hyper.alpha, o.hyper.cap);
      g = skew(g, push.kappa, push.distance);
      excess = push.excess;
    }
  if (!o.direction()) g = o.rule.template descent<Options::kPlain>(g, w, state, stateful);
  w = w - o.hyper.lr * g;
  return {o.clamp() ? clamp_hull(w, row) : w, g, excess};
}
