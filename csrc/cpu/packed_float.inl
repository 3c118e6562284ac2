// Float activations times packed weights. A lane's word holds consecutive columns: shifting all lanes by one code at a
// time needs no other unpacking, provided that the input was arranged in that order once.

enum Form : int { kBytes = 8, kDecoded = 32 };  // else the bits of a code: 1 to 4, or 0 for trits

#define ASKEW_BY_FORM(NAME, VALUE, LAST, ...)                    \
  switch (VALUE) {                                               \
    ASKEW_CASE(case kTrits, constexpr int NAME = 0, __VA_ARGS__) \
    ASKEW_CASE(case 1, constexpr int NAME = 1, __VA_ARGS__)      \
    ASKEW_CASE(case 2, constexpr int NAME = 2, __VA_ARGS__)      \
    ASKEW_CASE(case 3, constexpr int NAME = 3, __VA_ARGS__)      \
    ASKEW_CASE(case 4, constexpr int NAME = 4, __VA_ARGS__)      \
    ASKEW_CASE(default, constexpr int NAME = LAST, __VA_ARGS__)  \
  }

// How rows are read: as they stand, as bytes made of them, or as decoded floats where groups end inside a lane.
ASKEW_FN int form_of(const PackedWeight& w) {
  ASKEW_BY_FORM(BITS, w.bits, kBytes, return groups_fit(w, Block<BITS>::kCols, Block<BITS>::kCodes) ? BITS : kDecoded)
  return kDecoded;
}

static int64_t width(const PackedWeight& w) {
  ASKEW_BY_FORM(FORM, form_of(w), kBytes, return rounded_up(w.cols, Block<FORM>::kCols))
  return 0;
}

template <int BITS>
ASKEW_FN void arrange_blocks(const PackedWeight& weight, const float* x, float* out) {
  const PackedWeight w = weight;  // a copy that the stores cannot change
  constexpr int kCodes = Block<BITS>::kCodes;
  for (int64_t c = 0; c < w.cols; c += Block<BITS>::kCols, out += Block<BITS>::kCols) {
    const bool whole = c + Block<BITS>::kCols <= w.cols;
    for (int k = 0; k < kCodes; ++k)
      for (int i = 0; i < ASKEW_LANES; ++i) {
        const int64_t from = c + i * kCodes + k;
        out[k * ASKEW_LANES + i] = whole || from < w.cols ? x[from] : 0;
      }
  }
}

static void arrange(const PackedWeight& w, const float* x, float* out) {
  const int form = form_of(w);
  if (form <= 4) ASKEW_BY_FORM(FORM, form, 4, return arrange_blocks<FORM>(w, x, out))
  __builtin_memcpy(out, x, w.cols * 4);
  for (int64_t c = w.cols; c % ASKEW_LANES; ++c) out[c] = 0;
}

constexpr int kRows = 4;  // that the kernel has in flight for one input

static int64_t scratch(const PackedWeight& w) {
  const int form = form_of(w);
  const int64_t cols = rounded_up(w.cols, 64) + kPadding;
  return form == kDecoded ? kRows * cols * 4 + cols : form == kBytes ? kRows * cols : kPadding;
}

enum Grouped : int { kOneScale, kBlocks, kLanes };  // of a row: groups of whole blocks, or several groups in a block

// sum[r][b] = row r times input b, for R rows from p, `stride` bytes apart.
template <int FORM, int GROUPED, int R, int B>
ASKEW_FN void dot_tile(const PackedWeight& w, const uint8_t* p, int64_t stride, int64_t row, const float* x,
                       int64_t width, vf (&sum)[R][B]) {
  constexpr int kBits = FORM == kDecoded ? 8 : FORM;
  typedef Block<kBits> block;
  constexpr int kStep = FORM == kDecoded ? 4 * ASKEW_LANES : block::kBytes;
  const int64_t blocks = width / block::kCols, whole = FORM <= 4 ? w.row_bytes / kStep : blocks;
  const bool without_level = w.n_levels < 1 << w.bits;  // some codes, which count as the last
  LaneScales lanes;
  const float* scale = nullptr;
  int64_t left = w.groups, until = 0;
  if (GROUPED) {
    lanes = lane_scales(w, block::kCols, block::kCodes);
    scale = w.scale + row * w.groups;
    until = lanes.blocks;
  }
  ASKEW_EACH (r, R)
    ASKEW_EACH (b, B) sum[r][b] = vf{};
  for (int64_t i = 0; i < blocks; ++i) {
    vu word[R];
    vf level[R], s[R], own[R];
    ASKEW_EACH (r, R) {
      const uint8_t* from = p + r * stride + i * kStep;
      if (FORM <= 4) __builtin_prefetch(from + 2 * R * stride, 0, 2);  // of the rows that come next
      if (FORM == kDecoded) {
        level[r] = Floats::load((const float*)from);
      } else if (i < whole) {
        word[r] = words_of<kBits>(w, from);
      } else {  // the last bytes of a row
        uint8_t padded[block::kBytes] = {};
        __builtin_memcpy(padded, from, w.row_bytes - whole * kStep);
        word[r] = words_of<kBits>(w, padded);
      }
      if (GROUPED == kBlocks) s[r] = vf{} + scale[r * w.groups];
      if (GROUPED == kLanes) s[r] = scales_of(lanes, scale + r * w.groups, left);
      own[r] = vf{};
    }
    const float* at = x + i * block::kCols;
    ASKEW_EACH_CODE (k, block::kCodes) {
      ASKEW_EACH (r, R) {
        if (FORM == kBytes) level[r] = (vf)word[r] - (8388608.f - w.lo);
        if (FORM == kBytes && without_level) level[r] = select(level[r] > w.hi, vf{} + w.hi, level[r]);
        if (FORM <= 4) level[r] = lookup(w.table, word[r] >> (FORM <= 4 ? block::kShift * k : 0));
        if (GROUPED && B > 1) level[r] = level[r] * s[r];
      }
      ASKEW_EACH (b, B) {
        const vf input = Floats::load(at + b * width + k * ASKEW_LANES);
        ASKEW_EACH (r, R) {
          if (GROUPED && B == 1)
            own[r] = multiply_add(level[r], input, own[r]);
          else
            sum[r][b] = multiply_add(level[r], input, sum[r][b]);
        }
      }
    }
    if (GROUPED && B == 1)
      ASKEW_EACH (r, R) sum[r][0] = multiply_add(own[r], s[r], sum[r][0]);
    if (GROUPED) {
      const int64_t done = GROUPED == kBlocks || lanes.blocks ? i + 1 == until : lanes.groups;
      if ((GROUPED == kBlocks || lanes.blocks) && done) until += lanes.blocks;
      scale += done;
      left -= done;
    }
  }
}

template <int FORM, int GROUPED, int R, int B>
__attribute__((noinline)) void multiply_tile(const PackedWeight& w, const uint8_t* p, int64_t stride, int64_t row,
                                             const float* x, int64_t width, const float* bias, float* y) {
  vf sum[R][B];
  dot_tile<FORM, GROUPED, R, B>(w, p, stride, row, x, width, sum);
  ASKEW_EACH (b, B)
    ASKEW_EACH (r, R) {
      const float s = GROUPED || FORM == kDecoded ? 1.f : row_scale(w, row + r);
      y[b * w.n + row + r] = sum_of(sum[r][b]) * s + (bias ? bias[row + r] : 0.f);
    }
}

template <int FORM, bool GROUPED, int R>
ASKEW_FN void multiply_rows(const PackedWeight& w, int64_t row, const float* x, int64_t batch, int64_t width,
                            const float* bias, float* y, char* scratch) {
  const uint8_t* p = w.codes + row * w.row_bytes;
  int64_t stride = w.row_bytes;
  if (FORM == kDecoded) {
    stride = (rounded_up(w.cols, 64) + kPadding) * 4;
    ASKEW_EACH (r, R)
      decode(w, row + r, kFloat32, (float*)(scratch + r * stride), (uint8_t*)(scratch + kRows * stride));
    p = (const uint8_t*)scratch;
  } else if (FORM == kBytes && (w.bits != 8 || w.cols % ASKEW_LANES)) {
    stride = rounded_up(w.cols, 64) + kPadding;
    ASKEW_EACH (r, R) unpack_row(w, row + r, (uint8_t*)scratch + r * stride);
    p = (const uint8_t*)scratch;
  }
  constexpr int kInputs = ASKEW_LANES == 16 ? 8 : 4;
  constexpr int kBits = FORM == kDecoded ? 8 : FORM, kGrouped = GROUPED ? kLanes : kOneScale;
  // groups of whole blocks have a loop of their own: the choice of scales costs as much as a product
  constexpr int kWhole = GROUPED ? kBlocks : kOneScale;
  const bool whole = GROUPED && w.cols / w.groups % Block<kBits>::kCols == 0;
  int64_t b = 0;
  if (R == kRows) {
    if (whole)
      multiply_tile<FORM, kWhole, R, 1>(w, p, stride, row, x, width, bias, y);
    else
      multiply_tile<FORM, kGrouped, R, 1>(w, p, stride, row, x, width, bias, y);
    return;
  }
  for (; b + kInputs <= batch; b += kInputs)
    if (whole)
      multiply_tile<FORM, kWhole, R, kInputs>(w, p, stride, row, x + b * width, width, bias, y + b * w.n);
    else
      multiply_tile<FORM, kGrouped, R, kInputs>(w, p, stride, row, x + b * width, width, bias, y + b * w.n);
  for (; b + 2 <= batch; b += 2)
    multiply_tile<FORM, kGrouped, R, 2>(w, p, stride, row, x + b * width, width, bias, y + b * w.n);
  for (; b < batch; ++b)
    multiply_tile<FORM, kGrouped, R, 1>(w, p, stride, row, x + b * width, width, bias, y + b * w.n);
}

template <int FORM, bool GROUPED>
ASKEW_FN void multiply_form(const PackedWeight& w, int64_t row0, int64_t row1, const float* x, int64_t batch,
                            const float* bias, float* y, char* scratch) {
  const int64_t wide = width(w);
  int64_t row = row0;
  if (batch == 1)
    for (; row + kRows <= row1; row += kRows)
      multiply_rows<FORM, GROUPED, kRows>(w, row, x, batch, wide, bias, y, scratch);
  constexpr int kMany = ASKEW_LANES == 16 ? 3 : 2;
  for (; row + kMany <= row1; row += kMany)
    multiply_rows<FORM, GROUPED, kMany>(w, row, x, batch, wide, bias, y, scratch);
  for (; row < row1; ++row) multiply_rows<FORM, GROUPED, 1>(w, row, x, batch, wide, bias, y, scratch);
}

#if defined(ASKEW_FLOATS)  // another instruction set's, where these would be the same instructions, most of the code
using ASKEW_FLOATS::multiply;
#if ASKEW_LANES == 16
using ASKEW_FLOATS::multiply_tables;
#endif
#elif !defined(ASKEW_PANELS_ONLY)
void multiply(const PackedWeight& w, int64_t row0, int64_t row1, const float* x, int64_t batch, const float* bias,
              float* y, char* scratch) {
  const int form = form_of(w);
  if (form == kDecoded) return multiply_form<kDecoded, false>(w, row0, row1, x, batch, bias, y, scratch);
  if (w.groups > 1)
    ASKEW_BY_FORM(FORM, form, kBytes, multiply_form<FORM, true>(w, row0, row1, x, batch, bias, y, scratch))
  else
    ASKEW_BY_FORM(FORM, form, kBytes, multiply_form<FORM, false>(w, row0, row1, x, batch, bias, y, scratch))
}
#endif

#if ASKEW_LANES == 16 && defined(__AVX512F__)
#define ASKEW_TABLES 1
// Codes of 1 and 2 bits and trits: four bits of a row choose among 16 sums of inputs (four inputs or two), two trits
// among nine, which fit one register. A lane is a row here: 16 rows look up in the same table at once.
constexpr int kBands = 4;  // of 16 rows that share a table while it is in a register
constexpr int kTritWord = 4 * kTritsInByte;

ASKEW_FN int64_t word_tables(const PackedWeight& w) { return w.bits == kTrits ? kTritWord / 2 : 8; }
ASKEW_FN int64_t row_tables(const PackedWeight& w) { return rounded_up(w.row_bytes, 64) / 4 * word_tables(w); }

static int64_t tables_width(const PackedWeight& w) {
  if (w.bits != 1 && w.bits != 2 && w.bits != kTrits) return 0;
  const int64_t word = w.bits == kTrits ? kTritWord : 32 / w.bits;
  if (w.groups > 1 && w.cols / w.groups % word) return 0;
  return row_tables(w) * 16;
}

// A word of trits has tables of the two highest digits of bytes 0, 2, 1 and 3, each followed by that of the next two of
// bytes 0 and 2, 1 and 3, then of the last digits of bytes 0 and 1, 2 and 3: the order in which `tables_band` finds
// them.
ASKEW_FN void trit_tables(const PackedWeight& w, const float* x, float* out) {
  vu nines[2], last[2];
  for (int i = 0; i < 16; ++i) {
    nines[0][i] = i / 3;
    nines[1][i] = i % 3;
    last[0][i] = i % 4;
    last[1][i] = i / 4;
  }
  constexpr int kFirst[10] = {4, 14, 2, 12, 9, 19, 7, 17, 0, 10}, kSecond[10] = {3, 13, 1, 11, 8, 18, 6, 16, 5, 15};
  const int64_t words = row_tables(w) / 10;
  for (int64_t word = 0; word < words; ++word)
    for (int k = 0; k < 10; ++k, out += 16) {
      const vu* index = k < 8 ? nines : last;
      const int64_t a = word * kTritWord + kFirst[k], b = word * kTritWord + kSecond[k];
      const vf first = lookup(w.table, index[0]) * (vf{} + (a < w.cols ? x[a] : 0.f));
      Floats::store(out, multiply_add(lookup(w.table, index[1]), vf{} + (b < w.cols ? x[b] : 0.f), first));
    }
}

static void make_tables(const PackedWeight& w, const float* x, float* out) {
  if (w.bits == kTrits) return trit_tables(w, x, out);
  const int codes = 4 / w.bits;
  const int64_t tables = row_tables(w);
  vu index;
  for (int i = 0; i < 16; ++i) index[i] = i;
  vf level[4];
  for (int i = 0; i < codes; ++i) level[i] = lookup(w.table, index >> (w.bits * i));
  for (int64_t t = 0; t < tables; ++t) {
    vf sum{};
    for (int i = 0; i < codes; ++i)
      if (t * codes + i < w.cols) sum = multiply_add(level[i], vf{} + x[t * codes + i], sum);
    Floats::store(out + 16 * t, sum);
  }
}

// to[c][r] = word c of row r, for 16 rows of 64 bytes.
ASKEW_FN void transpose_words(const uint8_t* const* rows, int64_t at, __m512i* to) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i] + at);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i p = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x44), q = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xee);
    const __m512i r = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x44),
                  s = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xee);
    to[i] = _mm512_shuffle_i32x4(p, r, 0x88);
    to[i + 4] = _mm512_shuffle_i32x4(p, r, 0xdd);
    to[i + 8] = _mm512_shuffle_i32x4(q, s, 0x88);
    to[i + 12] = _mm512_shuffle_i32x4(q, s, 0xdd);
  }
}

// sums += what a word of codes of each row finds in its tables.
template <int BANDS>
ASKEW_INLINE void find_bits(const vu (&word)[BANDS], const float* t, vf (&sum)[BANDS]) {
  ASKEW_EACH (k, 8) {
    const __m512 sums = _mm512_loadu_ps(t + 16 * k);
    ASKEW_EACH (g, BANDS) sum[g] = sum[g] + (vf)_mm512_permutexvar_ps((__m512i)(word[g] >> (4 * k)), sums);
  }
}

// Bytes as 16-bit fractions of 243: times nine, the whole part is two digits, the rest what is left.
template <int BANDS>
ASKEW_INLINE void find_trits(const vu (&word)[BANDS], const float* t, vf (&sum)[BANDS]) {
  const __m512i nine = _mm512_set1_epi16(9), three = _mm512_set1_epi16(3);
  __m512i last[BANDS];
  ASKEW_EACH (e, 2) {
    __m512i rest[BANDS];
    ASKEW_EACH (g, BANDS) {
      const __m512i bytes = (__m512i)(e ? word[g] >> 8 : word[g]);
      rest[g] = _mm512_mullo_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(0xff)), _mm512_set1_epi16(270));
    }
    ASKEW_EACH (k, 2) {
      const __m512 low = _mm512_loadu_ps(t + 16 * (4 * e + 2 * k)),
                   high = _mm512_loadu_ps(t + 16 * (4 * e + 2 * k + 1));
      ASKEW_EACH (g, BANDS) {
        const __m512i digits = _mm512_mulhi_epu16(rest[g], nine);
        rest[g] = _mm512_mullo_epi16(rest[g], nine);
        sum[g] = sum[g] + (vf)_mm512_permutexvar_ps(digits, low);
        sum[g] = sum[g] + (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(digits, 16), high);
      }
    }
    ASKEW_EACH (g, BANDS) {
      const __m512i digit = _mm512_mulhi_epu16(rest[g], three);
      last[g] = e ? _mm512_or_si512(last[g], _mm512_slli_epi32(digit, 2)) : digit;
    }
  }
  const __m512 low = _mm512_loadu_ps(t + 16 * 8), high = _mm512_loadu_ps(t + 16 * 9);
  ASKEW_EACH (g, BANDS) {
    sum[g] = sum[g] + (vf)_mm512_permutexvar_ps(last[g], low);
    sum[g] = sum[g] + (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(last[g], 16), high);
  }
}

template <bool TRITS, int BANDS>
ASKEW_FN void tables_band(const PackedWeight& w, int64_t row, int64_t rows, const float* tables, const float* bias,
                          float* y) {
  const int codes_of_word = TRITS ? kTritWord : 32 / (TRITS ? 1 : w.bits);
  const int64_t length = w.groups > 1 ? w.cols / w.groups / codes_of_word : INT64_MAX;  // words in a group
  const int64_t words = (w.row_bytes + 3) / 4;
  vf sum[BANDS], total[BANDS];
  const uint8_t* from[BANDS][16];
  ASKEW_EACH (g, BANDS) {
    sum[g] = total[g] = vf{};
    for (int i = 0; i < 16; ++i) {  // past the end: the last row again
      const int64_t r = 16 * g + i < rows ? 16 * g + i : rows - 1;
      from[g][i] = w.codes + (row + r) * w.row_bytes;
    }
  }
  __m512i codes[BANDS][16];
  int64_t until = length, group = 0;
  for (int64_t at = 0; at < w.row_bytes; at += 64) {
    ASKEW_EACH (g, BANDS) {
      for (int i = 0; i < 16; ++i) __builtin_prefetch(from[g][i] + at + 16 * BANDS * w.row_bytes, 0, 2);
      if (at + 64 <= w.row_bytes) {
        transpose_words(from[g], at, codes[g]);
      } else {
        uint8_t padded[16][64] = {};
        const uint8_t* rows_of[16];
        for (int i = 0; i < 16; ++i) {
          __builtin_memcpy(padded[i], from[g][i] + at, w.row_bytes - at);
          rows_of[i] = padded[i];
        }
        transpose_words(rows_of, 0, codes[g]);
      }
    }
    constexpr int kTables = TRITS ? kTritWord / 2 : 8;
    const float* t = tables + at / 4 * kTables * 16;
    const int64_t first = at / 4, last = first + 16 < words ? first + 16 : words;
    for (int64_t c = first; c < last; ++c, t += kTables * 16) {
      vu word[BANDS];
      ASKEW_EACH (g, BANDS)
        word[g] = TRITS ? (vu)_mm512_min_epu8(codes[g][c - first], _mm512_set1_epi8((char)kTopTrits))
                        : (vu)codes[g][c - first];
      if constexpr (TRITS)
        find_trits(word, t, sum);
      else
        find_bits(word, t, sum);
      if (c + 1 == until) {
        ASKEW_EACH (g, BANDS) {
          vf scale;
          for (int i = 0; i < 16; ++i) {
            const int64_t r = 16 * g + i < rows ? 16 * g + i : rows - 1;
            scale[i] = w.scale[(row + r) * w.groups + group];
          }
          total[g] = multiply_add(sum[g], scale, total[g]);
          sum[g] = vf{};
        }
        until += length;
        ++group;
      }
    }
  }
  ASKEW_EACH (g, BANDS)
    for (int64_t i = 0; i < 16 && 16 * g + i < rows; ++i) {
      const int64_t r = row + 16 * g + i;
      const float dot = w.groups > 1 ? total[g][i] : sum[g][i] * row_scale(w, r);
      y[r] = dot + (bias ? bias[r] : 0.f);
    }
}

#if !defined(ASKEW_FLOATS) && !defined(ASKEW_PANELS_ONLY)
template <bool TRITS>
ASKEW_FN void multiply_tables_of(const PackedWeight& w, int64_t row0, int64_t row1, const float* tables, int64_t batch,
                                 const float* bias, float* y) {
  const int64_t wide = tables_width(w);
  for (int64_t row = row0; row < row1; row += 16 * kBands) {
    const int64_t rows = row1 - row < 16 * kBands ? row1 - row : 16 * kBands;
    for (int64_t b = 0; b < batch; ++b) {
      if (rows > 32)
        tables_band<TRITS, 4>(w, row, rows, tables + b * wide, bias, y + b * w.n);
      else if (rows > 16)
        tables_band<TRITS, 2>(w, row, rows, tables + b * wide, bias, y + b * w.n);
      else
        tables_band<TRITS, 1>(w, row, rows, tables + b * wide, bias, y + b * w.n);
    }
  }
}

void multiply_tables(const PackedWeight& w, int64_t row0, int64_t row1, const float* tables, int64_t batch,
                     const float* bias, float* y) {
  if (w.bits == kTrits)
    multiply_tables_of<true>(w, row0, row1, tables, batch, bias, y);
  else
    multiply_tables_of<false>(w, row0, row1, tables, batch, bias, y);
}
#endif
#endif
