// Sharpness-aware passes over a list of tensors on the CPU.
#include "../ops/sam.h"
#include "run.h"

namespace askew {

struct SamOnCpu : OnCpu {
  typedef std::vector<SamTensor> List;
  using OnCpu::OnCpu;

  // Each tensor as one row.
  static std::vector<Tiling> tilings(const List& list) {
    std::vector<Tiling> all;
    for (const SamTensor& t : list) all.emplace_back(Matrix{1, t.n});
    return all;
  }
  // Whether what is only written is large and aligned enough to go past the caches.
  static bool past_caches(SamPass pass, const List& list) {
    if (pass == kSamAverage) return false;
    int64_t bytes = 0;
    for (const SamTensor& t : list) {
      if ((uintptr_t)(pass == kSamPerturb ? t.kept : t.w) % 64) return false;
      bytes += t.n * type_size(t.type);
    }
    return bytes >= tuning.streaming_bytes;
  }

  void norm(const List& list, float eta, double* sum) const {
    const std::vector<Tiling> all = tilings(list);
    std::vector<std::vector<double>> partial;
    for (const Tiling& t : all) partial.emplace_back(t.tiles);
    over_list(all.data(), all.size(), [&](size_t j, Tile tile, int64_t i) {
      partial[j][i] = loops().sam(kSamNorm, list[j], {list[j].adaptive, eta, 0, 0}, false, tile);
    });
    *sum = 0;
    for (const auto& of_tensor : partial)
      for (const double p : of_tensor) *sum += p;
  }
  // pair: (c, a), or null
  void run(SamPass pass, const List& list, float eta, const float* pair) const {
    const float c = pair ? pair[0] : 0, a = pair ? pair[1] : 0;
    // nothing was perturbed: the first gradients were zero, inf or NaN
    if (pass == kSamAverage && c == 0.f && a == 0.f) return;
    const bool past = past_caches(pass, list);
    const std::vector<Tiling> all = tilings(list);
    over_list(all.data(), all.size(), [&](size_t j, Tile tile, int64_t) {
      loops().sam(pass, list[j], {list[j].adaptive, eta, c, a}, past, tile);
    });
  }
};

}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) { askew::SamOps<askew::SamOnCpu>::implement(m); }
