// Launch parameters that differ from device to device. They decide how fast a result comes, never its bits: what the
// order of a sum depends on (the band, the pieces of a row) is not among them.
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
  // CUDA
  int64_t slots = kSumSlots;  // 16-byte vectors that a thread of the elementwise passes takes of a large matrix
};

inline Tuning tuning;

}  // namespace askew
