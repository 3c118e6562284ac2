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

__device__ __forceinline__ SamArg read_arg(const FlatList& list, bool adaptive) {
  SamArg arg = list.arg;
  arg.adaptive = adaptive;
  if (list.coefficients) {
    arg.c = list.coefficients[0];
    arg.a = list.coefficients[1];
  }
  return arg;
}

// Calls run(x, y, spot, walk) for every slot, with the loads of two slots of both tensors under way at once; y may be
// null, and is zeros then.
template <int T, class Run>
__device__ __forceinline__ void for_pairs(const void* x, const void* y, const Cut& cut, uint32_t block,
                                          const Run& run) {
  constexpr int kAhead = 2;
  Walk<T> walk(cut, block);
  for (int taken = 0; taken < walk.count; taken += kAhead) {
    Spot spot[kAhead];
    Words a[kAhead], b[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      spot[u] = walk.take(taken + u);
      a[u] = load(x, spot[u], walk);
      if (y)
        b[u] = load(y, spot[u], walk);
      else
        b[u] = {{0, 0, 0, 0}};
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) run(a[u], b[u], spot[u], walk);
  }
}

template <int T>
__global__ void __launch_bounds__(kThreads, 3) sam_norm_kernel(const __grid_constant__ FlatList list) {
  const int i = tensor_of_block(list);
  const FlatEntry& t = list.entry[i];
  const SamArg arg = read_arg(list, t.adaptive);
  float sum = 0;
  for_pairs<T>(t.w, t.g, t.cut, blockIdx.x - list.first_block[i],
               [&](const Words& w, const Words& g, const Spot&, const Walk<T>&) {
#pragma unroll
                 for (int j = 0; j < Walk<T>::kWidth; ++j) {  // elements that do not exist are zeros, and 0 T = 0
                   const float x = sam_scaled(element<T>(w, j), element<T>(g, j), arg);
                   sum += x * x;
                 }
               });
  __shared__ float across[kThreads / 32];
  sum = add_lanes(sum, 5);
  if (threadIdx.x % 32 == 0) across[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int w = 0; w < kThreads / 32; ++w) total += across[w];
    list.partial[blockIdx.x] = total;
  }
}

template <int T>
__global__ void __launch_bounds__(kThreads, 3) sam_perturb_kernel(const __grid_constant__ FlatList list) {
  const int i = tensor_of_block(list);
  const FlatEntry& t = list.entry[i];
  const SamArg arg = read_arg(list, t.adaptive);
  const bool still = stands_still(arg);
  for_pairs<T>(t.w, t.g, t.cut, blockIdx.x - list.first_block[i],
               [&](const Words& w, const Words& g, const Spot& s, const Walk<T>& walk) {
                 store(t.kept, w, s, walk);
                 if (!still)
                   store(t.w, map_words<T>(w, g, [&](float v, float d) { return sam_perturbed(v, d, arg); }), s, walk);
               });
}

template <int T>
__global__ void __launch_bounds__(kThreads, 3) sam_restore_kernel(const __grid_constant__ FlatList list) {
  const int i = tensor_of_block(list);
  const FlatEntry& t = list.entry[i];
  for_pairs<T>(t.kept, nullptr, t.cut, blockIdx.x - list.first_block[i],
               [&](const Words& kept, const Words&, const Spot& s, const Walk<T>& walk) { store(t.w, kept, s, walk); });
}

template <int T>
__global__ void __launch_bounds__(kThreads, 3) sam_average_kernel(const __grid_constant__ FlatList list) {
  const int i = tensor_of_block(list);
  const FlatEntry& t = list.entry[i];
  if (stands_still(read_arg(list, false))) return;
  for_pairs<T>(t.w, t.g, t.cut, blockIdx.x - list.first_block[i],
               [&](const Words& second, const Words& first, const Spot& s, const Walk<T>& walk) {
                 store(t.w, map_words<T>(second, first, [](float x, float y) { return sam_mean(x, y); }), s, walk);
               });
}

Cut flat_cut(const SamTensor& t) {
  const int width = per_vector(t.type);
  bool vectors = t.n % width == 0;
  for (const void* p : {(const void*)t.w, t.g, (const void*)t.kept}) vectors = vectors && aligned(p, t.type, width);
  return make_cut({1, t.n}, width, vectors);
}

template <int T>
cudaError_t launch_flat(SamPass pass, const FlatList& list, unsigned blocks, cudaStream_t stream) {
  switch (pass) {
    case kSamNorm:
      return launch((sam_norm_kernel<T>), blocks, kThreads, stream, list);
    case kSamPerturb:
      return launch((sam_perturb_kernel<T>), blocks, kThreads, stream, list);
    case kSamRestore:
      return launch((sam_restore_kernel<T>), blocks, kThreads, stream, list);
    default:
      return launch((sam_average_kernel<T>), blocks, kThreads, stream, list);
  }
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
      if (error == cudaSuccess) error = e;
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
  Finisher finisher;
  finisher.stream = stream;
  finisher.add((const double*)scratch, sum, 1, list.partial - (double*)scratch, 1);
  finisher.run();
  return error != cudaSuccess ? error : finisher.error;
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
