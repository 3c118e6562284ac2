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

  // The tensors of a step, each checked against its parameter. `grads` may be the parameters themselves: of a list that
  // is kept, whose gradients come later.
  template <class Rule>
  static std::vector<UpdateTensor> checked(const Tensors& params, const Tensors& grads, const Tensors& states,
                                           const Tensors& scales, const Tensors& levels,
                                           const std::vector<int64_t>& grids, const Tensors& dequantized,
                                           const Tensors& row_sums, const Tensors& totals,
                                           const std::optional<Tensors>& kept, const std::optional<Tensors>& firsts) {
    const size_t n = params.size();
    for (const auto* list : {&grads, &scales, &levels})
      STD_TORCH_CHECK(list->size() == n, "grads, scales, levels: expected ", n, " tensors each");
    STD_TORCH_CHECK(grids.size() == 3 * n, "grids: expected ", 3 * n, " integers");
    STD_TORCH_CHECK(states.empty() || states.size() == Rule::kBuffers * n, "states: expected ",
                    Rule::kOptional ? "0 or " : "", Rule::kBuffers * n, " tensors, got ", states.size());
    std::vector<UpdateTensor> tensors(n);
    for (size_t i = 0; i < n; ++i) {
      const Tensor& w = params[i];
      UpdateTensor& t = tensors[i];
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
      if (const Tensor* copy = present(dequantized, i, n, "dequantized")) {
        check_like(*copy, w, "dequantized");
        t.dequantized = copy->data_ptr();
        t.dequantized_type = copy_type(*copy, "dequantized");
      }
      t.row_sums = (float*)sums(row_sums, i, params, "row_sums", ScalarType::Float, t.m.rows * kRowSums,
                                "float32 of shape (rows, 3)");
      t.totals = (double*)sums(totals, i, params, "totals", ScalarType::Double, kTotals, "float64 of shape (6,)");
    }
    return tensors;
  }

  // What is the same for every tensor of a step.
  template <class Rule>
  static void rate(Update& u, bool on_cpu, const std::optional<Tensor>& count, const Tensor& lr, const Tensor& eps,
                   const Scalar& alpha, const std::vector<double>& numbers, bool direction, bool clamp, bool maximize,
                   bool skip_nonfinite, bool ste_clip) {
    STD_TORCH_CHECK(numbers.size() == Rule::kNumbers, "numbers: expected ", Rule::kNumbers, ", got ", numbers.size());
    STD_TORCH_CHECK(!Rule::kCounts || count, "step: expected a 0-dim tensor");
    u.rates.lr = scalar(lr, "lr", on_cpu);
    u.rates.eps = scalar(eps, "eps", on_cpu);
    if (Rule::kCounts) u.rates.step = scalar(*count, "step", on_cpu);
    std::copy(numbers.begin(), numbers.end(), u.rates.numbers);
    u.hyper.rule = host::number_of<Rule>(host::Rules{});
    u.rates.alpha = alpha;
    u.hyper.alpha = (float)alpha.value;
    u.hyper.direction = direction;
    u.hyper.clamp = clamp;
    u.hyper.maximize = maximize;
    u.hyper.skip_nonfinite = skip_nonfinite;
    u.hyper.ste_clip = ste_clip;
    host::set_rates<Rule>(u.hyper, u.rates.lr.value, u.rates.eps.value, u.rates.step.value, u.rates.numbers);
  }

  template <class Rule>
  static void step(Tensors params, Tensors grads, Tensors states, Tensors scales, Tensors levels,
                   std::vector<int64_t> grids, Tensors dequantized, Tensors row_sums, Tensors totals,
                   std::optional<Tensor> count, Tensor lr, Tensor eps, double alpha, std::vector<double> numbers,
                   bool direction, bool clamp, bool maximize, bool skip_nonfinite, std::optional<Tensors> kept,
                   std::optional<Tensors> firsts, std::optional<Tensor> coefficients, bool ste_clip) {
    Update u{};
    u.tensors =
        checked<Rule>(params, grads, states, scales, levels, grids, dequantized, row_sums, totals, kept, firsts);
    for (const UpdateTensor& t : u.tensors)
      STD_TORCH_CHECK(!ste_clip || (!t.kept && !t.first), "ste_clip: expected no kept weights and no first gradients");
    if (params.empty()) return;
    if (firsts && !firsts->empty()) {
      STD_TORCH_CHECK(coefficients.has_value(), "coefficients: expected beside firsts");
      u.coefficients = coefficients_of(*coefficients, params[0]);
    }
    rate<Rule>(u, params[0].is_cpu(), count, lr, eps, {alpha, nullptr, true}, numbers, direction, clamp, maximize,
               skip_nonfinite, ste_clip);
    Device(params[0]).run(u);
  }

  // A list that is stepped again and again, checked once.
  static Tensor prepare(int64_t rule, Tensors params, Tensors states, Tensors scales, Tensors levels,
                        std::vector<int64_t> grids, Tensors dequantized, Tensors row_sums) {
    STD_TORCH_CHECK(!params.empty() && rule >= 0 && rule < host::Rules::kCount, "rule, params: expected a list");
    std::vector<UpdateTensor> tensors;
    host::with_rule((int)rule, host::Rules{}, [&](auto r) {
      tensors = checked<decltype(r)>(params, params, states, scales, levels, grids, dequantized, row_sums, {}, {}, {});
    });
    return bytes_of(tensors, params[0]);
  }

  // One step of a prepared list. grads: addresses, each of what its parameter has. `like`: the first parameter.
  // totals: (n, kTotals), or none.
  static void prepared_step(int64_t rule, Tensor list, std::vector<int64_t> grads, Tensor like,
                            std::optional<Tensor> totals, std::optional<Tensor> count, Tensor lr, Tensor eps,
                            Tensor alpha, std::vector<double> numbers, bool direction, bool clamp, bool maximize,
                            bool skip_nonfinite, bool ste_clip) {
    const size_t n = grads.size();
    STD_TORCH_CHECK(rule >= 0 && rule < host::Rules::kCount, "rule: unknown");
    Update u{};
    u.tensors = from_bytes<UpdateTensor>(list);
    STD_TORCH_CHECK(u.tensors.size() == n, "grads: expected ", u.tensors.size(), " addresses, got ", n);
    double* sums = nullptr;
    if (totals) {
      check_dense(*totals, "totals");
      STD_TORCH_CHECK(totals->scalar_type() == ScalarType::Double && totals->numel() == (int64_t)n * kTotals &&
                          together(*totals, like),
                      "totals: expected float64 of shape (", n, ", 6) beside the parameters");
      sums = static_cast<double*>(totals->data_ptr());
    }
    for (size_t i = 0; i < n; ++i) {
      u.tensors[i].g = reinterpret_cast<const void*>(grads[i]);
      u.tensors[i].totals = sums ? sums + i * kTotals : nullptr;
    }
    host::with_rule((int)rule, host::Rules{}, [&](auto r) {
      rate<decltype(r)>(u, like.is_cpu(), count, lr, eps, scalar(alpha, "alpha", like.is_cpu()), numbers, direction,
                        clamp, maximize, skip_nonfinite, ste_clip);
    });
    Device(like).run(u);
  }

  template <class Rule>
  static void implement_rule(StableLibrary& m) {
    m.impl(Rule::kOperator, TORCH_BOX(&step<Rule>));
  }
  template <class... Rule>
  static void implement(StableLibrary& m, host::RuleList<Rule...>) {
    (implement_rule<Rule>(m), ...);
  }
  static void implement(StableLibrary& m) {
    implement(m, host::Rules{});
    m.impl("prepare_update", TORCH_BOX(&prepare));
    m.impl("prepared_update_", TORCH_BOX(&prepared_step));
  }
};

}  // namespace askew
