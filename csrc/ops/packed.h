// Packed weights: decoding, and products with them. `Device` runs a PackedArg or a LinearArg: cpu/packed.cpp,
// cuda/packed.cpp.
#pragma once
#include "tensors.h"

namespace askew {

template <class Device>
struct PackedOps {
  // A packed weight of `cols` columns.
  static PackedArg checked(const Tensor& codes, const Tensor& scale, const Tensor& levels,
                           const std::vector<int64_t>& grid, int64_t bits, int64_t cols) {
    check_dense(codes, "codes");
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 2,
                    "codes: expected uint8 of shape (n, row_bytes)");
    STD_TORCH_CHECK(bits >= 0 && bits <= 8, "bits: expected 1 to 8, or 0 for five trits a byte, got ", bits);
    PackedArg w{};
    w.codes = static_cast<const uint8_t*>(codes.data_ptr());
    w.scale = floats(scale, codes, "scale");
    w.grid = grid_arg(grid, levels, codes);
    w.bits = (int)bits;
    w.n = codes.size(0);
    w.cols = cols;
    w.row_bytes = row_bytes(cols, w.bits);
    STD_TORCH_CHECK(codes.size(1) == w.row_bytes, "codes: expected ", w.row_bytes, " bytes a row, got ", codes.size(1));
    const int64_t rows = scale.numel();
    w.groups = rows == 1 ? 0 : w.n ? rows / w.n : 1;
    STD_TORCH_CHECK(rows == 1 || (rows == w.groups * w.n && (w.groups == 1 || (w.groups && cols % w.groups == 0))),
                    "scale: ", rows, " scales do not fit ", w.n, " rows of ", cols);
    const bool codebook = w.grid.kind == kCodebook;
    w.n_levels = codebook ? w.grid.n_levels : (int)((w.grid.hi - w.grid.lo) / grid_step(w.grid.kind)) + 1;
    const int most = bits == kTrits ? 3 : codebook && bits > 4 ? 16 : 1 << bits;
    STD_TORCH_CHECK(w.n_levels <= most, "levels: expected at most ", most, " of ", bits, " bits, got ", w.n_levels);
    return w;
  }

  static void dequantize(Tensor codes, Tensor scale, Tensor levels, std::vector<int64_t> grid, int64_t bits,
                         Tensor out) {
    check_dense(out, "out");
    STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == codes.size(0) && together(out, codes),
                    "out: expected shape (n, cols) beside codes");
    const int type = storage_type(out, "out");
    const PackedArg w = checked(codes, scale, levels, grid, bits, out.size(1));
    Device(codes).dequantize(w, out.data_ptr(), type);
  }

  template <bool INT8>
  static Tensor linear(Tensor x, Tensor codes, Tensor scale, Tensor levels, std::vector<int64_t> grid, int64_t bits,
                       std::optional<Tensor> bias) {
    STD_TORCH_CHECK(x.dim() == 2 && together(x, codes), "x: expected shape (batch, cols) beside codes");
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);  // exported programs lose calls that did nothing
    LinearArg a{checked(codes, scale, levels, grid, bits, x.size(1)),
                x.data_ptr(),
                nullptr,
                nullptr,
                x.size(0),
                storage_type(x, "x")};
    if (bias) {
      check_dense(*bias, "bias");
      STD_TORCH_CHECK(bias->numel() == a.w.n && bias->scalar_type() == x.scalar_type() && together(*bias, x),
                      "bias: expected ", a.w.n, " elements in the type of x, beside it");
      a.bias = bias->data_ptr();
    }
    if constexpr (INT8) {
      STD_TORCH_CHECK(a.w.grid.kind != kCodebook, "grid: int8 activations need integer levels");
      STD_TORCH_CHECK(a.w.cols * kInt8Top * (a.w.n_levels - 1) < INT32_MAX, "x: ", a.w.cols,
                      " columns may overflow int32");
    }
    const Device device(x);
    Tensor y = empty(x, {a.batch, a.w.n}, x.scalar_type());
    a.y = y.data_ptr();
    if (!a.batch || !a.w.n) return y;
    if constexpr (INT8)
      device.linear_int8(a);
    else
      device.linear(a);
    return y;
  }

  static void implement(StableLibrary& m) {
    m.impl("packed_dequantize_", TORCH_BOX(&dequantize));
    constexpr auto with_floats = &linear<false>;
    m.impl("packed_linear", TORCH_BOX(with_floats));
    if constexpr (Device::kInt8) {
      constexpr auto with_int8 = &linear<true>;
      m.impl("packed_linear_int8", TORCH_BOX(with_int8));
    }
  }
};

}  // namespace askew
