// Products of levels of a byte on the CPU, and gradients rounded stochastically. Integer sums are exact, and what is
// random follows from an element's place: the number of threads changes no result.
#include "../ops/lowbit.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "run.h"

namespace askew {
namespace {

constexpr int64_t kProductBlock = 192;    // rows of the input that meet a panel in one task
constexpr int64_t kSerialWork = 1 << 18;  // products that are not worth waking threads for
constexpr int64_t kElements = 1 << 15;    // of the elementwise passes, in one task

template <class T>
struct Room : std::unique_ptr<T, void (*)(void*)> {  // uninitialised, aligned to cache lines
  explicit Room(int64_t count)
      : Room::unique_ptr((T*)std::aligned_alloc(64, rounded_up(count * sizeof(T) + 64, 64)), std::free) {
    if (!this->get()) throw std::bad_alloc();
  }
};

// f(begin, end) on [0, n), `each` at a time, by threads where there is more than that.
template <class F>
void in_parts(int64_t n, int64_t each, const F& f) {
  each = std::max<int64_t>(each, 1);
  const int64_t parts = (n + each - 1) / each;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * each, std::min((i + 1) * each, n));
  };
  if (parts <= 1)
    run(0, parts);
  else
    torch::stable::parallel_for(0, parts, 1, run);
}
template <class F>
void over_rows(Matrix m, const F& f) {
  in_parts(m.rows, kElements / std::max<int64_t>(m.cols, 1), f);
}

struct WideBias : Room<float> {  // as float32; null where there is none
  const float* data;
  WideBias(const void* bias, int type, int64_t n) : Room<float>(bias ? rounded_up(n, kPadding) : 0), data(nullptr) {
    if (!bias) return;
    packed_loops().load(bias, n, type, get());
    data = get();
  }
};

struct LowbitOnCpu : OnCpu {
  using OnCpu::OnCpu;
  void run(const TokenArg& a) const {
    over_rows(a.m, [&](int64_t begin, int64_t end) { loops().token_levels(a, begin, end); });
  }
  void run(const SumsArg& a) const {
    const WideBias bias(a.bias, a.bias_type, a.m.cols);
    over_rows(a.m, [&](int64_t begin, int64_t end) { loops().scaled_sums(a, bias.data, begin, end); });
  }
  void run(const LevelsArg& a) const {
    const PackedLoops& l = packed_loops();
    if (a.rows == 0 || a.n == 0) return;
    const WideBias bias(a.bias, a.bias_type, a.n);
    const int64_t stride = rounded_up(a.cols, 4), padded = rounded_up(a.n, l.outputs) + kPadding;
    Room<float> scale(padded);
    for (int64_t i = 0; i < padded; ++i) scale.get()[i] = a.scale[a.each && i < a.n ? i : 0];
    Room<int8_t> q(stride == a.cols ? 0 : a.rows * stride);
    Room<int32_t> sums(a.rows);
    in_parts(a.rows, kElements / std::max<int64_t>(stride, 1), [&](int64_t begin, int64_t end) {
      l.sum_levels(a.q + begin * a.cols, end - begin, a.cols, sums.get() + begin);
      if (stride == a.cols) return;
      for (int64_t r = begin; r < end; ++r) {
        std::memcpy(q.get() + r * stride, a.q + r * a.cols, a.cols);
        std::memset(q.get() + r * stride + a.cols, 0, stride - a.cols);
      }
    });
    int lowest, highest;
    l.level_range(a.c, a.n * a.cols, &lowest, &highest);
    const int64_t panels = (a.n + l.outputs - 1) / l.outputs, blocks = (a.rows + kProductBlock - 1) / kProductBlock;
    const auto tasks = [&](int64_t begin, int64_t end) {
      Room<uint8_t> words(l.outputs * stride);
      for (int64_t i = begin, held = -1; i < end; ++i) {
        const int64_t first = i / blocks * l.outputs, row = i % blocks * kProductBlock;
        if (first != held) l.lay_out_panel(a, first, std::min(l.outputs, a.n - first), lowest, words.get());
        held = first;
        const LevelPanel panel{words.get(),     stride == a.cols ? a.q : q.get(),
                               sums.get(),      scale.get(),
                               bias.data,       first,
                               stride,          lowest,
                               highest - lowest};
        l.multiply_levels(a, panel, row, std::min(row + kProductBlock, a.rows));
      }
    };
    if (panels * blocks == 1 || a.rows * a.cols * a.n <= kSerialWork)
      tasks(0, panels * blocks);
    else
      torch::stable::parallel_for(0, panels * blocks, 1, tasks);
  }
  void stochastic_levels(const RoundArg& a) const {
    over_rows(a.m, [&](int64_t begin, int64_t end) {
      Room<float> row(a.m.cols + kPadding);
      loops().stochastic_levels(a, begin, end, row.get());
    });
  }
  void luq(RoundArg a) const {
    const int64_t count = a.m.rows * a.m.cols;
    std::vector<float> peaks((count + kElements - 1) / kElements);
    in_parts(count, kElements,
             [&](int64_t begin, int64_t end) { peaks[begin / kElements] = loops().peak(a.x, a.type, begin, end); });
    a.most = 0.f;
    for (const float p : peaks)
      if (p != p || p > a.most) a.most = p;  // NaN stays: nothing is above it
    in_parts(count, kElements, [&](int64_t begin, int64_t end) { loops().luq(a, begin, end); });
  }
};

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) {
  askew::LowbitOps<askew::LowbitOnCpu>::implement(m);
  askew::LevelOps<askew::LowbitOnCpu>::implement(m);
}
