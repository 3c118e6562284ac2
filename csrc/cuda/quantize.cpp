// Fake quantization, the projection and sums of rows on a GPU.
#include "run.h"

namespace askew {
namespace {

Tensor fake_quantize(Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid, bool /*ste_clip: backward's*/,
                     bool stochastic, int64_t seed) {
  const OnDevice device(x);
  const auto m = matrix(x, scale);
  const int type = storage_type(x, "x");
  Tensor y = empty_result(x);
  check_cuda(cuda::fake_quantize(x.data_ptr(), type, y.data_ptr(), type, scale_pointer(scale), grid_arg(grid, levels),
                                 m, stochastic, (uint64_t)seed, device.stream),
             "fake_quantize");
  return y;
}

void fake_quantize_out(Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid, Tensor out) {
  const OnDevice device(x);
  const auto m = matrix(x, scale);
  check_like(out, x, "out");
  check_cuda(cuda::fake_quantize(x.data_ptr(), storage_type(x, "x"), out.data_ptr(), storage_type(out, "out"),
                                 scale_pointer(scale), grid_arg(grid, levels), m, false, 0, device.stream),
             "fake_quantize_out_");
}

void clip_gradient(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& levels,
                   const std::vector<int64_t>& grid, const Tensor& out, cudaStream_t stream) {
  const auto m = matrix(x, scale);
  const int type = storage_type(x, "x");
  check_like(grad, x, "grad");
  STD_TORCH_CHECK(storage_type(grad, "grad") == type, "grad: expected the dtype of x");
  check_cuda(cuda::ste_clip(grad.data_ptr(), x.data_ptr(), type, out.data_ptr(), scale_pointer(scale),
                            grid_arg(grid, levels), m, stream),
             "ste_clip_");
}

Tensor fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid) {
  const OnDevice device(x);
  Tensor out = empty_result(grad);
  clip_gradient(grad, x, scale, levels, grid, out, device.stream);
  return out;
}

void ste_clip(Tensor grad, Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid) {
  const OnDevice device(x);
  clip_gradient(grad, x, scale, levels, grid, grad, device.stream);
}

void project_interval(Tensor w, Tensor scale, Tensor levels, std::vector<int64_t> grid, Tensor eps) {
  const OnDevice device(w);
  const auto m = matrix(w, scale);
  check_cuda(cuda::project_interval(w.data_ptr(), storage_type(w, "w"), scale_pointer(scale), grid_arg(grid, levels),
                                    scalar(eps, "eps"), m, device.stream),
             "project_interval_");
}

Tensor row_sums(Tensor x, int64_t rows) {
  check_dense(x, "x");
  const int64_t n = x.numel();
  STD_TORCH_CHECK(rows > 0 && n % rows == 0, "rows: ", rows, " rows do not divide ", n, " elements");
  const OnDevice device(x);
  const cuda::Matrix m{rows, n / rows};
  const int type = storage_type(x, "x");
  const int64_t shape[2] = {rows, (int64_t)kRowSums};
  Tensor out = torch::stable::new_empty(x, {shape, 2}, ScalarType::Float);
  Tensor scratch = scratch_bytes(x, cuda::row_sums_scratch(x.data_ptr(), type, m));
  check_cuda(
      cuda::row_sums(x.data_ptr(), type, m, static_cast<float*>(out.data_ptr()), scratch.data_ptr(), device.stream),
      "row_sums");
  return out;
}

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) {
  m.impl("fake_quantize", TORCH_BOX(&askew::fake_quantize));
  m.impl("fake_quantize_out_", TORCH_BOX(&askew::fake_quantize_out));
  m.impl("fake_quantize_backward", TORCH_BOX(&askew::fake_quantize_backward));
  m.impl("ste_clip_", TORCH_BOX(&askew::ste_clip));
  m.impl("project_interval_", TORCH_BOX(&askew::project_interval));
  m.impl("row_sums", TORCH_BOX(&askew::row_sums));
}
