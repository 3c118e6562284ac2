// A mixture of quantizations and its gradients. `Device` runs a MixArg: cpu/mix.cpp, cuda/mix.cpp.
#pragma once
#include <cmath>
#include <tuple>

#include "tensors.h"

namespace askew {

template <class Device>
struct MixOps {
  // scales (candidates, rows), strengths (candidates,), three integers a candidate.
  static MixArg checked(const Tensor& x, const Tensor& scales, const Tensor& strengths,
                        const std::vector<int64_t>& grids, bool clip, bool learned) {
    MixArg m{};
    m.type = storage_type(x, "x");
    m.x = x.data_ptr();
    m.scales = floats(scales, x, "scales");
    m.strengths = floats(strengths, x, "strengths");
    m.n = (int)strengths.numel();
    STD_TORCH_CHECK(m.n >= 1 && m.n <= kMostCandidates, "strengths: expected 1 to ", kMostCandidates, ", got ", m.n);
    STD_TORCH_CHECK(scales.numel() % m.n == 0, "scales: expected shape (", m.n, ", rows)");
    STD_TORCH_CHECK((int64_t)grids.size() == 3 * m.n, "grids: expected ", 3 * m.n, " integers");
    const Matrix size = matrix_of(x, scales.numel() / m.n, "scales");
    m.rows = size.rows;
    m.cols = size.cols;
    for (int k = 0; k < m.n; ++k) {
      m.grids[k] = {(int)grids[3 * k], (float)grids[3 * k + 1], (float)grids[3 * k + 2], nullptr, 0};
      STD_TORCH_CHECK(m.grids[k].kind >= kFloat && m.grids[k].kind <= kBinary, "grids: unknown kind ", m.grids[k].kind);
      const double top = m.grids[k].hi > 0 ? m.grids[k].hi : 1;
      m.lsq[k] = m.cols ? 1 / std::sqrt((double)m.cols * top) : 0;
    }
    m.clip = clip;
    m.learned = learned;
    return m;
  }

  static Tensor mix(Tensor x, Tensor scales, Tensor strengths, std::vector<int64_t> grids, bool clip, bool learned) {
    const MixArg m = checked(x, scales, strengths, grids, clip, learned);
    const Device device(x);
    Tensor y = device.empty_like(x);
    device.run(m, y.data_ptr());
    return y;
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor scales, Tensor strengths,
                                                     std::vector<int64_t> grids, bool clip, bool learned) {
    const MixArg m = checked(x, scales, strengths, grids, clip, learned);
    const void* g = data_like(grad, x, "grad");
    const Device device(x);
    Tensor to_x = device.empty_like(x), to_scales = device.empty_like(scales);
    Tensor to_strengths = device.empty_like(strengths);
    device.gradient(m, g, to_x.data_ptr(), static_cast<float*>(to_strengths.data_ptr()),
                    static_cast<float*>(to_scales.data_ptr()));
    return {to_x, to_strengths, to_scales};
  }

  static void implement(StableLibrary& m) {
    m.impl("mix_fake_quantize", TORCH_BOX(&mix));
    m.impl("mix_fake_quantize_backward", TORCH_BOX(&backward));
  }
};

}  // namespace askew
