// Products of many inputs with packed weights. A panel of kPanelRows rows of the weight is decoded into a tile, rows in
// the lanes of its vectors, and stays in the cache while all inputs pass: an input's column, in every lane, times the
// rows, into sums that stay in registers.
//
// Two kinds of products. Singles: float32; a tile holds s c. Pairs: levels and inputs in bfloat16, two columns to a
// lane, whose products are exact and are summed in float32; a tile holds levels, and the sums of a group meet its
// scale. A step is what one lane of 32 bits takes of a row: a column, or two.
#if defined(ASKEW_WITH_PANELS)

constexpr int kTileVectors = 2, kPanelRows = kTileVectors * ASKEW_LANES, kMostPanelRows = 4 * ASKEW_LANES;
constexpr int kTileSteps = 1024;  // of a tile: 128 KiB

// How a word of 32 bits of a row is read: codes of 1, 2 or 4 bits, trits, or a code in each byte, which is looked up or
// is the level but for `lo`. Rows of other widths become bytes first.
enum WordForm : int { kWordTrits = 0, kLookedUp = 7, kNumbers = 8 };

#define ASKEW_BY_WORD(NAME, VALUE, ...)                              \
  switch (VALUE) {                                                   \
    ASKEW_CASE(case kWordTrits, constexpr int NAME = 0, __VA_ARGS__) \
    ASKEW_CASE(case 1, constexpr int NAME = 1, __VA_ARGS__)          \
    ASKEW_CASE(case 2, constexpr int NAME = 2, __VA_ARGS__)          \
    ASKEW_CASE(case 4, constexpr int NAME = 4, __VA_ARGS__)          \
    ASKEW_CASE(case kLookedUp, constexpr int NAME = 7, __VA_ARGS__)  \
    ASKEW_CASE(default, constexpr int NAME = kNumbers, __VA_ARGS__)  \
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
  fraction = times(fraction, three);
  return digit;
}
ASKEW_FN __m512i trit_fractions(__m512i bytes) {
  return times(_mm512_and_si512(bytes, _mm512_set1_epi16(0xff)), _mm512_set1_epi16(270));
}

struct Singles {
  static constexpr int kColumns = 1;
  static constexpr bool kScaled = true;  // what a tile holds
  static bool exact(const PackedWeight&) { return true; }

  static Decoding decoding(const PackedWeight& w) {
    return {_mm512_loadu_si512(w.table), w.lo, (uint8_t)(w.n_levels - 1)};
  }
  ASKEW_FN vf product(vf sum, vf weight, const uint32_t* x) {
    const vf input = (vf)_mm512_set1_epi32((int)*x);  // not vf{} + a number, which is an addition
    return fused_multiply_add(weight, input, sum);
  }
  ASKEW_FN vf looked_up(const Decoding& d, __m512i codes) { return (vf)_mm512_permutexvar_epi32(codes, d.table); }
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
  static constexpr bool kScaled = false;
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
  ASKEW_FN __m512i rounded(__m512i first, __m512i second) {  // 32 floats
    const __m256i low = _mm512_cvtepi32_epi16((__m512i)narrow_bf16((vf)first));
    const __m256i high = _mm512_cvtepi32_epi16((__m512i)narrow_bf16((vf)second));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  ASKEW_FN vf product(vf sum, vf weight, const uint32_t* x) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)_mm512_set1_epi32((int)*x));
  }
  ASKEW_FN vf looked_up(const Decoding& d, __m512i codes) { return (vf)_mm512_permutexvar_epi16(codes, d.table); }
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

// ---- inputs
// -----------------------------------------------------------------------------------------------------------

template <class P>
ASKEW_FN int64_t steps_of(const PackedWeight& w) {
  return row_words(w) * word_codes(word_form(w)) / P::kColumns;
}

// 16 floats from x, those of them that are among the next `left`.
template <int T>
ASKEW_FN __m512i sixteen(const typename Storage<T>::type* x, int64_t left) {
  const __mmask16 there = left >= 16 ? (__mmask16)0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : (__mmask16)0;
  if constexpr (T == kFloat32) {
    return _mm512_maskz_loadu_epi32(there, x);
  } else {
    const __m512i half = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x));
    return (__m512i)Storage<T>::widen((vu)half);
  }
}

// 16 steps from x, `left` columns before the end, in order; `most` takes the bits of magnitudes, which are in their
// order: of float32, or of bfloat16 in both halves.
template <class P, int T>
ASKEW_FN __m512i steps_from(const typename Storage<T>::type* x, int64_t left, __m512i order, __m512i& most) {
  if constexpr (P::kColumns == 1) {
    const __m512i values = sixteen<T>(x, left);
    most = _mm512_max_epu32(most, _mm512_and_si512(values, _mm512_set1_epi32(0x7fffffff)));
    return values;
  } else {
    __m512i values;
    if constexpr (T == kBFloat16)
      values = _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0, x);
    else
      values = P::rounded(sixteen<T>(x, left), left > 16 ? sixteen<T>(x + 16, left - 16) : _mm512_setzero_si512());
    most = _mm512_max_epu16(most, _mm512_and_si512(values, _mm512_set1_epi16(0x7fff)));
    return _mm512_permutexvar_epi16(order, values);
  }
}

// The largest magnitude that `most` has seen; NaN where one was.
template <class P>
ASKEW_FN float largest(__m512i most) {
  if (P::kColumns == 2) most = _mm512_slli_epi32(_mm512_max_epu16(most, _mm512_srli_epi32(most, 16)), 16);
  const uint32_t bits = _mm512_reduce_max_epu32(most);
  float peak;
  __builtin_memcpy(&peak, &bits, 4);
  return peak;
}

// The place of column c of a word of trits among its steps of one column; of the lower half of a step of two.
ASKEW_FN int64_t trit_step(int64_t c, int columns) {
  const int64_t byte = c / kTritsInByte, digit = kTritsInByte - 1 - c % kTritsInByte;
  return columns == 2 ? kTritsInByte * byte + digit : 10 * (byte % 2) + 2 * digit + byte / 2;
}

// A word of trits, two neighbouring columns a lane, as the columns that a step takes: c and c + 10.
ASKEW_FN void pair_trits(const __m512i* lanes, __mmask16 mask, int64_t width, uint32_t* out) {
  for (int c = 0; c < 10; ++c) {
    const __m512i first = lanes[c / 2], second = lanes[c / 2 + 5];
    const __m512i pair = c % 2 ? _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(first, 16), second)
                               : _mm512_mask_blend_epi16(0xaaaaaaaau, first, _mm512_slli_epi32(second, 16));
    _mm512_mask_storeu_epi32(out + trit_step(c, 2) * width, mask, pair);
  }
}

// `count` inputs, and zeros up to `width`, as out[step][input].
template <class P, int T>
ASKEW_FN void arrange_steps(const PackedWeight& w, const void* in, int64_t count, int64_t width, uint32_t* out,
                            float* peaks) {
  typedef typename Storage<T>::type S;
  const S* x = (const S*)in;
  const int form = word_form(w), codes = (int)word_codes(form);
  const int64_t steps = steps_of<P>(w);
  const bool trits = form == kWordTrits;
  constexpr int kAhead = 256 / sizeof(S);
  constexpr int kWord = 10, kWords = 8;  // of trits in pairs: lanes of a word; words that are whole vectors
  uint16_t in_order[32];
  for (int i = 0; i < 32; ++i)  // pairs: the columns of a step stand half a word apart
    in_order[i] = (uint16_t)(trits || P::kColumns == 1 ? i : i / codes * codes + i % codes / 2 + i % 2 * (codes / 2));
  const __m512i order = _mm512_loadu_si512(in_order);
  const __mmask16 mask = (__mmask16)((1u << width) - 1);
  __m512i most[kFewInputs], lanes[kWord * kWords];
  for (int j = 0; j < kFewInputs; ++j) most[j] = _mm512_setzero_si512();
  for (int64_t s = 0; s < steps; s += 16) {
    const int64_t c = s * P::kColumns, there = steps - s < 16 ? steps - s : 16;
    __m512i columns[16];
    for (int64_t j = 0; j < count; ++j) __builtin_prefetch(x + j * w.cols + c + kAhead);
    for (int j = 0; j < 16; ++j)
      columns[j] =
          j < count ? steps_from<P, T>(x + j * w.cols + c, w.cols - c, order, most[j]) : _mm512_setzero_si512();
    transpose(columns);
    if (trits && P::kColumns == 2) {
      const int64_t at = s % (kWord * kWords);
      for (int i = 0; i < 16; ++i) lanes[at + i] = columns[i];
      if (at + 16 < kWord * kWords && s + 16 < steps) continue;
      for (int64_t i = 0; i + kWord <= at + there; i += kWord)
        pair_trits(lanes + i, mask, width, out + (s - at + i) * width);
    } else {
      for (int64_t i = 0; i < there; ++i) {
        const int64_t step = trits ? (s + i) / codes * codes + trit_step((s + i) % codes, 1) : s + i;
        _mm512_mask_storeu_epi32(out + step * width, mask, columns[i]);
      }
    }
  }
  for (int64_t j = 0; j < count; ++j) peaks[j] = largest<P>(most[j]);
}

// ---- tiles
// ------------------------------------------------------------------------------------------------------------

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
  const uint8_t* row[kMostPanelRows];
  int64_t bytes;
  bool any_width;
};

ASKEW_FN bool unpacks(const PackedWeight& w) { return word_form(w) >= kLookedUp && w.bits != 8; }

// Rows [first, first + count), filled up to `all` by the last one.
ASKEW_FN PanelRows panel_rows(const PackedWeight& w, int64_t first, int64_t count, int all, uint8_t* scratch) {
  PanelRows rows;
  rows.bytes = w.row_bytes;
  rows.any_width = false;
  for (int r = 0; r < all; ++r) rows.row[r] = w.codes + (first + (r < count ? r : count - 1)) * w.row_bytes;
  if (!unpacks(w)) return rows;
#if defined(ASKEW_ANY_WIDTH)
  if (w.bits) {
    rows.any_width = true;
    return rows;
  }
#endif
  rows.bytes = rounded_up(w.cols, 64);
  for (int r = 0; r < all; ++r) {
    uint8_t* to = scratch + (r < count ? r : count - 1) * (rows.bytes + kPadding);
    if (r < count) unpack_row(w, first + r, to);
    rows.row[r] = to;
  }
  return rows;
}

// Reads the words of a panel's rows, sixteen a row at a time.
template <int FORM>
struct WordReader {
  const PanelRows& rows;
#if defined(ASKEW_ANY_WIDTH)
  AnyWidth any;
  int bits;
  WordReader(const PackedWeight& w, const PanelRows& r) : rows(r), any(w.bits), bits(w.bits) {}
#else
  WordReader(const PackedWeight&, const PanelRows& r) : rows(r) {}
#endif
  // word[i][row]: words q to q + 15 of rows 16 v to 16 v + 15; q is a multiple of 16
  ASKEW_INLINE void read(int64_t q, int v, __m512i (&word)[16]) const {
    const uint8_t* const* row = rows.row + ASKEW_LANES * v;
#if defined(ASKEW_ANY_WIDTH)
    if (FORM >= kLookedUp && rows.any_width) {
      const int64_t at = q / 2 * bits;  // of 4 q codes
      for (int i = 0; i < 16; ++i) word[i] = any.codes(row[i] + at, rows.bytes - at);
    } else
#endif
      for (int i = 0; i < 16; ++i) word[i] = row_of_words(row[i], rows.bytes, q, FORM == kWordTrits);
    transpose(word);
  }
};

// Words [q0, q1) of a panel, decoded: tile[step from q0][row]. q0 is a multiple of 16; scale: of all its groups, of
// `group` words.
template <class P, int FORM>
__attribute__((noinline)) void decode_tile(const PackedWeight& w, const Decoding& d, const PanelRows& rows, int64_t q0,
                                           int64_t q1, int64_t group, const float* scale, float* tile) {
  constexpr int kSteps = Word<FORM>::kCodes / P::kColumns;
  const WordReader<FORM> reader(w, rows);
  for (int64_t q = q0; q < q1; q += 16)
    for (int v = 0; v < kTileVectors; ++v) {
      __m512i word[16];
      reader.read(q, v, word);
      const int64_t count = q1 - q < 16 ? q1 - q : 16;
      const float* own = scale + q / group * kPanelRows + ASKEW_LANES * v;
      int64_t left = group - q % group;
      float* to = tile + (q - q0) * kSteps * kPanelRows + ASKEW_LANES * v;
      for (int64_t i = 0; i < count; ++i, to += kSteps * kPanelRows) {
        const vf s = Floats::load(own);
        P::template decode<FORM>(d, word[i], [&](int step, vf level) {
          Floats::store(to + step * kPanelRows, P::kScaled ? level * s : level);
        });
        if (--left) continue;
        left = group;
        own += kPanelRows;
      }
    }
}

// ---- products
// ---------------------------------------------------------------------------------------------------------

// A pass of inputs over a tile. `ahead`: what will be decoded next, `ahead_bytes` a step.
struct TilePass {
  const float* tile;
  int64_t steps;
  bool first;           // of the row: total is overwritten
  int64_t left, group;  // of levels: steps of the first group that are left, of each other
  const float* scale;   // of the first group
  const uint8_t* ahead;
  int64_t ahead_bytes;
};

// sum[row][input] += the products of `steps` steps, with B inputs of blocks of BLOCK.
template <class P, int BLOCK, int B>
ASKEW_INLINE void multiply_steps(const float*& tile, int64_t steps, const uint32_t*& x, const uint8_t*& ahead,
                                 int64_t ahead_bytes, vf (&sum)[kTileVectors][B]) {
  for (int64_t i = 0; i < steps; ++i, tile += kPanelRows, x += BLOCK, ahead += ahead_bytes) {
    __builtin_prefetch(ahead, 0, 2);
    vf weight[kTileVectors];
    ASKEW_EACH (v, kTileVectors) weight[v] = Floats::load(tile + ASKEW_LANES * v);
    ASKEW_EACH (b, B)
      ASKEW_EACH (v, kTileVectors) sum[v][b] = P::product(sum[v][b], weight[v], x + b);
  }
}

template <int B>
ASKEW_INLINE void load_totals(const float* total, bool first, vf (&sum)[kTileVectors][B]) {
  ASKEW_EACH (v, kTileVectors)
    ASKEW_EACH (b, B) sum[v][b] = first ? vf{} : Floats::load(total + (b * kTileVectors + v) * ASKEW_LANES);
}
template <int B>
ASKEW_INLINE void store_totals(const vf (&sum)[kTileVectors][B], float* total) {
  ASKEW_EACH (v, kTileVectors)
    ASKEW_EACH (b, B) Floats::store(total + (b * kTileVectors + v) * ASKEW_LANES, sum[v][b]);
}

// total[row][input] += the products of a tile's steps that hold s c.
template <class P, int B>
ASKEW_INLINE void multiply_scaled(const TilePass& pass, const uint32_t* x, float* total) {
  const float* tile = pass.tile;
  const uint8_t* ahead = pass.ahead;
  vf sum[kTileVectors][B];
  load_totals(total, pass.first, sum);
  multiply_steps<P, B, B>(tile, pass.steps, x, ahead, pass.ahead_bytes, sum);
  store_totals(sum, total);
}

// The same of levels, whose sums meet the scales of their groups. Half a block of inputs: totals stay in registers,
// too.
template <class P, int BLOCK, int B>
__attribute__((noinline)) void multiply_groups(const TilePass& pass, const uint8_t* ahead, int64_t ahead_bytes,
                                               const uint32_t* x, float* total) {
  const float *tile = pass.tile, *scale = pass.scale;
  vf all[kTileVectors][B];
  load_totals(total, pass.first, all);
  for (int64_t steps = pass.steps, left = pass.left; steps > 0; left = pass.group, scale += kPanelRows) {
    const int64_t n = steps < left ? steps : left;
    steps -= n;
    vf sum[kTileVectors][B];
    ASKEW_EACH (v, kTileVectors)
      ASKEW_EACH (b, B) sum[v][b] = vf{};
    multiply_steps<P, BLOCK, B>(tile, n, x, ahead, ahead_bytes, sum);
    ASKEW_EACH (v, kTileVectors) {
      const vf s = Floats::load(scale + ASKEW_LANES * v);
      ASKEW_EACH (b, B) all[v][b] = multiply_add(sum[v][b], s, all[v][b]);
    }
  }
  store_totals(all, total);
}

template <class P, int B>
__attribute__((noinline)) void multiply_tile_of(const TilePass& pass, const uint32_t* x, float* total) {
  if constexpr (P::kScaled) {
    multiply_scaled<P, B>(pass, x, total);
  } else {
    constexpr int kFirst = (B + 1) / 2, kSecond = B / 2;
    multiply_groups<P, B, kFirst>(pass, pass.ahead, pass.ahead_bytes, x, total);
    if constexpr (kSecond > 0)
      multiply_groups<P, B, kSecond>(pass, pass.ahead, 0, x + kFirst, total + kFirst * kPanelRows);
  }
}

typedef void (*TileProduct)(const TilePass&, const uint32_t*, float*);
template <class P>
ASKEW_FN TileProduct tile_product(int64_t inputs) {
  static const TileProduct made[kPanelInputs] = {
      multiply_tile_of<P, 1>, multiply_tile_of<P, 2>,  multiply_tile_of<P, 3>,  multiply_tile_of<P, 4>,
      multiply_tile_of<P, 5>, multiply_tile_of<P, 6>,  multiply_tile_of<P, 7>,  multiply_tile_of<P, 8>,
      multiply_tile_of<P, 9>, multiply_tile_of<P, 10>, multiply_tile_of<P, 11>, multiply_tile_of<P, 12>};
  return made[inputs - 1];
}

// The same for few inputs, which meet the levels as they are decoded: V vectors of rows, all words; total is
// overwritten.
template <class P, int FORM, int V, int B>
__attribute__((noinline)) void multiply_words(const PackedWeight& w, const Decoding& decoding, const PanelRows& rows,
                                              int64_t words, int64_t group, const float* scale, const uint32_t* x,
                                              int64_t ahead, float* total) {
  constexpr int kSteps = Word<FORM>::kCodes / P::kColumns;
  const Decoding d = decoding;
  const WordReader<FORM> reader(w, rows);
  vf sum[V][B];
  ASKEW_EACH (v, V)
    ASKEW_EACH (b, B) {
      sum[v][b] = vf{};
      Floats::store(total + (b * V + v) * ASKEW_LANES, vf{});
    }
  int64_t left = group;
  for (int64_t q = 0; q < words; q += 16) {
    __m512i word[V][16];
    for (int v = 0; v < V; ++v) {
      reader.read(q, v, word[v]);
      for (int i = 0; i < 16; ++i) __builtin_prefetch(rows.row[ASKEW_LANES * v + i] + 4 * q + ahead, 0, 2);
    }
    const int64_t count = words - q < 16 ? words - q : 16;
    for (int64_t i = 0; i < count; ++i, x += kSteps * B) {
      vf weight[V][kSteps];
      ASKEW_EACH (v, V) P::template decode<FORM>(d, word[v][i], [&](int step, vf level) { weight[v][step] = level; });
      ASKEW_EACH (k, kSteps)
        ASKEW_EACH (b, B)
          ASKEW_EACH (v, V) sum[v][b] = P::product(sum[v][b], weight[v][k], x + k * B + b);
      if (--left && (q + i + 1 < words)) continue;
      ASKEW_EACH (v, V) {
        const vf s = Floats::load(scale + ASKEW_LANES * v);
        ASKEW_EACH (b, B) {
          float* to = total + (b * V + v) * ASKEW_LANES;
          Floats::store(to, multiply_add(sum[v][b], s, Floats::load(to)));
          sum[v][b] = vf{};
        }
      }
      left = group;
      scale += V * ASKEW_LANES;
    }
  }
}

typedef void (*WordProduct)(const PackedWeight&, const Decoding&, const PanelRows&, int64_t, int64_t, const float*,
                            const uint32_t*, int64_t, float*);
template <class P, int FORM>
ASKEW_FN WordProduct word_product(int64_t width) {
  switch (width) {
    case 1:
      return multiply_words<P, FORM, 4, 1>;
    case 2:
      return multiply_words<P, FORM, 4, 2>;
    case 3:
      return multiply_words<P, FORM, 4, 3>;
    case 4:
      return multiply_words<P, FORM, 4, 4>;
    case 6:
      return multiply_words<P, FORM, 2, 6>;
    case 8:
      return multiply_words<P, FORM, 2, 8>;
    case 12:
      return multiply_words<P, FORM, 1, 12>;
    default:
      return multiply_words<P, FORM, 1, 16>;
  }
}
ASKEW_FN int word_vectors(int64_t width) { return width <= 4 ? 4 : width <= 8 ? 2 : 1; }

template <int T>
ASKEW_FN void store_lanes(void* y, int64_t at, vf v, int64_t count) {
  typedef typename Storage<T>::type S;
  S* to = (S*)y + at;
  if (count >= ASKEW_LANES) return Storage<T>::store(to, v);
  S last[ASKEW_LANES];
  Storage<T>::store(last, v);
  __builtin_memcpy(to, last, count * sizeof(S));
}

// Scales of rows [row, row + rows) by groups, filled up to `all` by those of the last row.
ASKEW_FN void panel_scales(const PackedWeight& w, int64_t row, int64_t rows, int all, float* scale) {
  const int64_t groups = w.groups > 1 ? w.groups : 1;
  for (int64_t r = 0; r < all; ++r) {
    const float* from = w.groups ? w.scale + (row + (r < rows ? r : rows - 1)) * w.groups : w.scale;
    for (int64_t g = 0; g < groups; ++g) scale[g * all + r] = from[g];
  }
}

// y of `inputs` inputs from t0 on, of rows [row, row + rows), whose totals stand `all` for each input.
template <int T>
ASKEW_FN void store_typed_totals(int64_t n, int64_t row, int64_t rows, int all, int64_t t0, int64_t inputs,
                                 const float* total, const float* bias, void* y) {
  for (int64_t r = 0; r < rows; r += ASKEW_LANES) {
    const int64_t left = rows - r < ASKEW_LANES ? rows - r : ASKEW_LANES;
    vf added = vf{};
    if (bias) __builtin_memcpy(&added, bias + row + r, left * sizeof(float));
    for (int64_t t = 0; t < inputs; ++t) {
      const vf sum = Floats::load(total + t * all + r);
      store_lanes<T>(y, (t0 + t) * n + row + r, bias ? sum + added : sum, left);
    }
  }
}

ASKEW_FN void store_totals(const PackedWeight& w, int64_t row, int64_t rows, int all, int64_t t0, int64_t inputs,
                           const float* total, const float* bias, void* y, int type){
    ASKEW_BY_TYPE(type, store_typed_totals<T>(w.n, row, rows, all, t0, inputs, total, bias, y))}

// A tile, scales of a panel by groups, totals of the inputs, rows unpacked to bytes.
ASKEW_FN int64_t scale_floats(const PackedWeight& w) {
  return (w.groups > 1 ? w.groups : 1) * kMostPanelRows;
}
static int64_t panel_scratch(const PackedWeight& w, int64_t batch, int64_t inputs) {
  const bool few = batch <= kFewInputs;
  const int64_t totals = few ? kFewInputs * kMostPanelRows : inputs * kPanelRows;
  return ((few ? 0 : kTileSteps * kPanelRows) + scale_floats(w) + totals) * 4 +
         (unpacks(w) ? kMostPanelRows * (rounded_up(w.cols, 64) + kPadding) : 0);
}

// Up to kFewInputs inputs, side by side in blocks of `width`.
template <class P>
void few_product(const PackedWeight& w, int64_t row0, int64_t row1, const uint32_t* x, int64_t, int64_t batch,
                 const float* bias, void* y, int type, char* scratch) {
  const int form = word_form(w);
  const Decoding d = P::decoding(w);
  const int64_t words = row_words(w), groups = w.groups > 1 ? w.groups : 1;
  const int64_t group = groups > 1 ? words / groups : words, width = block_width(batch, batch);
  const int vectors = word_vectors(width), all = vectors * ASKEW_LANES;
  float* scale = (float*)scratch;
  float* total = scale + scale_floats(w);
  uint8_t* bytes = (uint8_t*)(total + kFewInputs * kMostPanelRows);
  WordProduct product = nullptr;
  ASKEW_BY_WORD(FORM, form, product = word_product<P, FORM>(width); break)
  for (int64_t row = row0; row < row1; row += all) {
    const int64_t rows = row1 - row < all ? row1 - row : all;
    const PanelRows source = panel_rows(w, row, rows, all, bytes);
    panel_scales(w, row, rows, all, scale);
    product(w, d, source, words, group, scale, x, unpacks(w) ? 0 : all * w.row_bytes, total);
    store_totals(w, row, rows, all, 0, batch, total, bias, y, type);
  }
}

// Inputs [t0, t0 + inputs), a pass over all of these rows; x: theirs.
template <class P>
void panel_product(const PackedWeight& w, int64_t row0, int64_t row1, const uint32_t* x, int64_t t0, int64_t inputs,
                   const float* bias, void* y, int type, char* scratch) {
  const int form = word_form(w);
  const Decoding d = P::decoding(w);
  const int64_t words = row_words(w), steps = steps_of<P>(w), in_word = words ? steps / words : 1;
  const int64_t groups = w.groups > 1 ? w.groups : 1, group_words = words > groups ? words / groups : 1;
  const int64_t tile_words = kTileSteps / in_word / 16 * 16, blocks = block_count(inputs);
  float* tile = (float*)scratch;
  float* scale = tile + kTileSteps * kPanelRows;
  float* total = scale + scale_floats(w);
  uint8_t* bytes = (uint8_t*)(total + inputs * kPanelRows);
  TilePass pass;
  pass.tile = tile;
  pass.group = group_words * in_word;
  for (int64_t row = row0; row < row1; row += kPanelRows) {
    const int64_t rows = row1 - row < kPanelRows ? row1 - row : kPanelRows;
    const PanelRows source = panel_rows(w, row, rows, kPanelRows, bytes);
    panel_scales(w, row, rows, kPanelRows, scale);
    if (!words) {
      __builtin_memset(total, 0, inputs * kPanelRows * sizeof(float));
      store_totals(w, row, rows, kPanelRows, t0, inputs, total, bias, y, type);
    }
    for (int64_t q = 0; q < words; q += tile_words) {
      const int64_t until = words - q < tile_words ? words : q + tile_words;
      ASKEW_BY_WORD(FORM, form, decode_tile<P, FORM>(w, d, source, q, until, group_words, scale, tile); break)
      const int64_t s = q * in_word;
      pass.steps = (until - q) * in_word;
      pass.first = !q;
      pass.left = pass.group - s % pass.group;
      pass.scale = scale + s / pass.group * kPanelRows;
      // the next panel's bytes, or of the last panel what is at hand
      pass.ahead_bytes = kPanelRows * w.row_bytes / steps;
      pass.ahead = source.row[0] + (row + kPanelRows < row1) * kPanelRows * w.row_bytes + s * pass.ahead_bytes;
      for (int64_t b = 0, t = 0; b < blocks; ++b) {
        const int64_t count = block_inputs(inputs, b);
        float* sums = total + t * kPanelRows;
        tile_product<P>(count)(pass, x + t * steps + s * count, sums);
        if (until == words) store_totals(w, row, rows, kPanelRows, t0 + t, count, sums, bias, y, type);
        pass.ahead_bytes = 0;
        t += count;
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
  static void arrange(const PackedWeight& w, const void* x, int type, int64_t count, int64_t width, uint32_t* out,
                      float* peaks) {
    ASKEW_BY_TYPE(type, arrange_steps<P, T>(w, x, count, width, out, peaks))
  }
  static constexpr PanelLoops kLoops = {kMostPanelRows, kPanelRows,    serves,         steps,
                                        arrange,        panel_scratch, few_product<P>, panel_product<P>};
};

extern const PanelLoops singles = PanelsOf<Singles>::kLoops;
#if defined(__AVX512BF16__)
extern const PanelLoops pairs = PanelsOf<Pairs>::kLoops;
#endif
#endif
