// The skewed updates on the CPU.
#include "../ops/update.h"
#include "run.h"

namespace askew {

struct UpdateOnCpu : OnCpu {
  using OnCpu::OnCpu;

  // What is only written goes past caches that are too small to keep it for the next forward: copies, and weights that
  // are read from elsewhere.
  static void choose_stores(std::vector<UpdateTensor>& list) {
    int64_t copies = 0, weights = 0;
    for (const UpdateTensor& t : list) {
      if (t.dequantized) copies += t.m.rows * t.m.cols * type_size(t.dequantized_type);
      if (t.kept) weights += t.m.rows * t.m.cols * type_size(t.type);
    }
    for (UpdateTensor& t : list) {
      t.past_caches = t.dequantized && copies >= tuning.streaming_bytes && in_lines(t.dequantized, t.m.cols);
      t.weight_past_caches = t.kept && weights >= tuning.streaming_bytes && in_lines(t.w, t.m.cols);
    }
  }
  // Whether every vector begins where such stores may.
  static bool in_lines(const void* p, int64_t cols) { return (uintptr_t)p % 64 == 0 && cols % 16 == 0; }

  void run(Update& u) const {
    const size_t n = u.tensors.size();
    std::vector<Tiling> tilings;
    std::vector<size_t> first_rows(n), first_totals(n);  // where a tensor's partial sums start
    tilings.reserve(n);
    size_t partial_rows = 0, partial_totals = 0;
    // where nothing was perturbed, the first gradients do not count
    const bool averaged = u.coefficients && (u.coefficients[0] != 0.f || u.coefficients[1] != 0.f);
    for (size_t j = 0; j < n; ++j) {
      UpdateTensor& t = u.tensors[j];
      if (!averaged) t.first = nullptr;
      const Tiling& tiling = tilings.emplace_back(t.m);
      first_rows[j] = partial_rows;
      first_totals[j] = partial_totals;
      if (t.row_sums) partial_rows += tiling.partials() * kRowSums;
      if (t.totals) partial_totals += tiling.tiles * kTotals;
    }

    choose_stores(u.tensors);

    std::vector<double> rows(partial_rows), totals(partial_totals);
    over_list(tilings.data(), n, [&](size_t j, Tile tile, int64_t i) {
      const UpdateTensor& t = u.tensors[j];
      double* const row = rows.data() + first_rows[j] + tilings[j].partial(i) * kRowSums;
      double* const total = totals.data() + first_totals[j] + i * kTotals;
      loops().update(t, u.hyper, tile, t.row_sums ? row : nullptr, t.totals ? total : nullptr);
    });
    for (size_t j = 0; j < n; ++j) {
      const UpdateTensor& t = u.tensors[j];
      if (t.row_sums) gather_row_sums(tilings[j], rows.data() + first_rows[j], t.row_sums);
      for (int c = 0; t.totals && c < kTotals; ++c) {
        t.totals[c] = 0;
        for (int64_t i = 0; i < tilings[j].tiles; ++i) t.totals[c] += totals[first_totals[j] + i * kTotals + c];
      }
    }
  }
};

}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) { askew::UpdateOps<askew::UpdateOnCpu>::implement(m); }
