// Packed weights on the CPU: checks, the choice of the kernel and work division. Threads share the rows of the weight,
// so their number changes no result.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <vector>

#include "../checks.h"
#include "loops.h"
#include "packed.h"
#include "output_pool.h"

namespace askew {
namespace {

constexpr int64_t kPiece = 1 << 16;   // weights times inputs that are worth a thread
constexpr int64_t kTokens = 128;      // int8 inputs that stay in the L2 cache while all rows pass
constexpr int64_t kManyTokens = 96;   // from here on the library's float32 product of decoded panels is faster
constexpr int64_t kPanel = 1 << 22;   // weights of a panel: 16 MiB decoded
constexpr int64_t kTableTokens = 12;  // for one bit; for two bits a third of them: beyond, products are faster

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
bool has_vnni() { return __builtin_cpu_supports("avx512vnni"); }
#else
bool has_vnni() { return false; }
#endif

const PackedLoops& packed_loops() {
  const char* name = loops().name;
  if (!std::strcmp(name, "avx512"))
    return has_vnni() && packed_avx512_vnni() ? *packed_avx512_vnni() : *packed_avx512();
  if (!std::strcmp(name, "avx2")) return *packed_avx2();
  return *packed_baseline();
}

// Uninitialised memory, aligned to cache lines.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(std::aligned_alloc(64, rounded_up(count * sizeof(T) + 64, 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return static_cast<T*>(data_); }

 private:
  void* data_;
};

// The five codes of each byte, as bytes and in one word.
struct Trits {
  uint8_t digits[256][8] = {};
  uint32_t words[256] = {};
  Trits() {
    for (int byte = 0; byte < 256; ++byte)
      for (int d = 0, rest = std::min(byte, 242); d < 5; ++d, rest /= 3) {
        digits[byte][d] = (uint8_t)(rest % 3);
        words[byte] |= (uint32_t)(rest % 3) << 4 * d;
      }
  }
};

const Trits& trits() {
  static const Trits table;
  return table;
}

PackedWeight as_weight(const Tensor& codes, const Tensor& scale, const Tensor& levels, const std::vector<int64_t>& grid,
                       int64_t bits, int64_t cols) {
  STD_TORCH_CHECK(codes.is_cpu(), "codes: expected on the CPU");
  PackedWeight w{};
  static_cast<PackedArg&>(w) = packed_arg(codes, scale, levels, grid, bits, cols);
  w.digits = trits().digits[0];
  w.words = trits().words;
  w.lo = w.grid.lo;
  w.hi = w.grid.hi;
  w.step = w.grid.kind == kBinary ? 2 : 1;
  if (bits <= 4)
    for (int i = 0; i < 16; ++i) {
      const int k = std::min(bits ? i & ((1 << bits) - 1) : i, w.n_levels - 1);
      w.table[i] = w.grid.kind == kCodebook ? w.grid.levels[k] : w.lo + w.step * (float)k;
    }
  return w;
}

// f(begin, end) on rows [0, n) in whole bands, in as many threads as the work is worth.
template <class F>
void for_rows(int64_t n, int64_t band, int64_t work_of_row, const F& f) {
  const int64_t bands = (n + band - 1) / band;
  const int64_t grain = std::max<int64_t>(1, kPiece / std::max<int64_t>(work_of_row * band, 1));
  const auto rows = [&](int64_t begin, int64_t end) { f(begin * band, std::min(end * band, n)); };
  if (bands <= grain)
    rows(0, bands);
  else
    torch::stable::parallel_for(0, bands, grain, rows);
}

void dequantize(Tensor codes, Tensor scale, Tensor levels, std::vector<int64_t> grid, int64_t bits, Tensor out) {
  check_dense(out, "out");
  STD_TORCH_CHECK(out.is_cpu() && out.dim() == 2 && out.size(0) == codes.size(0),
                  "out: expected shape (n, cols) on the CPU");
  const int type = storage_type(out, "out");
  const PackedWeight w = as_weight(codes, scale, levels, grid, bits, out.size(1));
  const PackedLoops& l = packed_loops();
  char* to = static_cast<char*>(out.data_ptr());
  const int64_t bytes = w.cols * (type == kFloat32 ? 4 : 2);
  for_rows(w.n, 1, w.cols, [&](int64_t begin, int64_t end) {
    Scratch<float> row(w.cols + kPadding);
    Scratch<uint8_t> digits(w.cols + kPadding);
    for (int64_t r = begin; r < end; ++r) {
      l.decode(w, r, type, row.get(), digits.get());
      l.store(row.get(), w.cols, to + r * bytes, type);
    }
  });
}

// What every product has: x as float32, y as float32 (the result itself where that is its type), a float32 bias.
struct Product {
  const PackedLoops& loops;
  PackedWeight w;
  int type;
  int64_t batch;
  Tensor x, y;
  std::optional<Tensor> bias;
  Scratch<float> wide_y, wide_bias;

  Product(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& levels,
          const std::vector<int64_t>& grid, int64_t bits, const std::optional<Tensor>& b)
      : loops(packed_loops()),
        w(as_weight(codes, scale, levels, grid, bits, (check(x, "x"), x.size(1)))),
        type(storage_type(x, "x")),
        batch(x.size(0)),
        x(x.is_contiguous() ? x : torch::stable::contiguous(x)),  // exported programs lose calls that did nothing
        y(output(x, w.n)),
        bias(b),
        wide_y(type == kFloat32 ? 0 : batch * w.n),
        wide_bias(b ? w.n : 0) {
    if (!bias) return;
    check_dense(*bias, "bias");
    STD_TORCH_CHECK(bias->is_cpu() && bias->numel() == w.n && storage_type(*bias, "bias") == type, "bias: expected ",
                    w.n, " elements in the type of x");
    loops.load(bias->data_ptr(), w.n, type, wide_bias.get());
  }
  static void check(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2, name, ": expected shape (batch, cols) on the CPU");
  }
  static Tensor output(const Tensor& x, int64_t n) {
    const int64_t shape[2] = {x.size(0), n};
    return torch::stable::new_empty(x, {shape, 2});
  }
  const float* bias_data() const { return bias ? wide_bias.get() : nullptr; }
  float* out() const { return type == kFloat32 ? static_cast<float*>(y.data_ptr()) : wide_y.get(); }
  // Input `i` as float32: in its own place, or in `wide`.
  const float* input(int64_t i, float* wide) const {
    const char* from = static_cast<const char*>(x.data_ptr()) + i * w.cols * (type == kFloat32 ? 4 : 2);
    if (type == kFloat32) return reinterpret_cast<const float*>(from);
    loops.load(from, w.cols, type, wide);
    return wide;
  }
  // f(token, its input as float32)
  template <class F>
  void for_inputs(const F& f) const {
    for_rows(batch, 1, 4 * w.cols, [&](int64_t begin, int64_t end) {
      Scratch<float> wide(type == kFloat32 ? 0 : w.cols + kPadding);
      for (int64_t i = begin; i < end; ++i) f(i, input(i, wide.get()));
    });
  }
  Tensor result() const {
    if (type != kFloat32) {
      char* to = static_cast<char*>(y.data_ptr());
      for_rows(batch, 1, w.n, [&](int64_t begin, int64_t end) {
        loops.store(wide_y.get() + begin * w.n, (end - begin) * w.n, to + begin * w.n * 2, type);
      });
    }
    return y;
  }
};

// Sums of inputs times levels are scaled last and may overflow where y does not. `see` marks the inputs that are large
// enough for that, in a pass over what is in the cache anyway; `mend` makes those of their outputs again that are not
// finite, from s c, in double.
class Overflows {
 public:
  explicit Overflows(const Product& p) : p_(p), large_(p.batch) {
    const GridArg& g = p.w.grid;
    double top = std::max(std::fabs(p.w.lo), std::fabs(p.w.hi));
    if (g.kind == kCodebook)
      for (int k = 0; k < p.w.n_levels; ++k) top = std::max<double>(top, std::fabs(g.levels[k]));
    limit_ = (float)(FLT_MAX / 2 / std::max(top * (double)p.w.cols, 1.));
  }
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
    const float *in = p_.input(token, wide.get()), *bias = p_.bias_data();
    if (!std::all_of(in, in + w.cols, [](float v) { return std::isfinite(v); })) return;
    float* y = p_.out() + token * w.n;
    for_rows(w.n, 1, w.cols, [&](int64_t begin, int64_t end) {
      Scratch<float> row(w.cols + kPadding);
      Scratch<uint8_t> bytes(w.cols + kPadding);
      for (int64_t r = begin; r < end; ++r) {
        if (std::isfinite(y[r])) continue;
        p_.loops.decode(w, r, kFloat32, row.get(), bytes.get());
        double sum = 0;
        for (int64_t c = 0; c < w.cols; ++c) sum += (double)in[c] * row.get()[c];
        y[r] = (float)sum + (bias ? bias[r] : 0.f);
      }
    });
  }

  const Product& p_;
  std::vector<char> large_;
  float limit_;
};

// A float32 tensor over memory that outlives it; nothing is recorded of it, whatever was of the memory's own tensor.
Tensor matrix(const float* data, int64_t rows, int64_t cols, bool transposed, const Tensor& like) {
  const int64_t shape[2] = {transposed ? cols : rows, transposed ? rows : cols};
  const int64_t strides[2] = {transposed ? 1 : cols, transposed ? cols : 1};
  return torch::stable::from_blob(const_cast<float*>(data), {shape, 2}, {strides, 2}, like.device(), ScalarType::Float);
}

// Panels of rows are decoded and multiplied by torch's own product while they are in the cache: by the CPU's kernel of
// it, not through the dispatcher, where autocast would have it made in another type.
void multiply_panels(const Product& p) {
  const PackedLoops& l = p.loops;
  const PackedWeight& w = p.w;
  const int64_t rows = std::min(w.n, std::max<int64_t>(1, kPanel / std::max<int64_t>(w.cols, 1)));
  Scratch<float> wide(p.type == kFloat32 ? 0 : p.batch * w.cols), product(p.batch * rows);
  if (p.type != kFloat32) l.load(p.x.data_ptr(), p.batch * w.cols, p.type, wide.get());
  const float* in = p.type == kFloat32 ? static_cast<const float*>(p.x.data_ptr()) : wide.get();
  const Tensor inputs = matrix(in, p.batch, w.cols, false, p.x);
  const int64_t shape[2] = {rows, w.cols};
  const Tensor panel = pooled_empty_like(torch::stable::new_empty(inputs, {shape, 2}));
  float* decoded = static_cast<float*>(panel.data_ptr());
  for (int64_t first = 0; first < w.n; first += rows) {
    const int64_t count = std::min(rows, w.n - first);
    for_rows(count, 1, w.cols, [&](int64_t begin, int64_t end) {
      Scratch<float> row(w.cols + kPadding);
      Scratch<uint8_t> bytes(w.cols + kPadding);
      for (int64_t r = begin; r < end; ++r) {
        l.decode(w, first + r, kFloat32, row.get(), bytes.get());
        std::memcpy(decoded + r * w.cols, row.get(), w.cols * sizeof(float));
      }
    });
    const Tensor out = matrix(product.get(), p.batch, count, false, p.x);
    const Tensor part = matrix(decoded, count, w.cols, true, p.x);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), inputs.get(), part.get()));
    const float *from = product.get(), *bias = p.bias_data();
    float* to = p.out();
    for_rows(p.batch, 1, count, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t r = 0; r < count; ++r)
          to[b * w.n + first + r] = from[b * count + r] + (bias ? bias[first + r] : 0.f);
    });
  }
}

Tensor linear(Tensor x, Tensor codes, Tensor scale, Tensor levels, std::vector<int64_t> grid, int64_t bits,
              std::optional<Tensor> bias) {
  const Product p(x, codes, scale, levels, grid, bits, bias);
  const PackedLoops& l = p.loops;
  const PackedWeight& w = p.w;
  if (!p.batch || !w.n) return p.y;
  if (p.batch >= kManyTokens) {
    multiply_panels(p);
    return p.result();
  }
  Overflows overflows(p);
  const bool few = l.make_tables && p.batch * w.bits <= (w.bits == 1 ? kTableTokens : kTableTokens * 2 / 3);
  if (const int64_t wide = few ? l.tables_width(w) : 0) {
    Scratch<float> tables(p.batch * wide);
    p.for_inputs([&](int64_t i, const float* in) {
      overflows.see(i, in);
      l.make_tables(w, in, tables.get() + i * wide);
    });
    for_rows(w.n, 64, w.cols * p.batch, [&](int64_t begin, int64_t end) {
      l.multiply_tables(w, begin, end, tables.get(), p.batch, p.bias_data(), p.out());
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
      l.multiply(w, begin, end, inputs.get(), p.batch, p.bias_data(), p.out(), scratch.get());
    });
  }
  overflows.mend();
  return p.result();
}

Tensor linear_int8(Tensor x, Tensor codes, Tensor scale, Tensor levels, std::vector<int64_t> grid, int64_t bits,
                   std::optional<Tensor> bias) {
  STD_TORCH_CHECK(grid.size() == 3 && grid[0] != kCodebook, "grid: int8 activations need integer levels");
  const Product p(x, codes, scale, levels, grid, bits, bias);
  const PackedLoops& l = p.loops;
  const PackedWeight& w = p.w;
  STD_TORCH_CHECK(w.cols * 127 * (w.n_levels - 1) < INT32_MAX, "x: ", w.cols, " columns may overflow int32");
  if (!p.batch || !w.n) return p.y;
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
      l.multiply_int8(w, begin, end, input, t, std::min(t + kTokens, p.batch), p.bias_data(), p.out(), scratch.get());
  });
  return p.result();
}

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) {
  m.impl("packed_dequantize_", TORCH_BOX(&askew::dequantize));
  m.impl("packed_linear", TORCH_BOX(&askew::linear));
  m.impl("packed_linear_int8", TORCH_BOX(&askew::linear_int8));
}
