// The skewed updates on a GPU.
#include "../checks.h"
#include "run.h"

namespace askew {
namespace {

struct Lists {  // the tensor lists of one update
  const std::vector<Tensor>&params, &grads, &a, &b, &scales, &levels;
  const std::vector<int64_t>& grids;
  const std::vector<Tensor>&dequantized, &row_sums, &totals;
  const char *a_name, *b_name;
  Descent descent;
};

void update(const Lists& l, int rule, const Hyper& hyper, const cuda::Rates& rates, const char* name) {
  const size_t n = l.params.size();
  if (n == 0) return;
  for (const auto* list : {&l.grads, &l.scales, &l.levels})
    STD_TORCH_CHECK(list->size() == n, "grads, scales, levels: expected ", n, " tensors each");
  STD_TORCH_CHECK(l.grids.size() == 3 * n, "grids: expected ", 3 * n, " integers");

  std::vector<cuda::UpdateTensor> tensors(n);
  for (size_t i = 0; i < n; ++i) {  // every check comes before the first write
    const Tensor &w = l.params[i], &g = l.grads[i], &s = l.scales[i];
    cuda::UpdateTensor t{};
    t.m = as_matrix(w, s);
    t.type = storage_type(w, "params");
    STD_TORCH_CHECK(w.get_device_index() == l.params[0].get_device_index(), "params: expected one device");
    check_like(g, w, "grads");
    STD_TORCH_CHECK(storage_type(g, "grads") == t.type, "grads: expected the dtype of the parameter");
    t.w = w.data_ptr();
    t.g = g.data_ptr();
    t.scale = static_cast<const float*>(s.data_ptr());
    t.grid = grid_arg(l.grids.data() + 3 * i, l.levels[i], w);
    if (const Tensor* a = present(l.a, i, n, l.a_name)) {
      check_like(*a, w, l.a_name);
      STD_TORCH_CHECK(storage_type(*a, l.a_name) == t.type, l.a_name, ": expected the dtype of the parameter");
      t.a = a->data_ptr();
    }
    if (const Tensor* b = present(l.b, i, n, l.b_name)) {
      check_like(*b, w, l.b_name);
      STD_TORCH_CHECK(storage_type(*b, l.b_name) == t.type, l.b_name, ": expected the dtype of the parameter");
      t.b = b->data_ptr();
    }
    STD_TORCH_CHECK(rule == kSgd || w.numel() == 0 || (t.a && t.b),
                    "exp_avgs, exp_avg_sqs: expected for every parameter");
    if (const Tensor* kept = l.descent.beside(l.descent.kept, i, n, w, "kept")) t.kept = kept->data_ptr();
    if (const Tensor* first = l.descent.beside(l.descent.firsts, i, n, w, "firsts")) t.first = first->data_ptr();
    if (const Tensor* copy = present(l.dequantized, i, n, "dequantized")) {
      check_like(*copy, w, "dequantized");
      t.dequantized = copy->data_ptr();
      t.dequantized_type = storage_type(*copy, "dequantized");
    }
    if (const Tensor* r = present(l.row_sums, i, n, "row_sums")) {
      check_dense(*r, "row_sums");
      STD_TORCH_CHECK(r->scalar_type() == ScalarType::Float && r->numel() == t.m.rows * kRowSums,
                      "row_sums: expected float32 of shape (rows, 3)");
      t.row_sums = static_cast<float*>(r->data_ptr());
    }
    if (const Tensor* totals = present(l.totals, i, n, "totals")) {
      check_dense(*totals, "totals");
      STD_TORCH_CHECK(totals->scalar_type() == ScalarType::Double && totals->numel() == kTotals,
                      "totals: expected float64 of shape (6,)");
      t.totals = static_cast<double*>(totals->data_ptr());
    }
    tensors[i] = t;
  }
  const OnDevice device(l.params[0]);
  Tensor scratch = device.scratch(cuda::update_scratch(tensors.data(), n));
  check_cuda(cuda::update(tensors.data(), n, rule, hyper, rates, l.descent.pair(l.params[0]), scratch.data_ptr(),
                          device.stream),
             name);
}

void skew_sgd(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
              std::vector<Tensor> scales, std::vector<Tensor> levels, std::vector<int64_t> grids,
              std::vector<Tensor> dequantized, std::vector<Tensor> row_sums, std::vector<Tensor> totals, Tensor lr,
              Tensor eps, double alpha, double momentum, double dampening, double weight_decay, bool nesterov,
              bool direction, bool clamp, bool maximize, bool skip_nonfinite, std::optional<std::vector<Tensor>> kept,
              std::optional<std::vector<Tensor>> firsts, std::optional<Tensor> coefficients) {
  const cuda::Rates rates{scalar(lr, "lr", false), scalar(eps, "eps", false), {0, nullptr, false}, 0, 0};
  Hyper h{};
  set_rates(h, rates.lr.value, rates.eps.value);
  h.alpha = (float)alpha;
  h.weight_decay = (float)weight_decay;
  h.momentum = (float)momentum;
  h.one_minus_dampening = (float)(1 - dampening);
  h.nesterov = nesterov;
  h.direction = direction;
  h.clamp = clamp;
  h.maximize = maximize;
  h.skip_nonfinite = skip_nonfinite;
  update({params,
          grads,
          momentum_buffers,
          {},
          scales,
          levels,
          grids,
          dequantized,
          row_sums,
          totals,
          "momentum_buffers",
          "",
          Descent(kept, firsts, coefficients)},
         kSgd, h, rates, "skew_sgd_");
}

void skew_adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> scales, std::vector<Tensor> levels,
                std::vector<int64_t> grids, std::vector<Tensor> dequantized, std::vector<Tensor> row_sums,
                std::vector<Tensor> totals, Tensor step, Tensor lr, Tensor eps, double alpha, double beta1,
                double beta2, double adam_eps, double weight_decay, bool direction, bool clamp, bool maximize,
                bool skip_nonfinite, std::optional<std::vector<Tensor>> kept, std::optional<std::vector<Tensor>> firsts,
                std::optional<Tensor> coefficients) {
  const cuda::Rates rates{scalar(lr, "lr", false), scalar(eps, "eps", false), scalar(step, "step", false), beta1,
                          beta2};
  Hyper h{};
  set_rates(h, rates.lr.value, rates.eps.value);
  set_betas(h, beta1, beta2, rates.step.value);
  h.alpha = (float)alpha;
  h.weight_decay = (float)weight_decay;
  h.adam_eps = (float)adam_eps;
  h.direction = direction;
  h.clamp = clamp;
  h.maximize = maximize;
  h.skip_nonfinite = skip_nonfinite;
  update({params, grads, exp_avgs, exp_avg_sqs, scales, levels, grids, dequantized, row_sums, totals, "exp_avgs",
          "exp_avg_sqs", Descent(kept, firsts, coefficients)},
         kAdamW, h, rates, "skew_adamw_");
}

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) {
  m.impl("skew_sgd_", TORCH_BOX(&askew::skew_sgd));
  m.impl("skew_adamw_", TORCH_BOX(&askew::skew_adamw));
}
