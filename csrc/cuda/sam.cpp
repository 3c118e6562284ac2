// Sharpness-aware passes over a list of tensors on a GPU.
#include "../ops/sam.h"
#include "run.h"

namespace askew {

struct SamOnDevice : OnDevice {
  typedef std::vector<SamTensor> List;
  using OnDevice::OnDevice;
  void norm(const List& list, float eta, double* sum) const {
    const Tensor memory = scratch(cuda::sam_norm_scratch(list.data(), list.size()));
    check_cuda(cuda::sam_norm(list.data(), list.size(), eta, sum, memory.data_ptr(), stream), "sam_norm");
  }
  void run(SamPass pass, const List& list, float eta, const float* coefficients) const {
    check_cuda(cuda::sam(pass, list.data(), list.size(), eta, coefficients, stream), "sam");
  }
};

}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) { askew::SamOps<askew::SamOnDevice>::implement(m); }
