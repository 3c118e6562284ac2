// Packed weights on a GPU.
#include "../ops/packed.h"
#include "run.h"

namespace askew {

struct PackedOnDevice : OnDevice {
  static constexpr bool kTiles = true;
  static constexpr bool kRounded = false;  // products with rounded activations unpack the weight
  using OnDevice::OnDevice;
  void dequantize(const PackedArg& w, void* out, int type) const {
    check_cuda(cuda::packed_dequantize(w, out, type, stream), "packed_dequantize_");
  }
  void linear(const LinearArg& a) const { check_cuda(cuda::packed_linear(a, stream), "packed_linear"); }
  void tiles_linear(const TilesArg& a) const {
    const size_t bytes = cuda::packed_tiles_scratch(a);
    const Tensor space = scratch(bytes);
    check_cuda(cuda::packed_tiles_linear(a, space.data_ptr(), stream), "packed_tiles_linear");
  }
};

}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CUDA, m) { askew::PackedOps<askew::PackedOnDevice>::implement(m); }
