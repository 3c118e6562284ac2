// Sums of rows, the same bits on every instruction set.

struct Lanes16 {  // float lanes of one band, double lanes of one row
  vf now[kVectors];
  double total[16];
};
ASKEW_FN void flush(Lanes16& s) {
  for (int k = 0; k < kVectors; ++k) {
    float t[ASKEW_LANES];
    __builtin_memcpy(t, &s.now[k], sizeof t);
    for (int i = 0; i < ASKEW_LANES; ++i) s.total[k * ASKEW_LANES + i] += (double)t[i];
    s.now[k] = vf{};
  }
}
ASKEW_FN double finish(Lanes16& s) {
  flush(s);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) s.total[i] += s.total[i + width];
  return s.total[0];
}

struct RowSums {
  Lanes16 abs, squares;
  vf peak[kVectors];
};
ASKEW_FN void flush(RowSums& s) {
  flush(s.abs);
  flush(s.squares);
}
// ``finish`` of lanes that were never flushed, in registers: what a group of 32 costs is its sums' end.
ASKEW_FN double finish_band(const Lanes16& s) {
  float now[16];
  __builtin_memcpy(now, s.now, sizeof now);
  double total[16];
  for (int i = 0; i < 16; ++i) total[i] = (double)now[i];
  for (int i = 0; i < 8; ++i) total[i] += total[i + 8];
  for (int i = 0; i < 4; ++i) total[i] += total[i + 4];
  return (total[0] + total[2]) + (total[1] + total[3]);
}
ASKEW_FN void finish(RowSums& s, double* out, bool one_band) {
  out[kSumAbs] = one_band ? finish_band(s.abs) : finish(s.abs);
  out[kSumSquares] = one_band ? finish_band(s.squares) : finish(s.squares);
  float m = 0;
  for (int k = 0; k < kVectors; ++k)
    for (int i = 0; i < ASKEW_LANES; ++i) m = s.peak[k][i] > m ? s.peak[k][i] : m;
  out[kMaxAbs] = out[kSumAbs] == out[kSumAbs] ? (double)m : out[kSumAbs];  // the peak passes over NaN, the sum does not
}

// One vector's part of a band's sums, in registers while a loop runs.
struct VectorSums {
  vf abs{}, squares{}, peak{};
};
ASKEW_FN void add(VectorSums& s, vf w) {
  const vf a = absolute(w);
  s.abs += a;
  s.squares += w * w;
  s.peak = greater(a, s.peak);
}
ASKEW_FN void add(RowSums* to, const VectorSums* vectors) {
  for (int k = 0; k < kVectors; ++k) {
    to->abs.now[k] += vectors[k].abs;
    to->squares.now[k] += vectors[k].squares;
    to->peak[k] = select(vectors[k].peak > to->peak[k], vectors[k].peak, to->peak[k]);
  }
}

template <int T>
struct RowSumsLoop {
  static constexpr int kStreams = 1;
  Stream streams[kStreams];
  RowSums* sums;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const Stream x = streams[0];
    VectorSums vectors[kVectors];
    for (const int64_t end = i + n; i < end; i += 16)
      for (int k = 0; k < kVectors; ++k) add(vectors[k], load<T>(x, i + k * ASKEW_LANES));
    add(sums, vectors);
  }
};

template <int T>
void row_sums_typed(const void* x, int64_t cols, Tile t, double* out) {
  const bool one_band = t.col1 - t.col0 <= kBand;
  for (int64_t r = t.row0; r < t.row1; ++r, out += kRowSums) {
    RowSums sums{};
    const RowSumsLoop<T> loop{{{(void*)x, type_size(T), false}}, &sums};
    for_bands(r * cols, t, [&](Columns c) {
      for_columns(loop, c);
      if (!one_band) flush(sums);
    });
    finish(sums, out, one_band);
  }
}

static void row_sums(const QuantizeArg& a, Tile t, double* out) {
  ASKEW_BY_TYPE(a.type, row_sums_typed<T>(a.x, a.m.cols, t, out))
}
