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
#include "../math/portability.h"
#include "../tuning.h"

#include <initializer_list>  // braces in range-for; declares no function that could be linked

namespace askew {
namespace ASKEW_ISA {

#include "../math/scalar.inl"
#include "vec.inl"
#include "../math/math.inl"

#include "streams.inl"
#include "sums.inl"
#include "quantize.inl"

#define ASKEW_BY_GRID(GRID, CALL) \
  switch ((GRID).kind) {          \
    case kUniform: {              \
      typedef UniformGrid Grid;   \
      CALL;                       \
      break;                      \
    }                             \
    case kBinary: {               \
      typedef BinaryGrid Grid;    \
      CALL;                       \
      break;                      \
    }                             \
    default: {                    \
      typedef CodebookGrid Grid;  \
      CALL;                       \
      break;                      \
    }                             \
  }
#define ASKEW_BY_TYPE(TYPE, CALL)  \
  switch (TYPE) {                  \
    case kFloat32: {               \
      constexpr int T = kFloat32;  \
      CALL;                        \
      break;                       \
    }                              \
    case kBFloat16: {              \
      constexpr int T = kBFloat16; \
      CALL;                        \
      break;                       \
    }                              \
    default: {                     \
      constexpr int T = kFloat16;  \
      CALL;                        \
      break;                       \
    }                              \
  }

#include "sam.inl"
#include "mix.inl"
#include "update.inl"

// ---- choosing the template: storage type x grid (x rule) ----------------------------------------------------

template <class Loop>
ASKEW_FN void for_tile(int64_t cols, Tile t, const float* scale, const GridArg& grid, Loop loop) {
  for (int64_t r = t.row0; r < t.row1; ++r) {
    loop.row = make_row(vf{} + scale[r], decltype(loop.row.grid)::make(grid));
    for_columns(loop, r * cols, t.col0, t.col1);
  }
}

static void fake_quantize(const void* x, int x_type, void* y, int y_type, const float* scale, GridArg g, int64_t cols,
                          Tile t) {
  const Stream in{(void*)x, type_size(x_type), false}, out{y, type_size(y_type), true};
  ASKEW_BY_TYPE(x_type, ASKEW_BY_GRID(g, (for_tile(cols, t, scale, g, QuantizeLoop<T, Grid>{{in, out}, y_type, {}}))))
}

static void stochastic_quantize(const void* x, int x_type, void* y, int y_type, const float* scale, GridArg g,
                                int64_t cols, Tile t, uint64_t seed) {
  const Stream in{(void*)x, type_size(x_type), false}, out{y, type_size(y_type), true};
  ASKEW_BY_TYPE(x_type,
                ASKEW_BY_GRID(g, (for_tile(cols, t, scale, g, StochasticLoop<T, Grid>{{in, out}, y_type, {}, seed}))))
}

static void ste_clip(const void* grad, const void* x, int type, void* out, const float* scale, GridArg g, int64_t cols,
                     Tile t) {
  const int size = type_size(type);
  const Stream in{(void*)grad, size, false}, point{(void*)x, size, false}, result{out, size, true};
  ASKEW_BY_TYPE(type, ASKEW_BY_GRID(g, (for_tile(cols, t, scale, g, SteClipLoop<T, Grid>{{in, point, result}, {}}))))
}

static void project(void* w, int type, const float* scale, GridArg g, float eps, int64_t cols, Tile t) {
  const float radius = feasible_radius(eps);
  const Stream s{w, type_size(type), true};
  ASKEW_BY_TYPE(type, ASKEW_BY_GRID(g, (for_tile(cols, t, scale, g, ProjectLoop<T, Grid>{{s}, radius, {}}))))
}

static void row_sums(const void* x, int type, int64_t cols, Tile t, double* sums) {
  ASKEW_BY_TYPE(type, row_sums_typed<T>(x, cols, t, sums))
}

static const Loops table = {ASKEW_ISA_NAME, fake_quantize, stochastic_quantize, ste_clip,    project,     row_sums,
                            update,         sam_norm,      sam_perturb,         sam_restore, sam_average, mix,
                            mix_gradient};

}  // namespace ASKEW_ISA
}  // namespace askew
