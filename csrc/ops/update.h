// The skewed updates: an operator for each of math's rules. `Device` runs an Update: cpu/update.cpp, cuda/update.cpp.
#pragma once
#include "tensors.h"

namespace askew {
namespace host {
#include "../math/scalar.inl"
#include "../math/math.inl"
}  // namespace host

struct Update {
  std::vector<UpdateTensor> tensors;
  Hyper hyper;                // complete where no rate is on the device
  Rates rates;                // what it was made from
  const float* coefficients;  // (c, a) beside the parameters; null: no first gradients
};

template <class Device>
struct UpdateOps {
  typedef std::vector<Tensor> Tensors;

  // Entry i of a list that may be empty (absent for all) or hold tensors without elements (absent for one).
  static const Tensor* present(const Tensors& list, size_t i, size_t n, const char* name) {
    STD_TORCH_CHECK(list.empty() || list.size() == n, name, ": expected 0 or ", n, " tensors, got ", list.size());
    return list.empty() || list[i].numel() == 0 ? nullptr : &list[i];
  }
  static void* optional_like(const Tensors& list, size_t i, size_t n, const Tensor& w, const char* name) {
    const Tensor* t = present(list, i, n, name);
    return t ? data_like(*t, w, name) : nullptr;
  }
  static void* sums(const Tensors& list, size_t i, const Tensors& params, const char* name, ScalarType type,
                    int64_t count, const char* expected) {
    const Tensor* t = present(list, i, params.size(), name);
    if (!t) return nullptr;
    check_dense(*t, name);
    STD_TORCH_CHECK(t->scalar_type() == type && t->numel() == count && together(*t, params[i]), name, ": expected ",
                    expected, " beside the parameter");
    return t->data_ptr();
  }

  template <class Rule, class... All>
  static constexpr int number_of(host::RuleList<All...>) {
    int number = 0;
    (void)((std::is_same_v<Rule, All> || (++number, false)) || ...);
    return number;
  }

  template <class Rule>
  static void step(Tensors params, Tensors grads, Tensors states, Tensors scales, Tensors levels,
                   std::vector<int64_t> grids, Tensors dequantized, Tensors row_sums, Tensors totals,
                   std::optional<Tensor> count, Tensor lr, Tensor eps, double alpha, std::vector<double> numbers,
                   bool direction, bool clamp, bool maximize, bool skip_nonfinite, std::optional<Tensors> kept,
                   std::optional<Tensors> firsts, std::optional<Tensor> coefficients, bool ste_clip) {
    const size_t n = params.size();
    for (const auto* list : {&grads, &scales, &levels})
      STD_TORCH_CHECK(list->size() == n, "grads, scales, levels: expected ", n, " tensors each");
    STD_TORCH_CHECK(grids.size() == 3 * n, "grids: expected ", 3 * n, " integers");
    STD_TORCH_CHECK(states.empty() || states.size() == Rule::kBuffers * n, "states: expected ",
                    Rule::kOptional ? "0 or " : "", Rule::kBuffers * n, " tensors, got ", states.size());
    STD_TORCH_CHECK(numbers.size() == Rule::kNumbers, "numbers: expected ", Rule::kNumbers, ", got ", numbers.size());
    STD_TORCH_CHECK(!Rule::kCounts || count, "step: expected a 0-dim tensor");
    if (n == 0) return;

    Update u{};
    u.tensors.resize(n);
    for (size_t i = 0; i < n; ++i) {
      const Tensor& w = params[i];
      UpdateTensor& t = u.tensors[i];
      STD_TORCH_CHECK(together(w, params[0]), "params: expected one device");
      t.type = storage_type(w, "params");
      t.w = w.data_ptr();
      t.scale = floats(scales[i], w, "scales");
      t.m = matrix_of(w, scales[i].numel(), "scales");
      t.g = data_like(grads[i], w, "grads");
      t.grid = grid_arg(grids.data() + 3 * i, levels[i], w);
      int found = 0;
      for (size_t k = i; k < states.size(); k += n)
        if (states[k].numel()) t.state[found++] = data_like(states[k], w, "states");
      STD_TORCH_CHECK(found == Rule::kBuffers || (Rule::kOptional && !found) || !w.numel(), "states: expected ",
                      Rule::kBuffers, " for every parameter");
      if (kept) t.kept = optional_like(*kept, i, n, w, "kept");
      if (firsts) t.first = optional_like(*firsts, i, n, w, "firsts");
      STD_TORCH_CHECK(!ste_clip || (!t.kept && !t.first), "ste_clip: expected no kept weights and no first gradients");
      if (const Tensor* copy = present(dequantized, i, n, "dequantized")) {
        check_like(*copy, w, "dequantized");
        t.dequantized = copy->data_ptr();
        t.dequantized_type = copy_type(*copy, "dequantized");
      }
      t.row_sums = (float*)sums(row_sums, i, params, "row_sums", ScalarType::Float, t.m.rows * kRowSums,
                                "float32 of shape (rows, 3)");
      t.totals = (double*)sums(totals, i, params, "totals", ScalarType::Double, kTotals, "float64 of shape (6,)");
    }
    if (firsts && !firsts->empty()) {
      STD_TORCH_CHECK(coefficients.has_value(), "coefficients: expected beside firsts");
      u.coefficients = coefficients_of(*coefficients, params[0]);
    }
    const bool on_cpu = params[0].is_cpu();
    u.rates.lr = scalar(lr, "lr", on_cpu);
    u.rates.eps = scalar(eps, "eps", on_cpu);
    if (Rule::kCounts) u.rates.step = scalar(*count, "step", on_cpu);
    std::copy(numbers.begin(), numbers.end(), u.rates.numbers);
    u.hyper.rule = number_of<Rule>(host::Rules{});
    u.hyper.alpha = (float)alpha;
    u.hyper.direction = direction;
    u.hyper.clamp = clamp;
    u.hyper.maximize = maximize;
    u.hyper.skip_nonfinite = skip_nonfinite;
    u.hyper.ste_clip = ste_clip;
    host::set_rates<Rule>(u.hyper, u.rates.lr.value, u.rates.eps.value, u.rates.step.value, u.rates.numbers);
    Device(params[0]).run(u);
  }

  template <class Rule>
  static void implement_rule(StableLibrary& m) {
    m.impl(Rule::kOperator, TORCH_BOX(&step<Rule>));
  }
  template <class... Rule>
  static void implement(StableLibrary& m, host::RuleList<Rule...>) {
    (implement_rule<Rule>(m), ...);
  }
  static void implement(StableLibrary& m) { implement(m, host::Rules{}); }
};

}  // namespace askew
