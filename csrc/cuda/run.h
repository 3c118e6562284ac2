// What the CUDA operators share: memory from torch's allocator, torch's current stream.
//
// One build serves CUDA and CPU-only torch: what only libtorch_cuda defines is declared weak.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "../ops/tensors.h"
#include "kernels.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace askew {

inline void check_cuda(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, "askew::", name, ": ", cudaGetErrorString(error));
}

// What every operator's `Device` on a GPU has. The device of `t` is current while this stands; kernels go to torch's
// current stream there.
struct OnDevice {
  const Tensor& like;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  explicit OnDevice(const Tensor& t) : like(t), guard(t.get_device_index()), stream(nullptr) {
    void* current = nullptr;
    if (aoti_torch_get_current_cuda_stream)
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  static Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(like, {shape.begin(), shape.size()});
  }
  static Tensor empty_like(const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); }
  Tensor scratch(size_t bytes) const { return askew::empty(like, {(int64_t)bytes}, ScalarType::Byte); }
};

}  // namespace askew
