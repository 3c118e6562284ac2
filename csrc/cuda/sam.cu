// The sharpness-aware passes over a list of tensors: norm, perturbation with a copy kept, restore, mean of gradients.
// Every tensor is one long row; tensors of one storage type share a launch.
#include "device.cuh"

namespace askew {
namespace cuda {
namespace {

struct FlatEntry {
  void *w, *kept;
  const void* g;
  Cut cut;
  bool adaptive;
};

constexpr int kFlatTensors = 320;

struct FlatList {
  SamArg arg;                 // c and a are on the device
  const float* coefficients;  // (c, a); null for the norm and the restore
  double* partial;            // norm: one sum for each block
  int n;
  uint32_t first_block[kFlatTensors];
  FlatEntry entry[kFlatTensors];
};
static_assert(sizeof(FlatList) <= 32764, "a kernel takes at most 32,764 bytes of parameters");

template <int T, SamPass PASS>
__global__ void __launch_bounds__(kThreads, 3) sam_kernel(const __grid_constant__ FlatList list) {
  const int i = tensor_of_block(list);
  const FlatEntry& t = list.entry[i];
  const uint32_t block = blockIdx.x - list.first_block[i];
  if (PASS == kSamRestore) {
    for_slots<T, 2>({t.kept}, nullptr, t.cut, block,
                    [&](const Words* kept, float, const Spot& s, const Walk<T>& walk) { store(t.w, *kept, s, walk); });
    return;
  }
  SamArg arg = list.arg;
  arg.adaptive = t.adaptive;
  if (PASS != kSamNorm) {
    arg.c = list.coefficients[0];
    arg.a = list.coefficients[1];
  }
  const bool still = stands_still(arg);
  if (PASS == kSamAverage && still) return;
  float sum[1] = {0};
  for_slots<T, 2>({t.w, t.g}, nullptr, t.cut, block, [&](const Words* in, float, const Spot& s, const Walk<T>& walk) {
    if (PASS == kSamNorm) {
      ASKEW_EACH (j, Walk<T>::kWidth) {  // elements that do not exist are zeros, and 0 T = 0
        const float x = sam_scaled(element<T>(in[0], j), element<T>(in[1], j), arg);
        sum[0] += x * x;
      }
      return;
    }
    if (PASS == kSamPerturb) store(t.kept, in[0], s, walk);
    if (PASS == kSamPerturb && still) return;
    const auto moved = [&](float w, float g) {
      return PASS == kSamPerturb ? sam_perturbed(w, g, arg) : sam_mean(w, g);
    };
    store(t.w, map_words<T>(in[0], in[1], moved), s, walk);
  });
  if (PASS == kSamNorm) finish_block(sum, list.partial + blockIdx.x);
}

Cut flat_cut(const SamTensor& t) { return cut_for({1, t.n}, t.type, {t.w, t.g, t.kept}); }

template <int T>
cudaError_t launch_flat(SamPass pass, const FlatList& list, unsigned blocks, cudaStream_t stream) {
  void (*const kernels[])(FlatList) = {sam_kernel<T, kSamNorm>, sam_kernel<T, kSamPerturb>, sam_kernel<T, kSamRestore>,
                                       sam_kernel<T, kSamAverage>};  // as SamPass counts them
  return launch(kernels[pass], blocks, kThreads, stream, list);
}

// One launch for each storage type among up to kFlatTensors tensors. list.partial moves on by a sum for each block.
cudaError_t over_list(SamPass pass, const SamTensor* tensors, size_t n, FlatList& list, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  cudaError_t error = cudaSuccess;
  for (const int type : {kFloat32, kBFloat16, kFloat16}) {
    uint32_t blocks = 0;
    list.n = 0;
    const auto run = [&] {
      if (list.n == 0) return;
      cudaError_t e = cudaErrorInvalidValue;
      ASKEW_BY_TYPE(type, e = launch_flat<T>(pass, list, blocks, stream))
      error = first_error(error, e);
      if (list.partial) list.partial += blocks;
      list.n = 0;
      blocks = 0;
    };
    for (size_t i = 0; i < n; ++i) {
      const SamTensor& t = tensors[i];
      if (t.type != type || t.n == 0) continue;
      const Cut cut = flat_cut(t);
      const int64_t own = blocks_of(cut);
      if (list.n == kFlatTensors || blocks + own > kMostBlocks) run();
      list.first_block[list.n] = blocks;
      list.entry[list.n++] = {t.w, t.kept, t.g, cut, t.adaptive};
      blocks += (uint32_t)own;
    }
    run();
  }
  return error;
}

}  // namespace

size_t sam_norm_scratch(const SamTensor* tensors, size_t n) {
  size_t blocks = 0;
  for (size_t i = 0; i < n; ++i) blocks += blocks_of(flat_cut(tensors[i]));
  return blocks * sizeof(double);
}

cudaError_t sam_norm(const SamTensor* tensors, size_t n, float eta, double* sum, void* scratch, cudaStream_t stream) {
  FlatList list{};
  list.arg.eta = eta;
  list.partial = (double*)scratch;
  const cudaError_t error = over_list(kSamNorm, tensors, n, list, stream);
  Finisher finisher{stream};
  finisher.add((const double*)scratch, sum, 1, list.partial - (double*)scratch, 1);
  return first_error(error, finisher.run());
}

cudaError_t sam(SamPass pass, const SamTensor* tensors, size_t n, float eta, const float* coefficients,
                cudaStream_t stream) {
  FlatList list{};
  list.arg.eta = eta;
  list.coefficients = coefficients;
  return over_list(pass, tensors, n, list, stream);
}

}  // namespace cuda
}  // namespace askew
