// Sharpness-aware passes over a list of tensors on a GPU.
#include "run.h"

namespace askew {
namespace {

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

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) {
  m.impl("sam_norm", TORCH_BOX(&askew::sam_norm));
  m.impl("sam_perturb_", TORCH_BOX(&askew::sam_perturb));
  m.impl("sam_restore_", TORCH_BOX(&askew::sam_restore));
  m.impl("sam_average_", TORCH_BOX(&askew::sam_average));
}
