// The CUDA kernels as plain functions: raw device pointers, sizes, a stream; no torch.
// Every function queues its kernels on the stream, never waits for them and allocates nothing, so that calls can be
// captured in a CUDA graph.
#pragma once
#include <cuda_runtime_api.h>

#include "../math/types.h"

namespace askew {
namespace cuda {

cudaError_t quantize(const QuantizeArg& a, cudaStream_t stream);

// sums: (rows, kRowSums). scratch: row_sums_scratch bytes of device memory (may be 0), aligned to 8.
size_t row_sums_scratch(const QuantizeArg& a);
cudaError_t row_sums(const QuantizeArg& a, float* sums, void* scratch, cudaStream_t stream);

// out (rows,): factor times sums of a learned scale's terms; clips a.g into a.y where that is not null. scratch:
// scale_gradient_scratch bytes of device memory (may be 0), aligned to 8.
size_t scale_gradient_scratch(const QuantizeArg& a);
cudaError_t scale_gradient(const QuantizeArg& a, double factor, float* out, void* scratch, cudaStream_t stream);

// One step for a list of tensors. h is complete where no rate is on the device. scratch: update_scratch
// bytes of device memory, aligned to 8. coefficients: (c, a) on the device, needed where a tensor has a `first`, which
// does not count where both are 0.
size_t update_scratch(const UpdateTensor* tensors, size_t n);
cudaError_t update(const UpdateTensor* tensors, size_t n, const Hyper& h, const Rates& rates, const float* coefficients,
                   void* scratch, cudaStream_t stream);

// One sharpness-aware pass over a list of tensors. coefficients: (c, a) on the device; null for the norm and restore.
// scratch: sam_norm_scratch bytes of device memory, aligned to 8.
cudaError_t sam(SamPass pass, const SamTensor* tensors, size_t n, float eta, const float* coefficients,
                cudaStream_t stream);
size_t sam_norm_scratch(const SamTensor* tensors, size_t n);
cudaError_t sam_norm(const SamTensor* tensors, size_t n, float eta, double* sum, void* scratch, cudaStream_t stream);

// y = sum_k p_k s_k Q_k(x / s_k), and the gradients of x (out), strengths and scales. scratch: mix_gradient_scratch
// bytes of device memory, aligned to 8.
cudaError_t mix(const MixArg& m, void* y, cudaStream_t stream);
size_t mix_gradient_scratch(const MixArg& m, const void* g, const void* out);
cudaError_t mix_gradient(const MixArg& m, const void* g, void* out, float* to_strengths, float* to_scales,
                         void* scratch, cudaStream_t stream);

// Inputs as levels of a byte, and outputs from sums of products of levels.
cudaError_t token_levels(const TokenArg& a, cudaStream_t stream);
cudaError_t scaled_sums(const SumsArg& a, cudaStream_t stream);

// The scales of a list of tensors from the sums of their rows. scratch: scales_scratch bytes of device memory (may be
// 0), aligned to 8.
size_t scales_scratch(const ScaleTensor* tensors, size_t n);
cudaError_t scales(const ScaleTensor* tensors, size_t n, void* scratch, cudaStream_t stream);

// scale (rows,) of the least squared error; 1 where a row has none. scratch: mse_scales_scratch bytes of device memory
// (may be 0), aligned to 8.
size_t mse_scales_scratch(const MseArg& a);
cudaError_t mse_scales(const MseArg& a, float* scale, void* scratch, cudaStream_t stream);

// out = s c, (n, cols).
cudaError_t packed_dequantize(const PackedArg& w, void* out, int type, cudaStream_t stream);
cudaError_t packed_linear(const LinearArg& a, cudaStream_t stream);

// The product from tiles. scratch: packed_tiles_scratch bytes of device memory (may be 0), aligned to 16.
size_t packed_tiles_scratch(const TilesArg& a);
cudaError_t packed_tiles_linear(const TilesArg& a, void* scratch, cudaStream_t stream);

}  // namespace cuda
}  // namespace askew
