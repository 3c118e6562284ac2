// Rows of x as int8 in blocks of tokens (packed_bands.inl). The rows of a block are rounded side by side, so that a
// vector of 16 columns of each becomes bytes in the order of the block by a few moves; the numbers are those of
// `quantize_token` for each row.

// What a lane is multiplied by to be rounded, from the bits of its row's largest magnitude, and that row's scale.
struct RowScales {
  vf inverse, scale;
  vi there;  // lanes that are rounded; others, nothing but subnormal numbers or not finite, are multiplied by 0
};
ASKEW_FN RowScales row_scales(vi most) {
  const vf top = (vf)most, infinite = vf{} + __builtin_inff();
  const vi finite = most < 0x7f800000;
  const vf inverse = select(finite & (vi)(top > 0.f), (float)kInt8Top / top, vf{});
  const vi there = finite & (vi)(inverse < infinite);
  return {select(there, inverse, vf{}), select(finite, top / (float)kInt8Top, vf{} + __builtin_nanf("")), there};
}

static void quantize_band(const BandsArg& w, const float* x, int8_t* q, int64_t count, int64_t place, float* scale,
                          int32_t* offsets, int8_t* scratch) {
  const int64_t length = w.cols / w.groups, width = band_width(w) / w.groups;
  quantize_token(x, w.cols, w.cols, scratch, scale);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int8_t* from = scratch + g * length;
    int8_t* to = q + (g * width * count + place * 4);
    int32_t sum = 0;
    for (int64_t c = 0; c < length; ++c) sum += from[c];
    offsets[g] = sum * w.lo;
    int64_t c = 0;
    for (; c + 4 <= length; c += 4) __builtin_memcpy(to + c * count, from + c, 4);
    for (; c < width; c += 4) {
      int8_t four[4] = {};
      for (int i = 0; i < 4 && c + i < length; ++i) four[i] = from[c + i];
      __builtin_memcpy(to + c * count, four, 4);
    }
  }
}

#if ASKEW_LANES == 16 && defined(__AVX512F__)
#define ASKEW_LANES_OF(A, B, ORDER) _mm512_shuffle_i32x4(A, B, ORDER)

// The largest of each of 16 vectors.
ASKEW_FN vi largest(const __m512i (&rows)[16]) {
  __m512i half[8], quarter[4];
  ASKEW_EACH (i, 8) {  // of rows i and 8 + i
    const __m512i a = rows[i], b = rows[8 + i];
    half[i] = _mm512_max_epi32(ASKEW_LANES_OF(a, b, 0x88), ASKEW_LANES_OF(a, b, 0xdd));
  }
  ASKEW_EACH (i, 4) {  // of rows i, 4 + i, 8 + i, 12 + i, one in each lane of 128 bits
    const __m512i a = half[i], b = half[4 + i];
    const __m512i even = ASKEW_LANES_OF(a, b, 0x88), odd = ASKEW_LANES_OF(a, b, 0xdd);
    quarter[i] = _mm512_max_epi32(even, odd);
    quarter[i] = ASKEW_LANES_OF(quarter[i], quarter[i], 0xd8);
  }
  const __m512i low =
      _mm512_max_epi32(_mm512_unpacklo_epi32(quarter[0], quarter[1]), _mm512_unpackhi_epi32(quarter[0], quarter[1]));
  const __m512i high =
      _mm512_max_epi32(_mm512_unpacklo_epi32(quarter[2], quarter[3]), _mm512_unpackhi_epi32(quarter[2], quarter[3]));
  return (vi)_mm512_max_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
}

// ROWS rows, a whole block. What stands for a row that is not finite says nothing: its scale is NaN.
template <int ROWS>
static void quantize_together(const BandsArg& w, const float* const* rows, int8_t* q, float* scale, int32_t* offsets) {
  const int64_t cols = w.cols, groups = w.groups, length = cols / groups, width = band_width(w) / groups;
  const auto left = [](int64_t n) { return (__mmask16)(n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0); };
  __m512i most[16];
  ASKEW_EACH (i, 16) most[i] = _mm512_setzero_si512();
  const int64_t next = ROWS * (rows[1] - rows[0]);  // where the rows of the next block stand
  for (int64_t c = 0; c < cols; c += 16) {
    const __mmask16 mask = left(cols - c);
    ASKEW_EACH (i, ROWS) {
      __builtin_prefetch(rows[i] + c + next);
      const __m512i bits =
          _mm512_and_si512((__m512i)_mm512_maskz_loadu_ps(mask, rows[i] + c), _mm512_set1_epi32(0x7fffffff));
      most[i] = _mm512_max_epi32(most[i], bits);
    }
  }
  const RowScales s = row_scales(largest(most));
  const __mmask16 here = (__mmask16)((1u << ROWS) - 1);
  _mm512_mask_storeu_ps(scale, here, (__m512)s.scale);
  float inverse[16];
  __builtin_memcpy(inverse, &s.inverse, sizeof inverse);
  for (int64_t g = 0; g < groups; ++g, q += width * ROWS) {
    Codes ones, block[4];
    vi sums = vi{};
    ones = _mm512_set1_epi8(1);
    for (int64_t c = 0; c < width; c += 16) {
      const __mmask16 mask = left(length - c);
      ASKEW_EACH (k, ROWS / 4) {  // four rows: lane l of 128 bits has columns 4 l … 4 l + 3 of one after the other
        __m512i v[4];
        ASKEW_EACH (i, 4) {
          const __m512 x = _mm512_maskz_loadu_ps(mask, rows[4 * k + i] + g * length + c);
          v[i] = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse[4 * k + i])));
        }
        block[k] = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
      }
      if constexpr (ROWS > 4) {
        Codes low = ASKEW_LANES_OF(block[0], block[1], 0x44), high = ASKEW_LANES_OF(block[0], block[1], 0xee);
        if constexpr (ROWS == 8) {
          block[0] = ASKEW_LANES_OF(low, low, 0xd8);
          block[1] = ASKEW_LANES_OF(high, high, 0xd8);
        } else {
          const Codes low2 = ASKEW_LANES_OF(block[2], block[3], 0x44), high2 = ASKEW_LANES_OF(block[2], block[3], 0xee);
          block[0] = ASKEW_LANES_OF(low, low2, 0x88);
          block[1] = ASKEW_LANES_OF(low, low2, 0xdd);
          block[2] = ASKEW_LANES_OF(high, high2, 0x88);
          block[3] = ASKEW_LANES_OF(high, high2, 0xdd);
        }
      }
      const int64_t words = (width - c) / 4 * ROWS;  // that are left of the group
      ASKEW_EACH (k, ROWS / 4) {
        _mm512_mask_storeu_epi32(q + c * ROWS + 64 * k, left(words - 16 * k), block[k]);
        sums += lane_sums(products(ones, block[k]));
      }
    }
    ASKEW_EACH (i, ROWS) {
      int32_t sum = 0;
      ASKEW_EACH (k, 16 / ROWS) sum += sums[ROWS * k + i];
      offsets[i * groups + g] = sum * w.lo;
    }
  }
}
#endif

static void quantize_rows(const BandsArg& w, const float* const* rows, int64_t count, int8_t* q, float* scale,
                          int32_t* offsets, int8_t* scratch) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  if (count == 16) return quantize_together<16>(w, rows, q, scale, offsets);
  if (count == 8) return quantize_together<8>(w, rows, q, scale, offsets);
  if (count == 4) return quantize_together<4>(w, rows, q, scale, offsets);
#endif
  for (int64_t i = 0; i < count; ++i)
    quantize_band(w, rows[i], q, count, i, scale + i, offsets + i * w.groups, scratch);
}
