// Launch parameters that differ from device to device. They decide how fast a result comes, never its bits: what the
// order of a sum depends on (the band, the pieces of a row) is not among them, but for the float products of packed
// weights, whose kernels add up in orders of their own.
// Read at the start of an operator; to be changed only while none runs.
#pragma once
#include "math/types.h"

namespace askew {

struct Tuning {
  // CPU
  int64_t prefetch_columns = 512;      // how far ahead the loops bring in what they will read
  int64_t piece_columns = kSumPiece;   // elements of a tile of the elementwise passes
  int64_t serial_elements = 32768;     // no more elements than this are not worth waking threads for
  int64_t streaming_bytes = 16 << 20;  // what is written by lists from this size on goes past the caches
  int64_t pooled_bytes = 1 << 20;      // outputs from this size on come from the output pool
  // CPU, products of packed weights: which kernel serves how many inputs (rows of x)
  int64_t panel_inputs = 5;        // from which on panels of rows are faster than reading the codes as they stand
  int64_t pair_inputs = 3;         // the same with inputs in bfloat16
  int64_t bit_table_inputs = 12;   // up to which tables of sums are faster: of weights of one bit
  int64_t table_inputs = 1;        // of two bits and of trits
  int64_t table_rows = 512;        // rows of the weight that share an input's tables, at least: of two bits
  int64_t trit_table_rows = 64;    // of trits
  int64_t library_inputs = 96;     // from which on, where there are no panels, torch's own product of decoded rows is
  int64_t shared_blocks = 4;       // int8: inputs are shared out, not rows, from so many blocks of them a thread on,
  int64_t shared_bytes = 5 << 17;  // where all codes together take no more than this
  // CUDA
  int64_t slots = kSumSlots;  // 16-byte vectors that a thread of the elementwise passes takes of a large matrix
};

inline Tuning tuning;

}  // namespace askew
