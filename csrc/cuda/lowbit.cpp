// What stands before and behind products of levels, on a GPU.
#include "../ops/lowbit.h"
#include "run.h"

namespace askew {

struct LowbitOnDevice : OnDevice {
  using OnDevice::OnDevice;
  void run(const TokenArg& a) const { check_cuda(cuda::token_levels(a, stream), "token_levels"); }
  void run(const SumsArg& a) const { check_cuda(cuda::scaled_sums(a, stream), "scaled_sums"); }
};

}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) { askew::LowbitOps<askew::LowbitOnDevice>::implement(m); }
