// Products of many inputs with packed weights. A panel of kPanelRows rows of the weight is decoded into a tile, rows in
// the lanes of its vectors, and stays in the cache while all inputs pass: an input's column, in every lane, times the
// rows, into sums that stay in registers until a group of columns ends.
//
// Two kinds of products. Singles: float32. Pairs: levels and inputs in bfloat16, two columns to a lane, whose products
// are exact and are summed in float32. A step is what one lane of 32 bits takes of a row: a column, or two.
#if defined(ASKEW_WITH_PANELS)

constexpr int kPanelVectors32 = 2, kPanelRows = kPanelVectors32 * ASKEW_LANES;
constexpr int kTileSteps = 1024;       // of a tile: 128 KiB
constexpr int kStepFloats = kPanelRows;  // 32-bit numbers of a tile's step

// How a word of 32 bits of a row is read: codes of 1, 2 or 4 bits, trits, or a code in each byte, which is looked up or
// is the level but for `lo`. Rows of other widths become bytes first.
enum WordForm : int { kWordTrits = 0, kLookedUp = 7, kNumbers = 8 };

#define ASKEW_BY_WORD(NAME, VALUE, ...)                               \
  switch (VALUE) {                                                    \
    ASKEW_CASE(case kWordTrits, constexpr int NAME = 0, __VA_ARGS__)  \
    ASKEW_CASE(case 1, constexpr int NAME = 1, __VA_ARGS__)           \
    ASKEW_CASE(case 2, constexpr int NAME = 2, __VA_ARGS__)           \
    ASKEW_CASE(case 4, constexpr int NAME = 4, __VA_ARGS__)           \
    ASKEW_CASE(case kLookedUp, constexpr int NAME = 7, __VA_ARGS__)   \
    ASKEW_CASE(default, constexpr int NAME = kNumbers, __VA_ARGS__)   \
  }

template <int FORM>
struct Word {
  static constexpr int kBits = FORM >= kLookedUp ? 8 : FORM;
  static constexpr int kCodes = FORM == kWordTrits ? 4 * kTritsInByte : 32 / (kBits ? kBits : 1);
};

// Whether rows are made bytes before they are read, in place or on the way.
ASKEW_FN int word_form(const PackedWeight& w) {
  const int64_t length = w.groups > 1 ? w.cols / w.groups : 0;  // a word ends with a group
  const bool whole = w.bits == kTrits || w.bits == 1 || w.bits == 2 || w.bits == 4;
  if (whole) {
    int64_t codes = 0;
    ASKEW_BY_WORD(FORM, w.bits, codes = Word<FORM>::kCodes; break)
    if (length % codes == 0) return w.bits;
  }
  return w.bits <= 4 ? kLookedUp : kNumbers;
}

ASKEW_FN int64_t word_codes(int form) {
  ASKEW_BY_WORD(FORM, form, return Word<FORM>::kCodes)
  return 0;
}

ASKEW_FN int64_t row_words(const PackedWeight& w) {
  const int64_t codes = word_codes(word_form(w));
  return (w.cols + codes - 1) / codes;
}

// What decoding needs of a weight.
struct Decoding {
  __m512i table;  // Singles: 16 levels; Pairs: 32
  float lo;
  uint8_t top;  // the highest code
};

// The digits of the trits in the low byte of each half of a lane, the highest first, from byte * 65536 / 243.
ASKEW_FN __m512i next_digit(__m512i& fraction) {
  const __m512i three = _mm512_set1_epi16(3), digit = _mm512_mulhi_epu16(fraction, three);
  fraction = _mm512_mullo_epi16(fraction, three);
  return digit;
}
ASKEW_FN __m512i trit_fractions(__m512i bytes) {
  return _mm512_mullo_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(0xff)), _mm512_set1_epi16(270));
}

struct Singles {
  static constexpr int kColumns = 1;
  static bool exact(const PackedWeight&) { return true; }

  static Decoding decoding(const PackedWeight& w) {
    return {_mm512_loadu_si512(w.table), w.lo, (uint8_t)(w.n_levels - 1)};
  }
  ASKEW_FN vf product(vf sum, vf weight, const uint32_t* x) {
    float value;
    __builtin_memcpy(&value, x, 4);
    return fused_multiply_add(weight, vf{} + value, sum);
  }
  ASKEW_FN vf looked_up(const Decoding& d, __m512i codes) {
    return (vf)_mm512_permutexvar_epi32(codes, d.table);
  }
  // to[step]: the levels of the codes of a word of each row
  template <int FORM, class To>
  ASKEW_FN void decode(const Decoding& d, __m512i word, const To& to) {
    if (FORM == kWordTrits) {
      ASKEW_EACH (e, 2) {
        __m512i fraction = trit_fractions(e ? _mm512_srli_epi16(word, 8) : word);
        ASKEW_EACH (k, kTritsInByte) {
          const __m512i digit = next_digit(fraction);
          to(10 * e + 2 * k, looked_up(d, digit));
          to(10 * e + 2 * k + 1, looked_up(d, _mm512_srli_epi32(digit, 16)));
        }
      }
    } else if (FORM == kNumbers) {
      const __m512i codes = _mm512_min_epu8(word, _mm512_set1_epi8((char)d.top));
      ASKEW_EACH (k, 4) {
        const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, 8 * k), _mm512_set1_epi32(0xff));
        to(k, (vf)_mm512_cvtepi32_ps(code) + d.lo);
      }
    } else {
      constexpr int kBits = FORM == kWordTrits ? 1 : Word<FORM>::kBits;
      ASKEW_EACH (k, 32 / kBits) to(k, looked_up(d, _mm512_srli_epi32(word, kBits * k)));
    }
  }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kColumns = 2;
  // Whether bfloat16 holds the levels.
  static bool exact(const PackedWeight& w) {
    uint32_t bits[16], lost = 0;
    __builtin_memcpy(bits, w.table, sizeof bits);
    if (w.bits <= 4)
      for (uint32_t b : bits) lost |= b & 0xffff;
    return !lost;
  }

  static Decoding decoding(const PackedWeight& w) {
    uint16_t table[32];
    for (int i = 0; i < 32; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, w.table + i % 16, 4);
      table[i] = (uint16_t)(bits >> 16);  // exact, or the weight is not asked for in pairs
    }
    return {_mm512_loadu_si512(table), w.lo, (uint8_t)(w.n_levels - 1)};
  }
  ASKEW_FN vf product(vf sum, vf weight, const uint32_t* x) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)_mm512_set1_epi32((int)*x));
  }
  ASKEW_FN vf looked_up(const Decoding& d, __m512i codes) {
    return (vf)_mm512_permutexvar_epi16(codes, d.table);
  }
  template <int FORM, class To>
  ASKEW_FN void decode(const Decoding& d, __m512i word, const To& to) {
    if (FORM == kWordTrits) {
      ASKEW_EACH (e, 2) {
        __m512i fraction = trit_fractions(e ? _mm512_srli_epi16(word, 8) : word);
        ASKEW_EACH (k, kTritsInByte) to(kTritsInByte * e + k, looked_up(d, next_digit(fraction)));
      }
    } else if (FORM == kNumbers) {
      const __m512i codes = _mm512_min_epu8(word, _mm512_set1_epi8((char)d.top)), byte = _mm512_set1_epi32(0xff);
      ASKEW_EACH (k, 2) {
        const __m512i low = _mm512_and_si512(_mm512_srli_epi32(codes, 8 * k), byte);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi32(codes, 8 * k + 16), byte);
        const vf first = (vf)_mm512_cvtepi32_ps(low) + d.lo, second = (vf)_mm512_cvtepi32_ps(high) + d.lo;
        // integers of eight bits are exact in the upper half of a float
        to(k, (vf)_mm512_mask_blend_epi16(0x55555555u, (__m512i)second, _mm512_srli_epi32((__m512i)first, 16)));
      }
    } else {
      constexpr int kBits = FORM == kWordTrits ? 1 : Word<FORM>::kBits;
      ASKEW_EACH (k, 16 / kBits) to(k, looked_up(d, _mm512_srli_epi16(word, kBits * k)));
    }
  }
};
#endif

// ---- inputs -----------------------------------------------------------------------------------------------------------

// The columns of a word in the order of its steps, the lower half of a lane first.
template <class P>
ASKEW_FN int column_of(int form, int codes, int i) {
  if (form == kWordTrits) {
    const int e = i / 10, r = i % 10;
    return kTritsInByte * (e + 2 * (r % 2)) + kTritsInByte - 1 - r / 2;
  }
  return P::kColumns == 1 ? i : i / 2 + i % 2 * (codes / 2);
}

template <class P>
ASKEW_FN int64_t steps_of(const PackedWeight& w) {
  return row_words(w) * word_codes(word_form(w)) / P::kColumns;
}

// 16 steps of an input from column c, in order.
template <class P>
ASKEW_FN __m512i steps_from(const float* x, int64_t c, int64_t cols, __m512i order) {
  const int64_t left = cols - c;
  const __m512 first = _mm512_maskz_loadu_ps(left < 16 ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff, x + c);
  if (P::kColumns == 1) return (__m512i)first;
#if defined(__AVX512BF16__)
  const int64_t more = left < 16 ? 0 : left - 16;
  const __m512 second = more ? _mm512_maskz_loadu_ps(more < 16 ? (__mmask16)((1u << more) - 1) : (__mmask16)0xffff,
                                                     x + c + 16)
                             : _mm512_setzero_ps();
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
#else
  (void)order;
  return (__m512i)first;
#endif
}

// max |x|, NaN where one is: the bits of magnitudes are in their order.
ASKEW_FN float largest(const float* x, int64_t cols) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t c = 0; c < cols; c += 16) {
    const __mmask16 there = cols - c < 16 ? (__mmask16)((1u << (cols - c)) - 1) : (__mmask16)0xffff;
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(there, x + c), magnitude));
  }
  const uint32_t bits = _mm512_reduce_max_epu32(most);
  float peak;
  __builtin_memcpy(&peak, &bits, 4);
  return peak;
}

// `count` inputs, `stride` floats apart, as out[step][input].
template <class P>
ASKEW_FN void arrange_steps(const PackedWeight& w, const float* x, int64_t stride, int64_t count, uint32_t* out) {
  const int form = word_form(w), codes = (int)word_codes(form);
  const int64_t steps = steps_of<P>(w);
  constexpr int kAtOnce = 16 * P::kColumns;  // columns
  uint16_t in_order[32];
  alignas(64) float ordered[kPanelInputs][5 * kAtOnce];  // of trits: whole words, and whole vectors
  const bool jumps = form == kWordTrits;
  for (int i = 0; i < 32; ++i)
    in_order[i] = (uint16_t)(i / codes * codes + (jumps ? 0 : column_of<P>(form, codes, i % codes)));
  if (codes > 32 || jumps)
    for (int i = 0; i < 32; ++i) in_order[i] = (uint16_t)i;
  __m512i order = _mm512_loadu_si512(in_order);
  const float* from = x;
  int64_t pitch = stride, begin = 0, end = w.cols;
  for (int64_t s = 0; s < steps; s += 16) {
    int64_t c = s * P::kColumns;
    if (jumps) {
      if (c % (5 * kAtOnce) == 0) {
        for (int64_t j = 0; j < count; ++j)
          for (int i = 0; i < 5 * kAtOnce; ++i) {
            const int64_t at = c + i / codes * codes + column_of<P>(form, codes, i % codes);
            ordered[j][i] = at < w.cols ? x[j * stride + at] : 0.f;
          }
        begin = c;
      }
      from = ordered[0];
      pitch = 5 * kAtOnce;
      c -= begin;
      end = 5 * kAtOnce;
    }
    __m512i r[16];
    for (int j = 0; j < 16; ++j)
      r[j] = j < count ? (c < end ? steps_from<P>(from + j * pitch, c, end, order) : _mm512_setzero_si512())
                       : _mm512_setzero_si512();
    transpose(r);
    const __mmask16 mask = (__mmask16)((1u << count) - 1);
    for (int i = 0; i < 16 && s + i < steps; ++i) _mm512_mask_storeu_epi32(out + (s + i) * count, mask, r[i]);
  }
}

// ---- tiles ------------------------------------------------------------------------------------------------------------

// The sixteen words of a row from word q.
ASKEW_FN __m512i row_of_words(const uint8_t* row, int64_t bytes, int64_t q, bool trits) {
  const int64_t left = bytes - 4 * q;
  const __m512i words = left >= 64 ? _mm512_loadu_si512(row + 4 * q)
                                   : _mm512_maskz_loadu_epi8(left > 0 ? ((uint64_t)1 << left) - 1 : 0, row + 4 * q);
  return trits ? _mm512_min_epu8(words, _mm512_set1_epi8((char)kTopTrits)) : words;
}

#if defined(__AVX512VBMI__)
#define ASKEW_ANY_WIDTH 1
// 64 codes of `bits` bits as bytes.
struct AnyWidth {
  __m512i bytes, shifts, mask;
  explicit AnyWidth(int bits) {
    uint8_t from[64], by[64];
    for (int i = 0; i < 64; ++i) {
      from[i] = (uint8_t)(i / 8 * bits + i % 8);
      by[i] = (uint8_t)(i % 8 * bits);
    }
    bytes = _mm512_loadu_si512(from);
    shifts = _mm512_loadu_si512(by);
    mask = _mm512_set1_epi8((char)((1 << bits) - 1));
  }
  ASKEW_INLINE __m512i codes(const uint8_t* p, int64_t left) const {
    const __m512i word =
        left >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(left > 0 ? ((uint64_t)1 << left) - 1 : 0, p);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(bytes, word)), mask);
  }
};
#endif

struct PanelRows {  // where the rows of a panel are read: as they stand, or unpacked to bytes
  const uint8_t* row[kPanelRows];
  int64_t bytes;
  bool any_width;
};

ASKEW_FN bool unpacks(const PackedWeight& w) { return word_form(w) >= kLookedUp && w.bits != 8; }

ASKEW_FN PanelRows panel_rows(const PackedWeight& w, int64_t first, int64_t count, uint8_t* scratch) {
  PanelRows rows;
  rows.bytes = w.row_bytes;
  rows.any_width = false;
  for (int r = 0; r < kPanelRows; ++r)  // past the end: the last row again
    rows.row[r] = w.codes + (first + (r < count ? r : count - 1)) * w.row_bytes;
  if (!unpacks(w)) return rows;
#if defined(ASKEW_ANY_WIDTH)
  if (w.bits) {
    rows.any_width = true;
    return rows;
  }
#endif
  rows.bytes = rounded_up(w.cols, 64);
  for (int r = 0; r < kPanelRows; ++r) {
    uint8_t* to = scratch + (r < count ? r : count - 1) * (rows.bytes + kPadding);
    if (r < count) unpack_row(w, first + r, to);
    rows.row[r] = to;
  }
  return rows;
}

// Words [q0, q1) of a panel, decoded: tile[step from q0][row]. q0 is a multiple of 16.
template <class P, int FORM>
__attribute__((noinline)) void decode_tile(const PackedWeight& w, const Decoding& d, const PanelRows& rows, int64_t q0,
                                           int64_t q1, float* tile) {
  constexpr int kSteps = Word<FORM>::kCodes / P::kColumns;
#if defined(ASKEW_ANY_WIDTH)
  const AnyWidth any(w.bits);
#endif
  for (int64_t q = q0; q < q1; q += 16)
    for (int v = 0; v < kPanelVectors32; ++v) {
      __m512i word[16];
      const uint8_t* const* row = rows.row + ASKEW_LANES * v;
#if defined(ASKEW_ANY_WIDTH)
      if (FORM >= kLookedUp && rows.any_width)
        for (int i = 0; i < 16; ++i)
          word[i] = any.codes(row[i] + q / 2 * w.bits, rows.bytes - q / 2 * w.bits);  // 4 q codes of `bits` bits
      else
#endif
        for (int i = 0; i < 16; ++i) word[i] = row_of_words(row[i], rows.bytes, q, FORM == kWordTrits);
      transpose(word);
      const int64_t count = q1 - q < 16 ? q1 - q : 16;
      float* to = tile + (q - q0) * kSteps * kStepFloats + ASKEW_LANES * v;
      for (int64_t i = 0; i < count; ++i, to += kSteps * kStepFloats)
        P::template decode<FORM>(d, word[i], [&](int step, vf level) { Floats::store(to + step * kStepFloats, level); });
    }
}

// ---- products ---------------------------------------------------------------------------------------------------------

// total[row][input] += scale (sum of the steps of a group), for the steps of a tile; the first group has `left` more.
template <class P, int B>
__attribute__((noinline)) void multiply_tile_of(const float* tile, int64_t steps, int64_t left, int64_t group,
                                                const float* scale, const uint32_t* x, float* total) {
  while (steps > 0) {
    const int64_t n = steps < left ? steps : left;
    vf sum[kPanelVectors32][B];
    ASKEW_EACH (v, kPanelVectors32)
      ASKEW_EACH (b, B) sum[v][b] = vf{};
    for (int64_t i = 0; i < n; ++i, tile += kStepFloats, x += B) {
      vf weight[kPanelVectors32];
      ASKEW_EACH (v, kPanelVectors32) weight[v] = Floats::load(tile + ASKEW_LANES * v);
      ASKEW_EACH (b, B)
        ASKEW_EACH (v, kPanelVectors32) sum[v][b] = P::product(sum[v][b], weight[v], x + b);
    }
    ASKEW_EACH (v, kPanelVectors32) {
      const vf s = Floats::load(scale + ASKEW_LANES * v);
      ASKEW_EACH (b, B) {
        float* to = total + (b * kPanelVectors32 + v) * ASKEW_LANES;
        Floats::store(to, multiply_add(sum[v][b], s, Floats::load(to)));
      }
    }
    steps -= n;
    left = group;
    scale += kPanelRows;
  }
}

typedef void (*TileProduct)(const float*, int64_t, int64_t, int64_t, const float*, const uint32_t*, float*);
template <class P>
ASKEW_FN TileProduct tile_product(int64_t inputs) {
  static const TileProduct made[kPanelInputs] = {
      multiply_tile_of<P, 1>, multiply_tile_of<P, 2>,  multiply_tile_of<P, 3>,  multiply_tile_of<P, 4>,
      multiply_tile_of<P, 5>, multiply_tile_of<P, 6>,  multiply_tile_of<P, 7>,  multiply_tile_of<P, 8>,
      multiply_tile_of<P, 9>, multiply_tile_of<P, 10>, multiply_tile_of<P, 11>, multiply_tile_of<P, 12>};
  return made[inputs - 1];
}

template <int T>
ASKEW_FN void store_lanes(void* y, int64_t at, vf v, int64_t count) {
  typedef typename Storage<T>::type S;
  S* to = (S*)y + at;
  if (count >= ASKEW_LANES) return Storage<T>::store(to, v);
  S last[ASKEW_LANES];
  Storage<T>::store(last, v);
  __builtin_memcpy(to, last, count * sizeof(S));
}

// Beside the tile: scales of the panel by groups, totals of the inputs, rows unpacked to bytes.
ASKEW_FN int64_t scale_floats(const PackedWeight& w) { return (w.groups > 1 ? w.groups : 1) * kPanelRows; }
static int64_t panel_scratch(const PackedWeight& w, int64_t batch) {
  const int64_t inputs = batch < kPassInputs ? batch : kPassInputs;
  return (kTileSteps * kStepFloats + scale_floats(w) + inputs * kPanelRows) * 4 +
         (unpacks(w) ? kPanelRows * (rounded_up(w.cols, 64) + kPadding) : 0);
}

template <class P>
ASKEW_FN void panel_product(const PackedWeight& w, int64_t row0, int64_t row1, const uint32_t* x, int64_t batch,
                            const float* bias, void* y, int type, char* scratch) {
  const int form = word_form(w);
  const Decoding d = P::decoding(w);
  const int64_t words = row_words(w), steps = steps_of<P>(w), in_word = words ? steps / words : 1;
  const int64_t groups = w.groups > 1 ? w.groups : 1, group = groups > 1 ? steps / groups : INT64_MAX;
  const int64_t tile_words = kTileSteps / in_word / 16 * 16;
  float* tile = (float*)scratch;
  float* scale = tile + kTileSteps * kStepFloats;
  float* total = scale + scale_floats(w);
  const int64_t most = batch < kPassInputs ? batch : kPassInputs;
  uint8_t* bytes = (uint8_t*)(total + most * kPanelRows);
  for (int64_t t0 = 0; t0 < batch; t0 += kPassInputs) {
    const int64_t inputs = batch - t0 < kPassInputs ? batch - t0 : kPassInputs;
    for (int64_t row = row0; row < row1; row += kPanelRows) {
      const int64_t rows = row1 - row < kPanelRows ? row1 - row : kPanelRows;
      const PanelRows source = panel_rows(w, row, rows, bytes);
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t r = 0; r < kPanelRows; ++r)
          scale[g * kPanelRows + r] = w.groups ? w.scale[(row + (r < rows ? r : rows - 1)) * w.groups + g] : w.scale[0];
      __builtin_memset(total, 0, inputs * kPanelRows * 4);
      for (int64_t q = 0; q < words; q += tile_words) {
        const int64_t until = words - q < tile_words ? words : q + tile_words;
        ASKEW_BY_WORD(FORM, form, decode_tile<P, FORM>(w, d, source, q, until, tile); break)
        const int64_t s = q * in_word, n = (until - q) * in_word, g = s / group;
        for (int64_t t = 0; t < inputs; ) {
          const int64_t count = panel_inputs(inputs, t);
          tile_product<P>(count)(tile, n, group - s % group, group, scale + g * kPanelRows,
                                 x + (t0 + t) * steps + s * count, total + t * kPanelRows);
          t += count;
        }
      }
      for (int64_t t = 0; t < inputs; ++t)
        for (int v = 0; v < kPanelVectors32 && ASKEW_LANES * v < rows; ++v) {
          vf sum = Floats::load(total + t * kPanelRows + ASKEW_LANES * v);
          const int64_t at = row + ASKEW_LANES * v, left = rows - ASKEW_LANES * v;
          if (bias) {
            float b[ASKEW_LANES] = {};
            __builtin_memcpy(b, bias + at, (left < ASKEW_LANES ? left : ASKEW_LANES) * 4);
            sum = sum + Floats::load(b);
          }
          ASKEW_BY_TYPE(type, store_lanes<T>(y, (t0 + t) * w.n + at, sum, left))
        }
    }
  }
}

ASKEW_FN bool words_fit(const PackedWeight& w) {
  if (w.grid.kind == kCodebook && w.bits > 4) return false;
  return w.groups <= 1 || w.cols / w.groups % word_codes(word_form(w)) == 0;
}

template <class P>
struct PanelsOf {
  static bool serves(const PackedWeight& w) { return words_fit(w) && P::exact(w); }
  static int64_t steps(const PackedWeight& w) { return steps_of<P>(w); }
  static void arrange(const PackedWeight& w, const float* x, int64_t stride, int64_t count, uint32_t* out,
                      float* peaks) {
    for (int64_t j = 0; j < count; ++j) peaks[j] = largest(x + j * stride, w.cols);
    arrange_steps<P>(w, x, stride, count, out);
  }
  static void multiply(const PackedWeight& w, int64_t row0, int64_t row1, const uint32_t* x, int64_t batch,
                       const float* bias, void* y, int type, char* scratch) {
    panel_product<P>(w, row0, row1, x, batch, bias, y, type, scratch);
  }
  static constexpr PanelLoops kLoops = {kPanelRows, serves, steps, arrange, panel_scratch, multiply};
};

extern const PanelLoops singles = PanelsOf<Singles>::kLoops;
#if defined(__AVX512BF16__)
extern const PanelLoops pairs = PanelsOf<Pairs>::kLoops;
#endif
#endif
