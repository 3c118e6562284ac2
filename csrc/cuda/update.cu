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
  void *a, *b;
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
  const Hyper* device_h;      // replaces h's rates where they stand on the device; may be null
  int n;
  uint32_t first_block[kTensors];
  Entry entry[kTensors];
};
static_assert(sizeof(List) <= 32764, "a kernel takes at most 32,764 bytes of parameters");

// Partial totals of one thread.
struct Totals {
  float sum[kTotals];
};

__device__ __forceinline__ void add(Totals& t, bool exists, const Stepped<float>& s, float gradient, bool finite,
                                    bool flip) {
  if (!exists) return;
  t.sum[kInfeasible] += s.excess > 0.f ? 1.f : 0.f;
  t.sum[kViolation] += s.excess > 0.f ? 16.f * s.excess : 0.f;
  t.sum[kVelocity2] += s.descent * s.descent;
  t.sum[kGradVelocity] -= gradient * s.descent;
  t.sum[kFlips] += flip ? 1.f : 0.f;
  t.sum[kNonfinite] += finite ? 0.f : 1.f;
}

// The block's totals, added in a fixed order.
__device__ __forceinline__ void finish_totals(const Totals& t, double* out) {
  __shared__ float across[kThreads / 32][kTotals];
#pragma unroll
  for (int c = 0; c < kTotals; ++c) {
    const float v = add_lanes(t.sum[c], 5);
    if (threadIdx.x % 32 == 0) across[threadIdx.x / 32][c] = v;
  }
  __syncthreads();
  if (threadIdx.x < kTotals) {
    double v = 0;
    for (int w = 0; w < kThreads / 32; ++w) v += across[w][threadIdx.x];
    out[threadIdx.x] = v;
  }
}

template <int T, class Rule, class Grid>
__global__ void __launch_bounds__(kThreads, T == kFloat32 ? 3 : 2) update_kernel(const __grid_constant__ List list) {
  constexpr int kPer = Storage<T>::kPerWord, kWidth = Storage<T>::kPerVector;
  int low = 0, high = list.n - 1;  // the tensor of this block
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (blockIdx.x >= list.first_block[middle])
      low = middle;
    else
      high = middle - 1;
  }
  const Entry& t = list.entry[low];
  const uint32_t block = blockIdx.x - list.first_block[low];
  const Grid grid = GridMaker<Grid>::make(t.grid);
  Hyper h = list.h;
  if (list.device_h) {
    h.lr = list.device_h->lr;
    h.eps = list.device_h->eps;
    h.cap = list.device_h->cap;
    h.first_correction = list.device_h->first_correction;
    h.root_second_correction = list.device_h->root_second_correction;
  }

  const void* const first = t.first && (list.coefficients[0] != 0.f || list.coefficients[1] != 0.f) ? t.first : nullptr;
  const AnyOptions options{h};
  Walk<T> walk(t.cut, block);
  Sums sums{0, 0, 0};
  Totals totals{};
  for (int taken = 0; taken < walk.count; ++taken) {
    const Spot spot = walk.take(taken);
    Words w = load(t.from, spot, walk), g = load(t.g, spot, walk), a, b;
    if (first) {
      const Words other = load(first, spot, walk);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        float mean[kPer];
#pragma unroll
        for (int e = 0; e < kPer; ++e)
          mean[e] = sam_mean(Storage<T>::get(g.word[q], e), Storage<T>::get(other.word[q], e));
        g.word[q] = Storage<T>::put(mean);
      }
    }
    if (t.a) a = load(t.a, spot, walk);
    if (t.b) b = load(t.b, spot, walk);
    const auto row = make_row(spot.n ? t.scale[spot.row] : 1.f, grid);
    float copy[kWidth];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      Stepped<float> s[kPer];
      float gradient[kPer], level[kPer], new_w[kPer], new_a[kPer], new_b[kPer];
      bool finite[kPer];
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        const float old = Storage<T>::get(w.word[q], e);
        const float old_a = t.a ? Storage<T>::get(a.word[q], e) : 0.f,
                    old_b = t.b ? Storage<T>::get(b.word[q], e) : 0.f;
        gradient[e] = Storage<T>::get(g.word[q], e);
        new_a[e] = old_a;
        new_b[e] = old_b;
        if (t.totals) level[e] = nearest_level(old, row);
        s[e] = step_weight<Rule>(old, gradient[e], new_a[e], new_b[e], t.a != nullptr, row, options);
        finite[e] = absolute(gradient[e]) < __int_as_float(0x7f800000);
        if (options.skip_nonfinite() && !finite[e]) {
          s[e].w = old;
          s[e].descent = 0.f;
          new_a[e] = old_a;
          new_b[e] = old_b;
          gradient[e] = 0.f;
        }
        new_w[e] = s[e].w;
      }
      w.word[q] = Storage<T>::put(new_w);
      if (t.a) a.word[q] = Storage<T>::put(new_a);
      if (t.b) b.word[q] = Storage<T>::put(new_b);
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        const int j = q * kPer + e;
        const bool exists = j < spot.n;
        const float stored = Storage<T>::get(w.word[q], e);  // as the next step will read it
        if (t.sums) add(sums, exists ? stored : 0.f);
        if (t.dequantized || t.totals) {
          const float now = nearest_level(stored, row);
          copy[j] = row.scale.value * now;
          if (t.totals) add(totals, exists, s[e], gradient[e], finite[e], now != level[e]);
        }
      }
    }
    store(t.w, w, spot, walk);
    if (t.a) store(t.a, a, spot, walk);
    if (t.b) store(t.b, b, spot, walk);
    if (t.dequantized) store_as(t.dequantized_type, t.dequantized, copy, spot, walk);
    if (t.sums && spot.ends_row) {
      finish_row(sums, t.cut, spot.row, block, t.sums);
      sums = {0, 0, 0};
    }
  }
  if (t.totals) finish_totals(totals, t.totals + (int64_t)block * kTotals);
}

__device__ double read_scalar(const Scalar& s) {
  if (!s.device) return s.value;
  return s.is_double ? *(const double*)s.device : (double)*(const float*)s.device;
}

// The members of Hyper that follow from the rates, as checks.h computes them on the host.
__global__ void rates_kernel(Rates r, int rule, Hyper* h) {
  h->lr = (float)read_scalar(r.lr);
  h->eps = (float)read_scalar(r.eps);
  h->cap = __fdiv_rn(1.f, 4.f * h->lr);
  if (rule == kAdamW) {
    const double step = read_scalar(r.step);
    h->first_correction = (float)(1.0 / (1.0 - pow(r.beta1, step)));
    h->root_second_correction = (float)(1.0 / sqrt(1.0 - pow(r.beta2, step)));
  }
}

// ---- the host's side: which tensors share a launch, and where partial sums go in the scratch memory -----------

Cut cut_of(const UpdateTensor& t) {
  const int width = per_vector(t.type);
  bool vectors = t.m.cols % width == 0;
  for (const void* p : {(const void*)t.w, t.g, (const void*)t.a, (const void*)t.b, t.kept, t.first})
    vectors = vectors && aligned(p, t.type, width);
  return make_cut(t.m, width, vectors && aligned(t.dequantized, t.dequantized_type, width));
}

constexpr size_t kRatesBytes = 128;  // at the start of the scratch
static_assert(sizeof(Hyper) <= kRatesBytes, "Hyper has its place in the scratch");

template <int T, class Rule, class Grid>
cudaError_t launch_update(const List& list, unsigned blocks, cudaStream_t stream) {
  return launch((update_kernel<T, Rule, Grid>), blocks, kThreads, stream, list);
}

cudaError_t launch_update(int type, int rule, int kind, const List& list, unsigned blocks, cudaStream_t stream) {
  if (rule == kSgd) {
    ASKEW_BY_TYPE(type, ASKEW_BY_GRID(kind, return (launch_update<T, Sgd, Grid>(list, blocks, stream))))
  } else {
    ASKEW_BY_TYPE(type, ASKEW_BY_GRID(kind, return (launch_update<T, AdamW, Grid>(list, blocks, stream))))
  }
  return cudaErrorInvalidValue;
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

cudaError_t update(const UpdateTensor* tensors, size_t n, int rule, const Hyper& h, const Rates& rates,
                   const float* coefficients, void* scratch, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const auto note = [&](cudaError_t e) { error = error == cudaSuccess ? e : error; };
  Hyper* const device_h = rates.on_device() ? (Hyper*)scratch : nullptr;
  if (device_h) note(launch(rates_kernel, 1, 1, stream, rates, rule, device_h));

  double* partial = (double*)((char*)scratch + kRatesBytes);
  Finisher finisher;
  finisher.stream = stream;
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
          note(launch_update(type, rule, kind, list, blocks, stream));
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
        list.entry[list.n++] = {
            t.w, t.kept ? t.kept : t.w, t.g, t.first, t.a, t.b, t.scale, t.dequantized, sums, totals, t.grid,
            cut, t.dequantized_type};
        blocks += (uint32_t)own;
      }
      if (list.n) note(launch_update(type, rule, kind, list, blocks, stream));
    }
  finisher.run();
  note(finisher.error);
  return error;
}

}  // namespace cuda
}  // namespace askew
