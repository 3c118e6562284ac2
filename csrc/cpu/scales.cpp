// Scales on the CPU.
#include "../ops/scales.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "run.h"

namespace askew {

// A row of zeros takes the lower median of the scales of its tensor's other rows, so one of them; other rows that are
// marked, and a tensor without a scale, take 1.
inline void fill_marked(const ScaleTensor& t) {
  std::vector<float> known;
  for (int64_t r = 0; r < t.rows; ++r)
    if (t.scale[r] > 0) known.push_back(t.scale[r]);
  float median = 1;
  if (!known.empty()) {
    const auto middle = known.begin() + (known.size() - 1) / 2;
    std::nth_element(known.begin(), middle, known.end());
    median = *middle;
  }
  for (int64_t r = 0; r < t.rows; ++r)
    if (!(t.scale[r] > 0)) t.scale[r] = t.scale[r] == 0 ? median : 1;
}

// The first of those with the least error, counted from 1; the last where no error is finite.
inline int best_candidate(const double* errors) {
  double least = INFINITY;
  int best = kScaleCandidates;
  for (int j = 1; j <= kScaleCandidates; ++j)
    if (errors[j - 1] < least) {
      least = errors[j - 1];
      best = j;
    }
  return best;
}

namespace host {
#include "../math/scalar.inl"
#include "../math/scales.inl"
}  // namespace host

inline void round_whole(const ScaleTensor& t) {
  float top = 0;
  for (int64_t r = 0; r < t.rows; ++r) top = t.scale[r] > top ? t.scale[r] : top;
  const float unit = host::scale_unit(top);
  for (int64_t r = 0; r < t.rows; ++r) t.scale[r] = host::round_to_units(t.scale[r], unit);
}

struct ScalesOnCpu : OnCpu {
  using OnCpu::OnCpu;
  void run(const std::vector<ScaleTensor>& tensors) const {
    std::vector<Tiling> tilings;
    tilings.reserve(tensors.size());
    for (const ScaleTensor& t : tensors) tilings.emplace_back(Matrix{t.rows, t.rows ? 1 : 0});
    std::vector<std::atomic<bool>> marked(tensors.size());
    over_list(tilings.data(), tensors.size(), [&](size_t j, Tile t, int64_t) {
      if (loops().scales(tensors[j], t.row0, t.row1)) marked[j].store(true, std::memory_order_relaxed);
    });
    for (size_t j = 0; j < tensors.size(); ++j) {
      if (marked[j]) fill_marked(tensors[j]);
      if (tensors[j].type == kScaleE4M3) round_whole(tensors[j]);
    }
  }

  void run(MseArg a, float* scale) const {
    float top = 0;
    for (int64_t row = 0; row < a.m.rows; ++row) {
      const float own = host::largest_scale(row, a);
      top = own > top ? own : top;
    }
    const float unit = host::scale_unit(top);
    a.unit = &unit;
    const Tiling tiling(a.m, kSumPiece);
    const int64_t pieces = (a.m.cols + kSumPiece - 1) / kSumPiece;  // of a row, whether or not tiles hold several
    std::vector<double> errors(tiling.pieces_per_row > 1 ? a.m.rows * pieces * kScaleCandidates : 0);
    const auto choose = [&](int64_t row, double* found) {
      for (int64_t p = 1; p < pieces; ++p)
        for (int j = 0; j < kScaleCandidates; ++j) found[j] += found[p * kScaleCandidates + j];
      scale[row] = host::candidate_scale(best_candidate(found), (double)a.sums[row * kRowSums + kMaxAbs], a);
    };
    over_matrix(tiling, [&](Tile t, int64_t i) {
      if (!errors.empty()) return loops().errors(a, t, errors.data() + i * kScaleCandidates);
      double found[2 * kScaleCandidates];  // a row that is not cut has at most two pieces
      for (int64_t row = t.row0; row < t.row1; ++row) {
        loops().errors(a, {row, row + 1, t.col0, t.col1}, found);
        choose(row, found);
      }
    });
    if (!errors.empty())
      for (int64_t row = 0; row < a.m.rows; ++row) choose(row, errors.data() + row * pieces * kScaleCandidates);
  }
};

}  // namespace askew

STABLE_TORCH_LIBRARY_IMPL(askew, CPU, m) { askew::ScaleOps<askew::ScalesOnCpu>::implement(m); }
