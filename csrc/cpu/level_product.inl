// Products of levels of a byte: sums of (weight, as a byte above `lowest`, 0 … 255) times (input, -128 … 127) in int32,
// which are exact; lowest times the sum of the inputs is added, and the scales follow while the sums are in registers.
//
// A panel of kPanelVectors vectors of outputs is laid out once, four steps of the sum in each lane, and stays in the L2
// cache while the rows of the input pass, kProductRows at a time: the registers hold the sums of such a tile from the
// first column to the last.

#if ASKEW_LANES == 16
constexpr int kProductRows = 6, kPanelVectors = 4;
#elif ASKEW_LANES == 8
constexpr int kProductRows = 6, kPanelVectors = 2;
#else
constexpr int kProductRows = 4, kPanelVectors = 1;
#endif
constexpr int kPanelOutputs = kPanelVectors * ASKEW_LANES;
constexpr int kMostInput = 128;  // magnitude of an input's level

#if defined(ASKEW_MM) && !defined(ASKEW_VNNI)
#define ASKEW_INT16_SUMS 1  // products are added up in int16 while they fit
#endif

// ---- a panel of the weight --------------------------------------------------------------------------------------

ASKEW_FN uint32_t four_bytes(const int8_t* p, int64_t count, int64_t stride) {
  uint32_t word = 0;
  for (int64_t b = 0; b < count; ++b) word |= (uint32_t)(uint8_t)p[b * stride] << 8 * b;
  return word;
}

// Outputs [first, first + count) of c, count up to kPanelOutputs, as words of four steps: out[step][output].
static void lay_out_panel(const LevelsArg& a, int64_t first, int64_t count, int lowest, uint8_t* panel) {
  const int64_t steps = (a.cols + 3) / 4, out = a.transposed ? 1 : a.cols, in = a.transposed ? a.n : 1;
  const uint32_t low = 0x01010101u * (uint8_t)lowest;
  typedef uint8_t Bytes __attribute__((vector_size(4 * ASKEW_LANES)));
  uint32_t* words = (uint32_t*)panel;
  int64_t done = 0;  // steps
#if ASKEW_LANES >= 8
  if (a.transposed && count == kPanelOutputs) {
    const __m128i lows = _mm_set1_epi32((int)low);
    for (; done < a.cols / 4; ++done) {
      const int8_t* p = a.c + 4 * done * in + first;
      ASKEW_EACH (k, kPanelOutputs / 16) {
        __m128i row[4];
        ASKEW_EACH (b, 4) row[b] = _mm_sub_epi8(_mm_loadu_si128((const __m128i*)(p + b * in + 16 * k)), lows);
        const __m128i lo[2] = {_mm_unpacklo_epi8(row[0], row[1]), _mm_unpackhi_epi8(row[0], row[1])};
        const __m128i hi[2] = {_mm_unpacklo_epi8(row[2], row[3]), _mm_unpackhi_epi8(row[2], row[3])};
        __m128i* to = (__m128i*)(words + done * kPanelOutputs + 16 * k);
        ASKEW_EACH (h, 2) {
          _mm_storeu_si128(to + 2 * h, _mm_unpacklo_epi16(lo[h], hi[h]));
          _mm_storeu_si128(to + 2 * h + 1, _mm_unpackhi_epi16(lo[h], hi[h]));
        }
      }
    }
  }
#endif
#if ASKEW_LANES == 16
  if (!a.transposed && count == kPanelOutputs) {
    const __m512i lows = _mm512_set1_epi32((int)low);
    for (; done + 16 <= a.cols / 4; done += 16)
      for (int v = 0; v < kPanelVectors; ++v) {
        __m512i r[16];
        ASKEW_EACH (i, 16) {
          const int8_t* p = a.c + (first + 16 * v + i) * out + 4 * done;
          r[i] = _mm512_sub_epi8(_mm512_loadu_si512(p), lows);
        }
        transpose(r);
        ASKEW_EACH (i, 16) _mm512_storeu_si512(words + (done + i) * kPanelOutputs + 16 * v, r[i]);
      }
  }
#endif
  for (; done < steps; ++done) {
    const int64_t left = a.cols - 4 * done < 4 ? a.cols - 4 * done : 4;
    uint32_t* to = words + done * kPanelOutputs;
    for (int64_t o = 0; o < kPanelOutputs; ++o)
      to[o] = o < count ? four_bytes(a.c + (first + o) * out + 4 * done * in, left, in) : low;
    for (int v = 0; v < kPanelVectors; ++v) {
      Bytes bytes;
      __builtin_memcpy(&bytes, to + v * ASKEW_LANES, sizeof bytes);
      bytes -= (uint8_t)lowest;
      __builtin_memcpy(to + v * ASKEW_LANES, &bytes, sizeof bytes);
    }
  }
}

// ---- a tile of sums -----------------------------------------------------------------------------------------------

// R rows of q, `stride` apart, times V vectors of outputs of a panel. most: steps whose products int16 holds the sum
// of.
template <int R, int V, bool WIDE>
ASKEW_FN void tile_sums(const uint8_t* panel, const int8_t* q, int64_t stride, int64_t steps, int64_t most,
                        vi (&sum)[R][V]) {
  constexpr int64_t kVector = 4 * ASKEW_LANES, kStep = kPanelVectors * kVector;
  ASKEW_EACH (r, R)
    ASKEW_EACH (v, V) sum[r][v] = vi{};
#if defined(ASKEW_INT16_SUMS)
  for (int64_t k = 0; k < steps && !WIDE;) {
    const int64_t end = steps - k > most ? k + most : steps;
    Sums own[R][V];
    ASKEW_EACH (r, R)
      ASKEW_EACH (v, V) own[r][v] = Sums{};
    for (; k < end; ++k) {
      Codes code[V];
      ASKEW_EACH (v, V) code[v] = load_bytes(panel + k * kStep + v * kVector);
      ASKEW_EACH (r, R) {
        const Codes input = four_inputs(q + r * stride + 4 * k);
        ASKEW_EACH (v, V) accumulate(own[r][v], code[v], input);
      }
    }
    ASKEW_EACH (r, R)
      ASKEW_EACH (v, V) sum[r][v] += lane_sums(own[r][v]);
  }
  if (!WIDE) return;
  for (int64_t k = 0; k < steps; ++k)
    ASKEW_EACH (v, V) {
      const Codes code = load_bytes(panel + k * kStep + v * kVector);
      ASKEW_EACH (r, R) sum[r][v] += wide_products(code, four_inputs(q + r * stride + 4 * k));
    }
#else
  (void)most;
  Sums own[R][V];
  ASKEW_EACH (r, R)
    ASKEW_EACH (v, V) own[r][v] = Sums{};
  for (int64_t k = 0; k < steps; ++k) {
    Codes code[V];
    ASKEW_EACH (v, V) code[v] = load_bytes(panel + k * kStep + v * kVector);
    ASKEW_EACH (r, R) {
      const Codes input = four_inputs(q + r * stride + 4 * k);
      ASKEW_EACH (v, V) accumulate(own[r][v], code[v], input);
    }
  }
  ASKEW_EACH (r, R)
    ASKEW_EACH (v, V) sum[r][v] = lane_sums(own[r][v]);
#endif
}

ASKEW_FN void store_output(int type, void* y, int64_t i, int64_t count, vf value) {
  const int size = type == kFloat32 ? 4 : 2;
  char part[4 * ASKEW_LANES];
  char* to = count < ASKEW_LANES ? part : (char*)y + i * size;
  if (type == kFloat32)
    Storage<kFloat32>::store((float*)to, value);
  else if (type == kBFloat16)
    Storage<kBFloat16>::store((uint16_t*)to, value);
  else
    Storage<kFloat16>::store((uint16_t*)to, value);
  if (count < ASKEW_LANES) __builtin_memcpy((char*)y + i * size, part, count * size);
}

template <int R, int V, bool WIDE>
__attribute__((noinline)) void level_tile(const LevelsArg& a, const LevelPanel& p, int64_t row) {
  vi sum[R][V];
  const int64_t most = INT16_MAX / (2 * kMostInput * (p.span > 0 ? p.span : 1));
  tile_sums<R, V, WIDE>(p.words, p.q + row * p.stride, p.stride, p.stride / 4, most, sum);
  ASKEW_EACH (v, V) {
    const int64_t col = p.first + v * ASKEW_LANES, left = a.n - col;
    if (left <= 0) break;
    const vf scale = Floats::load(p.scale + col), bias = p.bias ? Floats::load(p.bias + col) : vf{};
    ASKEW_EACH (r, R) {
      const vf exact = __builtin_convertvector(sum[r][v] + p.lowest * p.input_sums[row + r], vf);
      vf y = exact * a.token_scale[row + r] * scale;
      if (p.bias) y = y + bias;
      store_output(a.y_type, a.y, (row + r) * a.n + col, left < ASKEW_LANES ? left : ASKEW_LANES, y);
    }
  }
}

template <int V, bool WIDE>
static void level_rows(const LevelsArg& a, const LevelPanel& p, int64_t row0, int64_t row1) {
  int64_t row = row0;
  for (; row + kProductRows <= row1; row += kProductRows) level_tile<kProductRows, V, WIDE>(a, p, row);
  for (; row + 2 <= row1; row += 2) level_tile<2, V, WIDE>(a, p, row);
  for (; row < row1; ++row) level_tile<1, V, WIDE>(a, p, row);
}

template <bool WIDE>
static void level_columns(const LevelsArg& a, const LevelPanel& p, int64_t row0, int64_t row1) {
  const int64_t vectors = (a.n - p.first + ASKEW_LANES - 1) / ASKEW_LANES;
  if constexpr (kPanelVectors > 2) {
    if (vectors > 2) return level_rows<kPanelVectors, WIDE>(a, p, row0, row1);
    if (vectors == 2) return level_rows<2, WIDE>(a, p, row0, row1);
  } else if constexpr (kPanelVectors == 2) {
    if (vectors >= 2) return level_rows<2, WIDE>(a, p, row0, row1);
  }
  level_rows<1, WIDE>(a, p, row0, row1);
}

static void multiply_levels(const LevelsArg& a, const LevelPanel& p, int64_t row0, int64_t row1) {
#if defined(ASKEW_INT16_SUMS)
  if (2 * kMostInput * p.span > INT16_MAX) return level_columns<true>(a, p, row0, row1);
#endif
  level_columns<false>(a, p, row0, row1);
}

// Sums of rows of levels.
static void sum_levels(const int8_t* q, int64_t rows, int64_t cols, int32_t* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    int32_t sum = 0;
    for (int64_t c = 0; c < cols; ++c) sum += q[r * cols + c];
    sums[r] = sum;
  }
}

// The lowest level and the highest, where they decide how products are added; else the ends of int8.
static void level_range(const int8_t* c, int64_t count, int* lowest, int* highest) {
#if defined(ASKEW_INT16_SUMS)
  int8_t lo = INT8_MAX, hi = INT8_MIN;
  for (int64_t i = 0; i < count; ++i) {
    lo = c[i] < lo ? c[i] : lo;
    hi = c[i] > hi ? c[i] : hi;
  }
  *lowest = lo < hi ? lo : hi;
  *highest = hi;
#else
  (void)c, (void)count;
  *lowest = INT8_MIN;
  *highest = INT8_MAX;
#endif
}
