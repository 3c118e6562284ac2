// The CPU loops, included once per instruction set with ASKEW_LANES (floats per vector) and ASKEW_ISA (a
// namespace) defined. Sees no torch header and no standard library, so that nothing compiled for AVX-512 can be
// picked by the linker for an older CPU.
//
// A loop is a struct with its streams (what it reads and writes) and run(i, n): columns i ... i + n of the streams,
// n a multiple of 16. for_columns feeds it a row; the last columns of a row, fewer than 16, go through a padded
// stage, so every loop is written once.
//
// Sums are the same on every instruction set: 16 float lanes (16 / ASKEW_LANES vectors) collect at most kBand
// columns, then go to 16 double lanes, which one fixed tree adds up at the end of the tile's row.
#include "loops.h"
#include "../math/choose.h"
#include "../tuning.h"

#include <initializer_list>  // braces in range-for; declares no function that could be linked

namespace askew {
namespace ASKEW_ISA {

#include "vec.inl"
#include "../math/math.inl"
typedef CodebookGrid Codebook;

#include "streams.inl"
#include "sums.inl"
#include "quantize.inl"
#include "sam.inl"
#include "mix.inl"
#include "update.inl"
#include "scales.inl"
#include "lowbit.inl"

extern const Loops loops = {quantize,    row_sums,          scale_gradient, update, sam,
                            mix,         mix_gradient,      scales,         errors, token_levels,
                            scaled_sums, stochastic_levels, peak,           luq};

}  // namespace ASKEW_ISA
}  // namespace askew
