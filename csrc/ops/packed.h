// Packed weights: decoding, and products with them. `Device` runs a PackedArg or a LinearArg: cpu/packed.cpp,
// cuda/packed.cpp.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "tensors.h"

namespace askew {

inline int64_t filled_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Groups that begin before the end of a row's tiles.
inline int64_t ceil_groups(int64_t cols, int64_t groups, int64_t chunks) {
  const int64_t length = cols / groups;
  return length ? filled_up(chunks * kTileColumns, length) / length : groups;
}

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

  enum Inputs { kAsTheyAre, kAsInt8, kAsBFloat16 };
  template <Inputs INPUTS>
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
    if constexpr (INPUTS == kAsInt8) {
      STD_TORCH_CHECK(a.w.grid.kind != kCodebook, "grid: int8 activations need integer levels");
      STD_TORCH_CHECK(a.w.cols * kInt8Top * (a.w.n_levels - 1) < INT32_MAX, "x: ", a.w.cols,
                      " columns may overflow int32");
    }
    const Device device(x);
    Tensor y = Device::empty(x, {a.batch, a.w.n});
    a.y = y.data_ptr();
    if (!a.batch || !a.w.n) return y;
    if constexpr (INPUTS == kAsInt8)
      device.linear_int8(a);
    else if constexpr (INPUTS == kAsBFloat16)
      device.linear_bf16(a);
    else
      device.linear(a);
    return y;
  }

  // y (batch, n) from tiles (contract.py). scale: one, one a row, or one a row for each group of columns, groups first.
  static Tensor tiles_linear(Tensor x, Tensor tiles, Tensor scale, Tensor levels, std::vector<int64_t> grid,
                             int64_t form, int64_t n, int64_t groups, std::optional<Tensor> bias) {
    STD_TORCH_CHECK(x.dim() == 2 && together(x, tiles), "x: expected shape (batch, cols) beside tiles");
    const bool table = form == kTilesTable || form == kTilesTable2;
    STD_TORCH_CHECK(
        table || form == kTiles1 || form == kTiles2 || form == kTiles3 || form == kTiles4 || form == kTiles8,
        "form: expected 1, 2, 3, 4 or 8 bits, 14 or 24 for a codebook, got ", form);
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    TilesArg a{};
    a.type = storage_type(x, "x");
    STD_TORCH_CHECK(a.type != kFloat32, "x: expected bfloat16 or float16");
    a.grid = grid_arg(grid, levels, tiles);
    STD_TORCH_CHECK(table == (a.grid.kind == kCodebook) && (a.grid.kind == kBinary) == (form == kTiles1),
                    "form: ", form, " is not for this kind of grid");
    STD_TORCH_CHECK(a.grid.kind != kUniform || (a.grid.lo >= -128 && a.grid.hi <= 255),
                    "grid: expected levels of -128 to 255");
    a.form = (int)form;
    a.n = n;
    a.cols = x.size(1);
    a.batch = x.size(0);
    a.x = x.data_ptr();
    check_dense(tiles, "tiles");
    const int64_t rows = filled_up(n, kTileRows), chunks = filled_up(a.cols, kTileColumns) / kTileColumns;
    STD_TORCH_CHECK(
        tiles.scalar_type() == ScalarType::Int && tiles.dim() == 5 && n >= 0 && tiles.size(0) == rows / kTileRows &&
            tiles.size(1) == chunks && tiles.size(2) == tile_bits(a.form) && tiles.size(3) == 32 && tiles.size(4) == 4,
        "tiles: expected int32 of shape (", rows / kTileRows, ", ", chunks, ", ", tile_bits(a.form), ", 32, 4)");
    a.tiles = static_cast<const uint32_t*>(tiles.data_ptr());
    a.scale = floats(scale, x, "scale");
    STD_TORCH_CHECK(groups >= 0 && (groups < 2 || a.cols % (16 * groups) == 0), "groups: ", groups, " do not divide ",
                    a.cols, " columns in multiples of 16");
    a.groups = groups;
    const int64_t wanted = groups < 2 ? (groups ? n : 1) : ceil_groups(a.cols, groups, chunks) * rows;
    STD_TORCH_CHECK(scale.numel() == wanted, "scale: expected ", wanted, " scales, got ", scale.numel());
    if (bias) {
      check_dense(*bias, "bias");
      STD_TORCH_CHECK(bias->numel() == n && bias->scalar_type() == x.scalar_type() && together(*bias, x),
                      "bias: expected ", n, " elements in the type of x, beside it");
      a.bias = bias->data_ptr();
    }
    const Device device(x);
    Tensor y = Device::empty(x, {a.batch, n});
    a.y = y.data_ptr();
    if (a.batch && n) device.tiles_linear(a);
    return y;
  }

  // Where codes stand in bands; `groups` of a row, at least 1.
  static BandsArg bands_of(int64_t bits, int64_t n, int64_t cols, int64_t groups) {
    STD_TORCH_CHECK(bits >= 0 && bits <= 8, "bits: expected 1 to 8, or 0 for five trits a byte, got ", bits);
    STD_TORCH_CHECK(n >= 0 && cols >= 0, "n, cols: expected no negative number");
    STD_TORCH_CHECK(groups >= 1 && cols % groups == 0, "groups: ", groups, " do not divide ", cols, " columns");
    BandsArg w{};
    w.bits = (int)bits;
    w.n = n;
    w.cols = cols;
    w.groups = groups;
    w.blocks = filled_up(cols / groups, 4 * band_vectors(w.bits)) / (4 * band_vectors(w.bits));
    return w;
  }
  static int64_t band_bytes(const BandsArg& w) { return w.groups * w.blocks * band_words(w.bits) * 4 * kBandRows; }
  static uint8_t* check_bands(const Tensor& bands, const BandsArg& w) {
    check_dense(bands, "bands");
    const int64_t count = filled_up(w.n, kBandRows) / kBandRows;
    STD_TORCH_CHECK(bands.scalar_type() == ScalarType::Byte && bands.dim() == 2 && bands.size(0) == count &&
                        bands.size(1) == band_bytes(w),
                    "bands: expected uint8 of shape (", count, ", ", band_bytes(w), ")");
    return static_cast<uint8_t*>(bands.data_ptr());
  }

  static Tensor bands(Tensor codes, int64_t bits, int64_t cols, int64_t groups, int64_t levels) {
    check_dense(codes, "codes");
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 2,
                    "codes: expected uint8 of shape (n, row_bytes)");
    const BandsArg w = bands_of(bits, codes.size(0), cols, groups);
    STD_TORCH_CHECK(codes.size(1) == row_bytes(cols, w.bits), "codes: expected ", row_bytes(cols, w.bits),
                    " bytes a row, got ", codes.size(1));
    STD_TORCH_CHECK(levels >= 1 && levels <= (bits ? 1 << bits : 3), "levels: too many for ", bits, " bits: ", levels);
    const Tensor made = empty(codes, {filled_up(w.n, kBandRows) / kBandRows, band_bytes(w)}, ScalarType::Byte);
    Device(codes).to_bands(static_cast<const uint8_t*>(codes.data_ptr()), w, (int)levels,
                           static_cast<uint8_t*>(made.data_ptr()));
    return made;
  }
  static Tensor bands_codes(Tensor bands, int64_t bits, int64_t n, int64_t cols, int64_t groups) {
    BandsArg w = bands_of(bits, n, cols, groups);
    w.codes = check_bands(bands, w);
    const Tensor made = empty(bands, {n, row_bytes(cols, w.bits)}, ScalarType::Byte);
    Device(bands).from_bands(w, static_cast<uint8_t*>(made.data_ptr()));
    return made;
  }
  // A weight in bands for products with inputs rounded to int8. scale: (bands, groups, kBandRows).
  static BandsArg checked_bands(const Tensor& bands, const Tensor& scale, const std::vector<int64_t>& grid,
                                int64_t bits, int64_t n, int64_t cols) {
    const int64_t count = filled_up(n, kBandRows) / kBandRows;
    STD_TORCH_CHECK(scale.dim() == 3 && scale.size(0) == count && scale.size(2) == kBandRows, "scale: expected shape (",
                    count, ", groups, ", kBandRows, ")");
    BandsArg w = bands_of(bits, n, cols, scale.size(1));
    w.codes = check_bands(bands, w);
    w.scale = floats(scale, bands, "scale");
    const GridArg g = grid_arg(grid, scale, bands);
    STD_TORCH_CHECK(g.kind == kUniform || g.kind == kBinary, "grid: int8 activations need integer levels");
    w.step = (float)grid_step(g.kind) / (bits == 1 ? 2 : 1);
    w.lo = (int)(g.lo / w.step);
    STD_TORCH_CHECK((float)w.lo * w.step == g.lo, "grid: levels of bands are multiples of ", w.step);
    if (bits == kTrits) --w.lo;
    const int64_t top = std::max(std::abs((int64_t)w.lo), std::max<int64_t>(band_top(w.bits), w.lo + band_top(w.bits)));
    const int64_t units = bits == kTrits ? 64 : 1;  // of which sums are made
    STD_TORCH_CHECK(w.cols * kInt8Top * top * units < INT32_MAX, "x: ", w.cols, " columns may overflow int32");
    return w;
  }
  static const void* bias_of(const std::optional<Tensor>& bias, int64_t n, const Tensor& x) {
    if (!bias) return nullptr;
    check_dense(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == n && bias->scalar_type() == x.scalar_type() && together(*bias, x),
                    "bias: expected ", n, " elements in the type of x, beside it");
    return bias->data_ptr();
  }

  // y (batch, n) from bands, x rounded to int8.
  static Tensor bands_linear(Tensor x, Tensor bands, Tensor scale, std::vector<int64_t> grid, int64_t bits, int64_t n,
                             std::optional<Tensor> bias) {
    STD_TORCH_CHECK(x.dim() == 2 && together(x, bands), "x: expected shape (batch, cols) beside bands");
    const BandsArg w = checked_bands(bands, scale, grid, bits, n, x.size(1));
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    LinearArg a{};
    a.w.n = n;
    a.w.cols = w.cols;
    a.x = x.data_ptr();
    a.batch = x.size(0);
    a.type = storage_type(x, "x");
    a.bias = bias_of(bias, n, x);
    Tensor y = Device::empty(x, {a.batch, n});
    a.y = y.data_ptr();
    if (a.batch && n) Device(x).bands_linear(a, w);
    return y;
  }

  // x (images, channels, height, width), or with `channels_last` (images, height, width, channels), which y is, too.
  // geometry: kernel, stride, dilation, zeros before and after, two numbers each.
  static ConvArg conv_arg(const Tensor& x, const std::vector<int64_t>& geometry, bool channels_last) {
    STD_TORCH_CHECK(geometry.size() == 10, "geometry: expected 10 numbers, got ", geometry.size());
    ConvArg a{};
    a.channels_last = channels_last;
    a.images = x.size(0);
    a.channels = x.size(channels_last ? 3 : 1);
    for (int d = 0; d < 2; ++d) {
      a.in[d] = x.size(d + (channels_last ? 1 : 2));
      a.kernel[d] = geometry[d];
      a.stride[d] = geometry[2 + d];
      a.dilation[d] = geometry[4 + d];
      a.before[d] = geometry[6 + d];
      const int64_t after = geometry[8 + d], most = INT32_MAX;
      STD_TORCH_CHECK(a.kernel[d] > 0 && a.stride[d] > 0 && a.dilation[d] > 0 && a.before[d] >= 0 && after >= 0,
                      "geometry: expected positive numbers");
      STD_TORCH_CHECK(a.kernel[d] <= most && a.dilation[d] <= most && a.stride[d] <= most && a.in[d] <= most &&
                          a.before[d] <= most && after <= most,
                      "geometry: expected numbers below 2^31");
      const int64_t reach = (a.kernel[d] - 1) * a.dilation[d] + 1, room = a.in[d] + a.before[d] + after;
      STD_TORCH_CHECK(reach <= room, "x: a kernel that reaches over ", reach, " has no place in ", room);
      a.out[d] = (room - reach) / a.stride[d] + 1;
    }
    const auto reached = [&](int d) {
      return std::max(a.in[d], (a.kernel[d] - 1) * a.dilation[d] + (a.out[d] + 1) * a.stride[d]);
    };
    STD_TORCH_CHECK(reached(0) * reached(1) <= INT32_MAX / std::max<int64_t>(a.channels, 1),
                    "x: an image of more than 2^31 numbers");
    a.type = storage_type(x, "x");
    a.x = x.data_ptr();
    return a;
  }
  static Tensor conv_result(const Tensor& x, const ConvArg& a, int64_t n) {
    return a.channels_last ? Device::empty(x, {a.images, a.out[0], a.out[1], n})
                           : Device::empty(x, {a.images, n, a.out[0], a.out[1]});
  }

  // The convolution of x; each patch is rounded to int8.
  static Tensor bands_conv(Tensor x, Tensor bands, Tensor scale, std::vector<int64_t> grid, int64_t bits, int64_t n,
                           std::vector<int64_t> geometry, bool channels_last, std::optional<Tensor> bias) {
    STD_TORCH_CHECK(x.dim() == 4 && together(x, bands), "x: expected an image of 4 dimensions beside bands");
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    ConvArg a = conv_arg(x, geometry, channels_last);
    const BandsArg w = checked_bands(bands, scale, grid, bits, n, a.channels * a.kernel[0] * a.kernel[1]);
    a.bias = bias_of(bias, n, x);
    Tensor y = conv_result(x, a, n);
    a.y = y.data_ptr();
    if (y.numel() && w.cols) Device(x).bands_conv(a, w);
    return y;
  }

  // The same with a filter for each channel, taps (kernel, channels); x float32 (images, height, width, channels).
  static Tensor depthwise(Tensor x, Tensor taps, std::vector<int64_t> geometry, std::optional<Tensor> bias) {
    STD_TORCH_CHECK(x.dim() == 4 && together(x, taps) && x.scalar_type() == ScalarType::Float,
                    "x: expected a float32 image of 4 dimensions beside taps");
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    ConvArg a = conv_arg(x, geometry, true);
    check_dense(taps, "taps");
    STD_TORCH_CHECK(taps.scalar_type() == ScalarType::Float && taps.dim() == 2 &&
                        taps.size(0) == a.kernel[0] * a.kernel[1] && taps.size(1) == a.channels,
                    "taps: expected float32 of shape (", a.kernel[0] * a.kernel[1], ", ", a.channels, ")");
    a.bias = bias_of(bias, a.channels, x);
    Tensor y = conv_result(x, a, a.channels);
    a.y = y.data_ptr();
    if (y.numel()) Device(x).depthwise(a, static_cast<const float*>(taps.data_ptr()));
    return y;
  }

  static void implement(StableLibrary& m) {
    m.impl("packed_dequantize_", TORCH_BOX(&dequantize));
    constexpr auto with_floats = &linear<kAsTheyAre>;
    m.impl("packed_linear", TORCH_BOX(with_floats));
    if constexpr (Device::kTiles) m.impl("packed_tiles_linear", TORCH_BOX(&tiles_linear));
    if constexpr (Device::kRounded) {
      constexpr auto with_int8 = &linear<kAsInt8>, with_bf16 = &linear<kAsBFloat16>;
      m.impl("packed_linear_int8", TORCH_BOX(with_int8));
      m.impl("packed_bands", TORCH_BOX(&bands));
      m.impl("packed_bands_codes", TORCH_BOX(&bands_codes));
      m.impl("packed_bands_linear", TORCH_BOX(&bands_linear));
      m.impl("packed_linear_bf16", TORCH_BOX(with_bf16));
      m.impl("packed_bands_conv", TORCH_BOX(&bands_conv));
      m.impl("packed_depthwise", TORCH_BOX(&depthwise));
    }
  }
};

}  // namespace askew
