// From tensors to what kernels take, with the checks that stand between a direct `torch.ops.askew` call and a bad
// pointer; once for both devices. The public Python functions check first and say more. Every check comes before the
// first write.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>
#include <vector>

#include "../math/types.h"

namespace askew {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::StableLibrary;

inline int storage_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

// A type that copies may have: those of storage, or of levels.
inline int copy_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Char:
      return kInt8;
    case ScalarType::Float8_e4m3fn:
      return kFloat8;
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return storage_type(t, name);
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16, or int8 or float8_e4m3fn for levels");
  }
}

inline void check_dense(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

inline bool together(const Tensor& a, const Tensor& b) {
  return a.is_cpu() ? b.is_cpu() : !b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_like(const Tensor& t, const Tensor& like, const char* name) {
  check_dense(t, name);
  STD_TORCH_CHECK(t.numel() == like.numel() && together(t, like), name,
                  ": expected as many elements as the tensor it belongs to, on the same device");
}

// The memory of a tensor that has the elements, the device and the storage type of `like`.
inline void* data_like(const Tensor& t, const Tensor& like, const char* name) {
  check_like(t, like, name);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of the tensor it belongs to");
  return t.data_ptr();
}

// The memory of a contiguous float32 tensor on the device of `beside`.
inline const float* floats(const Tensor& t, const Tensor& beside, const char* name) {
  check_dense(t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected float32");
  STD_TORCH_CHECK(together(t, beside), name, ": expected on the device of the tensor it belongs to");
  return static_cast<const float*>(t.data_ptr());
}

// x as (rows, columns)
inline Matrix matrix_of(const Tensor& x, int64_t rows, const char* name) {
  check_dense(x, "x");
  const int64_t n = x.numel();
  STD_TORCH_CHECK(n == 0 || (rows > 0 && n % rows == 0), name, ": ", rows, " rows do not divide ", n, " elements");
  return {rows, rows ? n / rows : 0};
}

// Three integers, and the levels of a codebook on the device of `beside`.
inline GridArg grid_arg(const int64_t* grid, const Tensor& levels, const Tensor& beside) {
  GridArg g{(int)grid[0], (float)grid[1], (float)grid[2], nullptr, 0};
  STD_TORCH_CHECK(g.kind >= kUniform && g.kind <= kCodebook, "grid: unknown kind ", g.kind);
  if (g.kind == kUniform) STD_TORCH_CHECK(g.lo < g.hi, "grid: expected lo < hi");
  if (g.kind == kCodebook) {
    g.levels = floats(levels, beside, "levels");
    g.n_levels = (int)levels.numel();
    STD_TORCH_CHECK(g.n_levels >= 2, "levels: expected 2 or more");
  }
  return g;
}

inline GridArg grid_arg(const std::vector<int64_t>& grid, const Tensor& levels, const Tensor& beside) {
  STD_TORCH_CHECK(grid.size() == 3, "grid: expected [kind, lo, hi]");
  return grid_arg(grid.data(), levels, beside);
}

// A 0-dim float32 or float64 tensor: its value where it stands on the CPU, else its address, for kernels on a device.
inline Scalar scalar(const Tensor& t, const char* name, bool on_cpu) {
  STD_TORCH_CHECK(t.numel() == 1 && (t.is_cpu() || !on_cpu), name, ": expected a 0-dim tensor",
                  on_cpu ? " on the CPU" : "");
  const bool is_double = t.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || t.scalar_type() == ScalarType::Float, name, ": expected float32 or float64");
  const void* at = t.data_ptr();
  if (!t.is_cpu()) return {0, at, is_double};
  return {is_double ? *static_cast<const double*>(at) : *static_cast<const float*>(at), nullptr, is_double};
}

// The coefficients (c, a) of a perturbation, float32 of shape (2,), beside the tensors that it moves.
inline const float* coefficients_of(const Tensor& t, const Tensor& beside) {
  const float* data = floats(t, beside, "coefficients");
  STD_TORCH_CHECK(t.numel() == 2, "coefficients: expected shape (2,)");
  return data;
}

// Uninitialised, contiguous.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, type);
}

// A checked list as bytes on the CPU, (n, sizeof(T)), whatever the device of `like`: for operators that run over it
// again and again. Addresses stand in it: whoever keeps it keeps the tensors.
template <class T>
inline Tensor bytes_of(const std::vector<T>& list, const Tensor& like) {
  const int64_t shape[] = {(int64_t)list.size(), (int64_t)sizeof(T)};
  const Tensor bytes = torch::stable::new_empty(like, {shape, 2}, ScalarType::Byte, std::nullopt,
                                                torch::stable::Device(torch::headeronly::DeviceType::CPU));
  std::memcpy(bytes.data_ptr(), list.data(), list.size() * sizeof(T));
  return bytes;
}
template <class T>
inline std::vector<T> from_bytes(const Tensor& bytes) {
  STD_TORCH_CHECK(bytes.is_cpu() && bytes.scalar_type() == ScalarType::Byte && bytes.numel() % sizeof(T) == 0,
                  "list: expected a prepared one");
  check_dense(bytes, "list");
  std::vector<T> list(bytes.numel() / sizeof(T));
  std::memcpy(list.data(), bytes.data_ptr(), list.size() * sizeof(T));
  return list;
}

}  // namespace askew
