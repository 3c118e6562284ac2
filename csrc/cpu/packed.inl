// Packed weights, included once per instruction set; like loops.inl it sees no torch and no standard library.
//
// Codes of at most 4 bits become levels by one permutation of a register of 16 levels, which reads the low four bits of
// each lane.
#include "loops.h"
#include "../math/choose.h"

namespace askew {
namespace ASKEW_ISA {

#include "vec.inl"

typedef Storage<kFloat32> Floats;

// The codes of a word one after the other. Four lanes take dozens of instructions for each, which unrolled were slow to
// compile and no faster.
#if ASKEW_LANES == 4
#define ASKEW_EACH_CODE(K, N) for (int K = 0; K < (N); ++K)
#else
#define ASKEW_EACH_CODE(K, N) ASKEW_EACH (K, N)
#endif

ASKEW_FN vf multiply_add(vf a, vf b, vf c) {
#if defined(__FMA__)
  return fused_multiply_add(a, b, c);
#else
  return a * b + c;
#endif
}

// table[i]: the level of the code in the low `bits` bits of i, so what stands above it need not be cleared.
ASKEW_FN vf lookup(const float* table, vu code) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(table));
#elif ASKEW_LANES == 8 && defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)code);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)code);
  return (vf)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)code, 28)));  // bit 3 chooses
#else
  vf level;
  for (int i = 0; i < ASKEW_LANES; ++i) level[i] = table[code[i] & 15];
  return level;
#endif
}

// LANES bytes as integers.
ASKEW_FN vu widened(const uint8_t* p) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif ASKEW_LANES == 8 && defined(__AVX2__)
  return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  vu word;
  for (int i = 0; i < ASKEW_LANES; ++i) word[i] = p[i];
  return word;
#endif
}

#if ASKEW_LANES == 16
// 16 words of 16 rows, transposed.
ASKEW_FN void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  ASKEW_EACH (i, 8) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  ASKEW_EACH (i, 4) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  ASKEW_EACH (i, 4) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  ASKEW_EACH (i, 8) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}
#endif

template <int BITS>
ASKEW_FN vu words_of(const PackedWeight& w, const uint8_t* p);

#if (ASKEW_LANES == 16 && defined(__AVX512BW__)) || (ASKEW_LANES == 8 && defined(__AVX2__))
#if ASKEW_LANES == 16
typedef __m512i Codes;
#define ASKEW_MM(NAME) _mm512_##NAME
#else
typedef __m256i Codes;
#define ASKEW_MM(NAME) _mm256_##NAME
#endif

// The lower halves of products of 16 bits. Where a factor is a constant GCC makes shifts and additions of it, six for
// 270, which take longer.
ASKEW_FN Codes times(Codes a, Codes b) {
  Codes product;
#if ASKEW_LANES == 16
  asm("vpmullw %2, %1, %0" : "=v"(product) : "v"(a), "v"(b));
#else
  asm("vpmullw %2, %1, %0" : "=x"(product) : "x"(a), "x"(b));
#endif
  return product;
}

// 16 bytes, in each lane of 128 bits.
ASKEW_FN Codes in_each_lane(const void* p) {
#if ASKEW_LANES == 16
  return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
#else
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
#endif
}

// As many whole bytes of trits as a vector has room for, as bytes in the order of the columns. Each column finds its
// byte, v, as a number of 16 bits: v / 243 times a power of three, whose whole part does not fit, so that three times
// what is left is the column's digit. 270 / 65536 is 1 / 243, rounded up: at most 0.0012 too much, 0.1 times 81.
struct TritOrder {
  static constexpr int kBytes = 4 * ASKEW_LANES / kTritsInByte, kCodes = kBytes * kTritsInByte;
  uint8_t from[2][4 * ASKEW_LANES] = {};  // of even columns and of odd ones; 128: zero
  uint16_t by[2][2 * ASKEW_LANES] = {};
  constexpr TritOrder() {
    for (int c = 0; c < 4 * ASKEW_LANES; ++c) {
      from[c % 2][c / 2 * 2] = (uint8_t)(c / kTritsInByte);
      from[c % 2][c / 2 * 2 + 1] = 128;
      int power = 270;
      for (int digit = c % kTritsInByte; digit < kTritsInByte - 1; ++digit) power *= 3;
      by[c % 2][c / 2] = (uint16_t)power;
    }
  }
};
constexpr TritOrder kTritOrder;

ASKEW_FN void trits_in_order(const uint8_t* p, int64_t left, uint8_t* out) {
  uint8_t padded[16] = {};
  if (left < 16) {
    __builtin_memcpy(padded, p, left);
    p = padded;
  }
  const __m128i some = _mm_min_epu8(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8((char)kTopTrits));
  const Codes bytes = in_each_lane(&some);
  Codes digit[2];
  ASKEW_EACH (k, 2) {
    Codes from, by;
    __builtin_memcpy(&from, kTritOrder.from[k], sizeof from);
    __builtin_memcpy(&by, kTritOrder.by[k], sizeof by);
    const Codes fraction = times(ASKEW_MM(shuffle_epi8)(bytes, from), by);
    digit[k] = ASKEW_MM(mulhi_epu16)(fraction, ASKEW_MM(set1_epi16)(3));
  }
  const Codes codes = digit[0] | ASKEW_MM(slli_epi16)(digit[1], 8);
  __builtin_memcpy(out, &codes, sizeof codes);
}

// Codes of 1 to 7 bits as bytes in the order of the columns, 16 to a lane of 128 bits. Each column finds the two bytes
// that hold its code, and a power of two moves the code to their top.
struct WidthOrder {
  uint8_t from[2][16] = {};  // of even columns and of odd ones
  uint16_t by[2][8] = {};
  constexpr explicit WidthOrder(int bits) {
    for (int c = 0; c < 16; ++c) {
      from[c % 2][c / 2 * 2] = (uint8_t)(c * bits / 8);
      from[c % 2][c / 2 * 2 + 1] = (uint8_t)(c * bits / 8 + 1);
      by[c % 2][c / 2] = (uint16_t)(1 << (16 - bits - c * bits % 8));
    }
  }
};
constexpr WidthOrder kWidthOrders[7] = {WidthOrder(1), WidthOrder(2), WidthOrder(3), WidthOrder(4),
                                        WidthOrder(5), WidthOrder(6), WidthOrder(7)};

ASKEW_FN void codes_in_order(int bits, const uint8_t* p, int64_t left, uint8_t* out) {
  const int64_t lane = 2 * bits, needed = (ASKEW_LANES / 4 - 1) * lane + 16;
  uint8_t padded[64] = {};
  if (left < needed) {
    __builtin_memcpy(padded, p, left);
    p = padded;
  }
#if ASKEW_LANES == 16
  const auto lanes = [&](int l) __attribute__((always_inline)) {
    const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(p + l * lane)));
    return _mm256_inserti128_si256(low, _mm_loadu_si128((const __m128i*)(p + (l + 1) * lane)), 1);
  };
  const Codes bytes = _mm512_inserti64x4(_mm512_castsi256_si512(lanes(0)), lanes(2), 1);
#else
  const Codes bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)),
                                              _mm_loadu_si128((const __m128i*)(p + lane)), 1);
#endif
  const WidthOrder& order = kWidthOrders[bits - 1];
  const __m128i down = _mm_cvtsi32_si128(16 - bits);
  Codes code[2];
  ASKEW_EACH (k, 2) {
    const Codes pair = ASKEW_MM(shuffle_epi8)(bytes, in_each_lane(order.from[k]));
    code[k] = ASKEW_MM(srl_epi16)(times(pair, in_each_lane(order.by[k])), down);
  }
  const Codes codes = code[0] | ASKEW_MM(slli_epi16)(code[1], 8);
  __builtin_memcpy(out, &codes, sizeof codes);
}
#endif

#if ASKEW_LANES == 16 && defined(__AVX512BW__)
// 128 codes of 3 bits, 48 bytes, as bytes: a lane's word holds eight of them, which become two words of four bytes.
ASKEW_FN void unpack_threes(const PackedWeight& w, const uint8_t* p, uint8_t* out) {
  const vu word = words_of<3>(w, p);
  __m512i four[2];
  for (int half = 0; half < 2; ++half) {
    const vu codes = word >> (12 * half);
    four[half] =
        (__m512i)((codes & 0x7u) | (codes << 5 & 0x700u) | (codes << 10 & 0x70000u) | (codes << 15 & 0x7000000u));
  }
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi32(four[0], first, four[1]));
  _mm512_storeu_si512(out + 64, _mm512_permutex2var_epi32(four[0], second, four[1]));
}
#endif

// Codes as bytes in the order of the columns, followed by zeros up to a multiple of 64.
ASKEW_FN void unpack_row(const PackedWeight& weight, int64_t row, uint8_t* out) {
  const PackedWeight w = weight;  // a copy that the stores cannot change
  const uint8_t* p = w.codes + row * w.row_bytes;
  const int64_t end = rounded_up(w.cols, 64);
  if (w.bits == 0) {
#if defined(ASKEW_MM)
    for (int64_t c = 0, at = 0; c < w.cols; c += TritOrder::kCodes, at += TritOrder::kBytes) {
      __builtin_prefetch(p + at + 4 * w.row_bytes);  // of the rows that come next
      trits_in_order(p + at, w.row_bytes - at, out + c);
    }
#else
    const uint8_t* const digits = w.digits;
    uint8_t* to = out;
    for (const uint8_t* const last = p + w.row_bytes; p < last; ++p, to += kTritsInByte)
      __builtin_memcpy(to, digits + 8 * *p, 8);
#endif
  } else if (w.bits == 8) {
    __builtin_memcpy(out, p, w.cols);
#if ASKEW_LANES == 16 && defined(__AVX512BW__)
  } else if (w.bits == 4) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int64_t i = 0; i < w.row_bytes; i += 32) {
      const int64_t left = w.row_bytes - i;
      const __m256i bytes = _mm256_maskz_loadu_epi8(left < 32 ? (1u << left) - 1 : ~0u, p + i);
      const __m512i pairs = _mm512_cvtepu8_epi16(bytes);
      _mm512_storeu_si512(out + 2 * i, _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), mask));
    }
  } else if (w.bits == 3) {
    int64_t c = 0, at = 0;
    for (; at + 48 <= w.row_bytes; c += 128, at += 48) unpack_threes(w, p + at, out + c);
    if (c < w.cols) {
      uint8_t bytes[48] = {}, codes[128];
      __builtin_memcpy(bytes, p + at, w.row_bytes - at);
      unpack_threes(w, bytes, codes);
      __builtin_memcpy(out + c, codes, end - c);
    }
#endif
  } else {
#if defined(ASKEW_MM)
    constexpr int64_t kStep = 4 * ASKEW_LANES;
    for (int64_t c = 0, at = 0; c < w.cols; c += kStep, at += kStep * w.bits / 8) {
      __builtin_prefetch(p + at + 4 * w.row_bytes);
      codes_in_order(w.bits, p + at, w.row_bytes - at, out + c);
    }
#else
    const int k = w.bits;
    const uint64_t halves = ((1ull << 4 * k) - 1), quarters = ((1ull << 2 * k) - 1) * 0x0000000100000001ull,
                   codes = ((1ull << k) - 1) * 0x0001000100010001ull;
    for (int64_t i = 0, at = 0; i < w.cols; i += 8, at += k) {  // eight codes are k bytes, moved apart by halves
      uint64_t word = 0;
      if (at + 8 <= w.row_bytes)
        __builtin_memcpy(&word, p + at, 8);
      else
        __builtin_memcpy(&word, p + at, w.row_bytes - at);
      word = (word & halves) | ((word >> 4 * k & halves) << 32);
      word = (word & quarters) | ((word >> 2 * k & quarters) << 16);
      word = (word & codes) | ((word >> k & codes) << 8);
      __builtin_memcpy(out + i, &word, 8);
    }
#endif
  }
  for (int64_t c = w.cols; c < end; ++c) out[c] = 0;
}

// The level of each byte's code.
ASKEW_FN vf levels_of(const PackedWeight& w, const uint8_t* p) {
  const vu code = widened(p);
  if (w.bits <= 4) return lookup(w.table, code);
  const vf level = __builtin_convertvector((vi)code, vf) + w.lo;
  return select(level > w.hi, vf{} + w.hi, level);
}

static void decode(const PackedWeight& weight, int64_t row, float* out, uint8_t* bytes) {
  const PackedWeight w = weight;  // a copy that the stores cannot change
  unpack_row(w, row, bytes);
  const int64_t groups = w.groups ? w.groups : 1, length = w.cols / groups;
  const float* scale = w.scale + (w.groups ? row * w.groups : 0);
  if (length % ASKEW_LANES == 0 || groups == 1) {
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = g * length; c < (g + 1) * length; c += ASKEW_LANES)
        Floats::store(out + c, levels_of(w, bytes + c) * scale[g]);
  } else {
    for (int64_t c = 0; c < w.cols; c += ASKEW_LANES) Floats::store(out + c, levels_of(w, bytes + c));
    for (int64_t g = 0, c = 0; g < groups; ++g)
      for (; c < (g + 1) * length; ++c) out[c] *= scale[g];
  }
  for (int64_t c = w.cols; c % 64; ++c) out[c] = 0;
}

template <int T>
ASKEW_FN void store_typed(const float* row, int64_t cols, void* out) {
  typedef typename Storage<T>::type S;
  S* to = (S*)out;
  int64_t c = 0;
  for (; c + ASKEW_LANES <= cols; c += ASKEW_LANES) Storage<T>::store(to + c, Floats::load(row + c));
  if (c < cols) {
    S last[ASKEW_LANES];
    Storage<T>::store(last, Floats::load(row + c));  // the row is padded
    __builtin_memcpy(to + c, last, (cols - c) * sizeof(S));
  }
}

// `floats`: a row of scratch, for groups whose ends are no ends of vectors.
template <int T>
ASKEW_FN void decode_typed(const PackedWeight& weight, int64_t row, void* out, float* floats, uint8_t* bytes) {
  typedef typename Storage<T>::type S;
  const PackedWeight w = weight;
  const int64_t groups = w.groups ? w.groups : 1, length = w.cols / groups;
  if (length % ASKEW_LANES && groups > 1) {
    decode(w, row, floats, bytes);
    return store_typed<T>(floats, w.cols, out);
  }
  unpack_row(w, row, bytes);
  const float* scale = w.scale + (w.groups ? row * w.groups : 0);
  S* const to = (S*)out;
  const int64_t whole = w.cols - w.cols % ASKEW_LANES;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = groups == 1 ? whole : (g + 1) * length;
    for (int64_t c = g * length; c < end; c += ASKEW_LANES)
      Storage<T>::store(to + c, levels_of(w, bytes + c) * scale[g]);
  }
  if (whole < w.cols) {
    S last[ASKEW_LANES];
    Storage<T>::store(last, levels_of(w, bytes + whole) * scale[0]);
    __builtin_memcpy(to + whole, last, (w.cols - whole) * sizeof(S));
  }
}

static void decode_as(const PackedWeight& w, int64_t row, int type, void* out, float* floats, uint8_t* bytes) {
  ASKEW_BY_TYPE(type, decode_typed<T>(w, row, out, floats, bytes))
}

static void store(const float* row, int64_t cols, void* out, int type) {
  ASKEW_BY_TYPE(type, store_typed<T>(row, cols, out))
}

template <int T>
ASKEW_FN void load_typed(const void* in, int64_t count, float* out) {
  typedef typename Storage<T>::type S;
  const S* from = (const S*)in;
  int64_t c = 0;
  for (; c + ASKEW_LANES <= count; c += ASKEW_LANES) Floats::store(out + c, Storage<T>::load(from + c));
  if (c < count) {
    S last[ASKEW_LANES] = {};
    __builtin_memcpy(last, from + c, (count - c) * sizeof(S));
    float wide[ASKEW_LANES];
    Floats::store(wide, Storage<T>::load(last));
    __builtin_memcpy(out + c, wide, (count - c) * 4);
  }
}

static void load(const void* in, int64_t count, int type,
                 float* out){ASKEW_BY_TYPE(type, load_typed<T>(in, count, out))}

// The sum of all lanes by one fixed tree.
ASKEW_FN float sum_of(vf v) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float t[ASKEW_LANES];
  __builtin_memcpy(t, &v, sizeof t);
  for (int width = ASKEW_LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) t[i] += t[i + width];
  return t[0];
#endif
}

ASKEW_FN int32_t sum_of(vi v) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t sum = 0;
  for (int i = 0; i < ASKEW_LANES; ++i) sum += v[i];
  return sum;
#endif
}

// The sums of R vectors; of four at once by adding them lane by lane while they are transposed.
template <int R, class V>
ASKEW_FN void sums_of(const V* v, float* sum) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  if constexpr (R == 4) {
    typedef __typeof__(v[0][0] + v[0][0]) Lane;
    typedef Lane Half __attribute__((vector_size(32)));
    typedef Lane Quarter __attribute__((vector_size(16)));
    const __m512i a = (__m512i)v[0], b = (__m512i)v[1], c = (__m512i)v[2], d = (__m512i)v[3];
    const __m512i ab = (__m512i)((V)_mm512_unpacklo_epi32(a, b) + (V)_mm512_unpackhi_epi32(a, b));
    const __m512i cd = (__m512i)((V)_mm512_unpacklo_epi32(c, d) + (V)_mm512_unpackhi_epi32(c, d));
    const __m512i all = (__m512i)((V)_mm512_unpacklo_epi64(ab, cd) + (V)_mm512_unpackhi_epi64(ab, cd));
    const __m256i half = (__m256i)((Half)_mm512_castsi512_si256(all) + (Half)_mm512_extracti64x4_epi64(all, 1));
    const Quarter four = (Quarter)_mm256_castsi256_si128(half) + (Quarter)_mm256_extracti128_si256(half, 1);
    const auto floats = __builtin_convertvector(four, float __attribute__((vector_size(16))));
    __builtin_memcpy(sum, &floats, sizeof floats);
    return;
  }
#endif
  for (int r = 0; r < R; ++r) sum[r] = (float)sum_of(v[r]);
}

ASKEW_FN float row_scale(const PackedWeight& w, int64_t row) { return w.scale[w.groups ? row * w.groups : 0]; }

// A block of codes is one vector of words, one for each lane; a word's codes are consecutive columns. 32 bits: levels.
template <int BITS>
struct Block {
  static constexpr int kShift = BITS == 0 ? 4 : BITS;
  static constexpr int kCodes = BITS == 0 ? 5 : BITS == 3 ? 8 : 32 / kShift;  // in a lane
  static constexpr int kCols = kCodes * ASKEW_LANES;
  static constexpr int kBytes = BITS == 0 ? ASKEW_LANES : kCols * BITS / 8;
};

template <int BITS>
ASKEW_FN vu words_of(const PackedWeight& w, const uint8_t* p) {
  vu word;
  if (BITS == 0) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
    word = (vu)_mm512_i32gather_epi32((__m512i)widened(p), w.words, 4);
#elif ASKEW_LANES == 8 && defined(__AVX2__)
    word = (vu)_mm256_i32gather_epi32((const int*)w.words, (__m256i)widened(p), 4);
#else
    for (int i = 0; i < ASKEW_LANES; ++i) word[i] = w.words[p[i]];
#endif
  } else if (BITS == 3) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
    const __m512i bytes = _mm512_maskz_loadu_epi32(0x0fff, p);
    const __m512i quarters =
        _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11), bytes);
    const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    word = (vu)_mm512_shuffle_epi8(quarters, spread);
#else
    for (int i = 0; i < ASKEW_LANES; ++i) word[i] = p[3 * i] | p[3 * i + 1] << 8 | p[3 * i + 2] << 16;
#endif
  } else {
    __builtin_memcpy(&word, p, sizeof word);
  }
  return word;
}

// Byte K of each word, as the float 2^23 + byte.
template <int K>
ASKEW_FN vf above_2_23(vu word) {
#if ASKEW_LANES == 16 && defined(__AVX512BW__)
  const __m512i at = _mm512_broadcast_i32x4(_mm_setr_epi32(K, 4 + K, 8 + K, 12 + K));
  return (vf)_mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x4b000000), 0x1111111111111111u, (__m512i)word, at);
#elif ASKEW_LANES == 8 && defined(__AVX2__)
  const __m128i at = _mm_setr_epi8(K, -1, -1, -1, 4 + K, -1, -1, -1, 8 + K, -1, -1, -1, 12 + K, -1, -1, -1);
  return (vf)((vu)_mm256_shuffle_epi8((__m256i)word, _mm256_broadcastsi128_si256(at)) | 0x4b000000u);
#else
  return (vf)((word >> (8 * K) & 255u) | 0x4b000000u);
#endif
}
ASKEW_FN vf above_2_23(vu word, int k) {
  return k == 0   ? above_2_23<0>(word)
         : k == 1 ? above_2_23<1>(word)
         : k == 2 ? above_2_23<2>(word)
                  : above_2_23<3>(word);
}

// Which scale of a row each lane of a block takes, where groups end with lanes.
struct LaneScales {
  int64_t blocks;  // in a group; 0: several groups in a block
  int64_t groups;  // in a block
  vi group;        // of a lane, from the block's first
};

ASKEW_FN bool groups_fit(const PackedWeight& w, int64_t block_cols, int64_t lane_cols) {
  if (w.groups <= 1) return true;
  const int64_t length = w.cols / w.groups;
  return length % block_cols == 0 || (block_cols % length == 0 && length % lane_cols == 0);
}

ASKEW_FN LaneScales lane_scales(const PackedWeight& w, int64_t block_cols, int64_t lane_cols) {
  LaneScales s = {0, 1, {}};
  if (w.groups <= 1) return s;
  const int64_t length = w.cols / w.groups;
  s.blocks = length / block_cols;
  if (!s.blocks) s.groups = block_cols / length;
  for (int i = 0; i < ASKEW_LANES; ++i) s.group[i] = s.blocks ? 0 : (int32_t)(i * lane_cols / length);
  return s;
}

// The lanes' scales in a block whose first group is the first of the `left` at p.
ASKEW_FN vf scales_of(const LaneScales& s, const float* p, int64_t left) {
  if (s.groups == 1) return vf{} + p[0];
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  const __mmask16 there = (__mmask16)((1u << (s.groups < left ? s.groups : left)) - 1);
  return (vf)_mm512_permutexvar_ps((__m512i)s.group, _mm512_maskz_loadu_ps(there, p));
#else
  vf scale;
  for (int i = 0; i < ASKEW_LANES; ++i) scale[i] = p[s.group[i] < left ? s.group[i] : left - 1];
  return scale;
#endif
}

#include "packed_float.inl"
#include "packed_int8.inl"
#include "packed_bands.inl"
#include "packed_rows.inl"
#include "packed_conv.inl"
#include "depthwise.inl"
#include "level_product.inl"
#include "packed_panels.inl"

#if !defined(ASKEW_PANELS_ONLY)
#if !defined(ASKEW_TABLES)
constexpr decltype(PackedLoops::tables_width) tables_width = nullptr;
constexpr decltype(PackedLoops::make_tables) make_tables = nullptr;
constexpr decltype(PackedLoops::multiply_tables) multiply_tables = nullptr;
#endif
extern const PackedLoops packed = {decode,          decode_as,       store,          load,          width,
                                   arrange,         scratch,         multiply,       tables_width,  make_tables,
                                   multiply_tables, int8_width,      quantize,       int8_scratch,  multiply_int8,
                                   unpack_codes,    band_tokens,     quantize_rows,  channel_peaks, quantize_patches,
                                   depthwise_line,  transpose,       multiply_bands, kPanelOutputs, level_range,
                                   lay_out_panel,   multiply_levels, sum_levels};
#endif

}  // namespace ASKEW_ISA
}  // namespace askew
