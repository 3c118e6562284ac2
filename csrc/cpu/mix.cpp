// The CPU implementation of askew::mix_fake_quantize and its backward.
//
// Work is divided by the shape alone and partial sums are added in the order of the pieces: the same bits for any
// number of threads.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "../checks.h"
#include "loops.h"
#include "output_pool.h"

namespace askew {
namespace {

constexpr int64_t kMixPiece = 16384;   // elements of a tile, about; a multiple of the loops' band
constexpr int64_t kMixSerial = 32768;  // fewer elements than this are not worth waking threads for

// (rows, cols) cut into pieces of long rows, or bands of short ones.
struct MixTiles {
  int64_t rows, cols, pieces, band, count;
  MixTiles(int64_t rows, int64_t cols) : rows(rows), cols(cols) {
    pieces = cols > 2 * kMixPiece ? (cols + kMixPiece - 1) / kMixPiece : 1;
    band = pieces > 1 || cols == 0 ? 1 : (kMixPiece + cols - 1) / cols;
    count = cols == 0 ? 0 : pieces > 1 ? rows * pieces : (rows + band - 1) / band;
  }
  Tile operator[](int64_t i) const {
    const int64_t row = pieces > 1 ? i / pieces : i * band, first = pieces > 1 ? i % pieces * kMixPiece : 0;
    const int64_t last = row + band < rows ? row + band : rows;
    return {row, last, first, pieces > 1 && first + kMixPiece < cols ? first + kMixPiece : cols};
  }
  template <class F>
  void run(const F& f) const {
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f((*this)[i], i);
    };
    if (rows * cols <= kMixSerial || count <= 1)
      some(0, count);
    else
      torch::stable::parallel_for(0, count, 1, some);
  }
};

Tensor mix_fake_quantize(Tensor x, Tensor scales, Tensor strengths, std::vector<int64_t> grids, bool clip,
                         bool learned) {
  const MixArg m = mix_arg(x, scales, strengths, grids, clip, learned);
  Tensor y = pooled_empty_like(x);
  void* out = y.data_ptr();
  MixTiles(m.rows, m.cols).run([&](Tile t, int64_t) { loops().mix(m, out, t); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mix_fake_quantize_backward(Tensor grad, Tensor x, Tensor scales, Tensor strengths,
                                                              std::vector<int64_t> grids, bool clip, bool learned) {
  const MixArg m = mix_arg(x, scales, strengths, grids, clip, learned);
  check_like(grad, x, "grad");
  STD_TORCH_CHECK(storage_type(grad, "grad") == m.type, "grad: expected the dtype of x");
  Tensor grad_x = pooled_empty_like(x);
  Tensor grad_scales = torch::stable::new_empty(scales, scales.sizes());
  Tensor grad_strengths = torch::stable::new_empty(strengths, strengths.sizes());
  float* to_scales = static_cast<float*>(grad_scales.data_ptr());
  float* to_strengths = static_cast<float*>(grad_strengths.data_ptr());
  const void* g = grad.data_ptr();
  void* out = grad_x.data_ptr();
  const MixTiles tiles(m.rows, m.cols);
  const int64_t width = 2 * m.n;
  std::vector<double> partial(tiles.cols ? m.rows * tiles.pieces * width : 0);
  tiles.run([&](Tile t, int64_t i) {
    loops().mix_gradient(m, g, out, t, partial.data() + (tiles.pieces > 1 ? i : t.row0) * width);
  });
  for (int k = 0; k < m.n; ++k) {
    const bool is_float = m.grids[k].kind == kFloat;
    const double top = m.grids[k].hi > 0 ? m.grids[k].hi : 1, lsq = m.cols ? 1 / std::sqrt((double)m.cols * top) : 0;
    double total = 0;
    for (int64_t r = 0; r < m.rows; ++r) {
      double of_row[2] = {0, 0};
      for (int64_t p = 0; p < (tiles.cols ? tiles.pieces : 0); ++p)
        for (int j = 0; j < 2; ++j) of_row[j] += partial[(r * tiles.pieces + p) * width + 2 * k + j];
      total += (is_float ? 1.0 : (double)m.scales[k * m.rows + r]) * of_row[0];
      to_scales[k * m.rows + r] = learned && !is_float ? (float)(m.strengths[k] * lsq * of_row[1]) : 0.f;
    }
    to_strengths[k] = (float)total;
  }
  return {grad_x, grad_strengths, grad_scales};
}

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) {
  m.impl("mix_fake_quantize", TORCH_BOX(&askew::mix_fake_quantize));
  m.impl("mix_fake_quantize_backward", TORCH_BOX(&askew::mix_fake_quantize_backward));
}
