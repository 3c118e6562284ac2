// int8 activations times packed weights: sums of (code, 0 … 255) times (input, -127 … 127) in integers, which are
// exact, then one float32 product with the scales of a weight's group and of the token. A level is lo + step * code,
// so lo times the sum of the inputs is added; with several groups that is a float32 sum over the groups.
//
// Codes of 1, 2 and 4 bits are unpacked a vector of words at a time, all words shifted by one code, and the input is
// brought into that order; so are trits with AVX-512, digit by digit; others are unpacked in the order of the columns.
// For many tokens codes are unpacked four rows at a time into a buffer that stays in L1, where they meet every token of
// the batch; for one or two they stay in registers, as filling a buffer would take longer than the products.

constexpr int kInt8Rows = 4;
#if ASKEW_LANES == 16 && defined(__AVX512BW__)
#define ASKEW_TRITS 1  // unpacked a vector at a time
#endif
// The instruction that adds four products to each lane of int32, as these loops have it: of 512 bits, of 256 as
// AVX-VNNI encodes it, or of 256 as AVX-512 does.
#if ASKEW_LANES == 16 && defined(__AVX512VNNI__)
#define ASKEW_VNNI "vpdpbusd"
#elif ASKEW_LANES == 8 && defined(__AVXVNNI__)
#define ASKEW_VNNI "%{vex%} vpdpbusd"
#elif ASKEW_LANES == 8 && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define ASKEW_VNNI "vpdpbusd"
#endif

// Vectors of codes that a block of words gives; a lane's word holds 4 of them consecutive columns. 0: groups end
// inside a lane, and sums are made one group at a time.
ASKEW_FN int int8_parts(const PackedWeight& w) {
#if defined(ASKEW_TRITS)
  if (w.bits == 0 && groups_fit(w, 5 * 4 * ASKEW_LANES, 5 * 4)) return 5;
#endif
  const int parts = w.bits == 1 ? 8 : w.bits == 2 ? 4 : w.bits == 4 ? 2 : 1;
  return groups_fit(w, parts * 4 * ASKEW_LANES, parts * 4) ? parts : 0;
}

static int64_t int8_width(const PackedWeight& w) {
  const int parts = int8_parts(w);
  return rounded_up(w.cols, parts ? parts * 4 * ASKEW_LANES : 64);
}

template <int PARTS>
ASKEW_FN void arrange_bytes(const int8_t* x, int64_t width, int8_t* out) {
  constexpr int kVector = 4 * ASKEW_LANES;
  for (int64_t c = 0; c < width; c += PARTS * kVector, out += PARTS * kVector) {
#if ASKEW_LANES == 16 && defined(__AVX512BW__)
    if constexpr (PARTS != 5) {
      ASKEW_EACH (k, PARTS) {
        const __m512i from = _mm512_loadu_si512(x + c + k * kVector);
        ASKEW_EACH (v, PARTS) {
          int8_t* to = out + v * kVector + k * kVector / PARTS;
          if (PARTS == 2)
            _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi16_epi8(_mm512_srli_epi16(from, 8 * v)));
          else if (PARTS == 4)
            _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_srli_epi32(from, 8 * v)));
          else
            _mm_storel_epi64((__m128i*)to, _mm512_cvtepi64_epi8(_mm512_srli_epi64(from, 8 * v)));
        }
      }
      continue;
    }
#endif
    for (int v = 0; v < PARTS; ++v)
      for (int i = 0; i < kVector; ++i) out[v * kVector + i] = x[c + i * PARTS + v];
  }
}

// q: `width` numbers, zeros beyond the columns.
ASKEW_FN void quantize_token(const float* x, int64_t cols, int64_t width, int8_t* to, float* scale) {
  uint32_t most = 0;  // as bits: above those of inf is NaN
  for (int64_t c = 0; c < cols; ++c) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + c, 4);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  float top;
  __builtin_memcpy(&top, &most, 4);
  const bool finite = most < 0x7f800000u;
  const float inverse = finite && top > 0 ? (float)kInt8Top / top : 0.f;
  *scale = finite ? top / (float)kInt8Top : __builtin_nanf("");
  if (finite && inverse < __builtin_inff()) {
    int64_t c = 0;
    for (; c + ASKEW_LANES <= cols; c += ASKEW_LANES) {
      typedef int8_t Bytes __attribute__((vector_size(ASKEW_LANES)));
      const vi rounded = __builtin_convertvector(round_even(Floats::load(x + c) * inverse), vi);
#if ASKEW_LANES == 16 && defined(__AVX512F__)
      const Bytes bytes = (Bytes)_mm512_cvtepi32_epi8((__m512i)rounded);
#else
      const Bytes bytes = __builtin_convertvector(rounded, Bytes);
#endif
      __builtin_memcpy(to + c, &bytes, sizeof bytes);
    }
    for (; c < cols; ++c) to[c] = (int8_t)round_even(x[c] * inverse);
  } else {  // nothing but zeros and subnormal numbers, or a token that is not finite: its scale is NaN
    for (int64_t c = 0; c < cols; ++c) to[c] = 0;
  }
  for (int64_t c = cols; c < width; ++c) to[c] = 0;
}

static void quantize(const PackedWeight& weight, const float* x, int8_t* q, float* scale, float* sums,
                     int8_t* scratch) {
  const PackedWeight w = weight;  // a copy that the stores cannot change
  const int parts = int8_parts(w);
  const int64_t width = int8_width(w), cols = w.cols;
  int8_t* to = parts == 1 || !parts ? q : scratch;
  quantize_token(x, cols, width, to, scale);
  const int64_t groups = w.groups > 1 ? w.groups : 1, length = cols / groups, padded = padded_groups(w);
  for (int64_t g = 0; g < padded; ++g) sums[g] = 0;
  for (int64_t g = 0; g < groups; ++g) {
    int32_t sum = 0;
    for (int64_t c = g * length; c < (g + 1) * length; ++c) sum += to[c];
    sums[g] = (float)sum * (w.lo / w.step);
  }
  if (parts == 8)
    arrange_bytes<8>(scratch, width, q);
  else if (parts == 5)
    arrange_bytes<5>(scratch, width, q);
  else if (parts == 4)
    arrange_bytes<4>(scratch, width, q);
  else if (parts == 2)
    arrange_bytes<2>(scratch, width, q);
}

static int64_t int8_scratch(const PackedWeight& w) {
  return kInt8Rows * (rounded_up(int8_width(w), 64) + kPadding + padded_groups(w) * 4);
}

// A vector of the row at p, from byte `at`; zeros beyond the row's end.
ASKEW_FN vu row_words(const PackedWeight& w, const uint8_t* p, int64_t at) {
  vu word;
  __builtin_prefetch(p + at + kInt8Rows * w.row_bytes);  // of the rows that come next
  if (at + (int64_t)sizeof word <= w.row_bytes) {
    __builtin_memcpy(&word, p + at, sizeof word);
  } else {
    uint8_t padded[sizeof word] = {};
    __builtin_memcpy(padded, p + at, w.row_bytes - at);
    __builtin_memcpy(&word, padded, sizeof word);
  }
  return word;
}

ASKEW_FN constexpr uint32_t byte_mask(int bits) { return 0x01010101u * ((1u << bits) - 1); }

// A code that has no level counts as the last: 3 of three levels, 15 of 15, 255 of 255.
template <int BITS>
ASKEW_FN vu with_levels(const PackedWeight& w, vu word) {
  if (BITS == 2 && w.n_levels == 3) word = word & ~((word >> 1) & 0x55555555u);
  if (BITS == 4 && w.n_levels == 15) {
    const vu two = word & (word >> 1);
    word = word ^ (two & (two >> 2) & 0x11111111u);
  }
  if (BITS == 8 && w.n_levels < 256) {
    typedef uint8_t Bytes __attribute__((vector_size(4 * ASKEW_LANES)));
    const Bytes top = Bytes{} + (uint8_t)(w.n_levels - 1);
    word = (vu)((Bytes)word < top ? (Bytes)word : top);
  }
  return word;
}

template <int BITS>
ASKEW_FN void unpack_arranged(const PackedWeight& weight, int64_t row, uint8_t* out) {
  const PackedWeight w = weight;  // a copy that the stores cannot change
  const uint8_t* p = w.codes + row * w.row_bytes;
  const int64_t blocks = int8_width(w) * BITS / (32 * ASKEW_LANES);
  for (int64_t i = 0; i < blocks; ++i) {
    const vu word = with_levels<BITS>(w, row_words(w, p, i * 4 * ASKEW_LANES));
    ASKEW_UNROLL for (int v = 0; v < 8 / BITS; ++v, out += 4 * ASKEW_LANES) {
      const vu codes = (word >> (v * BITS)) & byte_mask(BITS);
      __builtin_memcpy(out, &codes, sizeof codes);
    }
  }
}

#if defined(ASKEW_TRITS)
// A byte b is a fraction t = b / 243, rounded up, in 16 bits: 3 t is its highest digit and the fraction of the rest.
// Rounding adds at most 0.0012 to t, 0.1 to the last 3 t, whose digits are a third apart.
ASKEW_FN void unpack_trits(const PackedWeight& w, int64_t row, uint8_t* out) {
  const uint8_t* p = w.codes + row * w.row_bytes;
  const __m512i three = _mm512_set1_epi16(3), above = _mm512_set1_epi16(3 << 8), low = _mm512_set1_epi16(255);
  for (int64_t at = 0; at < int8_width(w) / 5; at += 64, out += 5 * 64) {
    const __m512i bytes = _mm512_min_epu8((__m512i)row_words(w, p, at), _mm512_set1_epi8((char)kTopTrits));
    __m512i even = times(_mm512_and_si512(bytes, low), _mm512_set1_epi16(270));
    __m512i odd = times(_mm512_srli_epi16(bytes, 8), _mm512_set1_epi16(270));
    ASKEW_UNROLL for (int k = 4; k >= 0; --k) {
      const __m512i digit = _mm512_mulhi_epu16(even, three), high = _mm512_mulhi_epu16(odd, above);
      _mm512_storeu_si512(out + 64 * k, _mm512_or_si512(digit, _mm512_andnot_si512(low, high)));
      even = times(even, three);
      odd = times(odd, three);
    }
  }
}
#endif

// Codes of a row as bytes; without parts in the order of the columns.
ASKEW_FN void unpack_int8(const PackedWeight& w, int64_t row, uint8_t* out) {
  const int parts = int8_parts(w);
  if (parts == 8) return unpack_arranged<1>(w, row, out);
  if (parts == 4) return unpack_arranged<2>(w, row, out);
  if (parts == 2) return unpack_arranged<4>(w, row, out);
#if defined(ASKEW_TRITS)
  if (parts == 5) return unpack_trits(w, row, out);
#endif
  unpack_row(w, row, out);
  const int top = w.n_levels - 1;
  const int64_t cols = w.cols;
  if (w.bits && top + 1 < 1 << w.bits)
    for (int64_t c = 0; c < cols; ++c) out[c] = out[c] < top ? out[c] : (uint8_t)top;
}

// Sums of four products in each lane; with the factor, which only sums in int16 take.
#if defined(ASKEW_MM)
typedef Codes Sums;
#else
typedef vu Codes;
typedef vi Sums;
#endif
ASKEW_FN Codes load_bytes(const void* p) {
  Codes codes;
  __builtin_memcpy(&codes, p, sizeof codes);
  return codes;
}

// Four bytes, in each lane.
ASKEW_FN Codes four_inputs(const int8_t* q) {
  int32_t word;
  __builtin_memcpy(&word, q, 4);
  const vi all = vi{} + word;
  Codes codes;
  __builtin_memcpy(&codes, &all, sizeof codes);
  return codes;
}

#if defined(ASKEW_MM) && !defined(ASKEW_VNNI)  // int16, two products each: added up in int32 before they overflow
ASKEW_FN Sums products(Codes codes, Codes input) { return ASKEW_MM(maddubs_epi16)(codes, input); }
ASKEW_FN Sums add_products(Sums sums, Codes codes, Codes input) {
  asm("vpaddw %1, %0, %0" : "+v"(sums) : "v"(products(codes, input)));  // in place: GCC copies otherwise
  return sums;
}
ASKEW_FN vi pair_sums(Codes a, Codes b) { return (vi)ASKEW_MM(madd_epi16)(a, b); }
ASKEW_FN vi lane_sums(Sums sums, int factor = 1) { return pair_sums(sums, ASKEW_MM(set1_epi16)((short)factor)); }
ASKEW_FN constexpr int64_t vectors_in_flight(int top) { return INT16_MAX / (2 * kInt8Top * top); }
#if ASKEW_LANES == 16
#define ASKEW_PLACES 4
#endif
#define ASKEW_WIDE 1
// Codes above 129 times 127, two of them, leave int16: low and high bytes of 16 bits apart.
ASKEW_FN vi wide_products(Codes codes, Codes input) {
  const Codes low = ASKEW_MM(set1_epi16)(255);
  return pair_sums(codes & low, ASKEW_MM(srai_epi16)(ASKEW_MM(slli_epi16)(input, 8), 8)) +
         pair_sums(ASKEW_MM(srli_epi16)(codes, 8), ASKEW_MM(srai_epi16)(input, 8));
}
#else  // int32
ASKEW_FN Sums add_products(Sums sums, Codes codes, Codes input) {
#if ASKEW_LANES == 8 && defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sums, codes, input);
#elif defined(ASKEW_MM)
  return ASKEW_MM(dpbusd_epi32)(sums, codes, input);
#else
  ASKEW_EACH (byte, 4) sums += (vi)(codes >> 8 * byte & 255u) * ((vi)(input << (24 - 8 * byte)) >> 24);
  return sums;
#endif
}
ASKEW_FN Sums products(Codes codes, Codes input) { return add_products(Sums{}, codes, input); }
ASKEW_FN vi lane_sums(Sums sums, int = 1) { return (vi)sums; }
ASKEW_FN constexpr int64_t vectors_in_flight(int) { return INT32_MAX; }
#endif

// sums += codes times input, in place: GCC copies registers otherwise, and stores each copy.
ASKEW_FN void accumulate(Sums& sums, Codes codes, Codes input) {
#if ASKEW_LANES == 16 && defined(ASKEW_VNNI)
  asm(ASKEW_VNNI " %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(input));
#elif defined(ASKEW_VNNI)  // which has 16 registers
  asm(ASKEW_VNNI " %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(input));
#else
  sums = add_products(sums, codes, input);
#endif
}

struct Int8Rows {
  const uint8_t* codes;  // R rows of `width` bytes, or of the weight itself
  const float* scales;   // R rows of padded_groups
  int64_t width, groups;
};

template <int R, int B, bool WIDE>
ASKEW_FN void int8_sums(const uint8_t* codes, const int8_t* q, int64_t width, int64_t bytes, int64_t most,
                        vi (&sum)[R][B]) {
  constexpr int kStep = 4 * ASKEW_LANES;
  ASKEW_EACH (r, R)
    ASKEW_EACH (b, B) sum[r][b] = vi{};
  for (int64_t i = 0; i < bytes;) {
    const int64_t end = bytes - i > most * kStep ? i + most * kStep : bytes;
#if defined(ASKEW_WIDE)
    if (WIDE) {
      for (; i < end; i += kStep)
        ASKEW_EACH (b, B) {
          const Codes input = load_bytes(q + b * width + i);
          ASKEW_EACH (r, R) sum[r][b] += wide_products(load_bytes(codes + r * width + i), input);
        }
      continue;
    }
#endif
    Sums own[R][B];
    ASKEW_EACH (r, R)
      ASKEW_EACH (b, B) own[r][b] = Sums{};
    for (; i < end; i += kStep) {
      Codes code[R];
      ASKEW_EACH (r, R) code[r] = load_bytes(codes + r * width + i);
      ASKEW_EACH (b, B) {
        const Codes input = load_bytes(q + b * width + i);
        ASKEW_EACH (r, R) own[r][b] = add_products(own[r][b], code[r], input);
      }
    }
    ASKEW_EACH (r, R)
      ASKEW_EACH (b, B) sum[r][b] += lane_sums(own[r][b]);
  }
}

// How much stands between two changes of scale: any number of vectors; or what BITS unpack of one vector of words (of
// four bits where the codes are in a buffer), few enough for int16, which is one group or holds several.
enum Span : int { kAny, kBlockOfOne, kBlockOfSeveral };

// The sums over columns [begin, end) from the weight's rows. Codes of one bit need not be shifted to the bottom of a
// byte: those at bits 0 to 3 have sums of their own, of which the lower ones are multiplied when they are added up.
template <int BITS, int R, int B, bool WIDE, int SPAN>
ASKEW_FN void direct_sums(const PackedWeight& w, const uint8_t* p, const int8_t* q, int64_t width, int64_t begin,
                          int64_t end, vi (&sum)[R][B]) {
#if defined(ASKEW_PLACES)
  constexpr int kPlaces = B == 1 && BITS < 4 ? ASKEW_PLACES / BITS : 1;
#else
  constexpr int kPlaces = 1;
#endif
  constexpr int kVector = 4 * ASKEW_LANES, kShifts = 8 / BITS / kPlaces, kBlock = kShifts * kPlaces * kVector;
  constexpr int kUp = (kPlaces - 1) * BITS;
  const int64_t blocks = WIDE ? INT32_MAX : vectors_in_flight((w.n_levels - 1) << kUp) / kShifts;
  ASKEW_EACH (r, R)
    ASKEW_EACH (b, B) sum[r][b] = vi{};
  for (int64_t c = begin; SPAN != kAny || c < end;) {
    const int64_t stop = (end - c) / kBlock > blocks ? c + blocks * kBlock : end;
    Sums own[kPlaces][R][B];
    ASKEW_EACH (k, kPlaces)
      ASKEW_EACH (r, R)
        ASKEW_EACH (b, B) own[k][r][b] = Sums{};
    do {
      vu word[R];
      ASKEW_EACH (r, R) word[r] = with_levels<BITS>(w, row_words(w, p + r * w.row_bytes, c * BITS / 8));
      ASKEW_EACH_CODE (v, kShifts * kPlaces) {
        const int k = v % kPlaces;
        Codes code[R];
        ASKEW_EACH (r, R) {
          const vu bytes = (word[r] >> ((v - k) * BITS)) & (byte_mask(BITS) << (k * BITS));
          __builtin_memcpy(&code[r], &bytes, sizeof bytes);
        }
        ASKEW_EACH (b, B) {
          const Codes input = load_bytes(q + b * width + c + v * kVector);
          ASKEW_EACH (r, R) {
#if defined(ASKEW_WIDE)
            if (WIDE) {
              sum[r][b] += wide_products(code[r], input);
              continue;
            }
#endif
            own[k][r][b] =
                SPAN != kAny && v < kPlaces ? products(code[r], input) : add_products(own[k][r][b], code[r], input);
          }
        }
      }
      c += kBlock;
    } while (SPAN == kAny && c < stop);
    if (!WIDE)
      ASKEW_EACH (k, kPlaces)
        ASKEW_EACH (r, R)
          ASKEW_EACH (b, B) sum[r][b] += lane_sums(own[k][r][b], 1 << (kUp - k * BITS));
    if (SPAN != kAny) break;
  }
  if (kUp)
    ASKEW_EACH (r, R)
      ASKEW_EACH (b, B) sum[r][b] >>= kUp;
}

// The sums over columns [begin, end) of codes in a buffer, or, with BITS, from the weight's rows.
template <int BITS, int R, int B, bool WIDE, int SPAN>
ASKEW_FN void span_sums(const PackedWeight& w, const Int8Rows& rows, const int8_t* q, int64_t begin, int64_t end,
                        vi (&sum)[R][B]) {
  constexpr int kVector = 4 * ASKEW_LANES;
  if constexpr (BITS != 0) return direct_sums<BITS, R, B, WIDE, SPAN>(w, rows.codes, q, rows.width, begin, end, sum);
  const int64_t most = WIDE ? INT32_MAX : vectors_in_flight(w.n_levels - 1);
  if (SPAN == kAny) return int8_sums<R, B, WIDE>(rows.codes + begin, q + begin, rows.width, end - begin, most, sum);
  ASKEW_EACH (b, B) {
    ASKEW_EACH (r, R) {
      const uint8_t* codes = rows.codes + r * rows.width + begin;
      const int8_t* input = q + b * rows.width + begin;
      const Sums own = products(load_bytes(codes), load_bytes(input));
      sum[r][b] = lane_sums(add_products(own, load_bytes(codes + kVector), load_bytes(input + kVector)));
    }
  }
}

template <int BITS, int R, int B, bool WIDE, int SPAN>
ASKEW_FN void int8_groups(const PackedWeight& w, const Int8Rows& rows, const Int8Input& x, const LaneScales& lanes,
                          int64_t step, int64_t token, float (&dot)[B][R]) {
  const int8_t* q = x.q + token * rows.width;
  vi sum[R][B];
  vf total[B][R];
  ASKEW_EACH (r, R)
    ASKEW_EACH (b, B) total[b][r] = vf{};
  for (int64_t g = 0; g < rows.groups; g += ASKEW_LANES)
    ASKEW_EACH (r, R)
      ASKEW_EACH (b, B)
        total[b][r] = multiply_add(Floats::load(rows.scales + r * rows.groups + g),
                                   Floats::load(x.sums + (token + b) * rows.groups + g), total[b][r]);
  for (int64_t i = 0, g = 0; i < rows.width; i += step, g += lanes.groups) {
    span_sums<BITS, R, B, WIDE, SPAN>(w, rows, q, i, i + step, sum);
    ASKEW_EACH (r, R) {
      const float* first = rows.scales + r * rows.groups + g;
      const vf s = SPAN == kBlockOfOne ? vf{} + *first : scales_of(lanes, first, w.groups - g);
      ASKEW_EACH (b, B) total[b][r] = multiply_add(__builtin_convertvector(sum[r][b], vf), s, total[b][r]);
    }
  }
  ASKEW_EACH (b, B) sums_of<R>(total[b], dot[b]);
}

template <int BITS, int R, int B, bool GROUPED, bool WIDE>
__attribute__((noinline)) void int8_tile(const PackedWeight& w, const Int8Rows& rows, const Int8Input& x, int64_t row,
                                         int64_t token, const float* bias, float* y) {
  float dot[B][R];
  if (!GROUPED) {
    vi sum[R][B];
    span_sums<BITS, R, B, WIDE, kAny>(w, rows, x.q + token * rows.width, 0, rows.width, sum);
    ASKEW_EACH (b, B) {
      vi own[R];
      ASKEW_EACH (r, R) own[r] = sum[r][b];
      sums_of<R>(own, dot[b]);
      const float correction = x.sums[(token + b) * rows.groups];
      ASKEW_EACH (r, R) dot[b][r] = (dot[b][r] + correction) * rows.scales[r * rows.groups];
    }
  } else {
    const int parts = int8_parts(w);
    const LaneScales lanes = lane_scales(w, parts * 4 * ASKEW_LANES, parts * 4);
    const int64_t step = parts * 4 * ASKEW_LANES * (lanes.blocks ? lanes.blocks : 1);
    const bool one = !WIDE && lanes.blocks <= 1 && (BITS || parts == 2) && vectors_in_flight(w.n_levels - 1) >= parts;
    if (one && lanes.blocks)
      int8_groups<BITS, R, B, WIDE, WIDE ? kAny : kBlockOfOne>(w, rows, x, lanes, step, token, dot);
    else if (one)
      int8_groups<BITS, R, B, WIDE, WIDE ? kAny : kBlockOfSeveral>(w, rows, x, lanes, step, token, dot);
    else
      int8_groups<BITS, R, B, WIDE, kAny>(w, rows, x, lanes, step, token, dot);
  }
  ASKEW_EACH (b, B) {
    const float s = w.step * x.scale[token + b];
    float* to = y + (token + b) * w.n + row;
    ASKEW_EACH (r, R) to[r] = dot[b][r] * s + (bias ? bias[row + r] : 0.f);
  }
}

// Groups that end inside a lane: one group at a time, column by column.
ASKEW_FN void int8_plain(const PackedWeight& w, const Int8Rows& rows, const Int8Input& x, int64_t row, int r,
                         int64_t token, const float* bias, float* y) {
  const int64_t length = w.cols / w.groups;
  const uint8_t* codes = rows.codes + r * rows.width;
  const int8_t* q = x.q + token * rows.width;
  float dot = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    int32_t sum = 0;
    for (int64_t c = g * length; c < (g + 1) * length; ++c) sum += codes[c] * q[c];
    dot += ((float)sum + x.sums[token * rows.groups + g]) * rows.scales[r * rows.groups + g];
  }
  y[token * w.n + row + r] = dot * (w.step * x.scale[token]) + (bias ? bias[row + r] : 0.f);
}

typedef void (*RowsProduct)(const PackedWeight&, const Int8Rows&, const Int8Input&, int64_t row, int64_t token0,
                            int64_t token1, const float* bias, float* y);

template <int R, bool GROUPED, bool WIDE>
static void int8_buffered(const PackedWeight& w, const Int8Rows& rows, const Int8Input& x, int64_t row, int64_t token0,
                          int64_t token1, const float* bias, float* y) {
  constexpr int kTokens = ASKEW_LANES == 16 ? 4 : 2;
  int64_t t = token0;
  for (; t + kTokens <= token1; t += kTokens) int8_tile<0, R, kTokens, GROUPED, WIDE>(w, rows, x, row, t, bias, y);
  for (; t < token1; ++t) int8_tile<0, R, 1, GROUPED, WIDE>(w, rows, x, row, t, bias, y);
}

// One token or two, from the rows of the weight itself.
template <int BITS, bool GROUPED, bool WIDE>
static void int8_direct(const PackedWeight& w, const Int8Rows& rows, const Int8Input& x, int64_t row, int64_t token0,
                        int64_t token1, const float* bias, float* y) {
  if (token1 - token0 == 1)
    int8_tile<BITS, kInt8Rows, 1, GROUPED, WIDE>(w, rows, x, row, token0, bias, y);
  else
    int8_tile<BITS, kInt8Rows, 2, GROUPED, WIDE>(w, rows, x, row, token0, bias, y);
}

// Null for codes that are not read from their rows. Where there are wide products, all grids of 8 bits take them.
template <bool GROUPED, bool WIDE>
static RowsProduct direct_product(int bits) {
#if defined(ASKEW_WIDE)
  constexpr bool kBytesHere = WIDE;
#else
  constexpr bool kBytesHere = true;
#endif
  if constexpr (kBytesHere)
    if (bits == 8) return int8_direct<8, GROUPED, WIDE>;
  if constexpr (!WIDE) {
    if (bits == 4) return int8_direct<4, GROUPED, WIDE>;
    if (bits == 2) return int8_direct<2, GROUPED, WIDE>;
    if (bits == 1) return int8_direct<1, GROUPED, WIDE>;
  }
  return nullptr;
}

template <bool GROUPED, bool WIDE>
static void int8_products(const PackedWeight& w, int64_t row0, int64_t row1, const Int8Input& x, int64_t token0,
                          int64_t token1, const float* bias, float* y, char* scratch) {
  const int64_t width = int8_width(w), groups = padded_groups(w);
  float* scales = (float*)scratch;
  uint8_t* codes = (uint8_t*)(scales + kInt8Rows * groups);
  const bool parts = int8_parts(w);
  const RowsProduct direct = parts && token1 - token0 <= 2 ? direct_product<GROUPED, WIDE>(w.bits) : nullptr;
  __builtin_memset(scales, 0, kInt8Rows * groups * sizeof(float));
  for (int64_t row = row0; row < row1;) {
    const int step = row + kInt8Rows <= row1 ? kInt8Rows : 1;
    const bool in_place = direct && step == kInt8Rows;
    const Int8Rows rows = {in_place ? w.codes + row * w.row_bytes : codes, scales, width, groups};
    for (int r = 0; r < step; ++r) {
      if (!in_place) unpack_int8(w, row + r, codes + r * width);
      if (GROUPED)
        __builtin_memcpy(scales + r * groups, w.scale + (row + r) * w.groups, w.groups * sizeof(float));
      else
        scales[r * groups] = row_scale(w, row + r);
    }
    if (!parts) {
      for (int r = 0; r < step; ++r)
        for (int64_t t = token0; t < token1; ++t) int8_plain(w, rows, x, row, r, t, bias, y);
    } else {
      const RowsProduct product = in_place    ? direct
                                  : step == 1 ? int8_buffered<1, GROUPED, WIDE>
                                              : int8_buffered<kInt8Rows, GROUPED, WIDE>;
      product(w, rows, x, row, token0, token1, bias, y);
    }
    row += step;
  }
}

static void multiply_int8(const PackedWeight& w, int64_t row0, int64_t row1, const Int8Input& x, int64_t token0,
                          int64_t token1, const float* bias, float* y, char* scratch) {
#define ASKEW_WIDTH(WIDE)                                                                       \
  (w.groups > 1 ? int8_products<true, WIDE>(w, row0, row1, x, token0, token1, bias, y, scratch) \
                : int8_products<false, WIDE>(w, row0, row1, x, token0, token1, bias, y, scratch))
#if defined(ASKEW_WIDE)
  if (!vectors_in_flight(w.n_levels - 1)) return ASKEW_WIDTH(true);
#endif
  ASKEW_WIDTH(false);
#undef ASKEW_WIDTH
}
