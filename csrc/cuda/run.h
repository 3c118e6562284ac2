// What the CUDA operators share: memory from torch's allocator, torch's current stream.
//
// One build serves CUDA and CPU-only torch: what only libtorch_cuda defines is declared weak.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "launch.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace askew {

using torch::stable::accelerator::DeviceGuard;

inline void check_cuda(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, "askew::", name, ": ", cudaGetErrorString(error));
}

// The device of `t` is current while this stands; kernels go to torch's current stream there.
struct OnDevice {
  DeviceGuard guard;
  cudaStream_t stream;
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()), stream(nullptr) {
    void* current = nullptr;
    if (aoti_torch_get_current_cuda_stream)
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

inline const float* scale_pointer(const Tensor& scale) { return static_cast<const float*>(scale.data_ptr()); }

inline cuda::Matrix matrix(const Tensor& x, const Tensor& scale) {
  const Matrix m = as_matrix(x, scale);
  return {m.rows, m.cols};
}

// A 0-dim float32 or float64 tensor: its value where it stands on the CPU, its address where it stands on the device.
inline cuda::Scalar scalar(const Tensor& t, const char* name) {
  if (t.is_cpu()) return {cpu_scalar(t, name), nullptr, false};
  STD_TORCH_CHECK(t.numel() == 1, name, ": expected a 0-dim tensor");
  const bool is_double = t.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || t.scalar_type() == ScalarType::Float, name, ": expected float32 or float64");
  return {0, t.data_ptr(), is_double};
}

inline Tensor scratch_bytes(const Tensor& like, size_t bytes) {
  const int64_t size[1] = {(int64_t)bytes};
  return torch::stable::new_empty(like, {size, 1}, ScalarType::Byte);
}

// Contiguous, with the sizes and the type of `like`.
inline Tensor empty_result(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

}  // namespace askew
