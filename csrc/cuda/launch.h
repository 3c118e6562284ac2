// The CUDA kernels as plain functions: raw device pointers, sizes, a stream; no torch.
// Every function queues its kernels on the stream, never waits for them and allocates nothing, so that calls can be
// captured in a CUDA graph. Matrices are contiguous (rows, cols); scale holds one float per row.
#pragma once
#include <cuda_runtime_api.h>

#include "../math/types.h"

namespace askew {
namespace cuda {

struct Matrix {
  int64_t rows, cols;
};

// y = s Q(x/s), or with `stochastic` a random level of x's bracket; y may have another storage type than x.
cudaError_t fake_quantize(const void* x, int x_type, void* y, int y_type, const float* scale, GridArg grid, Matrix m,
                          bool stochastic, uint64_t seed, cudaStream_t stream);

// out = g inside the hull, 0 outside; out may be g. All three have one storage type.
cudaError_t ste_clip(const void* g, const void* x, int type, void* out, const float* scale, GridArg grid, Matrix m,
                     cudaStream_t stream);

// A number that is either known here, or read on the device when the kernel runs (no synchronisation).
struct Scalar {
  double value;
  const void* device;  // null: `value` counts; else a float, or a double with is_double
  bool is_double;
};

cudaError_t project_interval(void* w, int type, const float* scale, GridArg grid, Scalar eps, Matrix m,
                             cudaStream_t stream);

// sums: (rows, kRowSums). scratch: row_sums_scratch bytes of device memory (may be 0), aligned to 8.
size_t row_sums_scratch(const void* x, int type, Matrix m);
cudaError_t row_sums(const void* x, int type, Matrix m, float* sums, void* scratch, cudaStream_t stream);

struct UpdateTensor {
  void* w;
  const void* g;
  void* a;  // momentum or first moment; may be null for SGD
  void* b;  // second moment; AdamW only
  const float* scale;
  void* dequantized;  // may be null
  float* row_sums;    // (rows, kRowSums) of the weights after the step; may be null
  double* totals;     // (kTotals); may be null
  int type, dequantized_type;
  Matrix m;
  GridArg grid;
  const void* kept;   // read in place of w, whose content does not matter then; may be null
  const void* first;  // a gradient whose mean with g takes g's place; may be null
};

// Replaces members of Hyper where they stand on the device.
struct Rates {
  Scalar lr, eps, step;  // step: AdamW only
  double beta1, beta2;
  bool on_device() const { return lr.device || eps.device || step.device; }
};

// One step of `rule` for a list of tensors. h is complete where no rate is on the device. scratch: update_scratch
// bytes of device memory, aligned to 8. coefficients: (c, a) on the device, needed where a tensor has a `first`, which
// does not count where both are 0.
size_t update_scratch(const UpdateTensor* tensors, size_t n);
cudaError_t update(const UpdateTensor* tensors, size_t n, int rule, const Hyper& h, const Rates& rates,
                   const float* coefficients, void* scratch, cudaStream_t stream);

// Sharpness-aware passes over a list of tensors of n elements each.
struct SamTensor {
  void* w;        // sam_average: the second gradient
  const void* g;  // sam_average: the first gradient; unused by sam_restore
  void* kept;     // the copy of w; unused by sam_norm and sam_average
  int type;
  bool adaptive;
  int64_t n;
};

// sum = sum (T g)^2. scratch: sam_norm_scratch bytes of device memory, aligned to 8.
size_t sam_norm_scratch(const SamTensor* tensors, size_t n);
cudaError_t sam_norm(const SamTensor* tensors, size_t n, float eta, double* sum, void* scratch, cudaStream_t stream);
// kept = w, w += (c T^2 - a) g with (c, a) read on the device.
cudaError_t sam_perturb(const SamTensor* tensors, size_t n, float eta, const float* coefficients, cudaStream_t stream);
cudaError_t sam_restore(const SamTensor* tensors, size_t n, cudaStream_t stream);
cudaError_t sam_average(const SamTensor* tensors, size_t n, const float* coefficients, cudaStream_t stream);

// y = sum_k p_k s_k Q_k(x / s_k), and the gradients of x (out), strengths and scales. scratch: mix_gradient_scratch
// bytes of device memory, aligned to 8.
cudaError_t mix(const MixArg& m, void* y, cudaStream_t stream);
size_t mix_gradient_scratch(const MixArg& m, const void* g, const void* out);
cudaError_t mix_gradient(const MixArg& m, const void* g, void* out, float* to_strengths, float* to_scales,
                         void* scratch, cudaStream_t stream);

// out = s c, (n, cols).
cudaError_t packed_dequantize(const PackedArg& w, void* out, int type, cudaStream_t stream);
// y = x W^T + bias for (tokens, cols) inputs, four at a time; x, bias (may be null) and y have one storage type.
cudaError_t packed_linear(const PackedArg& w, const void* x, int64_t tokens, const void* bias, void* y, int type,
                          cudaStream_t stream);

}  // namespace cuda
}  // namespace askew
