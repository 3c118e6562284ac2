// Plain data shared by the CPU loops, the CUDA kernels and their callers; constants that both, and
// askew_kernels/contract.py, agree on.
#pragma once
#include "portability.h"

namespace askew {

// kFloat: every number is a level; only among the candidates of a mixture
enum GridKind : int { kFloat = 0, kUniform = 1, kBinary = 2, kCodebook = 3 };
// The last two are copies' alone, which hold levels in grid units; kFloat8 is e4m3fn.
enum StorageType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kFloat8 = 4 };

ASKEW_FN constexpr bool holds_levels(int type) { return type >= kInt8; }
ASKEW_FN constexpr int type_size(int type) { return type == kFloat32 ? 4 : holds_levels(type) ? 1 : 2; }
ASKEW_FN constexpr int grid_step(int kind) { return kind == kBinary ? 2 : 1; }  // between levels, but for a codebook

struct Matrix {  // contiguous, a scale for each row
  int64_t rows, cols;
};

// A number that is known on the host, or read on the device when the kernel runs (no synchronisation).
struct Scalar {
  double value;
  const void* device;  // null: `value` counts; else a float, or a double with is_double
  bool is_double;
};

struct GridArg {  // passed to kernels by value
  int kind;
  float lo, hi;         // the hull in grid units
  const float* levels;  // codebook only: ascending levels, on the kernel's device
  int n_levels;
};

enum QuantizePass : int {
  kQuantize,    // y = s Q(x/s); y may have another storage type than x, or be Q(x/s) in a type of levels
  kStochastic,  // y = a random level of x's bracket, times s
  kSteClip,     // y = g inside the hull, 0 outside; y may be g
  kProject,     // y, in place, to the nearest feasible point
  kSoften       // x on its way to its level, eps being the slack
};
struct QuantizeArg {  // one elementwise pass over a matrix, or the sums of its rows; what a pass leaves out is null
  QuantizePass pass;
  int type, y_type;
  const void *x, *g;
  void* y;
  const float* scale;  // (rows,)
  GridArg grid;
  Matrix m;
  uint64_t seed;
  Scalar eps;
};

constexpr int kMostBuffers = 2, kMostNumbers = 4, kMostConstants = 8;  // of a rule of the update

// What cap counts a smaller lr as: with cap = inf, lr kappa would be 0 inf.
constexpr float kLeastRate = 0x1p-100f;

struct Hyper {                // one optimizer step, the same for every tensor of the list
  int rule;                   // its place among math's Rules
  float lr, eps, alpha, cap;  // cap = 1 / (4 max(lr, kLeastRate))
  bool direction, clamp, maximize, skip_nonfinite, ste_clip;
  float constants[kMostConstants];  // the rule's members
};

struct Rates {  // what Hyper follows from and may stand on the device
  Scalar lr, eps, step, alpha;
  double numbers[kMostNumbers];  // the rule's, always on the host
  bool on_device() const { return lr.device || eps.device || step.device || alpha.device; }
};

struct UpdateTensor {  // what is absent is null
  void* w;
  const void* g;
  void* state[kMostBuffers];  // the rule's buffers
  const float* scale;
  void* dequantized;  // s Q(w/s) of the weights after the step, or Q(w/s) in a type of levels
  float* row_sums;    // (rows, kRowSums) of the weights after the step
  double* totals;     // (kTotals)
  int type, dequantized_type;
  Matrix m;
  GridArg grid;
  const void* kept;   // read in place of w, whose content does not matter then
  const void* first;  // a gradient whose mean with g takes g's place
  // CPU: the copy, and the weight where it is only written, are stored without bringing their lines in first
  bool past_caches, weight_past_caches;
};

constexpr int kTrits = 0;                         // the `bits` of the format of five ternary codes a byte
constexpr int kTritsInByte = 5, kTopTrits = 242;  // 3^5 - 1; bytes above it count as it
constexpr int kInt8Top = 127;                     // activations are quantized to -127 ... 127

ASKEW_FN constexpr int64_t row_bytes(int64_t cols, int bits) {
  return bits == kTrits ? (cols + kTritsInByte - 1) / kTritsInByte : (cols * bits + 7) / 8;
}

struct PackedArg {       // a packed weight (docs/packed.md)
  const uint8_t* codes;  // (n, row_bytes)
  const float* scale;    // (1), (n) or (n * groups)
  GridArg grid;
  int bits, n_levels;                  // bits: 1 ... 8, or kTrits
  int64_t n, cols, row_bytes, groups;  // groups: scales of a row; 0: one scale for all
};
struct BandsArg {        // a packed weight in bands
  const uint8_t* codes;  // (bands, groups, blocks, words, kBandRows, 4)
  const float* scale;    // (bands, groups, kBandRows)
  int bits;
  int64_t n, cols, groups, blocks;  // groups: scales of a row, at least 1; blocks: of a group
  int lo;                           // a level is step (lo + code), with codes as products meet them
  float step;
};
struct LinearArg {  // y (batch, n) = x (batch, cols) W^T + bias (n,), all of one storage type
  PackedArg w;
  const void *x, *bias;  // bias may be null
  void* y;
  int64_t batch;
  int type;
};

struct ConvArg {  // y = convolution of x with a packed weight, whose columns are (channel, kernel), plus bias (n,)
  const void *x, *bias;  // x: (images, channels, in), y: (images, n, out); channels last of both if `channels_last`
  void* y;
  int type;
  bool channels_last;
  int64_t images, channels, in[2], out[2], kernel[2], stride[2], dilation[2], before[2];  // before: zeros around x
};

// How a weight's codes lie in tiles (docs/packed.md): the bits of an integer level's code, or 4 bits that a codebook is
// looked up by, whose levels are one number of the inputs' type or the sum of two.
enum TileForm : int {
  kTiles1 = 1,
  kTiles2 = 2,
  kTiles3 = 3,
  kTiles4 = 4,
  kTiles8 = 8,
  kTilesTable = 14,
  kTilesTable2 = 24
};
constexpr int kTileRows = 16, kTileColumns = 256;  // the columns of 16 products of the matrix units

ASKEW_FN constexpr int tile_bits(int form) { return form > kTiles8 ? 4 : form; }

// Packed codes in bands of rows, the order in which a CPU reads them (cpu/packed_bands.inl): a block of a row is 4
// columns in each of `band_vectors`, and takes `band_words` words of 32 bits.
constexpr int kBandRows = 16;
ASKEW_FN constexpr int band_vectors(int bits) { return bits == kTrits ? kTritsInByte : 8 / (bits & -bits); }
ASKEW_FN constexpr int band_words(int bits) { return bits == kTrits ? 1 : band_vectors(bits) * bits / 8; }
// The largest code that products meet: codes of one bit are doubled, trits count from 1.
ASKEW_FN constexpr int band_top(int bits) { return bits == kTrits ? 3 : bits == 1 ? 2 : (1 << bits) - 1; }

struct TilesArg {         // y (batch, n) = x (batch, cols) W^T + bias (n,), x in bfloat16 or float16
  const uint32_t* tiles;  // (n / kTileRows, cols / kTileColumns, tile_bits, 32, 4), both quotients rounded up
  const float*
      scale;  // (1), (n) or (groups, n), the latter filled up to whole tiles; groups of 16 columns and multiples
  GridArg grid;
  int form, type;
  int64_t n, cols, groups, batch;
  const void *x, *bias;  // bias may be null
  void* y;
};

constexpr int kInt32 = 5;  // of sums of products of levels, beside the storage types
struct TokenArg {          // rows of inputs as levels of a byte: q = Q(x / scale), scale = max |x| / top
  const void* x;
  void* q;
  float* scale;  // (rows,); NaN where the row is not finite, 1 where it is zero
  GridArg grid;  // kFloat: all numbers that kFloat8 holds
  float top;
  int type, levels_type;
  Matrix m;
};
struct SumsArg {  // y = sums token_scale[row] scale[col] + bias[col]
  const void* sums;
  const float *token_scale, *scale;
  const void* bias;  // may be null
  void* y;
  int sums_type, bias_type, y_type;  // sums: kInt32, kFloat32, or levels
  bool each;                         // a scale for each column, else one
  Matrix m;
};

constexpr int64_t kMostLevelColumns = 131071;  // whose products of bytes int32 holds the sum of, whatever they are
struct LevelsArg {      // y = ((q c^T) token_scale[row]) scale[col] + bias[col], q and c levels of int8
  const int8_t *q, *c;  // (rows, cols); (n, cols), or (cols, n) where it is transposed
  const float *token_scale, *scale;
  const void* bias;  // may be null
  void* y;
  int bias_type, y_type;
  bool each, transposed;  // each: a scale for each column of y, else one
  int64_t rows, cols, n;
};

constexpr int kLuqFewestBits = 2, kLuqMostBits = 6;  // of LUQ: one of the sign, the others of the exponent
struct RoundArg {  // gradients, rounded stochastically by the Philox numbers of `seed`
  const void* x;
  void* q;              // int8 levels, or the result of LUQ in the type of x
  const float* factor;  // levels: of x, one or one for each column
  float* scale;         // levels: (rows,), as in TokenArg
  uint64_t seed;
  float most;     // LUQ: max |x| of the whole tensor
  int type, top;  // LUQ: the exponent of most
  bool each;      // a factor for each column
  Matrix m;
};

enum SamPass : int {
  kSamNorm,     // sum (T g)^2
  kSamPerturb,  // kept = w, w += (c T^2 - a) g
  kSamRestore,  // w = kept
  kSamAverage   // w = (w + g) / 2, of two gradients; not where nothing was perturbed
};
struct SamTensor {
  void* w;        // average: the second gradient
  const void* g;  // average: the first gradient; unused by restore
  void* kept;     // the copy of w; unused by norm and average
  int type;
  bool adaptive;
  int64_t n;  // elements
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
  double lsq[kMostCandidates];  // what LSQ multiplies the gradient of the scales by: 1 / sqrt(cols top level)
};

// Rules of scales. kGiven: the scale is there already, and only the rows of zeros are left.
enum ScaleRule : int { kAbsmax = 0, kSawb = 1, kMean = 2, kRms = 3, kGiven = 4 };
// What scales are rounded to.
enum ScaleType : int { kScaleFloat32 = 0, kScaleBFloat16 = 1, kScaleFloat16 = 2, kScaleE8M0 = 3, kScaleE4M3 = 4 };

struct ScaleTensor {  // the scales of one tensor from the sums of its rows
  const float* sums;  // (rows, kRowSums)
  float* scale;       // (rows,)
  int64_t rows;
  double cols, c_max, first, second;  // c_max: what absmax maps the largest weight to; two factors of the rule
  int rule, type;
};

struct MseArg {  // per row, of kScaleCandidates parts of absmax's scale the one with the least squared error
  const void* w;
  const float* sums;  // (rows, kRowSums) of w
  Matrix m;
  GridArg grid;
  double c_max;
  int type, scale_type;  // of w; of the scales
  const float* unit;     // of the tensor, for kScaleE4M3
};
// Squared errors are added in one order everywhere: element i of a piece of kSumPiece columns to lane i mod
// kErrorLanes, then the lanes by halves, then the pieces, in float64.
constexpr int kScaleCandidates = 100, kErrorLanes = 8;

// How far a sum goes before it is added to others, which decides its bits: columns of a row on the CPU (a multiple of
// its loops' band), 16-byte vectors of a CUDA thread.
constexpr int64_t kSumPiece = 16384, kSumSlots = 16;

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
