// Patches of an image as int8 in blocks of tokens (packed_bands.inl), straight from the image: neighbours in an image
// row are lanes of a vector, which thus holds one column of a block's patches, and four of them, once rounded, are the
// bytes that stand together in a block. The numbers are those of `quantize_token` for each patch.

// Columns of a block's patches, where all of its lanes stand side by side in the image: one load each.
struct WholePatches {
  const float* first;
  const int32_t* offsets;
  ASKEW_INLINE vf column(int64_t c) const { return Floats::load(first + offsets[c]); }
};

// Lanes of several lines, or fewer than a vector has; the others are 0.
struct PatchRuns {
  int count;
  const int32_t* offsets;
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  const float* from[kMostPatches];  // where the vector would begin whose lanes `there` are the run's
  __mmask16 there[kMostPatches];
  ASKEW_INLINE void add(const float* p, int lane, int lanes) {
    from[count] = p - lane;
    there[count++] = (__mmask16)(((1u << lanes) - 1) << lane);
  }
  ASKEW_INLINE vf column(int64_t c) const {
    const int64_t offset = offsets[c];
    __m512 v = _mm512_maskz_loadu_ps(there[0], from[0] + offset);
    for (int r = 1; r < count; ++r) v = _mm512_mask_loadu_ps(v, there[r], from[r] + offset);
    return (vf)v;
  }
#else
  const float* from[kMostPatches];  // of each lane
  ASKEW_INLINE void add(const float* p, int lane, int lanes) {
    for (int l = 0; l < lanes; ++l) from[lane + l] = p + l;
    count += lanes;
  }
  ASKEW_INLINE vf column(int64_t c) const {
    const int64_t offset = offsets[c];
    vf v = vf{};
    for (int l = 0; l < count; ++l) v[l] = from[l][offset];
    return v;
  }
#endif
};

ASKEW_FN PatchRuns patch_runs(const float* image, const int64_t* at, const int32_t* offsets, int count) {
  PatchRuns runs;
  runs.count = 0;
  runs.offsets = offsets;
  for (int l = 0; l < count;) {
    int end = l + 1;
    while (end < count && at[end] == at[end - 1] + 1) ++end;
    runs.add(image + at[l], l, end - l);
    l = end;
  }
  return runs;
}

// Bits of the largest magnitude, as an integer: above those of inf is NaN.
ASKEW_FN vi larger_bits(vi most, vf v) {
  const vi bits = (vi)v & 0x7fffffff;
  return bits > most ? bits : most;
}

static void channel_peaks(const float* image, int64_t channels, int64_t plane, int64_t begin, int64_t end,
                          float* peaks) {
  constexpr int kTogether = 4;  // vectors: whole lines of a channel
  int64_t i = begin;
  for (; i + kTogether * ASKEW_LANES <= end; i += kTogether * ASKEW_LANES) {
    vi most[kTogether] = {};
    for (int64_t c = 0; c < channels; ++c)
      ASKEW_EACH (v, kTogether) most[v] = larger_bits(most[v], Floats::load(image + c * plane + i + v * ASKEW_LANES));
    ASKEW_EACH (v, kTogether) Floats::store(peaks + i + v * ASKEW_LANES, (vf)most[v]);
  }
  for (; i < end; ++i) {
    uint32_t most = 0;
    for (int64_t c = 0; c < channels; ++c) {
      uint32_t bits;
      __builtin_memcpy(&bits, image + c * plane + i, 4);
      bits &= 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    __builtin_memcpy(peaks + i, &most, 4);
  }
}

// The low bytes of four integers in one.
ASKEW_FN vi low_bytes(vi a, vi b, vi c, vi d) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  const __m512i two = _mm512_mask_blend_epi8(0x2222222222222222, (__m512i)a, (__m512i)(b << 8));
  const __m512i three = _mm512_mask_blend_epi8(0x4444444444444444, two, (__m512i)(c << 16));
  return (vi)_mm512_mask_blend_epi8(0x8888888888888888, three, (__m512i)(d << 24));
#else
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
#endif
}

// Sums of the four bytes of each lane.
ASKEW_FN vi byte_sums(vi four) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  return lane_sums(products(_mm512_set1_epi8(1), (Codes)four));
#else
  return (four << 24 >> 24) + (four << 16 >> 24) + (four << 8 >> 24) + (four >> 24);
#endif
}

// peaks: where the largest magnitudes stand, in `peak_columns` columns.
template <class Source>
static void quantize_from(const Source& source, const Source& peaks, int64_t peak_columns, const BandsArg& w, int count,
                          int8_t* q, float* scale, int32_t* offsets) {
  const Source from = source, largest_from = peaks;  // copies that the stores cannot change
  const int64_t length = w.cols / w.groups, width = band_width(w) / w.groups;
  vi most = vi{};
  for (int64_t c = 0; c < peak_columns; ++c) most = larger_bits(most, largest_from.column(c));
  const RowScales by = row_scales(most);
  const vf inverse = by.inverse;
  __builtin_memcpy(scale, &by.scale, count * sizeof(float));
  const auto rounded = [&](int64_t c) __attribute__((always_inline)) {
    const vf x = from.column(c);
#if ASKEW_LANES == 16 && defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)(x * inverse));  // to the nearest, ties to even; of NaN the low byte is 0
#else
    return __builtin_convertvector(round_even(select(by.there, x * inverse, vf{})), vi);
#endif
  };
  for (int64_t g = 0; g < w.groups; ++g, q += width * count) {
    const int64_t first = g * length;
    vi sum = vi{};
    const auto keep = [&](int64_t c, vi four) __attribute__((always_inline)) {
      sum += byte_sums(four);
      __builtin_memcpy(q + c * count, &four, 4 * count);
    };
    int64_t c = 0;
    for (; c + 4 <= length; c += 4)
      keep(c, low_bytes(rounded(first + c), rounded(first + c + 1), rounded(first + c + 2), rounded(first + c + 3)));
    for (; c < width; c += 4) {
      vi each[4] = {};
      for (int k = 0; k < 4 && c + k < length; ++k) each[k] = rounded(first + c + k);
      keep(c, low_bytes(each[0], each[1], each[2], each[3]));
    }
    for (int l = 0; l < count; ++l) offsets[l * w.groups + g] = sum[l] * w.lo;
  }
}

static void quantize_patches(const BandsArg& w, const Patches& p, int count, int8_t* q, float* scale,
                             int32_t* offsets) {
  if (count == ASKEW_LANES && p.at[count - 1] - p.at[0] == count - 1)
    quantize_from(WholePatches{p.image + p.at[0], p.offsets}, WholePatches{p.peaks + p.peak_at[0], p.offsets},
                  p.peak_columns, w, ASKEW_LANES, q, scale, offsets);
  else
    quantize_from(patch_runs(p.image, p.at, p.offsets, count), patch_runs(p.peaks, p.peak_at, p.offsets, count),
                  p.peak_columns, w, count, q, scale, offsets);
}

#if ASKEW_LANES == 16 && defined(__AVX512F__)
// 16 rows of 16 columns, `stride` apart, as columns.
ASKEW_FN void transpose_tile(const float* from, int64_t stride, float* to, int64_t to_stride) {
  __m512 a[16], b[16];
  ASKEW_EACH (i, 16) a[i] = _mm512_loadu_ps(from + i * stride);
  ASKEW_EACH (i, 8) {
    b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  ASKEW_EACH (i, 4)  // of four rows: columns 4 l, 4 l + 1, … of each lane l of 128 bits
    ASKEW_EACH (k, 2) {
      const __m512d low = (__m512d)b[4 * i + k], high = (__m512d)b[4 * i + 2 + k];
      a[4 * i + 2 * k] = (__m512)_mm512_unpacklo_pd(low, high);
      a[4 * i + 2 * k + 1] = (__m512)_mm512_unpackhi_pd(low, high);
    }
  ASKEW_EACH (k, 4) {
    const __m512 low = _mm512_shuffle_f32x4(a[k], a[4 + k], 0x44), high = _mm512_shuffle_f32x4(a[k], a[4 + k], 0xee);
    const __m512 low2 = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0x44),
                 high2 = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0xee);
    _mm512_storeu_ps(to + k * to_stride, _mm512_shuffle_f32x4(low, low2, 0x88));
    _mm512_storeu_ps(to + (4 + k) * to_stride, _mm512_shuffle_f32x4(low, low2, 0xdd));
    _mm512_storeu_ps(to + (8 + k) * to_stride, _mm512_shuffle_f32x4(high, high2, 0x88));
    _mm512_storeu_ps(to + (12 + k) * to_stride, _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}
#endif

// to[c to_stride + r] = from[r stride + c] for r < rows, c < cols.
static void transpose(const float* from, int64_t stride, int64_t rows, int64_t cols, float* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < cols; c += 16) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
      if (r + 16 <= rows && c + 16 <= cols) {
        transpose_tile(from + r * stride + c, stride, to + c * to_stride + r, to_stride);
        continue;
      }
#endif
      for (int64_t j = c; j < cols && j < c + 16; ++j)
        for (int64_t i = r; i < rows && i < r + 16; ++i) to[j * to_stride + i] = from[i * stride + j];
    }
}
