// Packed weights on the CPU: the choice of the kernel and work division. Threads share the rows of the weight, so their
// number changes no result but the last bits of panels that torch multiplies.
#include "../ops/packed.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "packed_conv.h"
#include "scratch.h"

namespace askew {
namespace {

constexpr int64_t kTokens = 128;              // int8 inputs that stay in the L2 cache while all rows pass
constexpr int64_t kPanel = 1 << 22;           // weights of a panel: 16 MiB decoded
constexpr int64_t kPanelUnits = 32;           // pieces of work that a product by panels is cut into
constexpr float kSmallestInPairs = 0x1p-60f;  // products of bfloat16 below 2^-126 are 0

// The five codes of each byte, as bytes and in one word.
struct Trits {
  uint8_t digits[256][8] = {};
  uint32_t words[256] = {};
  Trits() {
    for (int byte = 0; byte < 256; ++byte)
      for (int d = 0, rest = std::min(byte, kTopTrits); d < kTritsInByte; ++d, rest /= 3) {
        digits[byte][d] = (uint8_t)(rest % 3);
        words[byte] |= (uint32_t)(rest % 3) << 4 * d;
      }
  }
};

const Trits& trits() {
  static const Trits table;
  return table;
}

PackedWeight prepared(const PackedArg& arg) {
  PackedWeight w{arg, trits().digits[0], trits().words, {}, arg.grid.lo, arg.grid.hi, (float)grid_step(arg.grid.kind)};
  if (w.bits <= 4)
    for (int i = 0; i < 16; ++i) {
      const int k = std::min(w.bits == kTrits ? i : i & ((1 << w.bits) - 1), w.n_levels - 1);
      w.table[i] = w.grid.kind == kCodebook ? w.grid.levels[k] : w.lo + w.step * (float)k;
    }
  return w;
}

// One row after the other of [0, count) as float32 s c: f(row, its values, padded). By threads.
template <class F>
void for_decoded(const PackedWeight& w, int64_t first, int64_t count, const F& f) {
  for_rows(count, 1, w.cols, [&](int64_t begin, int64_t end) {
    Scratch<float> row(w.cols + kPadding);
    Scratch<uint8_t> bytes(w.cols + kPadding);
    for (int64_t r = begin; r < end; ++r) {
      packed_loops().decode(w, first + r, row.get(), bytes.get());
      f(r, row.get());
    }
  });
}

// What every product has: inputs as float32, y as float32 (the result itself where that is its type), a float32 bias.
struct Product {
  const PackedLoops& loops = packed_loops();
  const LinearArg& arg;
  const PackedWeight w;
  const int type;
  const int64_t batch;
  const void* x;
  int x_type;
  Scratch<float> wide_y, wide_bias;
  Scratch<uint16_t> rounded_x;

  explicit Product(const LinearArg& a) : Product(a, prepared(a.w)) {}
  Product(const LinearArg& a, const PackedWeight& weight)
      : arg(a),
        w(weight),
        type(a.type),
        batch(a.batch),
        x(a.x),
        x_type(a.type),
        wide_y(type == kFloat32 ? 0 : batch * w.n),
        wide_bias(a.bias ? w.n : 0),
        rounded_x(0) {
    if (a.bias) loops.load(a.bias, w.n, type, wide_bias.get());
  }
  const float* bias() const { return arg.bias ? wide_bias.get() : nullptr; }
  float* out() const { return type == kFloat32 ? static_cast<float*>(arg.y) : wide_y.get(); }
  // Input `i` as float32: in its own place, or in `wide`.
  const float* input(int64_t i, float* wide) const {
    const char* from = static_cast<const char*>(x) + i * w.cols * type_size(x_type);
    if (x_type == kFloat32) return reinterpret_cast<const float*>(from);
    loops.load(from, w.cols, x_type, wide);
    return wide;
  }
  // From now on the inputs are their roundings to bfloat16.
  void round_inputs() {
    if (x_type == kBFloat16) return;
    Scratch<uint16_t> rounded(batch * w.cols);
    for_rows(batch, 1, w.cols, [&](int64_t begin, int64_t end) {
      Scratch<float> wide(x_type == kFloat32 ? 0 : w.cols + kPadding);
      for (int64_t i = begin; i < end; ++i)
        loops.store(input(i, wide.get()), w.cols, rounded.get() + i * w.cols, kBFloat16);
    });
    rounded_x = std::move(rounded);
    x = rounded_x.get();
    x_type = kBFloat16;
  }
  // f(token, its input as float32)
  template <class F>
  void for_inputs(const F& f) const {
    for_rows(batch, 1, 4 * w.cols, [&](int64_t begin, int64_t end) {
      Scratch<float> wide(x_type == kFloat32 ? 0 : w.cols + kPadding);
      for (int64_t i = begin; i < end; ++i) f(i, input(i, wide.get()));
    });
  }
  void finish() const {  // y in its own type
    if (type == kFloat32) return;
    char* to = static_cast<char*>(arg.y);
    for_rows(batch, 1, w.n, [&](int64_t begin, int64_t end) {
      loops.store(wide_y.get() + begin * w.n, (end - begin) * w.n, to + begin * w.n * type_size(type), type);
    });
  }
};

// Inputs from which on panels of float32 are faster: trits have tables, or are read digit by digit.
int64_t panel_inputs(const PackedWeight& w) {
  if (w.bits != kTrits) return tuning.panel_inputs;
  return w.n < tuning.trit_table_rows ? 1 : tuning.table_inputs + 1;
}

// The largest magnitude of inputs whose sums with levels float32 surely holds.
float largest_input(const PackedWeight& w) {
  double top = std::max(std::fabs(w.lo), std::fabs(w.hi));
  if (w.grid.kind == kCodebook)
    for (int k = 0; k < w.n_levels; ++k) top = std::max<double>(top, std::fabs(w.grid.levels[k]));
  return (float)(FLT_MAX / 2 / std::max(top * (double)w.cols, 1.));
}

// Sums of inputs times levels are scaled last and may overflow where y does not. `see` marks the inputs that are large
// enough for that, in a pass over what is in the cache anyway; `mend` makes those of their outputs again that are not
// finite, from s c, in double.
class Overflows {
 public:
  explicit Overflows(const Product& p) : p_(p), large_(p.batch), limit_(largest_input(p.w)) {}
  void see(int64_t token, const float* in) {
    int large = 0;
    for (int64_t c = 0; c < p_.w.cols; ++c) large |= !(std::fabs(in[c]) <= limit_);
    large_[token] = (char)large;
  }
  void mend() const {
    for (int64_t i = 0; i < p_.batch; ++i)
      if (large_[i]) mend(i);
  }

 private:
  void mend(int64_t token) const {
    const PackedWeight& w = p_.w;
    Scratch<float> wide(w.cols + kPadding);
    const float *in = p_.input(token, wide.get()), *bias = p_.bias();
    if (!std::all_of(in, in + w.cols, [](float v) { return std::isfinite(v); })) return;
    float* y = p_.out() + token * w.n;
    for_decoded(w, 0, w.n, [&](int64_t r, const float* row) {
      if (std::isfinite(y[r])) return;
      double sum = 0;
      for (int64_t c = 0; c < w.cols; ++c) sum += (double)in[c] * row[c];
      y[r] = (float)sum + (bias ? bias[r] : 0.f);
    });
  }

  const Product& p_;
  std::vector<char> large_;
  float limit_;
};

// A float32 tensor over memory that outlives it.
Tensor matrix(const float* data, int64_t rows, int64_t cols, bool transposed) {
  const int64_t shape[2] = {transposed ? cols : rows, transposed ? rows : cols};
  const int64_t strides[2] = {transposed ? 1 : cols, transposed ? cols : 1};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(const_cast<float*>(data), {shape, 2}, {strides, 2}, cpu, ScalarType::Float);
}

// Panels of rows are decoded and multiplied by torch's own product while they are in the cache: by the CPU's kernel of
// it, not through the dispatcher, where autocast would have it made in another type.
void multiply_panels(const Product& p) {
  const PackedWeight& w = p.w;
  const int64_t rows = std::min(w.n, std::max<int64_t>(1, kPanel / std::max<int64_t>(w.cols, 1)));
  const bool as_it_is = p.x_type == kFloat32;
  Scratch<float> wide(as_it_is ? 0 : p.batch * w.cols), product(p.batch * rows);
  if (!as_it_is) p.loops.load(p.x, p.batch * w.cols, p.x_type, wide.get());
  const float* in = as_it_is ? static_cast<const float*>(p.x) : wide.get();
  const Tensor inputs = matrix(in, p.batch, w.cols, false);
  const Tensor panel = OnCpu::empty(inputs, {rows, w.cols});
  float* decoded = static_cast<float*>(panel.data_ptr());
  for (int64_t first = 0; first < w.n; first += rows) {
    const int64_t count = std::min(rows, w.n - first);
    for_decoded(w, first, count,
                [&](int64_t r, const float* row) { std::memcpy(decoded + r * w.cols, row, w.cols * sizeof(float)); });
    const Tensor out = matrix(product.get(), p.batch, count, false);
    const Tensor part = matrix(decoded, count, w.cols, true);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), inputs.get(), part.get()));
    const float *from = product.get(), *bias = p.bias();
    float* to = p.out();
    for_rows(p.batch, 1, count, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t r = 0; r < count; ++r)
          to[b * w.n + first + r] = from[b * count + r] + (bias ? bias[first + r] : 0.f);
    });
  }
}

// Codes of few inputs, read as they stand.
void multiply_codes(const Product& p) {
  const PackedLoops& l = p.loops;
  const PackedWeight& w = p.w;
  Overflows overflows(p);
  const int64_t rows = w.bits == 1 ? 0 : w.bits == kTrits ? tuning.trit_table_rows : tuning.table_rows;
  const bool few =
      l.make_tables && p.batch <= (w.bits == 1 ? tuning.bit_table_inputs : tuning.table_inputs) && w.n >= rows;
  if (const int64_t wide = few ? l.tables_width(w) : 0) {
    Scratch<float> tables(p.batch * wide);
    p.for_inputs([&](int64_t i, const float* in) {
      overflows.see(i, in);
      l.make_tables(w, in, tables.get() + i * wide);
    });
    for_rows(w.n, 64, w.cols * p.batch, [&](int64_t begin, int64_t end) {
      l.multiply_tables(w, begin, end, tables.get(), p.batch, p.bias(), p.out());
    });
  } else {
    const int64_t width = l.width(w);
    Scratch<float> inputs(p.batch * width);
    p.for_inputs([&](int64_t i, const float* in) {
      overflows.see(i, in);
      l.arrange(w, in, inputs.get() + i * width);
    });
    for_rows(w.n, 4, w.cols * p.batch, [&](int64_t begin, int64_t end) {
      Scratch<char> scratch(l.scratch(w));
      l.multiply(w, begin, end, inputs.get(), p.batch, p.bias(), p.out(), scratch.get());
    });
  }
  overflows.mend();
}

// Many inputs by panels of rows, in float32 or, `pairs`, bfloat16; y is made in its own type. False, and nothing done:
// there are no such kernels, or inputs are so large that sums of levels may overflow where y does not, or, in pairs, so
// small that products vanish.
bool multiply_in_panels(const Product& p, bool pairs) {
  const PanelLoops* l = panel_loops(pairs);
  const PackedWeight& w = p.w;
  if (!l || !l->serves(w)) return false;
  const bool few = p.batch <= kFewInputs;
  const int64_t together = few ? l->few_rows : l->rows, bands = (w.n + together - 1) / together;
  const int64_t passes = few ? 1 : pass_count(p.batch, std::max<int64_t>(bands, 1), kPanelUnits);
  const auto pass_begin = [&](int64_t i) { return p.batch * i / passes; };
  struct Block {
    int64_t first, count;
  };
  std::vector<Block> blocks;
  for (int64_t i = 0; i < passes; ++i) {
    const int64_t inputs = pass_begin(i + 1) - pass_begin(i);
    for (int64_t b = 0, t = pass_begin(i); t < pass_begin(i + 1); t += blocks.back().count, ++b)
      blocks.push_back({t, few ? inputs : block_inputs(inputs, b)});
  }
  const int64_t steps = l->steps(w);
  const KeptMemory arranged(std::max(p.batch, kFewInputs) * steps * (int64_t)sizeof(uint32_t));
  uint32_t* const x = static_cast<uint32_t*>(arranged.get());
  std::vector<float> peaks(p.batch);
  for_rows(blocks.size(), 1, kPanelInputs * 4 * w.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [first, count] = blocks[i];
      l->arrange(w, static_cast<const char*>(p.x) + first * w.cols * type_size(p.x_type), p.x_type, count,
                 block_width(p.batch, count), x + first * steps, peaks.data() + first);
    }
  });
  const float most = largest_input(w);
  for (float peak : peaks)
    if (!(peak <= most) || (pairs && peak && peak < kSmallestInPairs)) return false;
  const int64_t inputs = (p.batch + passes - 1) / passes;
  for_rows(passes * bands, 1, together * w.cols * inputs, [&](int64_t begin, int64_t end) {
    Scratch<char> scratch(l->scratch(w, p.batch, inputs));
    for (int64_t unit = begin, until; unit < end; unit = until) {
      const int64_t pass = unit / bands, first = pass_begin(pass);
      until = std::min(end, (pass + 1) * bands);
      (few ? l->multiply_few : l->multiply)(w, unit % bands * together,
                                            std::min((until - pass * bands) * together, w.n), x + first * steps, first,
                                            pass_begin(pass + 1) - first, p.bias(), p.arg.y, p.type, scratch.get());
    }
  });
  return true;
}

void multiply_int8(const Product& p) {
  const PackedLoops& l = p.loops;
  const PackedWeight& w = p.w;
  const int64_t width = l.int8_width(w), groups = padded_groups(w);
  Scratch<int8_t> q(p.batch * width);
  Scratch<float> scales(p.batch), sums(p.batch * groups);
  p.for_inputs([&](int64_t i, const float* in) {
    Scratch<int8_t> plain(width);
    l.quantize(w, in, q.get() + i * width, scales.get() + i, sums.get() + i * groups, plain.get());
  });
  const Int8Input input{q.get(), scales.get(), sums.get()};
  for_rows(w.n, 4, w.cols * p.batch, [&](int64_t begin, int64_t end) {
    Scratch<char> scratch(l.int8_scratch(w));
    for (int64_t t = 0; t < p.batch; t += kTokens)
      l.multiply_int8(w, begin, end, input, t, std::min(t + kTokens, p.batch), p.bias(), p.out(), scratch.get());
  });
}

// Inputs in blocks of tokens, for products with a weight in bands.
struct BlockedInputs {
  const Product& p;
  const BandsArg& w;
  Scratch<int8_t> q;
  Scratch<float> scales;
  Scratch<int32_t> offsets;
  const bool past_caches;
  BlockedInputs(const Product& p, const BandsArg& w, int64_t count)
      : p(p),
        w(w),
        q(count * band_width(w)),
        scales(count),
        offsets(count * w.groups),
        past_caches(goes_past_caches(p.out(), p.batch, w.n)) {}

  // Tokens [begin, end), of which `first` is the first here; whole blocks, but for the last ones.
  void quantize(int64_t begin, int64_t end, int64_t first, const RowRoom& room) const {
    const PackedLoops& l = p.loops;
    const float* rows[kMostPatches];
    for (int64_t t = begin, count; t < end; t += count) {
      count = l.band_tokens(end - t);
      for (int64_t i = 0; i < count; ++i) rows[i] = p.input(t + i, room.wide.get() + i * w.cols);
      l.quantize_rows(w, rows, count, q.get() + (t - first) * band_width(w), scales.get() + t - first,
                      offsets.get() + (t - first) * w.groups, room.bytes.get());
    }
  }
  // Products of these tokens with bands [band0, band1), into y (tokens, n).
  void multiply(int64_t band0, int64_t band1, int64_t tokens, float* y) const {
    const BandInput input{q.get(), scales.get(), offsets.get(), past_caches};
    for (int64_t t = 0; t < tokens; t += kTokens)
      p.loops.multiply_bands(w, band0, band1, input, t, std::min(t + kTokens, tokens), p.bias(), y);
  }
};

// Inputs are shared out, not bands, where each thread has some blocks of them and the codes stay in its L2 cache; they
// are then rounded and multiplied a block together: the fewer, the nearer to each other are the lines that are written.
void multiply_bands(const Product& p, const BandsArg& w) {
  const int64_t bands = (w.n + kBandRows - 1) / kBandRows;
  const int64_t bytes = bands * w.groups * w.blocks * band_words(w.bits) * kBandRows * 4;
  const int64_t enough = tuning.shared_blocks * kMostPatches * torch::stable::get_num_threads();
  if (bytes <= tuning.shared_bytes && p.batch >= enough) {
    for_rows(p.batch, kMostPatches, w.n * w.cols, [&](int64_t begin, int64_t end) {
      const BlockedInputs inputs(p, w, kMostPatches);
      const RowRoom room(w.cols, p.x_type);
      for (int64_t t = begin; t < end; t += kMostPatches) {
        const int64_t count = std::min<int64_t>(kMostPatches, end - t);
        inputs.quantize(t, t + count, t, room);
        inputs.multiply(0, bands, count, p.out() + t * w.n);
      }
      if (inputs.past_caches) finish_stores();
    });
    return;
  }
  const BlockedInputs inputs(p, w, p.batch);
  for_rows(p.batch, kMostPatches, 4 * w.cols,
           [&](int64_t begin, int64_t end) { inputs.quantize(begin, end, 0, RowRoom(w.cols, p.x_type)); });
  for_rows(bands, 1, kBandRows * w.cols * p.batch, [&](int64_t begin, int64_t end) {
    inputs.multiply(begin, end, p.batch, p.out());
    if (inputs.past_caches) finish_stores();
  });
}

// Four columns of a block's row, one byte each, and the bits of them that stand in one plane of words.
struct Plane {
  int bits, first, at;  // its width, its first word in a block, its lowest bit in a code
};

// f(plane) over those that the codes are cut into.
template <class F>
void for_planes(int bits, const F& f) {
  for (int width = 8, first = 0, at = 0; width; width /= 2)
    if (bits & width) {
      f(Plane{width, first, at});
      first += band_vectors(bits) * width / 8;
      at += width;
    }
}

// A row's block as `words`, kBandRows words apart: codes of 4 columns in each of the block's vectors.
void pack_block(int bits, const uint8_t* codes, uint32_t* words) {
  uint32_t four[8];
  const int vectors = band_vectors(bits);
  std::memcpy(four, codes, 4 * vectors);
  for (int i = 0; i < band_words(bits); ++i) words[i * kBandRows] = 0;
  if (bits == kTrits) {
    for (int i = 0; i < 4; ++i) {
      uint32_t v = 0;
      for (int d = 0; d < kTritsInByte; ++d) v = 3 * v + codes[4 * d + i];
      words[0] |= (256 * v + kTopTrits) / (kTopTrits + 1) << 8 * i;
    }
    return;
  }
  for_planes(bits, [&](Plane p) {
    const uint32_t mask = 0x01010101u * ((1u << p.bits) - 1);
    for (int v = 0; v < vectors; ++v)
      words[(p.first + v * p.bits / 8) * kBandRows] |= (four[v] >> p.at & mask) << v * p.bits % 8;
  });
}

void unpack_block(int bits, const uint32_t* words, uint8_t* codes) {
  uint32_t four[8] = {};
  const int vectors = band_vectors(bits);
  if (bits == kTrits) {
    for (int i = 0; i < 4; ++i) {
      const uint8_t* digits = trits().digits[(words[0] >> 8 * i & 255) * (kTopTrits + 1) >> 8];
      for (int d = 0; d < kTritsInByte; ++d) codes[4 * d + i] = digits[kTritsInByte - 1 - d];
    }
    return;
  }
  for_planes(bits, [&](Plane p) {
    const uint32_t mask = 0x01010101u * ((1u << p.bits) - 1);
    for (int v = 0; v < vectors; ++v)
      four[v] |= (words[(p.first + v * p.bits / 8) * kBandRows] >> v * p.bits % 8 & mask) << p.at;
  });
  std::memcpy(codes, four, 4 * vectors);
}

// Codes, a byte each, as a row of the file's layout; `codes` is padded with zeros.
void pack_row(int bits, const uint8_t* codes, int64_t cols, uint8_t* out) {
  if (bits == 8) {
    std::memcpy(out, codes, cols);
  } else if (bits == kTrits) {
    for (int64_t c = 0; c < cols; c += kTritsInByte, codes += kTritsInByte)
      *out++ = (uint8_t)(codes[0] + 3 * codes[1] + 9 * codes[2] + 27 * codes[3] + 81 * codes[4]);
  } else {
    for (int64_t c = 0, left = row_bytes(cols, bits); left > 0; c += 8, left -= bits, out += bits) {
      uint64_t eight, word = 0;
      std::memcpy(&eight, codes + c, 8);
      for (int i = 0; i < 8; ++i) word |= (eight >> 8 * i & 255) << bits * i;
      std::memcpy(out, &word, std::min<int64_t>(left, bits));
    }
  }
}

// f(first row, row begin, end) of the rows of each band, by threads.
template <class F>
void for_bands(const BandsArg& w, const F& f) {
  for_rows((w.n + kBandRows - 1) / kBandRows, 1, kBandRows * w.cols, f);
}

struct Device : OnCpu {
  static constexpr bool kTiles = false;  // their layout is a GPU's
  static constexpr bool kRounded = true;
  using OnCpu::OnCpu;
  void dequantize(const PackedArg& arg, void* out, int type) const {
    const PackedWeight w = prepared(arg);
    for_rows(w.n, 1, w.cols, [&](int64_t begin, int64_t end) {
      Scratch<float> floats(w.cols + kPadding);
      Scratch<uint8_t> bytes(w.cols + kPadding);
      char* to = static_cast<char*>(out) + begin * w.cols * type_size(type);
      for (int64_t r = begin; r < end; ++r, to += w.cols * type_size(type))
        packed_loops().decode_as(w, r, type, to, floats.get(), bytes.get());
    });
  }
  void linear(const LinearArg& a) const {
    const Product p(a);
    multiply(p, p.x_type == kBFloat16 && panel_loops(true));
  }
  void linear_bf16(const LinearArg& a) const {
    Product p(a);
    if (panel_loops(true) && p.batch >= tuning.pair_inputs && multiply_in_panels(p, true)) return;
    p.round_inputs();
    multiply(p, false);
  }
  static void multiply(const Product& p, bool pairs) {
    if (pairs && p.batch >= tuning.pair_inputs && multiply_in_panels(p, true)) return;
    if (p.batch >= panel_inputs(p.w) && multiply_in_panels(p, false)) return;
    if (p.batch >= tuning.library_inputs)
      multiply_panels(p);
    else
      multiply_codes(p);
    p.finish();
  }
  void to_bands(const uint8_t* codes, const BandsArg& w, int levels, uint8_t* out) const {
    const int64_t length = w.cols / w.groups, block = 4 * band_vectors(w.bits), words = band_words(w.bits);
    const int64_t row_size = row_bytes(w.cols, w.bits);
    PackedWeight from{};
    from.codes = codes;
    from.bits = w.bits;
    from.cols = w.cols;
    from.row_bytes = row_size;
    from.digits = trits().digits[0];
    for_bands(w, [&](int64_t begin, int64_t end) {
      Scratch<uint8_t> plain(w.cols + kPadding), padded(w.blocks * block);
      for (int64_t row = begin * kBandRows; row < end * kBandRows; ++row) {
        if (row < w.n) packed_loops().unpack(from, row, plain.get());
        uint32_t* to = reinterpret_cast<uint32_t*>(out) + row / kBandRows * w.groups * w.blocks * words * kBandRows +
                       row % kBandRows;
        for (int64_t g = 0; g < w.groups; ++g) {
          std::memset(padded.get(), 0, w.blocks * block);
          for (int64_t c = 0; row < w.n && c < length; ++c)
            padded.get()[c] = std::min<uint8_t>(plain.get()[g * length + c], levels - 1);
          for (int64_t b = 0; b < w.blocks; ++b, to += words * kBandRows)
            pack_block(w.bits, padded.get() + b * block, to);
        }
      }
    });
  }
  void from_bands(const BandsArg& w, uint8_t* out) const {
    const int64_t length = w.cols / w.groups, block = 4 * band_vectors(w.bits), words = band_words(w.bits);
    const int64_t row_size = row_bytes(w.cols, w.bits);
    for_bands(w, [&](int64_t begin, int64_t end) {
      Scratch<uint8_t> plain(w.cols + kPadding), padded(w.blocks * block);
      std::memset(plain.get() + w.cols, 0, kPadding);
      for (int64_t row = begin * kBandRows; row < std::min(end * kBandRows, w.n); ++row) {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(w.codes) +
                               row / kBandRows * w.groups * w.blocks * words * kBandRows + row % kBandRows;
        for (int64_t g = 0; g < w.groups; ++g) {
          for (int64_t b = 0; b < w.blocks; ++b, from += words * kBandRows)
            unpack_block(w.bits, from, padded.get() + b * block);
          std::memcpy(plain.get() + g * length, padded.get(), length);
        }
        pack_row(w.bits, plain.get(), w.cols, out + row * row_size);
      }
    });
  }
  void bands_linear(const LinearArg& a, const BandsArg& w) const {
    PackedWeight size{};
    size.n = w.n;
    size.cols = w.cols;
    const Product p(a, size);
    multiply_bands(p, w);
    p.finish();
  }
  void bands_conv(const ConvArg& a, const BandsArg& w) const { convolve_bands(a, w); }
  void depthwise(const ConvArg& a, const float* taps) const { convolve_depthwise(a, taps); }
  void linear_int8(const LinearArg& a) const {
    const Product p(a);
    multiply_int8(p);
    p.finish();
  }
};

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) { askew::PackedOps<askew::Device>::implement(m); }
