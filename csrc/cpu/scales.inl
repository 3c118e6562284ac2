// Scales from sums, and the errors of candidates.

constexpr int kScaleRows = 64;  // that stand side by side, so that the compiler makes vectors of them

template <int TYPE>
ASKEW_FN void round_scales(float* s) {
  for (int i = 0; i < kScaleRows; ++i) s[i] = s[i] > 0.f ? round_scale_to<TYPE>(s[i]) : s[i];
}

template <int RULE>
bool scales_typed(const ScaleTensor& t, int64_t row0, int64_t row1) {
  bool marked = false;
  for (int64_t row = row0; row < row1; row += kScaleRows) {
    const int n = (int)(row1 - row < kScaleRows ? row1 - row : kScaleRows);
    double abs[kScaleRows] = {}, squares[kScaleRows] = {}, peak[kScaleRows] = {};
    float s[kScaleRows];
    const float* sums = t.sums + row * kRowSums;
    for (int i = 0; i < n; ++i, sums += kRowSums) {
      abs[i] = (double)sums[kSumAbs];
      squares[i] = (double)sums[kSumSquares];
      peak[i] = (double)sums[kMaxAbs];
    }
    if (RULE == kGiven) {
      for (int i = 0; i < n; ++i) {
        const float top = guarded(peak[i] / t.c_max, peak[i]);
        s[i] = top > 0.f ? t.scale[row + i] : top;
      }
    } else {
      for (int i = 0; i < kScaleRows; ++i) s[i] = guarded(rule_scale<RULE>(abs[i], squares[i], peak[i], t), peak[i]);
      if (t.type == kScaleBFloat16) round_scales<kScaleBFloat16>(s);
      if (t.type == kScaleFloat16) round_scales<kScaleFloat16>(s);
      if (t.type == kScaleE8M0) round_scales<kScaleE8M0>(s);
    }
    for (int i = 0; i < n; ++i) {
      marked |= !(s[i] > 0.f);
      t.scale[row + i] = s[i];
    }
  }
  return marked;
}

static bool scales(const ScaleTensor& t, int64_t row0, int64_t row1) {
  switch (t.rule) {
    case kSawb:
      return scales_typed<kSawb>(t, row0, row1);
    case kMean:
      return scales_typed<kMean>(t, row0, row1);
    case kRms:
      return scales_typed<kRms>(t, row0, row1);
    case kGiven:
      return scales_typed<kGiven>(t, row0, row1);
    default:
      return scales_typed<kAbsmax>(t, row0, row1);
  }
}

// ---- mse ----

constexpr int kDoubles = ASKEW_LANES / 2;  // in a vector
typedef double vd __attribute__((vector_size(8 * kDoubles)));
typedef float half_vf __attribute__((vector_size(4 * kDoubles)));  // as many floats
constexpr int kParts = kErrorLanes / kDoubles;
static_assert(16 % kErrorLanes == 0 && kErrorLanes % kDoubles == 0, "a stripe is whole lanes, and they whole vectors");

struct Stripe {  // 16 columns
  vf part[kVectors];
};
struct ErrorSums {
  vd part[kParts];
};
// The square of a float is exact in float64, so a fused sum and one of a product have the same bits. The compiler would
// put the conversion together from smaller ones.
ASKEW_FN vd add_square(vd sum, half_vf d) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  const __m512d wide = _mm512_cvtps_pd((__m256)d);
  return (vd)_mm512_fmadd_pd(wide, wide, (__m512d)sum);
#elif ASKEW_LANES == 8 && defined(__FMA__)
  const __m256d wide = _mm256_cvtps_pd((__m128)d);
  return (vd)_mm256_fmadd_pd(wide, wide, (__m256d)sum);
#else
  const vd wide = __builtin_convertvector(d, vd);
  return sum + wide * wide;
#endif
}
ASKEW_FN void add_squares(ErrorSums& sum, const Stripe& difference) {
  half_vf half[16 / kDoubles];
  __builtin_memcpy(half, difference.part, sizeof half);
  for (int k = 0; k < 16 / kDoubles; ++k) sum.part[k % kParts] = add_square(sum.part[k % kParts], half[k]);
}

// Adds the errors of n columns; x is padded to whole stripes.
template <class Grid>
static ASKEW_LOOP void add_errors(ErrorSums* to, const float* x, int64_t n, const Row<vf, Grid>& given) {
  const Row<vf, Grid> row = given;
  ErrorSums sum = *to;
  const auto difference = [&](int64_t i) __attribute__((always_inline)) {
    Stripe d;
    for (int k = 0; k < kVectors; ++k) {
      vf w;
      __builtin_memcpy(&w, x + i + k * ASKEW_LANES, sizeof w);
      d.part[k] = w - quantize_dequantize(w, row);
    }
    return d;
  };
  const int64_t full = n / 16 * 16;
  for (int64_t i = 0; i < full; i += 16) add_squares(sum, difference(i));
  if (full < n) {
    float last[16];
    const Stripe d = difference(full);
    __builtin_memcpy(last, &d, sizeof last);
    for (int64_t i = n - full; i < 16; ++i) last[i] = 0.f;
    Stripe kept;
    __builtin_memcpy(&kept, last, sizeof last);
    add_squares(sum, kept);
  }
  *to = sum;
}

ASKEW_FN double over_lanes(const ErrorSums& sum) {
  double lanes[kErrorLanes];
  __builtin_memcpy(lanes, &sum, sizeof lanes);
  for (int width = kErrorLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <int T>
ASKEW_FN void load_floats(const void* from, int64_t first, int64_t count, float* to) {
  const Stream s{(void*)from, type_size(T), false};
  const auto take = [&](const Stream& at, int64_t i, float* out) __attribute__((always_inline)) {
    for (int k = 0; k < kVectors; ++k) {
      const vf v = load<T>(at, i + k * ASKEW_LANES);
      __builtin_memcpy(out + k * ASKEW_LANES, &v, sizeof v);
    }
  };
  const int64_t full = count / 16 * 16;
  for (int64_t i = 0; i < full; i += 16) take(s, first + i, to + i);
  if (full == count) return;
  alignas(64) char stage[64] = {};
  __builtin_memcpy(stage, (const char*)from + (first + full) * s.size, (count - full) * s.size);
  take({stage, s.size, false}, 0, to + full);
}

template <int T, class Grid>
void errors_typed(const MseArg& a, Tile t, double* out) {
  constexpr int64_t kBlock = 4096;  // columns that stay in the L1 cache while all candidates read them
  static_assert(kSumPiece % kBlock == 0, "blocks do not cross pieces");
  alignas(64) float x[kBlock];
  const Grid grid = Grid::make(a.grid);
  for (int64_t r = t.row0; r < t.row1; ++r) {
    float scale[kScaleCandidates];
    for (int j = 0; j < kScaleCandidates; ++j)
      scale[j] = candidate_scale(j + 1, (double)a.sums[r * kRowSums + kMaxAbs], a);
    for (int64_t piece = t.col0; piece < t.col1; piece += kSumPiece, out += kScaleCandidates) {
      const int64_t end = piece + kSumPiece < t.col1 ? piece + kSumPiece : t.col1;
      ErrorSums sums[kScaleCandidates] = {};
      for (int64_t c = piece; c < end; c += kBlock) {
        const int64_t n = c + kBlock < end ? kBlock : end - c;
        load_floats<T>(a.w, r * a.m.cols + c, n, x);
        for (int j = 0; j < kScaleCandidates; ++j) add_errors(sums + j, x, n, make_row(vf{} + scale[j], grid));
      }
      for (int j = 0; j < kScaleCandidates; ++j) out[j] = over_lanes(sums[j]);
    }
  }
}

static void errors(const MseArg& a, Tile t, double* out) {
  ASKEW_BY_TYPE(a.type, ASKEW_BY_GRID(a.grid.kind, errors_typed<T, Grid>(a, t, out)))
}
