// Products with packed weights on a GPU.
#include "run.h"

namespace askew {
namespace {

void packed_dequantize(Tensor codes, Tensor scale, Tensor levels, std::vector<int64_t> grid, int64_t bits, Tensor out) {
  check_dense(out, "out");
  STD_TORCH_CHECK(!out.is_cpu() && out.dim() == 2 && out.size(0) == codes.size(0), "out: expected shape (n, cols)");
  const OnDevice device(codes);
  check_cuda(cuda::packed_dequantize(packed_arg(codes, scale, levels, grid, bits, out.size(1)), out.data_ptr(),
                                     storage_type(out, "out"), device.stream),
             "packed_dequantize_");
}

Tensor packed_linear(Tensor x, Tensor codes, Tensor scale, Tensor levels, std::vector<int64_t> grid, int64_t bits,
                     std::optional<Tensor> bias) {
  check_dense(x, "x");
  STD_TORCH_CHECK(!x.is_cpu() && x.dim() == 2 && !codes.is_cpu(), "x: expected shape (batch, cols) beside the codes");
  const int type = storage_type(x, "x");
  const PackedArg w = packed_arg(codes, scale, levels, grid, bits, x.size(1));
  if (bias) {
    check_dense(*bias, "bias");
    STD_TORCH_CHECK(!bias->is_cpu() && bias->numel() == w.n && storage_type(*bias, "bias") == type, "bias: expected ",
                    w.n, " elements in the type of x");
  }
  const OnDevice device(x);
  const int64_t shape[2] = {x.size(0), w.n};
  Tensor y = torch::stable::new_empty(x, {shape, 2});
  check_cuda(cuda::packed_linear(w, x.data_ptr(), x.size(0), bias ? bias->data_ptr() : nullptr, y.data_ptr(), type,
                                 device.stream),
             "packed_linear");
  return y;
}

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) {
  m.impl("packed_dequantize_", TORCH_BOX(&askew::packed_dequantize));
  m.impl("packed_linear", TORCH_BOX(&askew::packed_linear));
}
