// What every compiled operator checks before it touches memory. The public Python functions check first and say
// more; these stand between a direct `torch.ops.askew` call and a bad pointer.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>
#include <vector>

#include "math/types.h"

namespace askew {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

inline void check_dense(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_like(const Tensor& t, const Tensor& like, const char* name) {
  check_dense(t, name);
  STD_TORCH_CHECK(
      t.numel() == like.numel() && t.get_device_index() == like.get_device_index() && t.is_cpu() == like.is_cpu(), name,
      ": expected as many elements as the tensor it belongs to, on the same device");
}

struct Matrix {
  int64_t rows, cols;
};

// x as (scale.numel(), cols)
inline Matrix as_matrix(const Tensor& x, const Tensor& scale) {
  check_dense(x, "x");
  check_dense(scale, "scale");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, "scale: expected float32");
  STD_TORCH_CHECK(scale.is_cpu() == x.is_cpu(), "scale: expected on the device of x");
  const int64_t rows = scale.numel(), n = x.numel();
  STD_TORCH_CHECK(n == 0 || (rows > 0 && n % rows == 0), "scale: ", rows, " rows do not divide ", n, " elements");
  return {rows, rows ? n / rows : 0};
}

inline GridArg grid_arg(const int64_t* grid, const Tensor& levels) {
  GridArg g{(int)grid[0], (float)grid[1], (float)grid[2], nullptr, 0};
  STD_TORCH_CHECK(g.kind >= kUniform && g.kind <= kCodebook, "grid: unknown kind ", g.kind);
  if (g.kind == kUniform) STD_TORCH_CHECK(g.lo < g.hi, "grid: expected lo < hi");
  if (g.kind == kCodebook) {
    check_dense(levels, "levels");
    STD_TORCH_CHECK(levels.scalar_type() == ScalarType::Float && levels.numel() >= 2,
                    "levels: expected 2 or more float32 levels");
    g.levels = static_cast<const float*>(levels.data_ptr());
    g.n_levels = (int)levels.numel();
  }
  return g;
}

inline GridArg grid_arg(const std::vector<int64_t>& grid, const Tensor& levels) {
  STD_TORCH_CHECK(grid.size() == 3, "grid: expected [kind, lo, hi]");
  return grid_arg(grid.data(), levels);
}

// A packed weight of `cols` columns.
inline PackedArg packed_arg(const Tensor& codes, const Tensor& scale, const Tensor& levels,
                            const std::vector<int64_t>& grid, int64_t bits, int64_t cols) {
  check_dense(codes, "codes");
  check_dense(scale, "scale");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 2,
                  "codes: expected uint8 of shape (n, row_bytes)");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.is_cpu() == codes.is_cpu(),
                  "scale: expected float32 on the device of codes");
  STD_TORCH_CHECK(bits >= 0 && bits <= 8, "bits: expected 1 to 8, or 0 for five trits a byte, got ", bits);
  PackedArg w{};
  w.codes = static_cast<const uint8_t*>(codes.data_ptr());
  w.scale = static_cast<const float*>(scale.data_ptr());
  w.grid = grid_arg(grid, levels);
  w.bits = (int)bits;
  w.n = codes.size(0);
  w.cols = cols;
  w.row_bytes = bits ? (cols * bits + 7) / 8 : (cols + 4) / 5;
  STD_TORCH_CHECK(codes.size(1) == w.row_bytes, "codes: expected ", w.row_bytes, " bytes a row, got ", codes.size(1));
  const int64_t rows = scale.numel();
  w.groups = rows == 1 ? 0 : w.n ? rows / w.n : 1;
  STD_TORCH_CHECK(rows == 1 || (rows == w.groups * w.n && (w.groups == 1 || (w.groups && cols % w.groups == 0))),
                  "scale: ", rows, " scales do not fit ", w.n, " rows of ", cols);
  const bool codebook = w.grid.kind == kCodebook;
  w.n_levels = codebook ? w.grid.n_levels : (int)((w.grid.hi - w.grid.lo) / (w.grid.kind == kBinary ? 2 : 1)) + 1;
  const int most = bits == 0 ? 3 : codebook && bits > 4 ? 16 : 1 << bits;
  STD_TORCH_CHECK(w.n_levels <= most, "levels: expected at most ", most, " of ", bits, " bits, got ", w.n_levels);
  return w;
}

// Entry i of a list that may be empty (absent for all) or hold tensors without elements (absent for one).
inline const Tensor* present(const std::vector<Tensor>& list, size_t i, size_t n, const char* name) {
  STD_TORCH_CHECK(list.empty() || list.size() == n, name, ": expected 0 or ", n, " tensors, got ", list.size());
  return list.empty() || list[i].numel() == 0 ? nullptr : &list[i];
}

// A 0-dim float32 or float64 tensor on the CPU.
inline double cpu_scalar(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.numel() == 1, name, ": expected a 0-dim tensor on the CPU");
  if (t.scalar_type() == ScalarType::Double) return *static_cast<const double*>(t.data_ptr());
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected float32 or float64");
  return *static_cast<const float*>(t.data_ptr());
}

inline void set_rates(Hyper& h, double lr, double eps) {
  h.lr = (float)lr;
  h.eps = (float)eps;
  h.cap = 1.f / (4.f * h.lr);
}

// The coefficients (c, a) of a perturbation: float32 of shape (2,), beside the tensors that it moves.
inline void check_coefficients(const Tensor& t, bool on_cpu) {
  check_dense(t, "coefficients");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == 2 && t.is_cpu() == on_cpu,
                  "coefficients: expected float32 of shape (2,) on the device of params");
}

// What a sharpness-aware optimizer hands to the base update, beside each parameter.
struct Descent {
  std::vector<Tensor> kept, firsts;
  std::optional<Tensor> coefficients;  // where there are firsts

  Descent(const std::optional<std::vector<Tensor>>& kept, const std::optional<std::vector<Tensor>>& firsts,
          const std::optional<Tensor>& coefficients)
      : coefficients(coefficients) {
    if (kept) this->kept = *kept;
    if (firsts) this->firsts = *firsts;
  }
  const Tensor* beside(const std::vector<Tensor>& list, size_t i, size_t n, const Tensor& w, const char* name) const {
    const Tensor* t = present(list, i, n, name);
    if (t) {
      check_like(*t, w, name);
      STD_TORCH_CHECK(t->scalar_type() == w.scalar_type(), name, ": expected the dtype of the parameter");
    }
    return t;
  }
  // (c, a), or null; both 0: nothing was perturbed, and the first gradients do not count.
  const float* pair(bool on_cpu) const {
    if (firsts.empty()) return nullptr;
    STD_TORCH_CHECK(coefficients.has_value(), "coefficients: expected beside firsts");
    check_coefficients(*coefficients, on_cpu);
    return static_cast<const float*>(coefficients->data_ptr());
  }
};

// A mixture's arguments: scales (candidates, rows), strengths (candidates,), three integers a candidate.
inline MixArg mix_arg(const Tensor& x, const Tensor& scales, const Tensor& strengths, const std::vector<int64_t>& grids,
                      bool clip, bool learned) {
  MixArg m{};
  check_dense(x, "x");
  check_dense(scales, "scales");
  check_dense(strengths, "strengths");
  m.type = storage_type(x, "x");
  m.n = (int)strengths.numel();
  STD_TORCH_CHECK(m.n >= 1 && m.n <= kMostCandidates, "strengths: expected 1 to ", kMostCandidates, ", got ", m.n);
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && strengths.scalar_type() == ScalarType::Float &&
                      scales.is_cpu() == x.is_cpu() && strengths.is_cpu() == x.is_cpu() && scales.numel() % m.n == 0,
                  "scales, strengths: expected float32 of shape (candidates, rows) and (candidates,) beside x");
  STD_TORCH_CHECK((int64_t)grids.size() == 3 * m.n, "grids: expected ", 3 * m.n, " integers");
  const int64_t n = x.numel();
  m.rows = scales.numel() / m.n;
  STD_TORCH_CHECK(n == 0 || (m.rows > 0 && n % m.rows == 0), "scales: ", m.rows, " rows do not divide ", n,
                  " elements");
  m.cols = m.rows ? n / m.rows : 0;
  for (int k = 0; k < m.n; ++k) {
    m.grids[k] = {(int)grids[3 * k], (float)grids[3 * k + 1], (float)grids[3 * k + 2], nullptr, 0};
    STD_TORCH_CHECK(m.grids[k].kind >= kFloat && m.grids[k].kind <= kBinary, "grids: unknown kind ", m.grids[k].kind);
  }
  m.x = x.data_ptr();
  m.scales = static_cast<const float*>(scales.data_ptr());
  m.strengths = static_cast<const float*>(strengths.data_ptr());
  m.clip = clip;
  m.learned = learned;
  return m;
}

inline void set_betas(Hyper& h, double beta1, double beta2, double step) {
  h.one_minus_beta1 = (float)(1.0 - beta1);
  h.beta2 = (float)beta2;
  h.one_minus_beta2 = (float)(1.0 - beta2);
  h.first_correction = (float)(1.0 / (1.0 - std::pow(beta1, step)));
  h.root_second_correction = (float)(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
}

}  // namespace askew
