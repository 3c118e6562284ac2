// Packed weights as every instruction set reads them: raw pointers, no torch. The format is docs/packed.md.
#pragma once
#include "../math/types.h"

namespace askew {

struct PackedWeight : PackedArg {
  const uint8_t* digits;  // bits == 0: (256, 8), the five codes of a byte and padding; above 242 those of 242
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

struct PackedLoops {
  // Row r as float32 s c, rounded to the storage type; `out` has room for cols rounded up to 64, the rest is set to 0.
  // bytes: scratch of cols + 64.
  void (*decode)(const PackedWeight&, int64_t row, int type, float* out, uint8_t* bytes);
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
};

constexpr int64_t kPadding = 64;  // arrays that the loops read are padded to whole vectors
inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t padded_groups(const PackedWeight& w) { return rounded_up(w.groups ? w.groups : 1, 16); }

const PackedLoops* packed_baseline();
const PackedLoops* packed_avx2();         // null where the compiler target has no AVX2
const PackedLoops* packed_avx512();       // null where the compiler target has no AVX-512
const PackedLoops* packed_avx512_vnni();  // the same with the VNNI instructions for int8 activations

}  // namespace askew
