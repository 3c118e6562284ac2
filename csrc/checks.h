// What the update's lists are made of.
#pragma once
#include <cmath>

#include "ops/tensors.h"

namespace askew {

inline Matrix as_matrix(const Tensor& x, const Tensor& scale) {
  floats(scale, x, "scale");
  return matrix_of(x, scale.numel(), "scale");
}

// Entry i of a list that may be empty (absent for all) or hold tensors without elements (absent for one).
inline const Tensor* present(const std::vector<Tensor>& list, size_t i, size_t n, const char* name) {
  STD_TORCH_CHECK(list.empty() || list.size() == n, name, ": expected 0 or ", n, " tensors, got ", list.size());
  return list.empty() || list[i].numel() == 0 ? nullptr : &list[i];
}

inline void set_rates(Hyper& h, double lr, double eps) {
  h.lr = (float)lr;
  h.eps = (float)eps;
  h.cap = 1.f / (4.f * h.lr);
}

// What a sharpness-aware optimizer hands to the base update, beside each parameter.
struct Descent {
  std::vector<Tensor> kept, firsts;
  std::optional<Tensor> coefficients;  // where there are firsts

  Descent(const std::optional<std::vector<Tensor>>& kept, const std::optional<std::vector<Tensor>>& firsts,
          const std::optional<Tensor>& coefficients)
      : coefficients(coefficients) {
    if (kept) this->kept = *kept;
    if (firsts) this->firsts = *firsts;
  }
  const Tensor* beside(const std::vector<Tensor>& list, size_t i, size_t n, const Tensor& w, const char* name) const {
    const Tensor* t = present(list, i, n, name);
    if (t) data_like(*t, w, name);
    return t;
  }
  // (c, a), or null; both 0: nothing was perturbed, and the first gradients do not count.
  const float* pair(const Tensor& beside) const {
    if (firsts.empty()) return nullptr;
    STD_TORCH_CHECK(coefficients.has_value(), "coefficients: expected beside firsts");
    return coefficients_of(*coefficients, beside);
  }
};

inline void set_betas(Hyper& h, double beta1, double beta2, double step) {
  h.one_minus_beta1 = (float)(1.0 - beta1);
  h.beta2 = (float)beta2;
  h.one_minus_beta2 = (float)(1.0 - beta2);
  h.first_correction = (float)(1.0 / (1.0 - std::pow(beta1, step)));
  h.root_second_correction = (float)(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
}

}  // namespace askew
