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
  const int form = form_of(w);
  if (form == kDecoded) return rounded_up(w.cols, ASKEW_LANES);
  ASKEW_BY_FORM(FORM, form, kBytes, return rounded_up(w.cols, Block<FORM>::kCols))
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
  if (form != kDecoded) ASKEW_BY_FORM(FORM, form, kBytes, return arrange_blocks<FORM>(w, x, out))
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
  typedef Block<FORM> block;
  constexpr int kStep = block::kBytes;
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
      if (FORM != kDecoded) __builtin_prefetch(from + 2 * R * stride, 0, 2);  // of the rows that come next
      if (FORM == kDecoded) {
        level[r] = Floats::load((const float*)from);
      } else if (i < whole) {
        word[r] = words_of<FORM>(w, from);
      } else {  // the last bytes of a row
        uint8_t padded[block::kBytes] = {};
        __builtin_memcpy(padded, from, w.row_bytes - whole * kStep);
        word[r] = words_of<FORM>(w, padded);
      }
      if (GROUPED == kBlocks) s[r] = vf{} + scale[r * w.groups];
      if (GROUPED == kLanes) s[r] = scales_of(lanes, scale + r * w.groups, left);
      own[r] = vf{};
    }
    const float* at = x + i * block::kCols;
    ASKEW_EACH_CODE (k, block::kCodes) {
      ASKEW_EACH (r, R) {
        if (FORM == kBytes) level[r] = above_2_23(word[r], k) - (8388608.f - w.lo);
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
    ASKEW_EACH (r, R) decode(w, row + r, (float*)(scratch + r * stride), (uint8_t*)(scratch + kRows * stride));
    p = (const uint8_t*)scratch;
  } else if (FORM == kBytes && (w.bits != 8 || w.cols % Block<kBytes>::kCols)) {
    stride = rounded_up(w.cols, 64) + kPadding;
    ASKEW_EACH (r, R) unpack_row(w, row + r, (uint8_t*)scratch + r * stride);
    p = (const uint8_t*)scratch;
  }
  constexpr int kInputs = 4;  // of more, where panels serve (packed_panels.inl), none come here
  constexpr int kGrouped = GROUPED ? kLanes : kOneScale;
  // groups of whole blocks have a loop of their own: the choice of scales costs as much as a product
  constexpr int kWhole = GROUPED ? kBlocks : kOneScale;
  const bool whole = GROUPED && w.cols / w.groups % Block<FORM>::kCols == 0;
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
// Codes of 1 and 2 bits and trits: four bits of a row choose among 16 sums of inputs (four inputs or two), which fit
// one register; the three highest trits of a byte among 27, which fit two, and the others among nine. A lane is a row
// here: 16 rows look up in the same table at once.
constexpr int kBands = 4;  // of 16 rows that share a table while it is in a register
constexpr int kTritTable = 48, kTritWord = 4 * kTritsInByte;

// Where groups end inside a byte of trits, it has tables for each group, in which the others' columns count nothing.
ASKEW_FN int64_t trit_tables(const PackedWeight& w) {
  const int64_t bytes = rounded_up(w.row_bytes, 64);
  if (w.groups <= 1) return bytes;
  const int64_t length = w.cols / w.groups, ends = w.groups - 1;
  return bytes + ends - (length % kTritsInByte ? ends / kTritsInByte : ends);
}

static int64_t tables_width(const PackedWeight& w) {
  if (w.bits == kTrits) return trit_tables(w) * kTritTable;
  if (w.bits != 1 && w.bits != 2) return 0;
  const int64_t word = 32 / w.bits;
  if (w.groups > 1 && w.cols / w.groups % word) return 0;
  return rounded_up(w.row_bytes, 64) * 2 * 16;
}

// Of a byte: the sums of its last three columns, then of its first two.
static void make_trit_tables(const PackedWeight& weight, const float* x, float* out) {
  const PackedWeight w = weight;  // a copy that the stores cannot change
  vu digit[3][3];                 // of the column that comes last, and so on
  for (int i = 0; i < 3 * 16; ++i) {
    const int k = i < 32 ? i : 3 * (i - 32);
    digit[0][i / 16][i % 16] = k / 9;
    digit[1][i / 16][i % 16] = k / 3 % 3;
    digit[2][i / 16][i % 16] = k % 3;
  }
  vf level[3][3];
  ASKEW_EACH (d, 3)
    ASKEW_EACH (v, 3) level[d][v] = lookup(w.table, digit[d][v]);
  const int64_t length = w.groups > 1 ? w.cols / w.groups : w.cols, cols = rounded_up(w.row_bytes, 64) * kTritsInByte;
  for (int64_t c = 0, end = length; c < cols; c += kTritsInByte)
    for (int64_t from = c; from < c + kTritsInByte; out += kTritTable) {
      const int64_t until = end < c + kTritsInByte && end < w.cols ? end : c + kTritsInByte;
      float in[kTritsInByte];
      for (int i = 0; i < kTritsInByte; ++i) in[i] = c + i >= from && c + i < until && c + i < w.cols ? x[c + i] : 0;
      ASKEW_EACH (v, 3) {
        vf sum = level[0][v] * (vf{} + in[v < 2 ? 4 : 1]);
        sum = multiply_add(level[1][v], vf{} + in[v < 2 ? 3 : 0], sum);
        if (v < 2) sum = multiply_add(level[2][v], vf{} + in[2], sum);
        Floats::store(out + 16 * v, sum);
      }
      from = until;
      if (end == until) end += length;
    }
}

static void make_tables(const PackedWeight& w, const float* x, float* out) {
  if (w.bits == kTrits) return make_trit_tables(w, x, out);
  const int codes = 4 / w.bits;
  const int64_t tables = rounded_up(w.row_bytes, 64) * 2;
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

// to[c][r] = word c from byte `at` on of row r, for 16 rows of `bytes` bytes, which are followed by zeros.
ASKEW_FN void words_of_rows(const uint8_t* const* rows, int64_t at, int64_t bytes, __m512i (&to)[16]) {
  const int64_t left = bytes - at;
  if (left >= 64)
    for (int i = 0; i < 16; ++i) to[i] = _mm512_loadu_si512(rows[i] + at);
  else
    for (int i = 0; i < 16; ++i) to[i] = _mm512_maskz_loadu_epi8(((uint64_t)1 << left) - 1, rows[i] + at);
  transpose(to);
}

// sums += what a word of codes of each row finds in its tables.
template <int BANDS>
ASKEW_INLINE void find_bits(const vu (&word)[BANDS], const float* t, vf (&sum)[BANDS]) {
  ASKEW_EACH (k, 8) {
    const __m512 sums = _mm512_loadu_ps(t + 16 * k);
    ASKEW_EACH (g, BANDS) sum[g] = sum[g] + (vf)_mm512_permutexvar_ps((__m512i)(word[g] >> (4 * k)), sums);
  }
}

// The numbers that the trits of a byte are, in the low bits of a lane: of the three highest, and of the others.
struct TritIndex {
  __m512i high, low;
};
// Of bytes E and, above them in each lane, E + 2 of each word, as 16-bit fractions of 243 (TritOrder): times 27, the
// whole part is three digits.
template <int E>
ASKEW_INLINE TritIndex trit_index(__m512i word) {
  const __m512i by = _mm512_set1_epi16(27);
  const __m512i bytes = E ? _mm512_srli_epi16(word, 8) : _mm512_and_si512(word, _mm512_set1_epi16(0xff));
  const __m512i all = times(bytes, _mm512_set1_epi16(270)), rest = times(all, by);
  return {_mm512_mulhi_epu16(all, by), _mm512_mulhi_epu16(rest, _mm512_set1_epi16(9))};
}
ASKEW_INLINE TritIndex upper_index(TritIndex index) {
  return {_mm512_srli_epi32(index.high, 16), _mm512_srli_epi32(index.low, 16)};
}

// sums += what a byte of each row finds in its tables.
template <int BANDS>
ASKEW_INLINE void find_trits(const TritIndex (&index)[BANDS], const float* t, vf (&sum)[BANDS]) {
  const __m512 first = _mm512_loadu_ps(t), second = _mm512_loadu_ps(t + 16), third = _mm512_loadu_ps(t + 32);
  ASKEW_EACH (g, BANDS) {
    const vf high = (vf)_mm512_permutex2var_ps(first, index[g].high, second);
    sum[g] = sum[g] + high + (vf)_mm512_permutexvar_ps(index[g].low, third);
  }
}

// Rows of the weight that meet one input, BANDS times 16; past the end the last one again.
template <int BANDS>
struct TableRows {
  const PackedWeight& w;
  const uint8_t* codes[BANDS][16];
  const uint8_t* scales[BANDS][16];
  __m512i scale[BANDS][16];  // of sixteen groups
  vf sum[BANDS], total[BANDS];
  int64_t group = 0;

  ASKEW_INLINE TableRows(const PackedWeight& w, int64_t row, int64_t rows) : w(w) {
    ASKEW_EACH (g, BANDS) {
      sum[g] = total[g] = vf{};
      for (int i = 0; i < 16; ++i) {
        const int64_t r = row + (16 * g + i < rows ? 16 * g + i : rows - 1);
        codes[g][i] = w.codes + r * w.row_bytes;
        scales[g][i] = (const uint8_t*)(w.scale + r * w.groups);
      }
    }
  }
  // Sixteen words from byte `at` on.
  ASKEW_INLINE void read(int64_t at, __m512i (&word)[BANDS][16]) const {
    ASKEW_EACH (g, BANDS) {
      for (int i = 0; i < 16; ++i) __builtin_prefetch(codes[g][i] + at + 16 * BANDS * w.row_bytes, 0, 2);
      words_of_rows(codes[g], at, w.row_bytes, word[g]);
    }
  }
  // A group ends: its sums meet its scales.
  ASKEW_INLINE void end_group() {
    if (group % 16 == 0)
      ASKEW_EACH (g, BANDS) words_of_rows(scales[g], 4 * group, 4 * w.groups, scale[g]);
    ASKEW_EACH (g, BANDS) {
      total[g] = multiply_add(sum[g], (vf)scale[g][group % 16], total[g]);
      sum[g] = vf{};
    }
    ++group;
  }
  ASKEW_INLINE void store(int64_t row, int64_t rows, const float* bias, float* y) const {
    ASKEW_EACH (g, BANDS)
      for (int64_t i = 0; i < 16 && 16 * g + i < rows; ++i) {
        const int64_t r = row + 16 * g + i;
        const float dot = w.groups > 1 ? total[g][i] : sum[g][i] * row_scale(w, r);
        y[r] = dot + (bias ? bias[r] : 0.f);
      }
  }
};

template <int BANDS>
static void bits_product(const PackedWeight& w, int64_t row, int64_t rows, const float* t, const float* bias,
                         float* y) {
  const int64_t length = w.groups > 1 ? w.cols / w.groups / (32 / w.bits) : INT64_MAX;  // words in a group
  const int64_t words = (w.row_bytes + 3) / 4;
  TableRows<BANDS> of(w, row, rows);
  for (int64_t first = 0, until = length; first < words; first += 16) {
    __m512i read[BANDS][16];
    of.read(4 * first, read);
    for (int64_t i = 0; i < 16 && first + i < words; ++i, t += 8 * 16) {
      vu word[BANDS];
      ASKEW_EACH (g, BANDS) word[g] = (vu)read[g][i];
      find_bits(word, t, of.sum);
      if (first + i + 1 < until) continue;
      of.end_group();
      until += length;
    }
  }
  of.store(row, rows, bias, y);
}

template <int BANDS>
static void trits_product(const PackedWeight& w, int64_t row, int64_t rows, const float* t, const float* bias,
                          float* y) {
  const int64_t length = w.groups > 1 ? w.cols / w.groups : INT64_MAX, words = (w.row_bytes + 3) / 4;
  TableRows<BANDS> of(w, row, rows);
  int64_t until = length;  // the column at which a group ends
  for (int64_t first = 0; first < words; first += 16) {
    __m512i read[BANDS][16];
    of.read(4 * first, read);
    for (int64_t i = 0; i < 16 && first + i < words; ++i) {
      const int64_t begin = (first + i) * kTritWord;
      __m512i word[BANDS];
      ASKEW_EACH (g, BANDS) word[g] = _mm512_min_epu8(read[g][i], _mm512_set1_epi8((char)kTopTrits));
      if (until > begin + kTritWord) {
        TritIndex index[BANDS];
        ASKEW_EACH (g, BANDS) index[g] = trit_index<0>(word[g]);
        find_trits(index, t, of.sum);
        ASKEW_EACH (g, BANDS) index[g] = upper_index(index[g]);
        find_trits(index, t + 2 * kTritTable, of.sum);
        ASKEW_EACH (g, BANDS) index[g] = trit_index<1>(word[g]);
        find_trits(index, t + kTritTable, of.sum);
        ASKEW_EACH (g, BANDS) index[g] = upper_index(index[g]);
        find_trits(index, t + 3 * kTritTable, of.sum);
        t += 4 * kTritTable;
        continue;
      }
      TritIndex byte[4][BANDS];
      ASKEW_EACH (g, BANDS) {
        byte[0][g] = trit_index<0>(word[g]);
        byte[1][g] = trit_index<1>(word[g]);
        byte[2][g] = upper_index(byte[0][g]);
        byte[3][g] = upper_index(byte[1][g]);
      }
      for (int k = 0; k < 4; ++k) {
        const int64_t end = begin + (k + 1) * kTritsInByte;
        for (; until < end && until < w.cols; until += length, t += kTritTable) {
          find_trits(byte[k], t, of.sum);
          of.end_group();
        }
        find_trits(byte[k], t, of.sum);
        t += kTritTable;
        if (until > end || until > w.cols) continue;
        of.end_group();
        until += length;
      }
    }
  }
  of.store(row, rows, bias, y);
}

#if !defined(ASKEW_FLOATS) && !defined(ASKEW_PANELS_ONLY)
template <int BANDS>
ASKEW_FN void table_product(const PackedWeight& w, int64_t row, int64_t rows, const float* tables, const float* bias,
                            float* y) {
  if (w.bits == kTrits)
    trits_product<BANDS>(w, row, rows, tables, bias, y);
  else
    bits_product<BANDS>(w, row, rows, tables, bias, y);
}

void multiply_tables(const PackedWeight& w, int64_t row0, int64_t row1, const float* tables, int64_t batch,
                     const float* bias, float* y) {
  const int64_t wide = tables_width(w);
  for (int64_t row = row0; row < row1; row += 16 * kBands) {
    const int64_t rows = row1 - row < 16 * kBands ? row1 - row : 16 * kBands;
    for (int64_t b = 0; b < batch; ++b) {
      if (rows > 32)
        table_product<4>(w, row, rows, tables + b * wide, bias, y + b * w.n);
      else if (rows > 16)
        table_product<2>(w, row, rows, tables + b * wide, bias, y + b * w.n);
      else
        table_product<1>(w, row, rows, tables + b * wide, bias, y + b * w.n);
    }
  }
}
#endif
#endif
