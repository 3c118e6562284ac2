// The skewed updates on the CPU.
#include "../ops/update.h"
#include "run.h"

namespace askew {
namespace {

struct Job {
  UpdateTensor t;
  Tiling tiling;
  int64_t first_tile;                   // in the numbering of all tiles
  size_t partial_rows, partial_totals;  // where its partial sums start
};

struct Device : OnCpu {
  using OnCpu::OnCpu;
  void run(const Update& u) const {
    std::vector<Job> jobs;
    jobs.reserve(u.tensors.size());
    int64_t tiles = 0, elements = 0;
    size_t partial_rows = 0, partial_totals = 0;
    // where nothing was perturbed, the first gradients do not count
    const bool averaged = u.coefficients && (u.coefficients[0] != 0.f || u.coefficients[1] != 0.f);
    for (UpdateTensor t : u.tensors) {
      if (!averaged) t.first = nullptr;
      const Job job{t, Tiling(t.m), tiles, partial_rows, partial_totals};
      tiles += job.tiling.tiles;
      elements += t.m.rows * t.m.cols;
      if (t.row_sums) partial_rows += job.tiling.partials() * kRowSums;
      if (t.totals) partial_totals += job.tiling.tiles * kTotals;
      jobs.push_back(job);
    }

    std::vector<double> rows(partial_rows), totals(partial_totals);
    for_tiles(tiles, elements, [&](int64_t begin, int64_t end) {
      size_t j = 0;
      for (int64_t i = begin; i < end; ++i) {
        while (i >= jobs[j].first_tile + jobs[j].tiling.tiles) ++j;
        const Job& job = jobs[j];
        const int64_t k = i - job.first_tile;
        double* const row = rows.data() + job.partial_rows + job.tiling.partial(k) * kRowSums;
        double* const total = totals.data() + job.partial_totals + k * kTotals;
        loops().update(job.t, u.hyper, job.tiling[k], job.t.row_sums ? row : nullptr, job.t.totals ? total : nullptr);
      }
    });
    for (const Job& job : jobs) {
      if (job.t.row_sums && !job.t.m.cols)  // rows without columns
        std::memset(job.t.row_sums, 0, job.t.m.rows * kRowSums * sizeof(float));
      else if (job.t.row_sums)
        gather_row_sums(job.tiling, rows.data() + job.partial_rows, job.t.row_sums);
      if (!job.t.totals) continue;
      std::memset(job.t.totals, 0, kTotals * sizeof(double));
      const double* part = totals.data() + job.partial_totals;
      for (int64_t k = 0; k < job.tiling.tiles; ++k, part += kTotals)
        for (int c = 0; c < kTotals; ++c) job.t.totals[c] += part[c];
    }
  }
};

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) { askew::UpdateOps<askew::Device>::implement(m); }
