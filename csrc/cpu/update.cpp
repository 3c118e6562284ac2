// The skewed updates on the CPU.
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

void update(const Lists& l, int rule, const Hyper& hyper) {
  const size_t n = l.params.size();
  for (const auto* list : {&l.grads, &l.scales, &l.levels})
    STD_TORCH_CHECK(list->size() == n, "grads, scales, levels: expected ", n, " tensors each");
  STD_TORCH_CHECK(l.grids.size() == 3 * n, "grids: expected ", 3 * n, " integers");

  struct Job {
    UpdateTensor t;
    Tiling tiling;
    int64_t first_tile;                   // in the numbering of all tiles
    float* row_sums;                      // may be null
    double* totals;                       // may be null
    size_t partial_rows, partial_totals;  // where its partial sums start
  };
  std::vector<Job> jobs;
  jobs.reserve(n);
  int64_t tiles = 0, elements = 0;
  size_t partial_rows = 0, partial_totals = 0;
  const float* const pair = n ? l.descent.pair(l.params[0]) : nullptr;
  for (size_t i = 0; i < n; ++i) {  // every check comes before the first write
    const Tensor &w = l.params[i], &g = l.grads[i], &s = l.scales[i];
    const Matrix m = as_matrix(w, s);
    UpdateTensor t{};
    t.type = storage_type(w, "params");
    check_like(g, w, "grads");
    STD_TORCH_CHECK(storage_type(g, "grads") == t.type, "grads: expected the dtype of the parameter");
    t.w = w.data_ptr();
    t.g = g.data_ptr();
    t.scale = static_cast<const float*>(s.data_ptr());
    t.rows = m.rows;
    t.cols = m.cols;
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
    const Tensor* first = l.descent.beside(l.descent.firsts, i, n, w, "firsts");
    if (first && (pair[0] != 0.f || pair[1] != 0.f)) t.first = first->data_ptr();
    if (const Tensor* copy = present(l.dequantized, i, n, "dequantized")) {
      check_like(*copy, w, "dequantized");
      t.dequantized = copy->data_ptr();
      t.dequantized_type = storage_type(*copy, "dequantized");
    }
    Job job{t, Tiling(m), tiles, nullptr, nullptr, partial_rows, partial_totals};
    if (const Tensor* r = present(l.row_sums, i, n, "row_sums")) {
      check_dense(*r, "row_sums");
      STD_TORCH_CHECK(r->scalar_type() == ScalarType::Float && r->numel() == m.rows * kRowSums,
                      "row_sums: expected float32 of shape (rows, 3)");
      job.row_sums = static_cast<float*>(r->data_ptr());
      partial_rows += job.tiling.rows * job.tiling.pieces_per_row * kRowSums;
    }
    if (const Tensor* totals = present(l.totals, i, n, "totals")) {
      check_dense(*totals, "totals");
      STD_TORCH_CHECK(totals->scalar_type() == ScalarType::Double && totals->numel() == kTotals,
                      "totals: expected float64 of shape (6,)");
      job.totals = static_cast<double*>(totals->data_ptr());
      partial_totals += job.tiling.tiles * kTotals;
    }
    tiles += job.tiling.tiles;
    elements += m.rows * m.cols;
    jobs.push_back(job);
  }

  std::vector<double> rows(partial_rows), totals(partial_totals);
  for_tiles(tiles, elements, [&](int64_t begin, int64_t end) {
    size_t j = 0;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= jobs[j].first_tile + jobs[j].tiling.tiles) ++j;
      const Job& job = jobs[j];
      const int64_t k = i - job.first_tile;
      const Tile tile = job.tiling[k];
      double* row_part =
          job.row_sums ? rows.data() + job.partial_rows + (job.tiling.pieces_per_row > 1 ? k : tile.row0) * kRowSums
                       : nullptr;
      loops().update(job.t, rule, hyper, tile, row_part,
                     job.totals ? totals.data() + job.partial_totals + k * kTotals : nullptr);
    }
  });
  for (const Job& job : jobs) {
    if (job.row_sums && !job.tiling.cols)  // rows without columns
      std::memset(job.row_sums, 0, job.t.rows * kRowSums * sizeof(float));
    else if (job.row_sums)
      gather_row_sums(job.tiling, rows.data() + job.partial_rows, job.row_sums);
    if (job.totals) {
      double s[kTotals] = {};
      const double* part = totals.data() + job.partial_totals;
      for (int64_t k = 0; k < job.tiling.tiles; ++k, part += kTotals)
        for (int c = 0; c < kTotals; ++c) s[c] += part[c];
      std::memcpy(job.totals, s, sizeof s);
    }
  }
}

void skew_sgd(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
              std::vector<Tensor> scales, std::vector<Tensor> levels, std::vector<int64_t> grids,
              std::vector<Tensor> dequantized, std::vector<Tensor> row_sums, std::vector<Tensor> totals, Tensor lr,
              Tensor eps, double alpha, double momentum, double dampening, double weight_decay, bool nesterov,
              bool direction, bool clamp, bool maximize, bool skip_nonfinite, std::optional<std::vector<Tensor>> kept,
              std::optional<std::vector<Tensor>> firsts, std::optional<Tensor> coefficients) {
  Hyper h{};
  set_rates(h, scalar(lr, "lr", true).value, scalar(eps, "eps", true).value);
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
         kSgd, h);
}

void skew_adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> scales, std::vector<Tensor> levels,
                std::vector<int64_t> grids, std::vector<Tensor> dequantized, std::vector<Tensor> row_sums,
                std::vector<Tensor> totals, Tensor step, Tensor lr, Tensor eps, double alpha, double beta1,
                double beta2, double adam_eps, double weight_decay, bool direction, bool clamp, bool maximize,
                bool skip_nonfinite, std::optional<std::vector<Tensor>> kept, std::optional<std::vector<Tensor>> firsts,
                std::optional<Tensor> coefficients) {
  Hyper h{};
  set_rates(h, scalar(lr, "lr", true).value, scalar(eps, "eps", true).value);
  set_betas(h, beta1, beta2, scalar(step, "step", true).value);
  h.alpha = (float)alpha;
  h.weight_decay = (float)weight_decay;
  h.adam_eps = (float)adam_eps;
  h.direction = direction;
  h.clamp = clamp;
  h.maximize = maximize;
  h.skip_nonfinite = skip_nonfinite;
  update({params, grads, exp_avgs, exp_avg_sqs, scales, levels, grids, dequantized, row_sums, totals, "exp_avgs",
          "exp_avg_sqs", Descent(kept, firsts, coefficients)},
         kAdamW, h);
}

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) {
  m.impl("skew_sgd_", TORCH_BOX(&askew::skew_sgd));
  m.impl("skew_adamw_", TORCH_BOX(&askew::skew_adamw));
}
