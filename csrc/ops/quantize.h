// Fake quantization, a learned scale's gradient, the projection and sums of rows. `Device` runs a QuantizeArg:
// cpu/quantize.cpp, cuda/quantize.cpp.
#pragma once
#include "tensors.h"

namespace askew {

template <class Device>
struct QuantizeOps {
  static QuantizeArg checked(QuantizePass pass, const Tensor& x, const Tensor& scale, const Tensor& levels,
                             const std::vector<int64_t>& grid) {
    QuantizeArg a{};
    a.pass = pass;
    a.type = a.y_type = storage_type(x, "x");
    a.x = x.data_ptr();
    a.scale = floats(scale, x, "scale");
    a.m = matrix_of(x, scale.numel(), "scale");
    a.grid = grid_arg(grid, levels, x);
    return a;
  }

  static Tensor fake_quantize(Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid,
                              bool /*ste_clip: backward's*/, bool stochastic, int64_t seed) {
    QuantizeArg a = checked(stochastic ? kStochastic : kQuantize, x, scale, levels, grid);
    a.seed = (uint64_t)seed;
    const Device device(x);
    Tensor y = device.empty_like(x);
    a.y = y.data_ptr();
    device.run(a);
    return y;
  }

  static void fake_quantize_out(Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid, Tensor out) {
    QuantizeArg a = checked(kQuantize, x, scale, levels, grid);
    check_like(out, x, "out");
    a.y = out.data_ptr();
    a.y_type = copy_type(out, "out");
    Device(x).run(a);
  }

  static Tensor fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid) {
    QuantizeArg a = checked(kSteClip, x, scale, levels, grid);
    a.g = data_like(grad, x, "grad");
    const Device device(x);
    Tensor out = device.empty_like(grad);
    a.y = out.data_ptr();
    device.run(a);
    return out;
  }

  static void ste_clip(Tensor grad, Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid) {
    QuantizeArg a = checked(kSteClip, x, scale, levels, grid);
    a.g = a.y = data_like(grad, x, "grad");
    Device(x).run(a);
  }

  static Tensor ste_clip_scale_grad(Tensor grad, Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid,
                                    bool ste_clip, double factor) {
    QuantizeArg a = checked(kSteClip, x, scale, levels, grid);
    a.g = data_like(grad, x, "grad");
    a.y = ste_clip ? grad.data_ptr() : nullptr;
    const Device device(x);
    Tensor out = empty(x, {a.m.rows}, ScalarType::Float);
    device.scale_gradient(a, factor, static_cast<float*>(out.data_ptr()));
    return out;
  }

  static void project_interval(Tensor w, Tensor scale, Tensor levels, std::vector<int64_t> grid, Tensor eps) {
    QuantizeArg a = checked(kProject, w, scale, levels, grid);
    a.y = w.data_ptr();
    a.eps = scalar(eps, "eps", w.is_cpu());
    Device(w).run(a);
  }

  static Tensor soft_quantize(Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid, Tensor slack) {
    QuantizeArg a = checked(kSoften, x, scale, levels, grid);
    a.eps = scalar(slack, "slack", x.is_cpu());
    const Device device(x);
    Tensor y = device.empty_like(x);
    a.y = y.data_ptr();
    device.run(a);
    return y;
  }

  static Tensor row_sums(Tensor x, int64_t rows) {
    STD_TORCH_CHECK(rows > 0, "rows: expected at least 1, got ", rows);
    QuantizeArg a{};
    a.type = storage_type(x, "x");
    a.x = x.data_ptr();
    a.m = matrix_of(x, rows, "rows");
    const Device device(x);
    Tensor sums = empty(x, {rows, kRowSums}, ScalarType::Float);
    device.row_sums(a, static_cast<float*>(sums.data_ptr()));
    return sums;
  }

  static void implement(StableLibrary& m) {
    m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
    m.impl("fake_quantize_out_", TORCH_BOX(&fake_quantize_out));
    m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
    m.impl("ste_clip_", TORCH_BOX(&ste_clip));
    m.impl("ste_clip_scale_grad_", TORCH_BOX(&ste_clip_scale_grad));
    m.impl("project_interval_", TORCH_BOX(&project_interval));
    m.impl("soft_quantize", TORCH_BOX(&soft_quantize));
    m.impl("row_sums", TORCH_BOX(&row_sums));
  }
};

}  // namespace askew
