// Sharpness-aware passes over a list of tensors on the CPU.
#include "../ops/sam.h"
#include "run.h"

namespace askew {
namespace {

typedef std::vector<SamTensor> List;

// body(tensor, tile of it as one row, number of the tile)
template <class F>
void over_list(const List& list, const F& body) {
  std::vector<Tiling> tilings;
  int64_t tiles = 0, elements = 0;
  for (const SamTensor& t : list) {
    tilings.emplace_back(Matrix{1, t.n});
    tiles += tilings.back().tiles;
    elements += t.n;
  }
  for_tiles(tiles, elements, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // tile of the tensor
    size_t j = 0;
    for (int64_t i = begin; i < end; ++i) {
      for (; i >= first + tilings[j].tiles; ++j) first += tilings[j].tiles;
      body(list[j], tilings[j][i - first], i);
    }
  });
}

// Whether what is only written is large and aligned enough to go past the caches.
bool past_caches(SamPass pass, const List& list) {
  if (pass == kSamAverage) return false;
  int64_t bytes = 0;
  for (const SamTensor& t : list) {
    if ((uintptr_t)(pass == kSamPerturb ? t.kept : t.w) % 64) return false;
    bytes += t.n * type_size(t.type);
  }
  return bytes >= tuning.streaming_bytes;
}

struct Device : OnCpu {
  using OnCpu::OnCpu;
  void norm(const List& list, float eta, double* sum) const {
    int64_t tiles = 0;
    for (const SamTensor& t : list) tiles += Tiling({1, t.n}).tiles;
    std::vector<double> partial(tiles);
    over_list(list, [&](const SamTensor& t, Tile tile, int64_t i) {
      partial[i] = loops().sam(kSamNorm, t, {t.adaptive, eta, 0, 0}, false, tile);
    });
    *sum = 0;
    for (const double p : partial) *sum += p;
  }
  // pair: (c, a), or null
  void run(SamPass pass, const List& list, float eta, const float* pair) const {
    const float c = pair ? pair[0] : 0, a = pair ? pair[1] : 0;
    // nothing was perturbed: the first gradients were zero, inf or NaN
    if (pass == kSamAverage && c == 0.f && a == 0.f) return;
    const bool past = past_caches(pass, list);
    over_list(list, [&](const SamTensor& t, Tile tile, int64_t) {
      loops().sam(pass, t, {t.adaptive, eta, c, a}, past, tile);
    });
  }
};

}  // namespace
}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) { askew::SamOps<askew::Device>::implement(m); }
