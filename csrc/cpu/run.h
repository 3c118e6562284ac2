// How the CPU operators divide their work over torch's own threads, and put sums together.
//
// Work is divided by the shapes alone (never by the thread count), and partial sums are added in the order of the
// pieces: results are the same bits for any number of threads.
#pragma once
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
    pieces_per_row = cols > 2 * piece ? (cols + piece - 1) / piece : cols > 0;
    rows_per_band = pieces_per_row == 1 ? (piece + cols - 1) / cols : 1;
    tiles = pieces_per_row == 1 ? (rows + rows_per_band - 1) / rows_per_band : rows * pieces_per_row;
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

// body(number of the matrix, tile of it, number of the tile among the matrix's)
template <class F>
inline void over_list(const Tiling* list, size_t n, const F& body) {
  int64_t tiles = 0, elements = 0;
  for (const Tiling* t = list; t < list + n; ++t) {
    tiles += t->tiles;
    elements += t->rows * t->cols;
  }
  const auto run = [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // tile of the matrix
    size_t j = 0;
    for (int64_t i = begin; i < end; ++i) {
      for (; i >= first + list[j].tiles; ++j) first += list[j].tiles;
      body(j, list[j][i - first], i - first);
    }
  };
  if (elements <= tuning.serial_elements || tiles <= 1)
    run(0, tiles);
  else
    torch::stable::parallel_for(0, tiles, 1, run);
}

// body(tile, its number)
template <class F>
inline void over_matrix(const Tiling& tiling, const F& body) {
  over_list(&tiling, 1, [&](size_t, Tile t, int64_t i) { body(t, i); });
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
  static Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape) {
    return pooled_empty(like, {shape.begin(), shape.size()});
  }
  static Tensor empty_like(const Tensor& t) { return pooled_empty(t, t.sizes()); }
};

}  // namespace askew
