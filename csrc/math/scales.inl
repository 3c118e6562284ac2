// Scales of rows (docs/mathematics.md, section 1), in float64 and IEEE: the same bits everywhere.
//
// A row that has no scale of its own is marked until all rows of its tensor are known: 0 where all its weights are 0,
// kNoScale where they are not finite, or where no float32 holds its scale.

constexpr double kScaleFloor = 1e-12;           // of a scale, relative to max(1, max |w|)
constexpr double kFloat32End = 0x1.ffffffp127;  // rounds to inf in float32
constexpr float kNoScale = -1.f;

// Not below the floor; marked where the row has no scale.
ASKEW_FN float guarded(double s, double peak) {
  const double floor = kScaleFloor * (peak > 1 ? peak : 1);
  s = s > floor ? s : floor;
  const bool usable = (peak > 0) & (peak < __builtin_inf()) & (s < kFloat32End);
  return usable ? (float)s : peak == 0 ? 0.f : kNoScale;
}

// A sum may overflow where max |w| does not: then it is absmax.
template <int RULE>
ASKEW_FN double rule_scale(double abs, double squares, double peak, const ScaleTensor& t) {
  const double top = peak / t.c_max;
  double s = top;
  if (RULE == kSawb) {
    const double clip = t.first * root(squares / t.cols) - t.second * abs / t.cols;
    s = clip > 0 ? clip / t.c_max : top;
  }
  if (RULE == kMean) s = t.first * abs / t.cols;
  if (RULE == kRms) {
    s = t.first * root(squares / t.cols);
    s = s < top ? s : top;
  }
  return s - s == 0 ? s : top;
}

ASKEW_FN uint32_t bits_of(float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, 4);
  return bits;
}
ASKEW_FN float float_of(uint32_t bits) {
  float a;
  __builtin_memcpy(&a, &bits, 4);
  return a;
}

// The nearest scale that `TYPE` holds, ties to even (powers of two: the smaller ratio), its ends beyond its range.
// E4M3 is in units of the tensor's, so its scales are left until all are known.
template <int TYPE>
ASKEW_FN float round_scale_to(float s) {
  if (TYPE == kScaleFloat32) return s;
  const float low = TYPE == kScaleFloat16 ? 0x1p-24f : 0x1p-126f;
  const float high = TYPE == kScaleFloat16 ? 65504.f : TYPE == kScaleBFloat16 ? 0x1.fep127f : 0x1p127f;
  s = s < low ? low : s > high ? high : s;
  const uint32_t bits = bits_of(s);
  if (TYPE == kScaleBFloat16) return float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  if (TYPE == kScaleE8M0) return float_of((bits & 0x7f800000u) + ((bits & 0x7fffffu) >= 0x3504f3u ? 0x800000u : 0u));
  const float normal = float_of((bits + 0xfffu + ((bits >> 13) & 1u)) & 0xffffe000u);
  return s < 0x1p-14f ? (s + 0.5f) - 0.5f : normal;  // subnormal halves are multiples of 2^-24
}
ASKEW_FN float round_scale(float s, int type) {
  switch (type) {
    case kScaleBFloat16:
      return round_scale_to<kScaleBFloat16>(s);
    case kScaleFloat16:
      return round_scale_to<kScaleFloat16>(s);
    case kScaleE8M0:
      return round_scale_to<kScaleE8M0>(s);
    default:
      return s;
  }
}

// The unit of a tensor whose largest scale is `top` (not less than any other): the least power of two whose 448-fold it
// does not exceed.
ASKEW_FN float scale_unit(float top) {
  const uint32_t bits = bits_of(top > 0.f ? top : 1.f);
  const int exponent = (int)(bits >> 23) - 8 + ((bits & 0x7fffffu) > 0x600000u ? 1 : 0);  // biased by 127
  const int kept = exponent < 10 ? 10 : exponent > 246 ? 246 : exponent;                  // float32 holds all multiples
  return float_of((uint32_t)kept << 23);
}
// The nearest E4M3 number of units, ties to even, its ends beyond its range; every product with a unit is exact.
ASKEW_FN float round_to_units(float s, float unit) {
  float x = s * (1.f / unit);
  x = x < 0x1p-9f ? 0x1p-9f : x > 448.f ? 448.f : x;
  const uint32_t bits = bits_of(x);
  const float normal = float_of((bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u);
  return (x < 0x1p-6f ? (x + 0x1p14f) - 0x1p14f : normal) * unit;  // subnormal numbers are multiples of 2^-9
}

// absmax's scale of a row; not above 0 where the row has none.
ASKEW_FN float largest_scale(int64_t row, const MseArg& a) {
  const double peak = (double)a.sums[row * kRowSums + kMaxAbs];
  return guarded(peak / a.c_max, peak);
}

// Candidate j = 1 ... kScaleCandidates of a row: j hundredths of absmax's scale, or of twice that where powers of two
// may be rounded far down; 1 where the row has none.
ASKEW_FN float candidate_scale(int j, double peak, const MseArg& a) {
  const float top = guarded(peak / a.c_max, peak);
  const float s =
      top > 0.f ? guarded((double)top * ((double)j / kScaleCandidates * (a.scale_type == kScaleE8M0 ? 2 : 1)), peak)
                : 1.f;
  return a.scale_type == kScaleE4M3 ? round_to_units(s, *a.unit) : round_scale(s, a.scale_type);
}
