// The launchers of csrc/cuda/kernels.h, over ordinary memory, with plain names and arguments for ctypes.
#include "emulator.h"

#include "../../csrc/cuda/quantize.cu"
#include "../../csrc/cuda/packed.cu"
#include "../../csrc/cuda/packed_tiles.cu"
#include "../../csrc/cuda/mix.cu"
#include "../../csrc/cuda/sam.cu"
#include "../../csrc/cuda/scales.cu"
#include "../../csrc/cuda/update.cu"
#include "../../csrc/cuda/lowbit.cu"

using namespace askew;

namespace {
std::vector<double> poisoned(size_t bytes) {  // scratch that a kernel must write before it reads
  std::vector<double> v(bytes / sizeof(double) + 1);
  std::memset(v.data(), 0xff, v.size() * sizeof(double));
  return v;
}
}  // namespace

extern "C" {

void emulated_set_slots(int64_t slots) { tuning.slots = slots; }
int emulated_fake_quantize(const void* x, int x_type, void* y, int y_type, const float* scale, GridArg grid,
                           int64_t rows, int64_t cols, int stochastic, uint64_t seed) {
  return cuda::quantize(
      {stochastic ? kStochastic : kQuantize, x_type, y_type, x, nullptr, y, scale, grid, {rows, cols}, seed, {}},
      nullptr);
}
int emulated_ste_clip(const void* g, const void* x, int type, void* out, const float* scale, GridArg grid, int64_t rows,
                      int64_t cols) {
  return cuda::quantize({kSteClip, type, type, x, g, out, scale, grid, {rows, cols}, 0, {}}, nullptr);
}
int emulated_soft_quantize(const void* x, void* y, int type, const float* scale, GridArg grid, Scalar slack,
                           int64_t rows, int64_t cols) {
  return cuda::quantize({kSoften, type, type, x, nullptr, y, scale, grid, {rows, cols}, 0, slack}, nullptr);
}
int emulated_project_interval(void* w, int type, const float* scale, GridArg grid, Scalar eps, int64_t rows,
                              int64_t cols) {
  return cuda::quantize({kProject, type, type, w, nullptr, w, scale, grid, {rows, cols}, 0, eps}, nullptr);
}
int emulated_row_sums(const void* x, int type, int64_t rows, int64_t cols, float* sums) {
  QuantizeArg a{};
  a.type = type;
  a.x = x;
  a.m = {rows, cols};
  auto scratch = poisoned(cuda::row_sums_scratch(a));
  return cuda::row_sums(a, sums, scratch.data(), nullptr);
}
int emulated_scale_gradient(const void* g, const void* x, int type, void* out, const float* scale, GridArg grid,
                            int64_t rows, int64_t cols, double factor, float* to_scale) {
  const QuantizeArg a{kSteClip, type, type, x, g, out, scale, grid, {rows, cols}, 0, {}};
  auto scratch = poisoned(cuda::scale_gradient_scratch(a));
  return cuda::scale_gradient(a, factor, to_scale, scratch.data(), nullptr);
}
int emulated_update(const UpdateTensor* tensors, size_t n, const Hyper* switches, const Rates* rates,
                    const float* coefficients) {
  auto scratch = poisoned(cuda::update_scratch(tensors, n));
  Hyper h = *switches;
  if (!rates->on_device())
    cuda::with_rule(h.rule, cuda::Rules{}, [&](auto rule) {
      cuda::set_rates<decltype(rule)>(h, rates->lr.value, rates->eps.value, rates->step.value, rates->numbers);
    });
  return cuda::update(tensors, n, h, *rates, coefficients, scratch.data(), nullptr);
}
int emulated_sam_norm(const SamTensor* tensors, size_t n, float eta, double* sum) {
  auto scratch = poisoned(cuda::sam_norm_scratch(tensors, n));
  return cuda::sam_norm(tensors, n, eta, sum, scratch.data(), nullptr);
}
int emulated_sam(int pass, const SamTensor* tensors, size_t n, float eta, const float* coefficients) {
  return cuda::sam((SamPass)pass, tensors, n, eta, coefficients, nullptr);
}
int emulated_scales(const ScaleTensor* tensors, size_t n) {
  auto scratch = poisoned(cuda::scales_scratch(tensors, n));
  return cuda::scales(tensors, n, scratch.data(), nullptr);
}
int emulated_mse_scales(const MseArg* a, float* scale) {
  auto scratch = poisoned(cuda::mse_scales_scratch(*a));
  return cuda::mse_scales(*a, scale, scratch.data(), nullptr);
}
int emulated_packed_dequantize(const PackedArg* w, void* out, int type) {
  return cuda::packed_dequantize(*w, out, type, nullptr);
}
int emulated_packed_linear(const PackedArg* w, const void* x, int64_t tokens, const void* bias, void* y, int type) {
  return cuda::packed_linear({*w, x, bias, y, tokens, type}, nullptr);
}
int emulated_packed_tiles_linear(const TilesArg* a) {
  auto scratch = poisoned(cuda::packed_tiles_scratch(*a) + 16);
  return cuda::packed_tiles_linear(*a, (void*)(((uintptr_t)scratch.data() + 15) / 16 * 16), nullptr);
}
int emulated_mix(const MixArg* m, void* y) { return cuda::mix(*m, y, nullptr); }
int emulated_mix_gradient(const MixArg* m, const void* g, void* out, float* to_strengths, float* to_scales) {
  auto scratch = poisoned(cuda::mix_gradient_scratch(*m, g, out));
  return cuda::mix_gradient(*m, g, out, to_strengths, to_scales, scratch.data(), nullptr);
}
int emulated_token_levels(const TokenArg* a) { return cuda::token_levels(*a, nullptr); }
int emulated_scaled_sums(const SumsArg* a) { return cuda::scaled_sums(*a, nullptr); }
// Division by a scale as the kernels do it, for comparison with the exact quotient.
void emulated_divide(const float* a, const float* b, float* quotient, int64_t n) {
  for (int64_t i = 0; i < n; ++i) quotient[i] = cuda::divide(a[i], cuda::divisor(b[i]));
}

void emulated_divide_quickly(const float* a, const float* b, float* quotient, int64_t n) {
  for (int64_t i = 0; i < n; ++i) quotient[i] = cuda::divide_quickly(a[i], b[i]);
}
// The two ways to e4m3: an instruction's, emulated, and the code of architectures that lack it.
void emulated_narrow_e4m3(const float* values, uint8_t* instruction, uint8_t* code, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    instruction[i] = (uint8_t)cuda::pack_e4m3(values[i], 0.f);
    code[i] = (uint8_t)cuda::narrow_e4m3(values[i]);
  }
}

}  // extern "C"
