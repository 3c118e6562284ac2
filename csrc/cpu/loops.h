// The CPU loops as every instruction set offers them (raw pointers, no torch), and which of them are in use.
#pragma once
#include "../math/types.h"

namespace askew {

// A rectangle of a (rows, cols) matrix: rows [row0, row1), columns [col0, col1).
// Loops are handed whole rows, or one piece of one row.
struct Tile {
  int64_t row0, row1, col0, col1;
};

struct Loops {
  void (*quantize)(const QuantizeArg&, Tile);
  // sums: [rows of the tile][kRowSums]
  void (*row_sums)(const QuantizeArg&, Tile, double* sums);
  // The clip of kSteClip where a.y is not null; sums: [rows of the tile], LSQ's terms
  void (*scale_gradient)(const QuantizeArg&, Tile, double* sums);
  // row_sums (may be null): [rows of the tile][kRowSums], of the weights after the step; totals (may be null):
  // [kTotals], overwritten
  void (*update)(const UpdateTensor&, const Hyper&, Tile, double* row_sums, double* totals);
  // Columns of one flat tensor; the sum for kSamNorm, else 0. `past_caches`: what is only written is stored with
  // non-temporal stores, which wants the written tensors aligned to 64 bytes.
  double (*sam)(SamPass, const SamTensor&, SamArg, bool past_caches, Tile);
  // A mixture of quantizations. sums: [rows of the tile][n][2]: of G Q, and of LSQ's terms where scales are learned
  void (*mix)(const MixArg&, void* y, Tile);
  void (*mix_gradient)(const MixArg&, const void* g, void* out, Tile, double* sums);
  // Rows [row0, row1) of a tensor; whether some are marked (math/scales.inl).
  bool (*scales)(const ScaleTensor&, int64_t row0, int64_t row1);
  // errors: [rows of the tile][pieces of kSumPiece columns that the tile has of a row][kScaleCandidates]
  void (*errors)(const MseArg&, Tile, double* errors);
  // What stands before and behind products of levels. bias: float32 or null.
  void (*token_levels)(const TokenArg&, int64_t row0, int64_t row1);
  void (*scaled_sums)(const SumsArg&, const float* bias, int64_t row0, int64_t row1);
  // Gradients: row_scratch: of cols + 64 floats; elements [begin, end) of the whole; max |x|, NaN where one is.
  void (*stochastic_levels)(const RoundArg&, int64_t row0, int64_t row1, float* row_scratch);
  float (*peak)(const void* x, int type, int64_t begin, int64_t end);
  void (*luq)(const RoundArg&, int64_t begin, int64_t end);
};

struct PackedWeight : PackedArg {
  const uint8_t* digits;  // trits: (256, 8), the five codes of a byte and padding; above kTopTrits those of it
  const uint32_t* words;  // the same codes in a word, four bits each
  float table[16];        // level of the code in the low `bits` bits of the index, where there are at most 4
  float lo, hi, step;     // levels lo, lo + step … hi, but for a codebook
};

// x quantized to int8, token by token.
struct Int8Input {
  const int8_t* q;     // (batch, width)
  const float* scale;  // (batch): x = scale q
  const float* sums;   // (batch, padded groups): lo / step times the sum of q over a group
};

// The same for codes in bands.
struct BandInput {
  const int8_t* q;         // in blocks of tokens (packed_bands.inl)
  const float* scale;      // (batch)
  const int32_t* offsets;  // (batch, groups): lo times the sum of q over a group
  bool past_caches;        // results are stored with non-temporal stores, whole lines; a fence belongs behind them
};

// Patches of an image that are quantized together, one a lane; offsets: of their columns, the same for each, channel by
// channel. peaks: a plane with the largest magnitude of each pixel's channels, so that a patch's own is that of
// `peak_columns` numbers there; or the image itself, and all columns.
constexpr int kMostPatches = 16;
struct Patches {
  const float *image, *peaks;
  const int32_t* offsets;
  int64_t at[kMostPatches], peak_at[kMostPatches], peak_columns;
};

// A panel of outputs of a product of levels, laid out, and what its tiles need beside it.
struct LevelPanel {
  const uint8_t* words;
  const int8_t* q;  // rows of `stride` bytes, padded with zeros to a multiple of 4
  const int32_t* input_sums;
  const float *scale, *bias;  // of all outputs, padded; bias may be null
  int64_t first, stride;
  int lowest, span;  // of the weight's levels: the words hold level - lowest, at most span
};

// A line of a convolution with a filter for each channel; channels stand together, all in float32.
struct DepthwiseLine {
  const float* const* lines;  // kernel[0] of the input, from where the first filter begins; null: zeros
  const float* bias;          // or null
  int64_t channels, stride, dilation, kernel[2];
  bool past_caches;  // as in BandInput
};

struct PackedLoops {
  // Row r as float32 s c; `out` has room for cols rounded up to 64, the rest is set to 0. bytes: scratch of cols + 64.
  void (*decode)(const PackedWeight&, int64_t row, float* out, uint8_t* bytes);
  // The same rounded to a storage type, cols of it. floats: scratch as decode's `out`.
  void (*decode_as)(const PackedWeight&, int64_t row, int type, void* out, float* floats, uint8_t* bytes);
  void (*store)(const float* values, int64_t count, void* out, int type);
  void (*load)(const void* values, int64_t count, int type, float* out);

  // Float activations. `arrange` brings one input into the order in which the kernel meets the codes, padded with 0
  // to `width`; `multiply` then makes rows [row0, row1) of y (batch, n) = x W^T + bias. scratch: `scratch` bytes.
  int64_t (*width)(const PackedWeight&);
  void (*arrange)(const PackedWeight&, const float* x, float* out);
  int64_t (*scratch)(const PackedWeight&);
  void (*multiply)(const PackedWeight&, int64_t row0, int64_t row1, const float* x, int64_t batch, const float* bias,
                   float* y, char* scratch);

  // The same for codes of 1 and 2 bits and few inputs, where a table of all sums that four bits of codes can choose
  // from stands in the place of the input. Null where the instruction set has no 16-entry table look-up.
  int64_t (*tables_width)(const PackedWeight&);
  void (*make_tables)(const PackedWeight&, const float* x, float* out);
  void (*multiply_tables)(const PackedWeight&, int64_t row0, int64_t row1, const float* tables, int64_t batch,
                          const float* bias, float* y);

  // int8 activations, quantized by token; integer sums are exact.
  int64_t (*int8_width)(const PackedWeight&);
  void (*quantize)(const PackedWeight&, const float* x, int8_t* q, float* scale, float* sums, int8_t* scratch);
  int64_t (*int8_scratch)(const PackedWeight&);
  void (*multiply_int8)(const PackedWeight&, int64_t row0, int64_t row1, const Int8Input&, int64_t token0,
                        int64_t token1, const float* bias, float* y, char* scratch);

  // Codes of a row as bytes, padded with zeros to a multiple of 64.
  void (*unpack)(const PackedWeight&, int64_t row, uint8_t* out);
  // int8 activations times codes in bands. A block of tokens is the next `band_tokens` of those left; rows: where each
  // of them begins, q: where the block stands. scratch: a byte for each column.
  int64_t (*band_tokens)(int64_t left);
  void (*quantize_rows)(const BandsArg&, const float* const* rows, int64_t count, int8_t* q, float* scale,
                        int32_t* offsets, int8_t* scratch);
  // Numbers [begin, end) of a plane of peaks.
  void (*channel_peaks)(const float* image, int64_t channels, int64_t plane, int64_t begin, int64_t end, float* peaks);
  // As `quantize_rows`, of the patches of a block.
  void (*quantize_patches)(const BandsArg&, const Patches&, int count, int8_t* q, float* scale, int32_t* offsets);
  // `count` positions of a line, (count, channels); taps: (kernel, channels).
  void (*depthwise_line)(const DepthwiseLine&, const float* taps, int64_t count, float* y);
  // to[c to_stride + r] = from[r stride + c] for r < rows, c < cols.
  void (*transpose)(const float* from, int64_t stride, int64_t rows, int64_t cols, float* to, int64_t to_stride);
  void (*multiply_bands)(const BandsArg&, int64_t band0, int64_t band1, const BandInput&, int64_t token0,
                         int64_t token1, const float* bias, float* y);

  // Products of levels of a byte: `outputs` of them a panel, whose rows of 4 columns take 4 outputs bytes.
  int64_t outputs;
  void (*level_range)(const int8_t* c, int64_t count, int* lowest, int* highest);
  void (*lay_out_panel)(const LevelsArg&, int64_t first, int64_t count, int lowest, uint8_t* words);
  void (*multiply_levels)(const LevelsArg&, const LevelPanel&, int64_t row0, int64_t row1);
  void (*sum_levels)(const int8_t* q, int64_t rows, int64_t cols, int32_t* sums);
};

ASKEW_FN int64_t band_width(const BandsArg& w) { return w.groups * w.blocks * 4 * band_vectors(w.bits); }

// Products of several inputs by panels of rows (packed_panels.inl).
struct PanelLoops {
  int64_t few_rows, rows;  // that should stay together, of few inputs and of more
  bool (*serves)(const PackedWeight&);
  int64_t (*steps)(const PackedWeight&);  // 32-bit numbers of an input
  // A block of `count` inputs of a storage type, side by side, and zeros up to `width`; and max |x| of each, NaN where
  // one is.
  void (*arrange)(const PackedWeight&, const void* x, int type, int64_t count, int64_t width, uint32_t* out,
                  float* peaks);
  int64_t (*scratch)(const PackedWeight&, int64_t batch, int64_t inputs);
  // Rows [row0, row1) of y (batch, n) of a storage type, for the `inputs` inputs from t0 on; x: their blocks one after
  // the other.
  typedef void Multiply(const PackedWeight&, int64_t row0, int64_t row1, const uint32_t* x, int64_t t0, int64_t inputs,
                        const float* bias, void* y, int type, char* scratch);
  Multiply *multiply_few, *multiply;
};

constexpr int64_t kFewInputs = 16;                       // that meet the levels as they are decoded
constexpr int64_t kPanelInputs = 12;                     // that are multiplied at once at most where there are more
constexpr int64_t kMostOfPass = 480, kLeastOfPass = 96;  // inputs that meet a tile while it is in the cache

// More than kFewInputs inputs are cut into passes of about the same size, and a pass into blocks: as many passes as
// keep inputs in the L3 cache, or as `units` pieces of work take, `bands` a pass.
ASKEW_FN int64_t pass_count(int64_t batch, int64_t bands, int64_t units) {
  const int64_t least = (batch + kMostOfPass - 1) / kMostOfPass, most = batch / kLeastOfPass;
  const int64_t wanted = (units + bands - 1) / bands;
  return wanted > most ? (most > least ? most : least) : wanted > least ? wanted : least;
}
ASKEW_FN int64_t block_count(int64_t inputs) { return (inputs + kPanelInputs - 1) / kPanelInputs; }
ASKEW_FN int64_t block_inputs(int64_t inputs, int64_t block) {
  const int64_t blocks = block_count(inputs);
  return inputs / blocks + (block < inputs % blocks);
}
// What a block is filled up to, of `batch` inputs in all.
ASKEW_FN int64_t block_width(int64_t batch, int64_t count) {
  if (batch > kFewInputs) return count;
  return count <= 4 ? count : count <= 6 ? 6 : count <= 8 ? 8 : count <= 12 ? 12 : 16;
}

constexpr int64_t kPadding = 64;  // arrays that the packed loops read are padded to whole vectors
ASKEW_FN int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
ASKEW_FN int64_t padded_groups(const PackedWeight& w) { return rounded_up(w.groups ? w.groups : 1, 16); }

// The set in use: the best that this CPU runs, or the one that was forced (dispatch.cpp).
const Loops& loops();
const PackedLoops& packed_loops();
const PanelLoops* panel_loops(bool pairs);  // of bfloat16 pairs, or of float32; null: the set has none
const char* capability();                   // baseline, avx2 or avx512
const char* packed_capability();            // the same and, where products with int8 activations use VNNI, "_vnni"
const char* best_capability();
// The set of this name, without VNNI or bfloat16 where they are not wanted. False: unknown, not built or not supported
// by this CPU.
bool force_capability(const char* name, bool vnni, bool bf16);

}  // namespace askew
