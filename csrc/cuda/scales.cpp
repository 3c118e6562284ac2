// Scales on a GPU.
#include "../ops/scales.h"
#include "run.h"

namespace askew {

struct ScalesOnDevice : OnDevice {
  using OnDevice::OnDevice;
  void run(const std::vector<ScaleTensor>& tensors) const {
    const Tensor memory = scratch(cuda::scales_scratch(tensors.data(), tensors.size()));
    check_cuda(cuda::scales(tensors.data(), tensors.size(), memory.data_ptr(), stream), "scales_from_sums_");
  }
  void run(const MseArg& a, float* scale) const {
    const Tensor memory = scratch(cuda::mse_scales_scratch(a));
    check_cuda(cuda::mse_scales(a, scale, memory.data_ptr(), stream), "mse_scales");
  }
};

}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) { askew::ScaleOps<askew::ScalesOnDevice>::implement(m); }
