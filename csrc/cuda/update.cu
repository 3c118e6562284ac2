// The fused optimizer step over a list of tensors: one read and one write of everything, in one launch for each kernel
// among up to kMany tensors.
//
// One template, two kinds of kernels: for each storage type, rule and grid one that has every switch at run time
// (kAnyStep), and for the steps that training is made of their own, kUsual, in which the switches are known to the
// compiler.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "device.cuh"

namespace askew {
namespace cuda {
namespace {

struct Entry {  // one tensor of a launch
  void* w;
  const void* from;  // what is read as w: itself, or the copy that was kept of it
  const void* g;
  const void* first;  // the first of two gradients; may be null
  void* state[kMostBuffers];
  const float* scale;
  void* dequantized;
  void* sums;      // float row sums, or double partials where rows are in pieces; may be null
  double* totals;  // [blocks][kTotals], partial sums; may be null
  GridArg grid;
  Cut cut;
  int dequantized_type;
};

constexpr int kFew = 24, kMany = 200;        // tensors of a launch: every byte of its parameters takes time
constexpr int64_t kStepSlots = 4;            // vectors of a thread where no sums are taken
constexpr int64_t kMostBlocks = 0x7fffffff;  // of a launch

template <int N>
struct List {
  Hyper h;
  const float* coefficients;  // both 0: first gradients do not count; null where there are none
  const Hyper* device_h;      // replaces what in h follows from rates on the device; may be null
  int n;
  uint32_t first_block[N];
  Entry entry[N];
};
static_assert(sizeof(List<kFew>) <= 4096 && sizeof(List<kMany>) <= 32764, "what a kernel takes as parameters");

template <class Rule, class List>
__device__ __forceinline__ Hyper hyper_of(const List& list) {
  Hyper h = list.h;
  if (list.device_h) {
    h.lr = list.device_h->lr;
    h.eps = list.device_h->eps;
    h.cap = list.device_h->cap;
    h.alpha = list.device_h->alpha;
    for (int k = 0; k < (int)(sizeof(Rule) / sizeof(float)); ++k) h.constants[k] = list.device_h->constants[k];
  }
  return h;
}

// ---- the kernels
// ------------------------------------------------------------------------------------------------------

struct CarefulDivision {  // spares the slow way of a division by 0
  static __device__ __forceinline__ float where(bool on, float a, float b) { return divide(a, on ? b : 1.f); }
};
struct QuickDivision {  // without a branch
  static __device__ __forceinline__ float where(bool, float a, float b) { return divide_quickly(a, b); }
};

// Whether a row's divisions need no branch: nothing comes near the ends of the exponents. Brackets of integers.
template <StepKind KIND>
__device__ __forceinline__ bool divides_quickly(float scale, const Hyper& h) {
  const float factor = scale * (0.25f * h.alpha), sixteenth = 0.0625f * h.eps;  // numbers that the step has at hand
  return scale > 0x1p-60f && scale < 0x1p60f &&
         (KIND == kFreeStep || (factor > 0x1p-40f && factor < 0x1p60f && sixteenth >= 0x1p-34f));
}

// What a thread sums while it goes through its elements.
struct Sum {
  Sums row{0, 0, 0};
  float totals[kTotals] = {};
};

__device__ __forceinline__ void add(float (&totals)[kTotals], const Stepped<float>& s, float gradient, bool finite,
                                    bool flip) {
  totals[kInfeasible] += s.excess > 0.f ? 1.f : 0.f;
  totals[kViolation] += s.excess > 0.f ? 16.f * s.excess : 0.f;
  totals[kVelocity2] += s.descent * s.descent;
  totals[kGradVelocity] -= gradient * s.descent;
  totals[kFlips] += flip ? 1.f : 0.f;
  totals[kNonfinite] += finite ? 0.f : 1.f;
}

// N neighbouring elements of one row through a step. first: the first of two gradients, or null.
template <int T, int N, int BUFFERS, class Options, class Row>
__device__ __forceinline__ void step_elements(const Entry& t, const void* first, int64_t index, const Row& row,
                                              const Options& options, Sum& sum) {
  constexpr bool kAny = !Options::kUsual;
  const bool stateful = BUFFERS > 0 && (!kAny || t.state[0]), totals = kAny && t.totals;
  float w[N], g[N], state[kMostBuffers][N] = {}, level[N];
  load_elements<T>(kAny ? t.from : t.w, index, w);
  load_elements<T>(t.g, index, g);
  if (stateful)
    ASKEW_EACH (k, BUFFERS) load_elements<T>(t.state[k], index, state[k]);
  if (kAny && first) {
    load_elements<T>(first, index, level);
    ASKEW_EACH (j, N) g[j] = sam_mean(g[j], level[j]);
    round_to_storage<T>(g);
  }
  if (!Options::kPlain && options.ste_clip()) {
    const auto stored = with_stored_ends<T>(row);
    ASKEW_EACH (j, N) g[j] = pass_inside(g[j], w[j], stored);
  }
  if (totals)
    ASKEW_EACH (j, N) level[j] = nearest_level(w[j], row);
  Stepped<float> stepped[N];
  bool finite[N];
  ASKEW_EACH (j, N) {
    float buffers[kMostBuffers];
    ASKEW_EACH (k, BUFFERS) buffers[k] = state[k][j];
    stepped[j] = step_weight(w[j], g[j], buffers, stateful, row, options);
    finite[j] = absolute(g[j]) < __int_as_float(0x7f800000);
    const bool skipped = options.skip_nonfinite() && !finite[j];
    if (skipped) {
      stepped[j].descent = 0.f;
      g[j] = 0.f;
    }
    w[j] = skipped ? w[j] : stepped[j].w;
    ASKEW_EACH (k, BUFFERS) state[k][j] = skipped ? state[k][j] : buffers[k];
  }
  store_elements<T>(t.w, index, w);
  if (stateful)
    ASKEW_EACH (k, BUFFERS) store_elements<T>(t.state[k], index, state[k]);
  if (!t.sums && !t.dequantized && !totals) return;
  round_to_storage<T>(w);  // as the next step will read them
  if (t.sums)
    ASKEW_EACH (j, N) add(sum.row, w[j]);
  if (!t.dequantized && !totals) return;
  // a weight that was clamped and not rounded since stands in the hull
  const bool inside = Options::kUsual && !Options::kFree && T == kFloat32;
  ASKEW_EACH (j, N) w[j] = inside ? row.grid.nearest(divide(w[j], row.scale)) : nearest_level(w[j], row);
  if (totals)
    ASKEW_EACH (j, N) add(sum.totals, stepped[j], g[j], finite[j], w[j] != level[j]);
  if (!t.dequantized) return;
  const int type = t.dequantized_type;
  if (!holds_levels(type))
    ASKEW_EACH (j, N) w[j] = row.scale.value * w[j];
  if (type == kBFloat16) return store_elements<kBFloat16>(t.dequantized, index, w);
  store_elements_as(type, t.dequantized, index, w);
}

// Blocks of an SM at least: what keeps the registers few without spilling. For sm_80 and sm_100 the compiler takes one
// or two more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kTight = 1;
#else
constexpr int kTight = 0;
#endif
constexpr int least_blocks(int type, int buffers, bool binary, StepKind kind) {
  const bool narrow = type != kFloat32;
  if (kind == kAnyStep) return narrow ? buffers == 2 ? 1 : 2 : 3;
  if (buffers == 2) return !narrow ? 4 : kind == kFreeStep ? 4 - kTight : 3;
  if (binary || (narrow && buffers)) return 4;
  return kind == kFreeStep || (!narrow && !buffers) ? 5 : 5 - kTight;
}

// Rows of whole vectors with a scale like any other go vector by vector; all others element by element, in that order.
template <int T, class Rule, int BUFFERS, class Grid, StepKind KIND, int N>
__global__ void __launch_bounds__(kThreads, least_blocks(T, BUFFERS, std::is_same_v<Grid, BinaryGrid>, KIND))
    step_kernel(const __grid_constant__ List<N> list) {
  constexpr int kWidth = Walk<T>::kWidth;
  constexpr bool kCodebook = std::is_same_v<Grid, Codebook>;
  typedef std::conditional_t<kCodebook, CarefulDivision, QuickDivision> Quick;
  const int number = tensor_of_block(list);
  const Entry& t = list.entry[number];
  const uint32_t block = blockIdx.x - list.first_block[number];
  const Grid grid = GridMaker<Grid>::make(t.grid);
  const Hyper h = hyper_of<Rule>(list);
  const Rule rule = rule_of<Rule>(h);
  const bool averaged = KIND == kAnyStep && t.first && (list.coefficients[0] != 0.f || list.coefficients[1] != 0.f);
  const void* const first = averaged ? t.first : nullptr;
  Walk<T> walk(t.cut, block);
  Sum sum;
  for (int r = t.cut.rows_per_team; r > 0; --r) {
    if (walk.row < t.cut.rows) {
      const float scale = t.scale[walk.row];
      if (walk.vectors && divides_quickly<kCodebook ? kFreeStep : KIND>(scale, h)) {
        const Row<float, Grid> row = make_row(quick_divisor(scale), grid);
        const auto step_row = [&](const auto& options) {
          for (int column = walk.first; column < walk.columns; column += walk.step)
            step_elements<T, kWidth, BUFFERS>(t, first, walk.base + column, row, options, sum);
        };
        if (KIND != kAnyStep && !h.ste_clip && rule.usual())
          step_row(StepOptions<Rule, KIND, Quick, true>{h, rule});
        else
          step_row(StepOptions<Rule, KIND, Quick, false>{h, rule});
      } else {
        const StepOptions<Rule, KIND, CarefulDivision, false> options{h, rule};
        const Row<float, Grid> row = make_row(scale, grid);
        for (int slot = walk.first; slot < walk.columns; slot += walk.step)
#pragma unroll 1
          for (int j = 0; j < kWidth; ++j) {
            const int column = slot + (j << walk.shift);
            if (column < walk.columns) step_elements<T, 1, BUFFERS>(t, first, walk.base + column, row, options, sum);
          }
      }
    }
    if (t.sums) {
      finish_row(sum.row, t.cut, walk.row, block, t.sums);
      sum.row = {0, 0, 0};
    }
    walk.next_row();
  }
  if (KIND == kAnyStep && t.totals) finish_block(sum.totals, t.totals + (int64_t)block * kTotals);
}

struct Usual {
  int type, rule, buffers, grids;  // grids: a bit for each kind
  StepKind kind;
  void (*few)(List<kFew>);
  void (*many)(List<kMany>);
};
template <int T, class Rule, int BUFFERS, class Grid, StepKind KIND>
constexpr Usual usual() {
  const int grids = std::is_same_v<Grid, BinaryGrid>    ? 1 << kBinary
                    : std::is_same_v<Grid, UniformGrid> ? 1 << kUniform
                                                        : 1 << kUniform | 1 << kBinary;
  return {T,
          number_of<Rule>(Rules{}),
          BUFFERS,
          grids,
          KIND,
          step_kernel<T, Rule, BUFFERS, Grid, KIND, kFew>,
          step_kernel<T, Rule, BUFFERS, Grid, KIND, kMany>};
}
// hold, annealed, annealed binary
#define ASKEW_USUAL(RULE, BUFFERS)                                     \
  usual<kFloat32, RULE, BUFFERS, IntegerGrid, kFreeStep>(),            \
      usual<kFloat32, RULE, BUFFERS, UniformGrid, kConstrainedStep>(), \
      usual<kFloat32, RULE, BUFFERS, BinaryGrid, kConstrainedStep>(),  \
      usual<kBFloat16, RULE, BUFFERS, IntegerGrid, kFreeStep>(),       \
      usual<kBFloat16, RULE, BUFFERS, UniformGrid, kConstrainedStep>()
const Usual kUsual[] = {ASKEW_USUAL(Sgd, 0), ASKEW_USUAL(Sgd, 1), ASKEW_USUAL(AdamW, 2)};
constexpr int kUsuals = sizeof(kUsual) / sizeof(Usual);

template <class Rule>
__global__ void rates_kernel(Rates r, Hyper* h) {
  set_rates<Rule>(*h, read(r.lr), read(r.eps), read(r.step), r.numbers);
  h->alpha = (float)read(r.alpha);
}

// ---- the host's side: which tensors share a launch, and where partial sums go in the scratch memory -----------

// Where sums are taken their order depends on the cut, and is that of row_sums.
Cut cut_of(const UpdateTensor& t) {
  const bool copy_aligned = aligned(t.dequantized, t.dequantized_type, per_vector(t.type));
  return cut_for(t.m, t.type, {t.w, t.g, t.state[0], t.state[1], t.kept, t.first}, copy_aligned,
                 t.row_sums || t.totals ? kSumSlots : kStepSlots);
}

constexpr size_t kRatesBytes = 128;  // at the start of the scratch
static_assert(sizeof(Hyper) <= kRatesBytes, "Hyper has its place in the scratch");

// The usual step that a tensor takes, kUsuals and more where it takes any: then by its type and grid.
int kernel_of(const UpdateTensor& t, const Hyper& h, const Rates& rates) {
  const int any = kUsuals + 3 * t.type + t.grid.kind - kUniform;
  if (t.totals || t.kept || t.first || h.direction || h.maximize || h.skip_nonfinite) return any;
  // clamped at eps = 1 a constrained step changes nothing more than the clamp
  const bool free = !rates.eps.device && h.eps == 1.f;
  if (!h.clamp && !free) return any;
  for (int k = 0; k < kUsuals; ++k) {
    const Usual& u = kUsual[k];
    if (u.type == t.type && u.rule == h.rule && u.kind == (h.clamp ? kConstrainedStep : kFreeStep) &&
        (u.grids >> t.grid.kind & 1) && u.buffers == (t.state[0] != nullptr) + (t.state[1] != nullptr))
      return k;
  }
  return any;
}
constexpr int kKernels = kUsuals + 9;

cudaError_t launch_step(int kernel, const List<kMany>& list, unsigned blocks, cudaStream_t stream) {
  if (kernel < kUsuals) {
    if (list.n > kFew) return launch(kUsual[kernel].many, blocks, kThreads, stream, list);
    List<kFew> few;
    few.h = list.h;
    few.coefficients = list.coefficients;
    few.device_h = list.device_h;
    few.n = list.n;
    std::copy(list.first_block, list.first_block + list.n, few.first_block);
    std::copy(list.entry, list.entry + list.n, few.entry);
    return launch(kUsual[kernel].few, blocks, kThreads, stream, few);
  }
  cudaError_t error = cudaErrorInvalidValue;
  with_rule(list.h.rule, Rules{}, [&](auto rule) {
    typedef decltype(rule) Rule;
    ASKEW_BY_TYPE((kernel - kUsuals) / 3,
                  ASKEW_BY_GRID((kernel - kUsuals) % 3 + kUniform,
                                error = launch((step_kernel<T, Rule, Rule::kBuffers, Grid, kAnyStep, kMany>), blocks,
                                               kThreads, stream, list)))
  });
  return error;
}

}  // namespace

size_t update_scratch(const UpdateTensor* tensors, size_t n) {
  size_t doubles = 0;
  for (size_t i = 0; i < n; ++i) {
    const UpdateTensor& t = tensors[i];
    if (!t.row_sums && !t.totals) continue;
    const Cut cut = cut_of(t);
    if (t.row_sums && cut.pieces > 1) doubles += blocks_of(cut) * kRowSums;
    if (t.totals) doubles += blocks_of(cut) * kTotals;
  }
  return kRatesBytes + doubles * sizeof(double);
}

cudaError_t update(const UpdateTensor* tensors, size_t n, const Hyper& h, const Rates& rates, const float* coefficients,
                   void* scratch, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const auto note = [&](cudaError_t e) { error = first_error(error, e); };
  Hyper* const device_h = rates.on_device() ? (Hyper*)scratch : nullptr;
  if (device_h)
    with_rule(h.rule, Rules{},
              [&](auto rule) { note(launch(rates_kernel<decltype(rule)>, 1, 1, stream, rates, device_h)); });

  double* partial = (double*)((char*)scratch + kRatesBytes);
  Finisher finisher{stream};
  List<kMany> list;
  list.h = h;
  list.coefficients = coefficients;
  list.device_h = device_h;
  std::vector<int8_t> kernels(n);
  bool taken[kKernels] = {};
  for (size_t i = 0; i < n; ++i) taken[kernels[i] = (int8_t)kernel_of(tensors[i], h, rates)] = true;
  for (int kernel = 0; kernel < kKernels; ++kernel) {
    if (!taken[kernel]) continue;
    uint32_t blocks = 0;
    list.n = 0;
    for (size_t i = 0; i < n; ++i) {
      if (kernels[i] != kernel) continue;
      const UpdateTensor& t = tensors[i];
      const Cut cut = cut_of(t);
      const int64_t own = blocks_of(cut);
      if (list.n == kMany || blocks + own > kMostBlocks) {
        note(launch_step(kernel, list, blocks, stream));
        list.n = 0;
        blocks = 0;
      }
      void* sums = t.row_sums;
      if (t.row_sums && (own == 0 || cut.pieces > 1)) {
        sums = partial;
        partial += own * kRowSums;
        finisher.add((const double*)sums, t.row_sums, t.m.rows, own ? cut.pieces : 0, kRowSums);
      }
      double* totals = nullptr;
      if (t.totals) {
        totals = partial;
        partial += own * kTotals;
        finisher.add(totals, t.totals, 1, own, kTotals);
      }
      if (own == 0) continue;
      list.first_block[list.n] = blocks;
      list.entry[list.n++] = {t.w,     t.kept ? t.kept : t.w, t.g,  t.first, {t.state[0], t.state[1]},
                              t.scale, t.dequantized,         sums, totals,  t.grid,
                              cut,     t.dequantized_type};
      blocks += (uint32_t)own;
    }
    if (list.n) note(launch_step(kernel, list, blocks, stream));
  }
  return first_error(error, finisher.run());
}

}  // namespace cuda
}  // namespace askew
