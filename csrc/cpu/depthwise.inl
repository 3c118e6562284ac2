// A filter for each channel, in float32: neighbours in memory are channels, and the lanes of a vector. A few positions
// of a line are made together, for which a weight is read once.

template <int COUNT>
ASKEW_FN void depthwise_positions(const DepthwiseLine& l, const float* taps, int64_t first, int64_t c, float* y) {
  const int64_t step = l.stride * l.channels;
  vf sum[COUNT];
  const vf begin = l.bias ? Floats::load(l.bias + c) : vf{};
  ASKEW_EACH (p, COUNT) sum[p] = begin;
  for (int64_t i = 0; i < l.kernel[0]; ++i) {
    if (!l.lines[i]) continue;  // of zeros
    const float *x = l.lines[i] + first * step + c, *tap = taps + i * l.kernel[1] * l.channels + c;
    for (int64_t j = 0; j < l.kernel[1]; ++j, x += l.dilation * l.channels, tap += l.channels) {
      const vf w = Floats::load(tap);
      ASKEW_EACH (p, COUNT) sum[p] = multiply_add(Floats::load(x + p * step), w, sum[p]);
    }
  }
  ASKEW_EACH (p, COUNT) store_whole(y + (first + p) * l.channels + c, sum[p], l.past_caches);
}

// Channels that fill no vector.
ASKEW_FN void depthwise_rest(const DepthwiseLine& l, const float* taps, int64_t position, int64_t c, float* y) {
  vf sum = vf{};
  const int64_t rest = l.channels - c;
  const auto few = [&](const float* p) __attribute__((always_inline)) {
    vf v = vf{};
    __builtin_memcpy(&v, p, rest * sizeof(float));
    return v;
  };
  if (l.bias) sum = few(l.bias + c);
  for (int64_t i = 0; i < l.kernel[0]; ++i)
    for (int64_t j = 0; l.lines[i] && j < l.kernel[1]; ++j)
      sum = multiply_add(few(l.lines[i] + (position * l.stride + j * l.dilation) * l.channels + c),
                         few(taps + (i * l.kernel[1] + j) * l.channels + c), sum);
  store_first(y + position * l.channels + c, sum, (int)rest);
}

static void depthwise_line(const DepthwiseLine& line, const float* taps, int64_t count, float* y) {
  const DepthwiseLine l = line;  // a copy that the stores cannot change
  const int64_t whole = l.channels / ASKEW_LANES * ASKEW_LANES;
  for (int64_t first = 0; first < count;) {
    const int64_t left = count - first, together = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
#define ASKEW_POSITIONS(N) \
  if (together == N)       \
    for (int64_t c = 0; c < whole; c += ASKEW_LANES) depthwise_positions<N>(l, taps, first, c, y);
    ASKEW_POSITIONS(8)
    ASKEW_POSITIONS(4)
    ASKEW_POSITIONS(2)
    ASKEW_POSITIONS(1)
#undef ASKEW_POSITIONS
    for (int64_t p = 0; whole < l.channels && p < together; ++p) depthwise_rest(l, taps, first + p, whole, y);
    first += together;
  }
}
