// Sharpness-aware passes over lists of tensors, each taken as one long row. `Device` runs a list of SamTensor:
// cpu/sam.cpp, cuda/sam.cpp.
#pragma once
#include "tensors.h"

namespace askew {

template <class Device>
struct SamOps {
  // `grads`, `kept`, `adaptive`: as many as tensors, or null where the pass has none.
  static std::vector<SamTensor> checked(const std::vector<Tensor>& tensors, const std::vector<Tensor>* grads,
                                        const char* grads_name, const std::vector<Tensor>* kept,
                                        const std::vector<int64_t>* adaptive) {
    const size_t n = tensors.size();
    STD_TORCH_CHECK(!grads || grads->size() == n, grads_name, ": expected ", n, " tensors");
    STD_TORCH_CHECK(!kept || kept->size() == n, "kept: expected ", n, " tensors");
    STD_TORCH_CHECK(!adaptive || adaptive->size() == n, "adaptive: expected ", n, " integers");
    std::vector<SamTensor> list(n);
    for (size_t i = 0; i < n; ++i) {
      const Tensor& w = tensors[i];
      check_dense(w, "params");
      STD_TORCH_CHECK(together(w, tensors[0]), "params: expected one device");
      list[i] = {w.data_ptr(),
                 grads ? data_like((*grads)[i], w, grads_name) : nullptr,
                 kept ? data_like((*kept)[i], w, "kept") : nullptr,
                 storage_type(w, "params"),
                 adaptive && (*adaptive)[i] != 0,
                 w.numel()};
    }
    return list;
  }

  static Tensor norm(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<int64_t> adaptive, double eta) {
    STD_TORCH_CHECK(!params.empty(), "params: expected at least one tensor");
    const auto list = checked(params, &grads, "grads", nullptr, &adaptive);
    const Device device(params[0]);
    Tensor sum = empty(params[0], {}, ScalarType::Double);
    device.norm(list, (float)eta, static_cast<double*>(sum.data_ptr()));
    return sum;
  }

  static void perturb(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> kept,
                      Tensor coefficients, std::vector<int64_t> adaptive, double eta) {
    const auto list = checked(params, &grads, "grads", &kept, &adaptive);
    if (list.empty()) return;
    const float* pair = coefficients_of(coefficients, params[0]);
    Device(params[0]).run(kSamPerturb, list, (float)eta, pair);
  }

  static void restore(std::vector<Tensor> params, std::vector<Tensor> kept) {
    const auto list = checked(params, nullptr, "grads", &kept, nullptr);
    if (!list.empty()) Device(params[0]).run(kSamRestore, list, 0, nullptr);
  }

  static void average(std::vector<Tensor> grads, std::vector<Tensor> firsts, Tensor coefficients) {
    const auto list = checked(grads, &firsts, "firsts", nullptr, nullptr);
    if (list.empty()) return;
    const float* pair = coefficients_of(coefficients, grads[0]);
    Device(grads[0]).run(kSamAverage, list, 0, pair);
  }

  static void implement(StableLibrary& m) {
    m.impl("sam_norm", TORCH_BOX(&norm));
    m.impl("sam_perturb_", TORCH_BOX(&perturb));
    m.impl("sam_restore_", TORCH_BOX(&restore));
    m.impl("sam_average_", TORCH_BOX(&average));
  }
};

}  // namespace askew
