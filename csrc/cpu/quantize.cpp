// Fake quantization, the projection and sums of rows on the CPU.
#include "run.h"

namespace askew {
namespace {

Tensor fake_quantize(Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid, bool /*ste_clip: backward's*/,
                     bool stochastic, int64_t seed) {
  const Matrix m = as_matrix(x, scale);
  const GridArg g = grid_arg(grid, levels);
  const int type = storage_type(x, "x");
  Tensor y = pooled_empty_like(x);
  const void* in = x.data_ptr();
  void* out = y.data_ptr();
  const float* s = static_cast<const float*>(scale.data_ptr());
  over_matrix(m, [&](Tile t) {
    if (stochastic)
      loops().stochastic_quantize(in, type, out, type, s, g, m.cols, t, (uint64_t)seed);
    else
      loops().fake_quantize(in, type, out, type, s, g, m.cols, t);
  });
  return y;
}

void fake_quantize_out(Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid, Tensor out) {
  const Matrix m = as_matrix(x, scale);
  const GridArg g = grid_arg(grid, levels);
  const int type = storage_type(x, "x"), out_type = storage_type(out, "out");
  check_like(out, x, "out");
  over_matrix(m, [&](Tile t) {
    loops().fake_quantize(x.data_ptr(), type, out.data_ptr(), out_type, static_cast<const float*>(scale.data_ptr()), g,
                          m.cols, t);
  });
}

void clip_gradient(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& levels,
                   const std::vector<int64_t>& grid, const Tensor& out) {
  const Matrix m = as_matrix(x, scale);
  const GridArg g = grid_arg(grid, levels);
  const int type = storage_type(x, "x");
  check_like(grad, x, "grad");
  STD_TORCH_CHECK(storage_type(grad, "grad") == type, "grad: expected the dtype of x");
  over_matrix(m, [&](Tile t) {
    loops().ste_clip(grad.data_ptr(), x.data_ptr(), type, out.data_ptr(), static_cast<const float*>(scale.data_ptr()),
                     g, m.cols, t);
  });
}

Tensor fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid) {
  Tensor out = pooled_empty_like(grad);
  clip_gradient(grad, x, scale, levels, grid, out);
  return out;
}

void ste_clip(Tensor grad, Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid) {
  clip_gradient(grad, x, scale, levels, grid, grad);
}

void project_interval(Tensor w, Tensor scale, Tensor levels, std::vector<int64_t> grid, Tensor eps) {
  const Matrix m = as_matrix(w, scale);
  const GridArg g = grid_arg(grid, levels);
  const int type = storage_type(w, "w");
  const float e = (float)cpu_scalar(eps, "eps");
  over_matrix(m, [&](Tile t) {
    loops().project_interval(w.data_ptr(), type, static_cast<const float*>(scale.data_ptr()), g, e, m.cols, t);
  });
}

Tensor row_sums(Tensor x, int64_t rows) {
  check_dense(x, "x");
  const int64_t n = x.numel();
  STD_TORCH_CHECK(rows > 0 && n % rows == 0, "rows: ", rows, " rows do not divide ", n, " elements");
  const Matrix m{rows, n / rows};
  const int type = storage_type(x, "x");
  const int64_t shape[2] = {rows, (int64_t)kRowSums};
  Tensor out = torch::stable::new_empty(x, {shape, 2}, ScalarType::Float);
  float* result = static_cast<float*>(out.data_ptr());
  const Tiling tiling(m);
  if (n == 0) {
    std::memset(result, 0, rows * kRowSums * sizeof(float));
    return out;
  }
  std::vector<double> partial(tiling.pieces_per_row * rows * kRowSums);
  for_tiles(tiling.tiles, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tile t = tiling[i];
      loops().row_sums(x.data_ptr(), type, m.cols, t,
                       partial.data() + (tiling.pieces_per_row > 1 ? i : t.row0) * kRowSums);
    }
  });
  gather_row_sums(tiling, partial.data(), result);
  return out;
}

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&askew::fake_quantize));
  m.impl("fake_quantize_out_", TORCH_BOX(&askew::fake_quantize_out));
  m.impl("fake_quantize_backward", TORCH_BOX(&askew::fake_quantize_backward));
  m.impl("ste_clip_", TORCH_BOX(&askew::ste_clip));
  m.impl("project_interval_", TORCH_BOX(&askew::project_interval));
  m.impl("row_sums", TORCH_BOX(&askew::row_sums));
}
