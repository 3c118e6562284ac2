// Fake quantization, a learned scale's gradient, the projection and sums of rows on the CPU.
#include "../ops/quantize.h"
#include "run.h"

namespace askew {

struct QuantizeOnCpu : OnCpu {
  using OnCpu::OnCpu;
  void run(const QuantizeArg& a) const {
    over_matrix(Tiling(a.m, tuning.piece_columns), [&](Tile t, int64_t) { loops().quantize(a, t); });
  }
  void row_sums(const QuantizeArg& a, float* sums) const {
    const Tiling tiling(a.m);
    std::vector<double> partial(tiling.partials() * kRowSums);
    over_matrix(tiling,
                [&](Tile t, int64_t i) { loops().row_sums(a, t, partial.data() + tiling.partial(i) * kRowSums); });
    gather_row_sums(tiling, partial.data(), sums);
  }
  void scale_gradient(const QuantizeArg& a, double factor, float* out) const {
    const Tiling tiling(a.m);
    std::vector<double> partial(tiling.partials());
    over_matrix(tiling, [&](Tile t, int64_t i) { loops().scale_gradient(a, t, partial.data() + tiling.partial(i)); });
    const double* from = partial.data();
    for (int64_t row = 0; row < a.m.rows; ++row) {
      double sum = 0;
      for (int64_t p = 0; p < tiling.pieces_per_row; ++p) sum += *from++;
      out[row] = (float)(factor * sum);
    }
  }
};

}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) { askew::QuantizeOps<askew::QuantizeOnCpu>::implement(m); }
