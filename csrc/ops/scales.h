// Scales: from the sums of rows, for a list of tensors; by the least squared error. `Device` runs both: cpu/scales.cpp,
// cuda/scales.cpp.
#pragma once
#include "tensors.h"

namespace askew {

template <class Device>
struct ScaleOps {
  // rules: [rule, type of the scales, columns of a row] of each tensor; numbers: [c_max, first, second].
  static std::vector<ScaleTensor> checked(const std::vector<Tensor>& scales, const std::vector<Tensor>& row_sums,
                                          const std::vector<int64_t>& rules, const std::vector<double>& numbers) {
    const size_t n = scales.size();
    STD_TORCH_CHECK(row_sums.size() == n, "row_sums: expected ", n, " tensors, got ", row_sums.size());
    STD_TORCH_CHECK(rules.size() == 3 * n, "rules: expected ", 3 * n, " integers, got ", rules.size());
    STD_TORCH_CHECK(numbers.size() == 3 * n, "numbers: expected ", 3 * n, " numbers, got ", numbers.size());
    std::vector<ScaleTensor> tensors(n);
    for (size_t i = 0; i < n; ++i) {
      ScaleTensor& t = tensors[i];
      t.scale = const_cast<float*>(floats(scales[i], scales[0], "scales"));
      t.sums = floats(row_sums[i], scales[0], "row_sums");
      t.rows = scales[i].numel();
      STD_TORCH_CHECK(row_sums[i].numel() == t.rows * kRowSums, "row_sums: expected shape (", t.rows, ", ", kRowSums,
                      "), got ", row_sums[i].numel(), " elements");
      t.rule = (int)rules[3 * i];
      t.type = (int)rules[3 * i + 1];
      STD_TORCH_CHECK(t.rule >= kAbsmax && t.rule <= kGiven, "rules: unknown rule ", t.rule);
      check_type(t.type);
      STD_TORCH_CHECK(rules[3 * i + 2] > 0, "rules: expected columns, got ", rules[3 * i + 2]);
      t.cols = (double)rules[3 * i + 2];
      t.c_max = checked_top(numbers[3 * i]);
      t.first = numbers[3 * i + 1];
      t.second = numbers[3 * i + 2];
    }
    return tensors;
  }

  static void from_sums(std::vector<Tensor> scales, std::vector<Tensor> row_sums, std::vector<int64_t> rules,
                        std::vector<double> numbers) {
    const std::vector<ScaleTensor> tensors = checked(scales, row_sums, rules, numbers);
    if (!scales.empty()) Device(scales[0]).run(tensors);
  }

  // A list that is used again and again, as UpdateOps has it.
  static Tensor prepare(std::vector<Tensor> scales, std::vector<Tensor> row_sums, std::vector<int64_t> rules,
                        std::vector<double> numbers) {
    STD_TORCH_CHECK(!scales.empty(), "scales: expected a list");
    return bytes_of(checked(scales, row_sums, rules, numbers), scales[0]);
  }
  static void prepared(Tensor list, Tensor like) { Device(like).run(from_bytes<ScaleTensor>(list)); }

  static Tensor mse(Tensor w, Tensor row_sums, Tensor levels, std::vector<int64_t> grid, double c_max,
                    int64_t scale_type) {
    MseArg a{};
    a.type = storage_type(w, "w");
    a.w = w.data_ptr();
    a.sums = floats(row_sums, w, "row_sums");
    STD_TORCH_CHECK(row_sums.numel() % kRowSums == 0, "row_sums: expected shape (rows, ", kRowSums, ")");
    a.m = matrix_of(w, row_sums.numel() / kRowSums, "row_sums");
    a.grid = grid_arg(grid, levels, w);
    a.c_max = checked_top(c_max);
    a.scale_type = (int)scale_type;
    check_type(a.scale_type);
    Tensor scale = empty(w, {a.m.rows}, ScalarType::Float);
    Device(w).run(a, static_cast<float*>(scale.data_ptr()));
    return scale;
  }

  static void check_type(int type) {
    STD_TORCH_CHECK(type >= kScaleFloat32 && type <= kScaleE4M3, "unknown type of scales ", type);
  }
  static double checked_top(double c_max) {
    STD_TORCH_CHECK(c_max > 0, "c_max: expected a positive number, got ", c_max);
    return c_max;
  }

  static void implement(StableLibrary& m) {
    m.impl("scales_from_sums_", TORCH_BOX(&from_sums));
    m.impl("mse_scales", TORCH_BOX(&mse));
    m.impl("prepare_scales", TORCH_BOX(&prepare));
    m.impl("prepared_scales_", TORCH_BOX(&prepared));
  }
};

}  // namespace askew
