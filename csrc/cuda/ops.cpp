// The CUDA implementations of the operators: checks, memory from torch's allocator, torch's current stream.
//
// One build serves CUDA and CPU-only torch: what only libtorch_cuda defines is declared weak.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../checks.h"
#include "launch.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace askew {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check_cuda(cudaError_t error, const char* name) {
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

const float* scale_pointer(const Tensor& scale) { return static_cast<const float*>(scale.data_ptr()); }

cuda::Matrix matrix(const Tensor& x, const Tensor& scale) {
  const Matrix m = as_matrix(x, scale);
  return {m.rows, m.cols};
}

// A 0-dim float32 or float64 tensor: its value where it stands on the CPU, its address where it stands on the device.
cuda::Scalar scalar(const Tensor& t, const char* name) {
  if (t.is_cpu()) return {cpu_scalar(t, name), nullptr, false};
  STD_TORCH_CHECK(t.numel() == 1, name, ": expected a 0-dim tensor");
  const bool is_double = t.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || t.scalar_type() == ScalarType::Float, name, ": expected float32 or float64");
  return {0, t.data_ptr(), is_double};
}

Tensor scratch_bytes(const Tensor& like, size_t bytes) {
  const int64_t size[1] = {(int64_t)bytes};
  return torch::stable::new_empty(like, {size, 1}, ScalarType::Byte);
}

// Contiguous, with the sizes and the type of `like`.
Tensor empty_result(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

Tensor fake_quantize(Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid, bool /*ste_clip: backward's*/,
                     bool stochastic, int64_t seed) {
  const OnDevice device(x);
  const auto m = matrix(x, scale);
  const int type = storage_type(x, "x");
  Tensor y = empty_result(x);
  check_cuda(cuda::fake_quantize(x.data_ptr(), type, y.data_ptr(), type, scale_pointer(scale), grid_arg(grid, levels),
                                 m, stochastic, (uint64_t)seed, device.stream),
             "fake_quantize");
  return y;
}

void fake_quantize_out(Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid, Tensor out) {
  const OnDevice device(x);
  const auto m = matrix(x, scale);
  check_like(out, x, "out");
  check_cuda(cuda::fake_quantize(x.data_ptr(), storage_type(x, "x"), out.data_ptr(), storage_type(out, "out"),
                                 scale_pointer(scale), grid_arg(grid, levels), m, false, 0, device.stream),
             "fake_quantize_out_");
}

void clip_gradient(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& levels,
                   const std::vector<int64_t>& grid, const Tensor& out, cudaStream_t stream) {
  const auto m = matrix(x, scale);
  const int type = storage_type(x, "x");
  check_like(grad, x, "grad");
  STD_TORCH_CHECK(storage_type(grad, "grad") == type, "grad: expected the dtype of x");
  check_cuda(cuda::ste_clip(grad.data_ptr(), x.data_ptr(), type, out.data_ptr(), scale_pointer(scale),
                            grid_arg(grid, levels), m, stream),
             "ste_clip_");
}

Tensor fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid) {
  const OnDevice device(x);
  Tensor out = empty_result(grad);
  clip_gradient(grad, x, scale, levels, grid, out, device.stream);
  return out;
}

void ste_clip(Tensor grad, Tensor x, Tensor scale, Tensor levels, std::vector<int64_t> grid) {
  const OnDevice device(x);
  clip_gradient(grad, x, scale, levels, grid, grad, device.stream);
}

void project_interval(Tensor w, Tensor scale, Tensor levels, std::vector<int64_t> grid, Tensor eps) {
  const OnDevice device(w);
  const auto m = matrix(w, scale);
  check_cuda(cuda::project_interval(w.data_ptr(), storage_type(w, "w"), scale_pointer(scale), grid_arg(grid, levels),
                                    scalar(eps, "eps"), m, device.stream),
             "project_interval_");
}

Tensor row_sums(Tensor x, int64_t rows) {
  check_dense(x, "x");
  const int64_t n = x.numel();
  STD_TORCH_CHECK(rows > 0 && n % rows == 0, "rows: ", rows, " rows do not divide ", n, " elements");
  const OnDevice device(x);
  const cuda::Matrix m{rows, n / rows};
  const int type = storage_type(x, "x");
  const int64_t shape[2] = {rows, (int64_t)kRowSums};
  Tensor out = torch::stable::new_empty(x, {shape, 2}, ScalarType::Float);
  Tensor scratch = scratch_bytes(x, cuda::row_sums_scratch(x.data_ptr(), type, m));
  check_cuda(
      cuda::row_sums(x.data_ptr(), type, m, static_cast<float*>(out.data_ptr()), scratch.data_ptr(), device.stream),
      "row_sums");
  return out;
}

struct Lists {  // the tensor lists of one update
  const std::vector<Tensor>&params, &grads, &a, &b, &scales, &levels;
  const std::vector<int64_t>& grids;
  const std::vector<Tensor>&dequantized, &row_sums, &totals;
  const char *a_name, *b_name;
  Descent descent;
};

void update(const Lists& l, int rule, const Hyper& hyper, const cuda::Rates& rates, const char* name) {
  const size_t n = l.params.size();
  if (n == 0) return;
  for (const auto* list : {&l.grads, &l.scales, &l.levels})
    STD_TORCH_CHECK(list->size() == n, "grads, scales, levels: expected ", n, " tensors each");
  STD_TORCH_CHECK(l.grids.size() == 3 * n, "grids: expected ", 3 * n, " integers");

  std::vector<cuda::UpdateTensor> tensors(n);
  for (size_t i = 0; i < n; ++i) {  // every check comes before the first write
    const Tensor &w = l.params[i], &g = l.grads[i], &s = l.scales[i];
    cuda::UpdateTensor t{};
    t.m = matrix(w, s);
    t.type = storage_type(w, "params");
    STD_TORCH_CHECK(w.get_device_index() == l.params[0].get_device_index(), "params: expected one device");
    check_like(g, w, "grads");
    STD_TORCH_CHECK(storage_type(g, "grads") == t.type, "grads: expected the dtype of the parameter");
    t.w = w.data_ptr();
    t.g = g.data_ptr();
    t.scale = scale_pointer(s);
    t.grid = grid_arg(l.grids.data() + 3 * i, l.levels[i]);
    if (const Tensor* a = present(l.a, i, n, l.a_name)) {
      check_like(*a, w, l.a_name);
      STD_TORCH_CHECK(storage_type(*a, l.a_name) == t.type, l.a_name, ": expected the dtype of the parameter");
      t.a = a->data_ptr();
    }
    if (const Tensor* b = present(l.b, i, n, l.b_name)) {
      check_like(*b, w, l.b_name);
      STD_TORCH_CHECK(storage_type(*b, l.b_name) == t.type, l.b_name, ": expected the dtype of the parameter");
      t.b = b->data_ptr();
    }
    STD_TORCH_CHECK(rule == kSgd || w.numel() == 0 || (t.a && t.b),
                    "exp_avgs, exp_avg_sqs: expected for every parameter");
    if (const Tensor* kept = l.descent.beside(l.descent.kept, i, n, w, "kept")) t.kept = kept->data_ptr();
    if (const Tensor* first = l.descent.beside(l.descent.firsts, i, n, w, "firsts")) t.first = first->data_ptr();
    if (const Tensor* copy = present(l.dequantized, i, n, "dequantized")) {
      check_like(*copy, w, "dequantized");
      t.dequantized = copy->data_ptr();
      t.dequantized_type = storage_type(*copy, "dequantized");
    }
    if (const Tensor* r = present(l.row_sums, i, n, "row_sums")) {
      check_dense(*r, "row_sums");
      STD_TORCH_CHECK(r->scalar_type() == ScalarType::Float && r->numel() == t.m.rows * kRowSums,
                      "row_sums: expected float32 of shape (rows, 3)");
      t.row_sums = static_cast<float*>(r->data_ptr());
    }
    if (const Tensor* totals = present(l.totals, i, n, "totals")) {
      check_dense(*totals, "totals");
      STD_TORCH_CHECK(totals->scalar_type() == ScalarType::Double && totals->numel() == kTotals,
                      "totals: expected float64 of shape (6,)");
      t.totals = static_cast<double*>(totals->data_ptr());
    }
    tensors[i] = t;
  }
  const OnDevice device(l.params[0]);
  Tensor scratch = scratch_bytes(l.params[0], cuda::update_scratch(tensors.data(), n));
  check_cuda(
      cuda::update(tensors.data(), n, rule, hyper, rates, l.descent.pair(false), scratch.data_ptr(), device.stream),
      name);
}

void skew_sgd(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
              std::vector<Tensor> scales, std::vector<Tensor> levels, std::vector<int64_t> grids,
              std::vector<Tensor> dequantized, std::vector<Tensor> row_sums, std::vector<Tensor> totals, Tensor lr,
              Tensor eps, double alpha, double momentum, double dampening, double weight_decay, bool nesterov,
              bool direction, bool clamp, bool maximize, bool skip_nonfinite, std::optional<std::vector<Tensor>> kept,
              std::optional<std::vector<Tensor>> firsts, std::optional<Tensor> coefficients) {
  const cuda::Rates rates{scalar(lr, "lr"), scalar(eps, "eps"), {0, nullptr, false}, 0, 0};
  Hyper h{};
  set_rates(h, rates.lr.value, rates.eps.value);
  h.alpha = (float)alpha;
  h.weight_decay = (float)weight_decay;
  h.momentum = (float)momentum;
  h.one_minus_dampening = (float)(1 - dampening);
  h.nesterov = nesterov;
  h.direction = direction;
  h.clamp = clamp;
  h.maximize = maximize;
  h.skip_nonfinite = skip_nonfinite;
  update({params,
          grads,
          momentum_buffers,
          {},
          scales,
          levels,
          grids,
          dequantized,
          row_sums,
          totals,
          "momentum_buffers",
          "",
          Descent(kept, firsts, coefficients)},
         kSgd, h, rates, "skew_sgd_");
}

void skew_adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> scales, std::vector<Tensor> levels,
                std::vector<int64_t> grids, std::vector<Tensor> dequantized, std::vector<Tensor> row_sums,
                std::vector<Tensor> totals, Tensor step, Tensor lr, Tensor eps, double alpha, double beta1,
                double beta2, double adam_eps, double weight_decay, bool direction, bool clamp, bool maximize,
                bool skip_nonfinite, std::optional<std::vector<Tensor>> kept, std::optional<std::vector<Tensor>> firsts,
                std::optional<Tensor> coefficients) {
  const cuda::Rates rates{scalar(lr, "lr"), scalar(eps, "eps"), scalar(step, "step"), beta1, beta2};
  Hyper h{};
  set_rates(h, rates.lr.value, rates.eps.value);
  set_betas(h, beta1, beta2, rates.step.value);
  h.alpha = (float)alpha;
  h.weight_decay = (float)weight_decay;
  h.adam_eps = (float)adam_eps;
  h.direction = direction;
  h.clamp = clamp;
  h.maximize = maximize;
  h.skip_nonfinite = skip_nonfinite;
  update({params, grads, exp_avgs, exp_avg_sqs, scales, levels, grids, dequantized, row_sums, totals, "exp_avgs",
          "exp_avg_sqs", Descent(kept, firsts, coefficients)},
         kAdamW, h, rates, "skew_adamw_");
}

// ---- sharpness-aware passes over a list of tensors ----------------------------------------------------------------

const Tensor& beside(const Tensor& t, const Tensor& w, int type, const char* name) {
  check_like(t, w, name);
  STD_TORCH_CHECK(storage_type(t, name) == type, name, ": expected the dtype of the tensor it belongs to");
  return t;
}

// `grads`, `kept`, `adaptive`: as many as tensors, or null where the pass has none.
std::vector<cuda::SamTensor> sam_list(const std::vector<Tensor>& tensors, const std::vector<Tensor>* grads,
                                      const char* grads_name, const std::vector<Tensor>* kept,
                                      const std::vector<int64_t>* adaptive) {
  const size_t n = tensors.size();
  for (const auto* list : {grads, kept})
    STD_TORCH_CHECK(!list || list->size() == n, grads_name, ", kept: expected ", n, " tensors each");
  STD_TORCH_CHECK(!adaptive || adaptive->size() == n, "adaptive: expected ", n, " integers");
  std::vector<cuda::SamTensor> result(n);
  for (size_t i = 0; i < n; ++i) {
    const Tensor& w = tensors[i];
    check_dense(w, "params");
    STD_TORCH_CHECK(w.get_device_index() == tensors[0].get_device_index(), "params: expected one device");
    const int type = storage_type(w, "params");
    result[i] = {w.data_ptr(),
                 grads ? beside((*grads)[i], w, type, grads_name).data_ptr() : nullptr,
                 kept ? beside((*kept)[i], w, type, "kept").data_ptr() : nullptr,
                 type,
                 adaptive && (*adaptive)[i] != 0,
                 w.numel()};
  }
  return result;
}

Tensor sam_norm(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<int64_t> adaptive, double eta) {
  STD_TORCH_CHECK(!params.empty(), "params: expected at least one tensor");
  const auto list = sam_list(params, &grads, "grads", nullptr, &adaptive);
  const OnDevice device(params[0]);
  const int64_t shape[1] = {};
  Tensor out = torch::stable::new_empty(params[0], {shape, (size_t)0}, ScalarType::Double);
  Tensor scratch = scratch_bytes(params[0], cuda::sam_norm_scratch(list.data(), list.size()));
  check_cuda(cuda::sam_norm(list.data(), list.size(), (float)eta, static_cast<double*>(out.data_ptr()),
                            scratch.data_ptr(), device.stream),
             "sam_norm");
  return out;
}

void sam_perturb(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> kept, Tensor coefficients,
                 std::vector<int64_t> adaptive, double eta) {
  check_coefficients(coefficients, false);
  const auto list = sam_list(params, &grads, "grads", &kept, &adaptive);
  if (list.empty()) return;
  const OnDevice device(params[0]);
  check_cuda(cuda::sam_perturb(list.data(), list.size(), (float)eta, static_cast<const float*>(coefficients.data_ptr()),
                               device.stream),
             "sam_perturb_");
}

void sam_restore(std::vector<Tensor> params, std::vector<Tensor> kept) {
  const auto list = sam_list(params, nullptr, "grads", &kept, nullptr);
  if (list.empty()) return;
  const OnDevice device(params[0]);
  check_cuda(cuda::sam_restore(list.data(), list.size(), device.stream), "sam_restore_");
}

void sam_average(std::vector<Tensor> grads, std::vector<Tensor> firsts, Tensor coefficients) {
  check_coefficients(coefficients, false);
  const auto list = sam_list(grads, &firsts, "firsts", nullptr, nullptr);
  if (list.empty()) return;
  const OnDevice device(grads[0]);
  check_cuda(
      cuda::sam_average(list.data(), list.size(), static_cast<const float*>(coefficients.data_ptr()), device.stream),
      "sam_average_");
}

Tensor mix_fake_quantize(Tensor x, Tensor scales, Tensor strengths, std::vector<int64_t> grids, bool clip,
                         bool learned) {
  const OnDevice device(x);
  const MixArg m = mix_arg(x, scales, strengths, grids, clip, learned);
  Tensor y = empty_result(x);
  check_cuda(cuda::mix(m, y.data_ptr(), device.stream), "mix_fake_quantize");
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mix_fake_quantize_backward(Tensor grad, Tensor x, Tensor scales, Tensor strengths,
                                                              std::vector<int64_t> grids, bool clip, bool learned) {
  const OnDevice device(x);
  const MixArg m = mix_arg(x, scales, strengths, grids, clip, learned);
  check_like(grad, x, "grad");
  STD_TORCH_CHECK(storage_type(grad, "grad") == m.type, "grad: expected the dtype of x");
  Tensor out = empty_result(x), to_strengths = empty_result(strengths), to_scales = empty_result(scales);
  Tensor scratch = scratch_bytes(x, cuda::mix_gradient_scratch(m, grad.data_ptr(), out.data_ptr()));
  check_cuda(cuda::mix_gradient(m, grad.data_ptr(), out.data_ptr(), static_cast<float*>(to_strengths.data_ptr()),
                                static_cast<float*>(to_scales.data_ptr()), scratch.data_ptr(), device.stream),
             "mix_fake_quantize_backward");
  return {out, to_strengths, to_scales};
}

void packed_dequantize(Tensor codes, Tensor scale, Tensor levels, std::vector<int64_t> grid, int64_t bits, Tensor out) {
  check_dense(out, "out");
  STD_TORCH_CHECK(!out.is_cpu() && out.dim() == 2 && out.size(0) == codes.size(0), "out: expected shape (n, cols)");
  const OnDevice device(codes);
  check_cuda(cuda::packed_dequantize(packed_arg(codes, scale, levels, grid, bits, out.size(1)), out.data_ptr(),
                                     storage_type(out, "out"), device.stream),
             "packed_dequantize_");
}

Tensor packed_linear(Tensor x, Tensor codes, Tensor scale, Tensor levels, std::vector<int64_t> grid, int64_t bits,
                     std::optional<Tensor> bias) {
  check_dense(x, "x");
  STD_TORCH_CHECK(!x.is_cpu() && x.dim() == 2 && !codes.is_cpu(), "x: expected shape (batch, cols) beside the codes");
  const int type = storage_type(x, "x");
  const PackedArg w = packed_arg(codes, scale, levels, grid, bits, x.size(1));
  if (bias) {
    check_dense(*bias, "bias");
    STD_TORCH_CHECK(!bias->is_cpu() && bias->numel() == w.n && storage_type(*bias, "bias") == type, "bias: expected ",
                    w.n, " elements in the type of x");
  }
  const OnDevice device(x);
  const int64_t shape[2] = {x.size(0), w.n};
  Tensor y = torch::stable::new_empty(x, {shape, 2});
  check_cuda(cuda::packed_linear(w, x.data_ptr(), x.size(0), bias ? bias->data_ptr() : nullptr, y.data_ptr(), type,
                                 device.stream),
             "packed_linear");
  return y;
}

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) {
  m.impl("fake_quantize", TORCH_BOX(&askew::fake_quantize));
  m.impl("fake_quantize_out_", TORCH_BOX(&askew::fake_quantize_out));
  m.impl("fake_quantize_backward", TORCH_BOX(&askew::fake_quantize_backward));
  m.impl("ste_clip_", TORCH_BOX(&askew::ste_clip));
  m.impl("project_interval_", TORCH_BOX(&askew::project_interval));
  m.impl("row_sums", TORCH_BOX(&askew::row_sums));
  m.impl("skew_sgd_", TORCH_BOX(&askew::skew_sgd));
  m.impl("skew_adamw_", TORCH_BOX(&askew::skew_adamw));
  m.impl("packed_dequantize_", TORCH_BOX(&askew::packed_dequantize));
  m.impl("packed_linear", TORCH_BOX(&askew::packed_linear));
  m.impl("mix_fake_quantize", TORCH_BOX(&askew::mix_fake_quantize));
  m.impl("mix_fake_quantize_backward", TORCH_BOX(&askew::mix_fake_quantize_backward));
  m.impl("sam_norm", TORCH_BOX(&askew::sam_norm));
  m.impl("sam_perturb_", TORCH_BOX(&askew::sam_perturb));
  m.impl("sam_restore_", TORCH_BOX(&askew::sam_restore));
  m.impl("sam_average_", TORCH_BOX(&askew::sam_average));
}
