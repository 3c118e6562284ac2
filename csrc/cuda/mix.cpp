// A mixture of quantizations on a GPU.
#include <tuple>

#include "run.h"

namespace askew {
namespace {

Tensor mix_fake_quantize(Tensor x, Tensor scales, Tensor strengths, std::vector<int64_t> grids, bool clip,
                         bool learned) {
  const OnDevice device(x);
  const MixArg m = mix_arg(x, scales, strengths, grids, clip, learned);
  Tensor y = empty_result(x);
  check_cuda(cuda::mix(m, y.data_ptr(), device.stream), "mix_fake_quantize");
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mix_fake_quantize_backward(Tensor grad, Tensor x, Tensor scales, Tensor strengths,
                                                              std::vector<int64_t> grids, bool clip, bool learned) {
  const OnDevice device(x);
  const MixArg m = mix_arg(x, scales, strengths, grids, clip, learned);
  check_like(grad, x, "grad");
  STD_TORCH_CHECK(storage_type(grad, "grad") == m.type, "grad: expected the dtype of x");
  Tensor out = empty_result(x), to_strengths = empty_result(strengths), to_scales = empty_result(scales);
  Tensor scratch = scratch_bytes(x, cuda::mix_gradient_scratch(m, grad.data_ptr(), out.data_ptr()));
  check_cuda(cuda::mix_gradient(m, grad.data_ptr(), out.data_ptr(), static_cast<float*>(to_strengths.data_ptr()),
                                static_cast<float*>(to_scales.data_ptr()), scratch.data_ptr(), device.stream),
             "mix_fake_quantize_backward");
  return {out, to_strengths, to_scales};
}

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) {
  m.impl("mix_fake_quantize", TORCH_BOX(&askew::mix_fake_quantize));
  m.impl("mix_fake_quantize_backward", TORCH_BOX(&askew::mix_fake_quantize_backward));
}
