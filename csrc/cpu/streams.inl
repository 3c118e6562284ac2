// Streams of a row and the loop over its columns: what every loop of the CPU is made of.

#define ASKEW_LOOP __attribute__((noinline))

constexpr int kVectors = 16 / ASKEW_LANES;  // vectors in a stripe of 16 columns
constexpr int64_t kBand = 512;              // columns that a chain of loops takes while they stay in the L1 cache

struct Stream {
  void* data;
  int size;  // bytes of an element
  bool written;
  template <class S>
  ASKEW_INLINE S* at(int64_t i) const {
    return (S*)data + i;
  }
};

struct Columns {  // `count` of them from element `first` on
  int64_t first, count;
};

template <class Loop>
ASKEW_FN void for_columns(const Loop& loop, Columns c) {
  const int64_t full = c.count / 16 * 16, rest = c.count - full, first = c.first + full;
  if (full) loop.run(c.first, full);
  if (!rest) return;
  Loop staged = loop;
  alignas(64) char stage[Loop::kStreams][64] = {};
  for (int k = 0; k < Loop::kStreams; ++k) {
    if (!loop.streams[k].data) continue;
    __builtin_memcpy(stage[k], (const char*)loop.streams[k].data + first * loop.streams[k].size,
                     rest * loop.streams[k].size);
    staged.streams[k].data = stage[k] - first * loop.streams[k].size;  // run() sees the row's own indices
  }
  staged.run(first, 16);
  for (int k = 0; k < Loop::kStreams; ++k)
    if (loop.streams[k].data && loop.streams[k].written)
      __builtin_memcpy((char*)loop.streams[k].data + first * loop.streams[k].size, stage[k],
                       rest * loop.streams[k].size);
}

// body(columns) for each band of the tile in the row that starts at element `base`.
template <class Body>
ASKEW_FN void for_bands(int64_t base, Tile t, const Body& body) {
  for (int64_t c = t.col0; c < t.col1; c += kBand) body(Columns{base + c, c + kBand < t.col1 ? kBand : t.col1 - c});
}

// One of the storage types, chosen at run time (outputs whose type is not a template argument).
ASKEW_FN void store_as(int type, const Stream& s, int64_t i, vf v) {
  if (type == kFloat32)
    Storage<kFloat32>::store(s.at<float>(i), v);
  else if (type == kBFloat16)
    Storage<kBFloat16>::store(s.at<uint16_t>(i), v);
  else if (type == kFloat16)
    Storage<kFloat16>::store(s.at<uint16_t>(i), v);
  else if (type == kInt8)
    Storage<kInt8>::store(s.at<uint8_t>(i), v);
  else
    Storage<kFloat8>::store(s.at<uint8_t>(i), v);
}
template <int T>
ASKEW_FN vf load(const Stream& s, int64_t i) {
  return Storage<T>::load(s.at<typename Storage<T>::type>(i));
}
template <int T>
ASKEW_FN void store(const Stream& s, int64_t i, vf v) {
  Storage<T>::store(s.at<typename Storage<T>::type>(i), v);
}
template <int T>
ASKEW_FN void load(const Stream& s, int64_t i, vf& v) {
  v = load<T>(s, i);
}
template <int T>
ASKEW_FN void load(const Stream& s, int64_t i, Pair& v) {
  v = {load<T>(s, i), load<T>(s, i + ASKEW_LANES)};
}
template <int T>
ASKEW_FN void store(const Stream& s, int64_t i, Pair v) {
  store<T>(s, i, v.lo);
  store<T>(s, i + ASKEW_LANES, v.hi);
}
// Brings in what stands `ahead` columns later, so that memory keeps busy during the arithmetic. Never of null: that
// costs a failed page walk.
template <int T>
ASKEW_FN void prefetch(const Stream& s, int64_t i, int64_t ahead) {
  __builtin_prefetch(s.at<typename Storage<T>::type>(i + ahead));
}
template <class Grid>
ASKEW_FN Row<Pair, Grid> pair_of(const Row<vf, Grid>& r) {
  return {r.grid, {{r.scale.value, r.scale.value}, r.scale}, {r.low, r.low}, {r.high, r.high}};
}
// What most loops are: body(streams, i, row) for every vector of columns, none of which sees another. The first AHEAD
// streams are read ahead. The row stands beside the body, not in it, so that it can be replaced without a copy of
// everything, which would cost more than a short row.
#define ASKEW_VECTOR [=](const Stream* s, int64_t i, [[maybe_unused]] const auto& row) __attribute__((always_inline))
struct NoRow {};
template <int T, int AHEAD, class R, int N, class Body>
struct VectorLoop {
  static constexpr int kStreams = N;
  Stream streams[N];
  Body body;
  R row;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const VectorLoop l = *this;  // what a store cannot change
    const int64_t ahead = tuning.prefetch_columns;
    for (const int64_t end = i + n; i < end; i += ASKEW_LANES) {
      for (int k = 0; k < AHEAD; ++k) prefetch<T>(l.streams[k], i, ahead);
      l.body(l.streams, i, l.row);
    }
  }
};
template <int T, int AHEAD = 0, class R = NoRow, int N, class Body>
ASKEW_FN VectorLoop<T, AHEAD, R, N, Body> vector_loop(const Stream (&streams)[N], const Body& body) {
  VectorLoop<T, AHEAD, R, N, Body> loop{{}, body, {}};
  for (int k = 0; k < N; ++k) loop.streams[k] = streams[k];
  return loop;
}
