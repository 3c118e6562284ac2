// The CPU loops as every instruction set offers them: raw pointers, no torch.
#pragma once
#include "../math/types.h"

namespace askew {

// A rectangle of a (rows, cols) matrix: rows [row0, row1), columns [col0, col1).
// Loops are handed whole rows, or one piece of one row.
struct Tile {
  int64_t row0, row1, col0, col1;
};

struct UpdateTensor {
  void* w;
  const void* g;
  void* a;  // momentum or first moment; may be null for SGD
  void* b;  // second moment; AdamW only
  const float* scale;
  void* dequantized;  // may be null
  int type, dequantized_type;
  int64_t rows, cols;
  GridArg grid;
  const void* kept;   // read in place of w, whose content does not matter then; may be null
  const void* first;  // a gradient whose mean with g takes g's place; may be null
};

struct Loops {
  const char* name;
  // y = s Q(w/s); y may have another storage type
  void (*fake_quantize)(const void* x, int x_type, void* y, int y_type, const float* scale, GridArg, int64_t cols,
                        Tile);
  void (*stochastic_quantize)(const void* x, int x_type, void* y, int y_type, const float* scale, GridArg, int64_t cols,
                              Tile, uint64_t seed);
  // out = g inside the hull, 0 outside; out may be g
  void (*ste_clip)(const void* g, const void* x, int type, void* out, const float* scale, GridArg, int64_t cols, Tile);
  void (*project_interval)(void* w, int type, const float* scale, GridArg, float eps, int64_t cols, Tile);
  // sums: [rows of the tile][kRowSums]
  void (*row_sums)(const void* x, int type, int64_t cols, Tile, double* sums);
  // row_sums (may be null): [rows of the tile][kRowSums], of the weights after the step; totals (may be null):
  // [kTotals], overwritten
  void (*update)(const UpdateTensor&, int rule, const Hyper&, Tile, double* row_sums, double* totals);
  // Sharpness-aware passes over columns [col0, col1) of a flat tensor. `past_caches`: what is only written is stored
  // with non-temporal stores, which wants the written tensors aligned to 64 bytes.
  double (*sam_norm)(const void* w, const void* g, int type, SamArg, Tile);                           // sum (T g)^2
  void (*sam_perturb)(void* w, const void* g, void* kept, int type, SamArg, bool past_caches, Tile);  // w += delta
  void (*sam_restore)(void* w, const void* kept, int type, bool past_caches, Tile);                   // w = kept
  void (*sam_average)(void* g, const void* first, int type, Tile);                                    // g = mean
  // A mixture of quantizations. sums: [rows of the tile][n][2]: of G Q, and of LSQ's terms where scales are learned
  void (*mix)(const MixArg&, void* y, Tile);
  void (*mix_gradient)(const MixArg&, const void* g, void* out, Tile, double* sums);
};

const Loops* loops_baseline();
const Loops* loops_avx2();    // null where the compiler target has no AVX2
const Loops* loops_avx512();  // null where the compiler target has no AVX-512

// The loops in use: the best this CPU runs, or the one that was forced.
const Loops& loops();
const char* best_capability();
bool force_capability(const char* name);  // false: unknown, not built or not supported by this CPU

}  // namespace askew
