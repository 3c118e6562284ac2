// What stands before and behind products of levels of a byte, and stochastic rounding of gradients.

// ---- the largest magnitude ------------------------------------------------------------------------------------------

// Magnitudes as bits: above those of inf is NaN.
ASKEW_FN void raise(vi& most, vf x) {
  const vi bits = (vi)x & 0x7fffffff;
  most = bits > most ? bits : most;
}

template <int T>
struct PeakLoop {
  static constexpr int kStreams = 1;
  Stream streams[kStreams];
  vi* most;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const Stream x = streams[0];
    vi now[kVectors];
    for (int k = 0; k < kVectors; ++k) now[k] = *most;
    for (const int64_t end = i + n; i < end; i += 16)
      for (int k = 0; k < kVectors; ++k) raise(now[k], load<T>(x, i + k * ASKEW_LANES));
    for (int k = 0; k < kVectors; ++k) *most = now[k] > *most ? now[k] : *most;
  }
};

template <int T>
ASKEW_FN float peak_of(const void* x, Columns columns) {
  vi most{};
  for_columns(PeakLoop<T>{{{(void*)x, type_size(T), false}}, &most}, columns);
  int32_t bits = 0;
  for (int i = 0; i < ASKEW_LANES; ++i) bits = most[i] > bits ? most[i] : bits;
  float peak;
  __builtin_memcpy(&peak, &bits, 4);
  return peak;
}

static float peak(const void* x, int type, int64_t begin, int64_t end) {
  ASKEW_BY_TYPE(type, return peak_of<T>(x, {begin, end - begin}))
  return 0.f;
}

// s = peak / top, 1 where that is 0, NaN where the peak is not finite.
ASKEW_FN float level_scale(float peak, float top) {
  if (!(peak < __builtin_inff())) return __builtin_nanf("");
  const float scale = peak / top;
  return scale == 0.f ? 1.f : scale;
}

// ---- levels of inputs -----------------------------------------------------------------------------------------------

template <class Grid>
ASKEW_FN vf level_of_input(vf x, const Row<vf, Grid>& row, float) {
  return nearest_level(x, row);
}
ASKEW_FN vf level_of_input(vf x, const Row<vf, FloatGrid>& row, float top) {
  return clamp_between(divide(x, row.scale), vf{} - top, vf{} + top);
}

template <int T, class Grid>
void token_levels_typed(const TokenArg& a, int64_t row0, int64_t row1) {
  const int type = a.levels_type;
  const float top = a.top;
  auto loop = vector_loop<T, 0, Row<vf, Grid>>(
      {{(void*)a.x, type_size(T), false}, {a.q, 1, true}},
      ASKEW_VECTOR { store_as(type, s[1], i, level_of_input(load<T>(s[0], i), row, top)); });
  for (int64_t r = row0; r < row1; ++r) {
    const Columns columns{r * a.m.cols, a.m.cols};
    a.scale[r] = level_scale(peak_of<T>(a.x, columns), top);
    loop.row = make_row(vf{} + a.scale[r], Grid::make(a.grid));
    for_columns(loop, columns);
  }
}

static void token_levels(const TokenArg& a, int64_t row0, int64_t row1) {
  ASKEW_BY_TYPE(a.type, if (a.grid.kind == kFloat) return token_levels_typed<T, FloatGrid>(a, row0, row1);
                ASKEW_BY_GRID(a.grid.kind, return token_levels_typed<T, Grid>(a, row0, row1)))
}

// ---- outputs from sums ----------------------------------------------------------------------------------------------

ASKEW_FN vf widen_e4m3(vu code) {  // its bits in the place of float32's, where they count 2^120 less
  const vf v = (vf)((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f;
  return select((vi)(code & 0x7fu) == 0x7f, vf{} + __builtin_nanf(""), v);
}

template <int S>
ASKEW_FN vf load_sums(const Stream& s, int64_t i) {
  if constexpr (S == kInt32) {
    vi v;
    __builtin_memcpy(&v, s.at<int32_t>(i), sizeof v);
    return __builtin_convertvector(v, vf);
  } else if constexpr (S == kInt8) {
    typedef int8_t Bytes __attribute__((vector_size(ASKEW_LANES)));
    Bytes v;
    __builtin_memcpy(&v, s.at<int8_t>(i), sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, vi), vf);
  } else if constexpr (S == kFloat8) {
    vb v;
    __builtin_memcpy(&v, s.at<uint8_t>(i), sizeof v);
    return widen_e4m3(__builtin_convertvector(v, vu));
  } else {
    return load<kFloat32>(s, i);
  }
}

struct OfToken {
  vf scale, of_all;  // of_all: where outputs share one scale
};

template <int S>
void scaled_sums_typed(const SumsArg& a, const float* bias, int64_t row0, int64_t row1) {
  const int y_type = a.y_type, size = S == kInt8 || S == kFloat8 ? 1 : 4;
  auto loop = vector_loop<kFloat32, 0, OfToken>(
      {{(void*)a.sums, size, false}, {a.y, type_size(y_type), true}, {nullptr, 4, false}, {nullptr, 4, false}},
      ASKEW_VECTOR {
        vf y = load_sums<S>(s[0], i) * row.scale;
        y = y * (s[2].data ? load<kFloat32>(s[2], i) : row.of_all);
        if (s[3].data) y = y + load<kFloat32>(s[3], i);
        store_as(y_type, s[1], i, y);
      });
  for (int64_t r = row0; r < row1; ++r) {
    const int64_t base = r * a.m.cols;  // the scales' and the bias's columns under the row's own indices
    loop.row = {vf{} + a.token_scale[r], vf{} + (a.each ? 1.f : a.scale[0])};
    if (a.each) loop.streams[2].data = (char*)a.scale - base * 4;
    if (bias) loop.streams[3].data = (char*)bias - base * 4;
    for_columns(loop, {base, a.m.cols});
  }
}

static void scaled_sums(const SumsArg& a, const float* bias, int64_t row0, int64_t row1) {
  switch (a.sums_type) {
    case kInt32:
      return scaled_sums_typed<kInt32>(a, bias, row0, row1);
    case kInt8:
      return scaled_sums_typed<kInt8>(a, bias, row0, row1);
    case kFloat8:
      return scaled_sums_typed<kFloat8>(a, bias, row0, row1);
    default:
      return scaled_sums_typed<kFloat32>(a, bias, row0, row1);
  }
}

// ---- stochastic rounding
// ----------------------------------------------------------------------------------------------

// Low and high words of a b, lane by lane.
ASKEW_FN void wide_product(vu a, uint32_t b, vu& low, vu& high) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  const __m512i by = _mm512_set1_epi64(b), even = _mm512_mul_epu32((__m512i)a, by);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), by);
  low = (vu)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = (vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif ASKEW_LANES == 8 && defined(__AVX2__)
  const __m256i by = _mm256_set1_epi64x(b), even = _mm256_mul_epu32((__m256i)a, by);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), by);
  low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < ASKEW_LANES; ++i) {
    const uint64_t p = (uint64_t)a[i] * b;
    low[i] = (uint32_t)p;
    high[i] = (uint32_t)(p >> 32);
  }
#endif
}

// The four words of ASKEW_LANES blocks from `first` on, one after the other.
ASKEW_FN void philox_blocks(uint64_t seed, uint64_t first, vu (&out)[4]) {
  vu offset;  // so that a transposition of each four lanes leaves the blocks in order
  ASKEW_EACH (i, ASKEW_LANES) offset[i] = (i & 3) * (ASKEW_LANES / 4) + (i >> 2);
  vu c[4] = {(uint32_t)first + offset};
  c[1] = (uint32_t)(first >> 32) - (vu)(c[0] < (uint32_t)first);  // a comparison that holds is -1
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vu low0, high0, low1, high1;
    wide_product(c[0], 0xD2511F53u, low0, high0);
    wide_product(c[2], 0xCD9E8D57u, low1, high1);
    c[0] = high1 ^ c[1] ^ k0;
    c[2] = high0 ^ c[3] ^ k1;
    c[1] = low1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
#if ASKEW_LANES == 16 && defined(__AVX512F__)
#define ASKEW_UNPACK(NAME, A, B) _mm512_##NAME((__m512i)(A), (__m512i)(B))
#elif ASKEW_LANES == 8 && defined(__AVX2__)
#define ASKEW_UNPACK(NAME, A, B) _mm256_##NAME((__m256i)(A), (__m256i)(B))
#endif
#if defined(ASKEW_UNPACK)
  const auto first_low = ASKEW_UNPACK(unpacklo_epi32, c[0], c[1]),
             first_high = ASKEW_UNPACK(unpackhi_epi32, c[0], c[1]);
  const auto last_low = ASKEW_UNPACK(unpacklo_epi32, c[2], c[3]), last_high = ASKEW_UNPACK(unpackhi_epi32, c[2], c[3]);
  out[0] = (vu)ASKEW_UNPACK(unpacklo_epi64, first_low, last_low);
  out[1] = (vu)ASKEW_UNPACK(unpackhi_epi64, first_low, last_low);
  out[2] = (vu)ASKEW_UNPACK(unpacklo_epi64, first_high, last_high);
  out[3] = (vu)ASKEW_UNPACK(unpackhi_epi64, first_high, last_high);
#undef ASKEW_UNPACK
#else
  for (int r = 0; r < 4; ++r)
    for (int i = 0; i < ASKEW_LANES; ++i) out[r][i] = c[i & 3][(i >> 2) * 4 + r];
#endif
}

constexpr int64_t kUniforms = kBand + 4 * ASKEW_LANES + 4;
// The uniforms of elements from `first` on, at least `count` (up to kBand) of them: where in `room` the first stands.
ASKEW_FN const float* uniforms(uint64_t seed, int64_t first, int64_t count, float (&room)[kUniforms]) {
  const int64_t before = first & 3;
  for (int64_t done = 0; done < before + count; done += 4 * ASKEW_LANES) {
    vu words[4];
    philox_blocks(seed, (uint64_t)((first + done) >> 2), words);
    ASKEW_EACH (r, 4) {
      const vf u = __builtin_convertvector((vi)(words[r] >> 8), vf) * 0x1p-24f;
      __builtin_memcpy(room + done + r * ASKEW_LANES, &u, sizeof u);
    }
  }
  return room + before;
}

// body(columns, their uniforms) for each band of elements [begin, end).
template <class Body>
ASKEW_FN void for_random_bands(uint64_t seed, int64_t begin, int64_t end, const Body& body) {
  alignas(64) float room[kUniforms];
  for (int64_t i = begin; i < end; i += kBand) {
    const Columns columns{i, end - i < kBand ? end - i : kBand};
    body(columns, uniforms(seed, i, columns.count, room));
  }
}

template <int T>
void stochastic_levels_typed(const RoundArg& a, int64_t row0, int64_t row1, float* v) {
  const int64_t cols = a.m.cols;
  const bool each = a.each;
  constexpr float top = kInt8Top;
  const float one = each ? 1.f : a.factor[0];
  auto multiplied = vector_loop<T, 0>(
      {{(void*)a.x, type_size(T), false}, {nullptr, 4, false}, {nullptr, 4, true}},
      ASKEW_VECTOR { store<kFloat32>(s[2], i, load<T>(s[0], i) * (each ? load<kFloat32>(s[1], i) : vf{} + one)); });
  auto rounded = vector_loop<kFloat32, 0, OfToken>(
      {{nullptr, 4, false}, {nullptr, 4, false}, {a.q, 1, true}}, ASKEW_VECTOR {
        const vf x = clamp_between(load<kFloat32>(s[0], i) / row.scale, vf{} - top, vf{} + top);
        const vf near = round_even(x), low = select(near > x, near - 1.f, near);
        store<kInt8>(s[2], i, select(load<kFloat32>(s[1], i) < x - low, low + 1.f, low));
      });
  for (int64_t r = row0; r < row1; ++r) {
    const int64_t base = r * cols;
    if (each) multiplied.streams[1].data = (char*)a.factor - base * 4;
    multiplied.streams[2].data = rounded.streams[0].data = (char*)v - base * 4;
    for_columns(multiplied, {base, cols});
    a.scale[r] = level_scale(peak_of<kFloat32>(v, {0, cols}), top);
    rounded.row.scale = vf{} + a.scale[r];
    for_random_bands(a.seed, base, base + cols, [&](Columns columns, const float* u) {
      rounded.streams[1].data = (char*)u - columns.first * 4;
      for_columns(rounded, columns);
    });
  }
}

static void stochastic_levels(const RoundArg& a, int64_t row0, int64_t row1,
                              float* v){ASKEW_BY_TYPE(a.type, stochastic_levels_typed<T>(a, row0, row1, v))}

ASKEW_FN float power_of_two(int exponent) {
  const int32_t bits = (exponent + 0x7f) << 23;  // the bias
  float p;
  __builtin_memcpy(&p, &bits, 4);
  return p;
}

// Of r = |x| / alpha: below 1 stochastically 0 or 1; above, one of the two neighbouring powers of two.
ASKEW_FN vf luq_level(vf r, vf uniform) {
  const vi bits = (vi)r, large = r >= 1.f;
  const vf power = (vf)(bits & 0x7f800000), mantissa = (vf)((bits & 0x007fffff) | 0x3f800000);
  const vf low = select(large, power, vf{}), high = select(large, power + power, vf{} + 1.f);
  return select(uniform < select(large, mantissa - 1.f, r), high, low);
}

template <int T>
void luq_typed(const RoundArg& a, int64_t begin, int64_t end) {
  const bool finite = a.most < __builtin_inff();
  const vf most = vf{} + (finite ? a.most : __builtin_nanf("")), divisor = a.most == 0.f ? vf{} + 1.f : most;
  const float up = power_of_two(a.top), down = power_of_two(-a.top);
  auto loop = vector_loop<T, 0>(
      {{(void*)a.x, type_size(T), false}, {nullptr, 4, false}, {a.q, type_size(T), true}}, ASKEW_VECTOR {
        const vf x = load<T>(s[0], i);
        const vf level = luq_level(absolute(x) / divisor * up, load<kFloat32>(s[1], i));
        const vf size = most * (level * down);
        store<T>(s[2], i, (vf)((vi)size | ((vi)(level > 0.f) & (vi)x & (int32_t)0x80000000)));
      });
  for_random_bands(a.seed, begin, end, [&](Columns columns, const float* u) {
    loop.streams[1].data = (char*)u - columns.first * 4;
    for_columns(loop, columns);
  });
}

static void luq(const RoundArg& a, int64_t begin, int64_t end) { ASKEW_BY_TYPE(a.type, luq_typed<T>(a, begin, end)) }
