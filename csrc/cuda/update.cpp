// The skewed updates on a GPU.
#include "../ops/update.h"
#include "run.h"

namespace askew {

struct UpdateOnDevice : OnDevice {
  using OnDevice::OnDevice;
  void run(const Update& u) const {
    const size_t n = u.tensors.size();
    const Tensor memory = scratch(cuda::update_scratch(u.tensors.data(), n));
    check_cuda(cuda::update(u.tensors.data(), n, u.hyper, u.rates, u.coefficients, memory.data_ptr(), stream),
               "update");
  }
};

}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) { askew::UpdateOps<askew::UpdateOnDevice>::implement(m); }
