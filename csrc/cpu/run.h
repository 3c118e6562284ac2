// How the CPU operators divide their work over torch's own threads, and put sums together.
//
// Work is divided by the shapes alone (never by the thread count), and partial sums are added in the order of the
// pieces: results are the same bits for any number of threads.
#pragma once
#include <cstring>

#include "../ops/tensors.h"
#include "../tuning.h"
#include "loops.h"
#include "output_pool.h"

namespace askew {

// A (rows, cols) matrix cut into tiles: pieces of long rows, or bands of short rows, `piece` elements each or a little
// more. Where sums are taken the piece decides their bits and is kSumPiece.
struct Tiling {
  int64_t rows, cols, piece, pieces_per_row, rows_per_band, tiles;
  explicit Tiling(Matrix m, int64_t piece = kSumPiece) : rows(m.rows), cols(m.cols), piece(piece) {
    if (rows == 0 || cols == 0) rows = cols = 0;
    pieces_per_row = cols > 2 * piece ? (cols + piece - 1) / piece : 1;
    rows_per_band = pieces_per_row > 1 || cols == 0 ? 1 : (piece + cols - 1) / cols;
    tiles = pieces_per_row > 1 ? rows * pieces_per_row : (rows + rows_per_band - 1) / rows_per_band;
  }
  Tile operator[](int64_t i) const {
    if (pieces_per_row > 1) {
      const int64_t row = i / pieces_per_row, first = (i % pieces_per_row) * piece;
      return {row, row + 1, first, first + piece < cols ? first + piece : cols};
    }
    const int64_t first = i * rows_per_band;
    return {first, first + rows_per_band < rows ? first + rows_per_band : rows, 0, cols};
  }
  // Where the partial sums of tile i start, counted in rows: those of a row's pieces stand side by side.
  int64_t partial(int64_t i) const { return pieces_per_row > 1 ? i : i * rows_per_band; }
  int64_t partials() const { return rows * pieces_per_row; }
};

template <class F>
inline void for_tiles(int64_t tiles, int64_t elements, const F& f) {
  if (elements <= tuning.serial_elements || tiles <= 1) {
    f(0, tiles);
    return;
  }
  torch::stable::parallel_for(0, tiles, 1, f);
}

// body(tile, its number)
template <class F>
inline void over_matrix(const Tiling& tiling, const F& body) {
  for_tiles(tiling.tiles, tiling.rows * tiling.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(tiling[i], i);
  });
}

// Adds a tile's sums to those of its row, in the order of the pieces.
inline void gather_row_sums(const Tiling& tiling, const double* partial, float* out) {
  for (int64_t row = 0; row < tiling.rows; ++row, out += kRowSums) {
    double s[kRowSums] = {0, 0, 0};
    for (int64_t p = 0; p < tiling.pieces_per_row; ++p, partial += kRowSums) {
      s[kSumAbs] += partial[kSumAbs];
      s[kSumSquares] += partial[kSumSquares];
      if (!(partial[kMaxAbs] <= s[kMaxAbs])) s[kMaxAbs] = s[kMaxAbs] != s[kMaxAbs] ? s[kMaxAbs] : partial[kMaxAbs];
    }
    for (int j = 0; j < kRowSums; ++j) out[j] = (float)s[j];
  }
}

// What every operator's `Device` on the CPU has.
struct OnCpu {
  explicit OnCpu(const Tensor&) {}
  Tensor empty_like(const Tensor& t) const { return pooled_empty_like(t); }
};

}  // namespace askew
