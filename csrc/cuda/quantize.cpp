// Fake quantization, the projection and sums of rows on a GPU.
#include "../ops/quantize.h"
#include "run.h"

namespace askew {

struct QuantizeOnDevice : OnDevice {
  using OnDevice::OnDevice;
  void run(const QuantizeArg& a) const { check_cuda(cuda::quantize(a, stream), "quantize"); }
  void row_sums(const QuantizeArg& a, float* sums) const {
    const Tensor memory = scratch(cuda::row_sums_scratch(a));
    check_cuda(cuda::row_sums(a, sums, memory.data_ptr(), stream), "row_sums");
  }
  void scale_gradient(const QuantizeArg& a, double factor, float* out) const {
    const Tensor memory = scratch(cuda::scale_gradient_scratch(a));
    check_cuda(cuda::scale_gradient(a, factor, out, memory.data_ptr(), stream), "ste_clip_scale_grad_");
  }
};

}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) { askew::QuantizeOps<askew::QuantizeOnDevice>::implement(m); }
