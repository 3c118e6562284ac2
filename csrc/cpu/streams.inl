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

// Runs the loop over columns [c0, c1) of the row that starts at element `base`.
template <class Loop>
ASKEW_FN void for_columns(const Loop& loop, int64_t base, int64_t c0, int64_t c1) {
  const int64_t full = (c1 - c0) / 16 * 16;
  if (full) loop.run(base + c0, full);
  const int64_t rest = c1 - c0 - full;
  if (!rest) return;
  const int64_t first = base + c0 + full;
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

// One of the storage types, chosen at run time (outputs whose type is not a template argument).
ASKEW_FN void store_as(int type, const Stream& s, int64_t i, vf v) {
  if (type == kFloat32)
    Storage<kFloat32>::store(s.at<float>(i), v);
  else if (type == kBFloat16)
    Storage<kBFloat16>::store(s.at<uint16_t>(i), v);
  else
    Storage<kFloat16>::store(s.at<uint16_t>(i), v);
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
