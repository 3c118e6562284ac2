// Plain data shared by the CPU loops, the CUDA kernels and their callers.
#pragma once
#include <cstdint>

namespace askew {

// kFloat: every number is a level; only among the candidates of a mixture
enum GridKind : int { kFloat = 0, kUniform = 1, kBinary = 2, kCodebook = 3 };
enum StorageType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Rule : int { kSgd = 0, kAdamW = 1 };

struct GridArg {  // passed to kernels by value
  int kind;
  float lo, hi;         // the hull in grid units
  const float* levels;  // codebook only: ascending levels, on the kernel's device
  int n_levels;
};

struct Hyper {                // one optimizer step, the same for every tensor of the list
  float lr, eps, alpha, cap;  // cap = 1 / (4 lr), +inf for lr = 0
  float weight_decay;
  float momentum, one_minus_dampening;                      // Sgd
  float one_minus_beta1, beta2, one_minus_beta2, adam_eps;  // AdamW; 1 - beta rounded once, from double
  float first_correction, root_second_correction;           // 1 / (1 - beta1^step), 1 / sqrt(1 - beta2^step)
  bool nesterov, direction, clamp, maximize, skip_nonfinite;
};

struct PackedArg {       // a packed weight (docs/packed.md)
  const uint8_t* codes;  // (n, row_bytes)
  const float* scale;    // (1), (n) or (n * groups)
  GridArg grid;
  int bits, n_levels;                  // bits: 1 ... 8; 0: five trits a byte
  int64_t n, cols, row_bytes, groups;  // groups: scales of a row; 0: one scale for all
};

struct SamArg {  // a sharpness-aware perturbation by (c T^2 - a) g, T = |w| + eta where adaptive, else 1
  bool adaptive;
  float eta, c, a;
};

constexpr int kMostCandidates = 8;  // of a mixture

struct MixArg {  // y = sum_k p_k s_k Q_k(x / s_k)
  const void* x;
  int type, n;  // storage type; number of candidates
  int64_t rows, cols;
  const float *scales, *strengths;  // (n, rows), (n,)
  GridArg grids[kMostCandidates];
  bool clip, learned;
};

// Sums that the passes accumulate, in this order everywhere.
enum RowSum : int { kSumAbs = 0, kSumSquares = 1, kMaxAbs = 2, kRowSums = 3 };
enum Total : int {
  kInfeasible = 0,    // number of weights with h < 0 where the step started
  kViolation = 1,     // sum of max(0, -h) there
  kVelocity2 = 2,     // sum of v^2, w moved by lr * v before the final clamp
  kGradVelocity = 3,  // sum of g * v
  kFlips = 4,         // number of weights whose nearest level changed
  kNonfinite = 5,     // number of gradient elements that are inf or NaN
  kTotals = 6
};

}  // namespace askew
