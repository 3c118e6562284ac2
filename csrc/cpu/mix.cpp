// A mixture of quantizations on the CPU.
#include "../ops/mix.h"
#include "run.h"

namespace askew {

struct MixOnCpu : OnCpu {
  using OnCpu::OnCpu;
  void run(const MixArg& m, void* y) const {
    over_matrix(Tiling({m.rows, m.cols}, tuning.piece_columns), [&](Tile t, int64_t) { loops().mix(m, y, t); });
  }
  void gradient(const MixArg& m, const void* g, void* out, float* to_strengths, float* to_scales) const {
    const Tiling tiling({m.rows, m.cols});
    const int64_t width = 2 * m.n, pieces = tiling.pieces_per_row;
    std::vector<double> partial(tiling.partials() * width);
    over_matrix(tiling, [&](Tile t, int64_t i) {
      loops().mix_gradient(m, g, out, t, partial.data() + tiling.partial(i) * width);
    });
    for (int k = 0; k < m.n; ++k) {
      const bool is_float = m.grids[k].kind == kFloat;
      double total = 0;
      for (int64_t r = 0; r < m.rows; ++r) {
        double of_row[2] = {0, 0};
        for (int64_t p = 0; p < pieces; ++p)
          for (int j = 0; j < 2; ++j) of_row[j] += partial[(r * pieces + p) * width + 2 * k + j];
        total += (is_float ? 1.0 : (double)m.scales[k * m.rows + r]) * of_row[0];
        to_scales[k * m.rows + r] = m.learned && !is_float ? (float)(m.strengths[k] * m.lsq[k] * of_row[1]) : 0.f;
      }
      to_strengths[k] = (float)total;
    }
  }
};

}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) { askew::MixOps<askew::MixOnCpu>::implement(m); }
