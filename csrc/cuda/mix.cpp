// A mixture of quantizations on a GPU.
#include "../ops/mix.h"
#include "run.h"

namespace askew {

struct MixOnDevice : OnDevice {
  using OnDevice::OnDevice;
  void run(const MixArg& m, void* y) const { check_cuda(cuda::mix(m, y, stream), "mix_fake_quantize"); }
  void gradient(const MixArg& m, const void* g, void* out, float* to_strengths, float* to_scales) const {
    const Tensor memory = scratch(cuda::mix_gradient_scratch(m, g, out));
    check_cuda(cuda::mix_gradient(m, g, out, to_strengths, to_scales, memory.data_ptr(), stream),
               "mix_fake_quantize_backward");
  }
};

}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) { askew::MixOps<askew::MixOnDevice>::implement(m); }
