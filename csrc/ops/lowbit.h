// Products of levels of a byte: what stands before and behind them. `Device` runs a TokenArg and a SumsArg.
#pragma once
#include "tensors.h"

namespace askew {

template <class Device>
struct LowbitOps {
  typedef std::tuple<Tensor, Tensor> Pair;

  static Pair token_levels(Tensor x, Tensor levels, std::vector<int64_t> grid, double top, ScalarType dtype) {
    STD_TORCH_CHECK(x.dim() == 2, "x: expected shape (rows, cols)");
    STD_TORCH_CHECK(dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn,
                    "dtype: expected int8 or float8_e4m3fn");
    STD_TORCH_CHECK(grid.size() == 3, "grid: expected [kind, lo, hi]");
    TokenArg a{};
    a.type = storage_type(x, "x");
    a.m = matrix_of(x, x.size(0), "x");
    a.m.cols = x.size(1);  // of no rows too
    a.x = x.data_ptr();
    a.top = (float)top;
    a.levels_type = dtype == ScalarType::Char ? kInt8 : kFloat8;
    if (grid[0] == kFloat) {
      STD_TORCH_CHECK(a.levels_type == kFloat8, "grid: expected levels for int8");
      a.grid.kind = kFloat;
    } else {
      a.grid = grid_arg(grid, levels, x);
    }
    const Device device(x);
    Tensor q = torch::stable::new_empty(x, x.sizes(), dtype), s = empty(x, {x.size(0)}, ScalarType::Float);
    a.q = q.data_ptr();
    a.scale = static_cast<float*>(s.data_ptr());
    device.run(a);
    return {q, s};
  }

  static Tensor scaled_sums(Tensor sums, Tensor token_scale, Tensor scale, std::optional<Tensor> bias,
                            ScalarType dtype) {
    STD_TORCH_CHECK(sums.dim() == 2, "sums: expected shape (rows, n)");
    check_dense(sums, "sums");
    SumsArg a{};
    const int64_t rows = sums.size(0), n = sums.size(1);
    a.m = {rows, n};
    a.sums = sums.data_ptr();
    switch (sums.scalar_type()) {
      case ScalarType::Int:
        a.sums_type = kInt32;
        break;
      case ScalarType::Float:
        a.sums_type = kFloat32;
        break;
      case ScalarType::Char:
      case ScalarType::Float8_e4m3fn:
        a.sums_type = copy_type(sums, "sums");
        break;
      default:
        STD_TORCH_CHECK(false, "sums: expected int32 or float32, or int8 or float8_e4m3fn for levels");
    }
    a.token_scale = floats(token_scale, sums, "token_scale");
    STD_TORCH_CHECK(token_scale.numel() == rows, "token_scale: expected ", rows, " numbers, got ", token_scale.numel());
    a.scale = floats(scale, sums, "scale");
    a.each = scale.numel() != 1;
    STD_TORCH_CHECK(!a.each || scale.numel() == n, "scale: expected 1 or ", n, " numbers, got ", scale.numel());
    const Device device(sums);
    Tensor y = torch::stable::new_empty(sums, sums.sizes(), dtype);
    a.y_type = storage_type(y, "dtype");
    a.y = y.data_ptr();
    if (bias) {
      check_dense(*bias, "bias");
      STD_TORCH_CHECK(bias->numel() == n && together(*bias, sums), "bias: expected ", n, " numbers beside the sums");
      a.bias = bias->data_ptr();
      a.bias_type = storage_type(*bias, "bias");
    }
    device.run(a);
    return y;
  }

  static void implement(StableLibrary& m) {
    m.impl("token_levels", TORCH_BOX(&token_levels));
    m.impl("scaled_sums", TORCH_BOX(&scaled_sums));
  }
};

// What a GPU has no kernel of its own for: products of levels, and gradients rounded stochastically.
template <class Device>
struct LevelOps {
  static const int8_t* levels(const Tensor& t, const Tensor& beside, const char* name) {
    STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == ScalarType::Char && together(t, beside), name,
                    ": expected an int8 matrix beside q");
    check_dense(t, name);
    return static_cast<const int8_t*>(t.data_ptr());
  }

  static Tensor level_product(Tensor q, Tensor token_scale, Tensor c, Tensor scale, std::optional<Tensor> bias,
                              bool transposed, ScalarType dtype) {
    LevelsArg a{};
    a.q = levels(q, q, "q");
    a.c = levels(c, q, "c");
    a.rows = q.size(0);
    a.cols = q.size(1);
    a.n = c.size(transposed ? 1 : 0);
    a.transposed = transposed;
    STD_TORCH_CHECK(c.size(transposed ? 0 : 1) == a.cols, "c: expected ", a.cols, transposed ? " rows" : " columns");
    STD_TORCH_CHECK(a.cols <= kMostLevelColumns, "q: expected at most ", kMostLevelColumns, " columns, got ", a.cols);
    a.token_scale = floats(token_scale, q, "token_scale");
    STD_TORCH_CHECK(token_scale.numel() == a.rows, "token_scale: expected ", a.rows, " numbers, got ",
                    token_scale.numel());
    a.scale = floats(scale, q, "scale");
    a.each = scale.numel() != 1;
    STD_TORCH_CHECK(!a.each || scale.numel() == a.n, "scale: expected 1 or ", a.n, " numbers, got ", scale.numel());
    const Device device(q);
    Tensor y = torch::stable::new_empty(q, std::vector<int64_t>{a.rows, a.n}, dtype);
    a.y_type = storage_type(y, "dtype");
    a.y = y.data_ptr();
    if (bias) {
      check_dense(*bias, "bias");
      STD_TORCH_CHECK(bias->numel() == a.n && together(*bias, q), "bias: expected ", a.n, " numbers beside q");
      a.bias = bias->data_ptr();
      a.bias_type = storage_type(*bias, "bias");
    }
    device.run(a);
    return y;
  }

  static uint64_t seed_of(const Tensor& seed) {
    STD_TORCH_CHECK(seed.is_cpu() && seed.numel() == 1 && seed.scalar_type() == ScalarType::Long,
                    "seed: expected a 0-dim int64 tensor on the CPU");
    return (uint64_t)*static_cast<const int64_t*>(seed.data_ptr());
  }

  static std::tuple<Tensor, Tensor> stochastic_levels(Tensor x, Tensor factor, Tensor seed) {
    STD_TORCH_CHECK(x.dim() == 2, "x: expected shape (rows, cols)");
    RoundArg a{};
    a.type = storage_type(x, "x");
    a.m = matrix_of(x, x.size(0), "x");
    a.m.cols = x.size(1);
    a.x = x.data_ptr();
    a.factor = floats(factor, x, "factor");
    a.each = factor.numel() != 1;
    STD_TORCH_CHECK(!a.each || factor.numel() == a.m.cols, "factor: expected 1 or ", a.m.cols, " numbers, got ",
                    factor.numel());
    a.seed = seed_of(seed);
    Tensor q = torch::stable::new_empty(x, x.sizes(), ScalarType::Char), s = empty(x, {x.size(0)}, ScalarType::Float);
    a.q = q.data_ptr();
    a.scale = static_cast<float*>(s.data_ptr());
    Device(x).stochastic_levels(a);
    return {q, s};
  }

  static Tensor luq(Tensor x, int64_t bits, Tensor seed) {
    STD_TORCH_CHECK(bits >= kLuqFewestBits && bits <= kLuqMostBits, "bits: expected ", kLuqFewestBits, " to ",
                    kLuqMostBits, ", got ", bits);
    check_dense(x, "x");
    RoundArg a{};
    a.type = storage_type(x, "x");
    a.m = {1, x.numel()};
    a.x = x.data_ptr();
    a.top = (1 << (bits - 1)) - 1;
    a.seed = seed_of(seed);
    const Device device(x);
    Tensor y = device.empty_like(x);
    a.q = y.data_ptr();
    device.luq(a);
    return y;
  }

  static void implement(StableLibrary& m) {
    m.impl("level_product", TORCH_BOX(&level_product));
    m.impl("stochastic_levels", TORCH_BOX(&stochastic_levels));
    m.impl("luq", TORCH_BOX(&luq));
  }
};

}  // namespace askew
