// The fused optimizer step over a list of tensors: one read and one write of everything, in one launch for each
// storage type and grid kind among up to kTensors tensors.
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

constexpr int kTensors = 200;
constexpr int64_t kMostBlocks = 0x7fffffff;  // of a launch

struct List {
  Hyper h;
  const float* coefficients;  // both 0: first gradients do not count; null where there are none
  const Hyper* device_h;      // replaces what in h follows from rates on the device; may be null
  int n;
  uint32_t first_block[kTensors];
  Entry entry[kTensors];
};
static_assert(sizeof(List) <= 32764, "a kernel takes at most 32,764 bytes of parameters");

__device__ __forceinline__ void add(float (&totals)[kTotals], const Stepped<float>& s, float gradient, bool finite,
                                    bool flip) {
  totals[kInfeasible] += s.excess > 0.f ? 1.f : 0.f;
  totals[kViolation] += s.excess > 0.f ? 16.f * s.excess : 0.f;
  totals[kVelocity2] += s.descent * s.descent;
  totals[kGradVelocity] -= gradient * s.descent;
  totals[kFlips] += flip ? 1.f : 0.f;
  totals[kNonfinite] += finite ? 0.f : 1.f;
}

template <int T, class Rule, class Grid>
__global__ void __launch_bounds__(kThreads, T == kFloat32 ? 3 : 2) update_kernel(const __grid_constant__ List list) {
  constexpr int kPer = Storage<T>::kPerWord, kWidth = Storage<T>::kPerVector;
  const int number = tensor_of_block(list);
  const Entry& t = list.entry[number];
  const uint32_t block = blockIdx.x - list.first_block[number];
  const Grid grid = GridMaker<Grid>::make(t.grid);
  Hyper h = list.h;
  if (list.device_h) {
    h.lr = list.device_h->lr;
    h.eps = list.device_h->eps;
    h.cap = list.device_h->cap;
    for (int k = 0; k < (int)(sizeof(Rule) / sizeof(float)); ++k) h.constants[k] = list.device_h->constants[k];
  }

  const void* const first = t.first && (list.coefficients[0] != 0.f || list.coefficients[1] != 0.f) ? t.first : nullptr;
  const StepOptions<Rule> options{h, rule_of<Rule>(h)};
  Walk<T> walk(t.cut, block);
  Sums sums{0, 0, 0};
  float totals[kTotals] = {};
  for (int taken = 0; taken < walk.count; ++taken) {
    const Spot spot = walk.take(taken);
    Words w = load(t.from, spot, walk), g = load(t.g, spot, walk), state[Rule::kBuffers];
    if (first)
      g = map_words<T>(g, load(first, spot, walk), [](float second, float first) { return sam_mean(second, first); });
    ASKEW_EACH (k, Rule::kBuffers)
      if (t.state[k]) state[k] = load(t.state[k], spot, walk);
    const auto row = make_row(spot.n ? t.scale[spot.row] : 1.f, grid);
    const auto stored_row = with_stored_ends<T>(row);
    float copy[kWidth];
    ASKEW_EACH (q, 4) {
      Stepped<float> s[kPer];
      float gradient[kPer], level[kPer], new_w[kPer], new_state[Rule::kBuffers][kPer];
      bool finite[kPer];
      ASKEW_EACH (e, kPer) {
        const float old = Storage<T>::get(w.word[q], e);
        float before[Rule::kBuffers], after[Rule::kBuffers];
        ASKEW_EACH (k, Rule::kBuffers) before[k] = after[k] = t.state[k] ? Storage<T>::get(state[k].word[q], e) : 0.f;
        gradient[e] = Storage<T>::get(g.word[q], e);
        if (options.ste_clip()) gradient[e] = pass_inside(gradient[e], old, stored_row);
        if (t.totals) level[e] = nearest_level(old, row);
        s[e] = step_weight(old, gradient[e], after, t.state[0] != nullptr, row, options);
        finite[e] = absolute(gradient[e]) < __int_as_float(0x7f800000);
        const bool skipped = options.skip_nonfinite() && !finite[e];
        if (skipped) {
          s[e].w = old;
          s[e].descent = 0.f;
          gradient[e] = 0.f;
        }
        new_w[e] = s[e].w;
        ASKEW_EACH (k, Rule::kBuffers) new_state[k][e] = skipped ? before[k] : after[k];
      }
      w.word[q] = Storage<T>::put(new_w);
      ASKEW_EACH (k, Rule::kBuffers)
        if (t.state[k]) state[k].word[q] = Storage<T>::put(new_state[k]);
      ASKEW_EACH (e, kPer) {
        const int j = q * kPer + e;
        const bool exists = j < spot.n;
        const float stored = Storage<T>::get(w.word[q], e);  // as the next step will read it
        if (t.sums) add(sums, exists ? stored : 0.f);
        if (t.dequantized || t.totals) {
          const float now = nearest_level(stored, row);
          copy[j] = holds_levels(t.dequantized_type) ? now : row.scale.value * now;
          if (t.totals && exists) add(totals, s[e], gradient[e], finite[e], now != level[e]);
        }
      }
    }
    store(t.w, w, spot, walk);
    ASKEW_EACH (k, Rule::kBuffers)
      if (t.state[k]) store(t.state[k], state[k], spot, walk);
    if (t.dequantized) store_as(t.dequantized_type, t.dequantized, copy, spot, walk);
    if (t.sums && spot.ends_row) {
      finish_row(sums, t.cut, spot.row, block, t.sums);
      sums = {0, 0, 0};
    }
  }
  if (t.totals) finish_block(totals, t.totals + (int64_t)block * kTotals);
}

template <class Rule>
__global__ void rates_kernel(Rates r, Hyper* h) {
  set_rates<Rule>(*h, read(r.lr), read(r.eps), read(r.step), r.numbers);
}

// ---- the host's side: which tensors share a launch, and where partial sums go in the scratch memory -----------

Cut cut_of(const UpdateTensor& t) {
  const bool copy_aligned = aligned(t.dequantized, t.dequantized_type, per_vector(t.type));
  return cut_for(t.m, t.type, {t.w, t.g, t.state[0], t.state[1], t.kept, t.first}, copy_aligned);
}

constexpr size_t kRatesBytes = 128;  // at the start of the scratch
static_assert(sizeof(Hyper) <= kRatesBytes, "Hyper has its place in the scratch");

cudaError_t launch_update(int type, int kind, const List& list, unsigned blocks, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_rule(list.h.rule, Rules{}, [&](auto rule) {
    typedef decltype(rule) Rule;
    ASKEW_BY_TYPE(type,
                  ASKEW_BY_GRID(kind, error = launch((update_kernel<T, Rule, Grid>), blocks, kThreads, stream, list)))
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
  List list;
  list.h = h;
  list.coefficients = coefficients;
  list.device_h = device_h;
  for (const int type : {kFloat32, kBFloat16, kFloat16})
    for (const int kind : {kUniform, kBinary, kCodebook}) {
      uint32_t blocks = 0;
      list.n = 0;
      for (size_t i = 0; i < n; ++i) {
        const UpdateTensor& t = tensors[i];
        if (t.type != type || t.grid.kind != kind) continue;
        const Cut cut = cut_of(t);
        const int64_t own = blocks_of(cut);
        if (list.n == kTensors || blocks + own > kMostBlocks) {
          note(launch_update(type, kind, list, blocks, stream));
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
      if (list.n) note(launch_update(type, kind, list, blocks, stream));
    }
  return first_error(error, finisher.run());
}

}  // namespace cuda
}  // namespace askew
