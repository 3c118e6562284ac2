// Sharpness-aware perturbations of one weight (docs/mathematics.md, section 4).
// T = |w| + eta for adapted tensors, 1 for the others; delta = (c T^2 - a) g.

ASKEW_FN bool stands_still(const SamArg& s) { return s.c == 0.f && s.a == 0.f; }

// T g, which is squared and summed.
template <class F>
ASKEW_FN F sam_scaled(F w, F g, const SamArg& s) {
  return s.adaptive ? (absolute(w) + s.eta) * g : g;
}

// w + delta. Where nothing shall move, that is for the caller to know (w + 0 g is not w for g = inf).
template <class F>
ASKEW_FN F sam_perturbed(F w, F g, const SamArg& s) {
  if (!s.adaptive) return w + (s.c - s.a) * g;
  const F t = absolute(w) + s.eta;
  return w + (s.c * (t * t) - s.a) * g;
}

// The gradient of an aligned step.
template <class F>
ASKEW_FN F sam_mean(F second, F first) {
  return 0.5f * (second + first);
}
