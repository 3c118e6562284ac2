// int8 activations times codes in bands, the order in which these loops read them: every sum is a lane of its own, so
// nothing is added across lanes, and all that is read of a weight is one stream.
//
// A band is 16 rows. Its columns stand in blocks, a block in words of 32 bits, 16 of them (64 bytes) side by side, one
// a row. Of 8, 4, 2 or 1 bits a word holds 4, 8, 16 or 32 consecutive columns, column c at byte c % 4 and in that byte
// at bit BITS (c / 4): one shift and one mask give four columns of all rows as bytes. Codes of 3, 5, 6 and 7 bits are
// planes of 4, 2 and 1 bits, the low bits of a code in the widest, and a block holds the planes' words one after the
// other; trits are five digits of a number v, that of column i the highest and of column 16 + i the lowest, whose byte
// i is 256 v / 243, rounded up. The columns of a group are filled up to whole blocks with zeros, the rows to whole
// bands. Scales stand as (bands, groups, 16).
//
// Inputs stand in blocks of tokens, (columns / 4, tokens, 4): what meets a vector of codes is one cache line.

// The most tokens of a block: their sums stay in registers.
#if defined(ASKEW_VNNI) || ASKEW_LANES == 4
constexpr int64_t kBandTokens = ASKEW_LANES;
#else
constexpr int64_t kBandTokens = ASKEW_LANES / 2;
#endif

ASKEW_FN vu band_word(const uint8_t* p, int i) {
  vu word;
  __builtin_memcpy(&word, p + 4 * kBandRows * i, sizeof word);
  return word;
}

// a | (b & mask)
ASKEW_FN vu with_bits(vu a, vu b, uint32_t mask) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  return (vu)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, _mm512_set1_epi32((int)mask), 0xf8);
#else
  return a | (b & mask);
#endif
}

// What the codes of `band_codes` are multiplied by: digits stay at the top of their bytes where a shift saves nothing.
template <int BITS>
ASKEW_FN constexpr int band_shift() {
#if defined(ASKEW_VNNI)
  return BITS == kTrits ? 6 : 0;
#else
  return 0;
#endif
}

// Five digits of each byte, highest first, and one more: the byte is a fraction of 256, whose triple's whole part is
// the highest digit, and whose fraction is what is left. Two means that round up give 3/4 of the byte and 64, close
// enough for its top two bits to be that digit plus one.
ASKEW_FN void band_trits(vu word, vu (&code)[5]) {
  typedef uint8_t Bytes __attribute__((vector_size(4 * ASKEW_LANES)));
  Bytes rest = (Bytes)word;
  ASKEW_UNROLL for (int d = 0; d < 5; ++d) {
#if defined(ASKEW_MM)
    const Codes half = ASKEW_MM(avg_epu8)((Codes)rest, ASKEW_MM(set1_epi8)(-3));
    const vu top = (vu)ASKEW_MM(avg_epu8)((Codes)rest, half);
    code[d] = band_shift<kTrits>() ? top & 0xc0c0c0c0u : top >> 6 & 0x03030303u;
#else
    code[d] = (vu)(((Bytes)(rest >= 86) & 1) + ((Bytes)(rest >= 171) & 1) + 1);
#endif
    rest = rest + rest + rest;
  }
}

// The codes of a block, four columns a vector.
template <int BITS>
ASKEW_FN void band_codes(const uint8_t* p, vu (&code)[band_vectors(BITS)]) {
  constexpr int kVectors = band_vectors(BITS);
  if constexpr (BITS == kTrits) {
    band_trits(band_word(p, 0), code);
  } else if constexpr (BITS == 8) {
    code[0] = band_word(p, 0);
  } else if constexpr (BITS == 1) {  // twice the code, as the levels of one bit are
    ASKEW_EACH_CODE (v, kVectors) code[v] = (v ? band_word(p, 0) >> (v - 1) : band_word(p, 0) << 1) & 0x02020202u;
  } else {
    int first = 0, bit = 0;  // of the plane: its first word, and where its bits stand in a code
    ASKEW_EACH (k, 3) {
      const int plane = 4 >> k;
      if (!(BITS & plane)) continue;
      ASKEW_EACH_CODE (v, kVectors) {
        const vu word = band_word(p, first + v * plane / 8);
        const int shift = v * plane % 8 - bit;
        const vu bits = shift < 0 ? word << -shift : word >> shift;
        const uint32_t mask = byte_mask(plane) << bit;
        code[v] = bit ? with_bits(code[v], bits, mask) : bits & mask;
      }
      first += kVectors * plane / 8;
      bit += plane;
    }
  }
}

// sums += codes times the four inputs at q.
ASKEW_FN void add_inputs(Sums& sums, Codes codes, const int8_t* q) {
#if ASKEW_LANES == 16 && defined(ASKEW_VNNI)
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*(const int32_t*)q));
#else
  accumulate(sums, codes, four_inputs(q));
#endif
}

// Sums with B tokens of a block of BLOCK. Few tokens have several sums each, or one product would wait for the other.
template <int BITS, int B, int BLOCK = B>
struct BandSums {
  static constexpr int kVectors = band_vectors(BITS), kBytes = 4 * kBandRows * band_words(BITS);
  static constexpr int kInputs = 4 * kVectors * BLOCK;  // bytes of a block
  static constexpr int kSums = B >= 4 ? 1 : 4 / B, kBlocks = kVectors < kSums ? kSums / kVectors : 1;
  // Products that a sum may hold before it is added up in int32, and steps that add no more.
  static constexpr int64_t kMost = vectors_in_flight(band_top(BITS));
  static constexpr int64_t kSteps = kMost / ((kBlocks * kVectors + kSums - 1) / kSums);
  static constexpr int64_t kAhead = 4096;  // bytes: what stands there is in the cache when it is its turn
  Sums own[kSums][B];
  vi sum[B];

  template <int COUNT>
  ASKEW_INLINE void step(const uint8_t* p, const int8_t* q) {
    ASKEW_EACH (k, COUNT) {
      vu code[kVectors];
      for (int i = 0; i < band_words(BITS); ++i) __builtin_prefetch(p + k * kBytes + 64 * i + kAhead);
      band_codes<BITS>(p + k * kBytes, code);
      ASKEW_EACH_CODE (v, kVectors) {
        Codes c;
        __builtin_memcpy(&c, &code[v], sizeof c);
        ASKEW_EACH (b, B) {
          const int8_t* four = q + ((k * kVectors + v) * BLOCK + b) * 4;
#if defined(ASKEW_WIDE)
          if constexpr (kMost == 0) {
            sum[b] += wide_products(c, four_inputs(four));
            continue;
          }
#endif
          if constexpr (kSteps == 0)
            sum[b] += lane_sums(products(c, four_inputs(four)));
          else
            add_inputs(own[(k * kVectors + v) % kSums][b], c, four);
        }
      }
    }
  }

  // Steps of COUNT blocks; how many blocks that were.
  template <int COUNT>
  ASKEW_INLINE int64_t steps(const uint8_t* p, const int8_t* q, int64_t blocks) {
    int64_t i = 0;
#if defined(ASKEW_WIDE)
    while (i + COUNT <= blocks) {
      const int64_t whole = (blocks - i) / COUNT, count = whole < kSteps ? whole : kSteps ? kSteps : whole;
      ASKEW_EACH (s, kSums)
        ASKEW_EACH (b, B) own[s][b] = Sums{};
      for (const int64_t end = i + count * COUNT; i < end; i += COUNT) step<COUNT>(p + i * kBytes, q + i * kInputs);
      if (kSteps)
        ASKEW_EACH (s, kSums)
          ASKEW_EACH (b, B) sum[b] += lane_sums(own[s][b]);
    }
#else
    for (; i + COUNT <= blocks; i += COUNT) step<COUNT>(p + i * kBytes, q + i * kInputs);
#endif
    return i;
  }

#if defined(ASKEW_VNNI)
  // Trits that meet one token, without their digits: with the fraction r that a digit d is taken from and r' that is
  // left, 256 d = 3 r - r', so that sums of x r and of x r' give 256 times that of x d. Two additions and two products
  // for four columns of 16 rows in place of five operations and one; exact while that sum fits int32, whatever the
  // two do on the way.
  static constexpr int64_t kFewBlocks = INT32_MAX / 256 / (2 * kInt8Top) / (4 * kVectors);
  ASKEW_INLINE void over_fractions(const uint8_t* p, const int8_t* q, int64_t blocks, int32_t offset, int lo) {
    typedef uint8_t Bytes __attribute__((vector_size(4 * ASKEW_LANES)));
    Sums before[2] = {}, after[2] = {};
    for (int64_t i = 0; i < blocks; ++i, p += kBytes, q += kInputs) {
      __builtin_prefetch(p + kAhead);
      Bytes rest = (Bytes)band_word(p, 0);
      ASKEW_EACH (d, kVectors) {
        add_inputs(before[d % 2], (Codes)rest, q + 4 * d);
        rest = rest + rest + rest;
        add_inputs(after[d % 2], (Codes)rest, q + 4 * d);
      }
    }
    const vu all = ((vu)before[0] + (vu)before[1]) * 3u - ((vu)after[0] + (vu)after[1]);
    sum[0] = ((vi)all >> 8) + (offset + offset / lo);  // codes count from 1
  }
#endif

  // offsets: what the sums begin with, lo times the sum of the inputs, `stride` apart.
  ASKEW_INLINE void over(const uint8_t* p, const int8_t* q, int64_t blocks, const int32_t* offsets, int64_t stride,
                         [[maybe_unused]] int lo) {
#if defined(ASKEW_VNNI)
    if constexpr (BITS == kTrits && B == 1)
      if (lo && blocks <= kFewBlocks) return over_fractions(p, q, blocks, *offsets, lo);
#endif
    ASKEW_EACH (b, B) sum[b] = (vi{} + offsets[b * stride]) << band_shift<BITS>();
#if !defined(ASKEW_WIDE)
    ASKEW_EACH (s, kSums)
      ASKEW_EACH (b, B) own[s][b] = s ? Sums{} : (Sums)sum[b];
#endif
    const int64_t done = steps<kBlocks>(p, q, blocks);
    if (kBlocks > 1) steps<1>(p + done * kBytes, q + done * kInputs, blocks - done);
#if !defined(ASKEW_WIDE)
    ASKEW_EACH (b, B) {
      sum[b] = (vi)own[0][b];
      ASKEW_UNROLL for (int s = 1; s < kSums; ++s) sum[b] += (vi)own[s][b];
      sum[b] >>= band_shift<BITS>();
    }
#endif
  }
};

ASKEW_FN void store_whole(float* to, vf v, [[maybe_unused]] bool past_caches) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  if (past_caches) return _mm512_stream_ps(to, (__m512)v);
#endif
  Floats::store(to, v);
}

// The first `count` lanes.
ASKEW_FN void store_first(float* to, vf v, int count) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)v);
#else
  __builtin_memcpy(to, &v, count * sizeof(float));
#endif
}

// Tokens [first, first + B) of the block of BLOCK that begins at `block`.
template <int BITS, int B, int BLOCK = B>
__attribute__((noinline)) static void band_tile(const BandsArg& w, int64_t band, const BandInput& x, int64_t block,
                                                const float* bias, float* y, int first = 0) {
  typedef BandSums<BITS, B, BLOCK> Tile;
  const int64_t token = block + first;
  const int64_t groups = w.groups, blocks = w.blocks;
  for (int64_t lane = 0; lane < kBandRows; lane += ASKEW_LANES) {
    const int64_t row = band * kBandRows + lane, rows = w.n - row < ASKEW_LANES ? w.n - row : ASKEW_LANES;
    if (rows <= 0) break;
    const uint8_t* p = w.codes + band * groups * blocks * Tile::kBytes + 4 * lane;
    const int8_t* q = x.q + block * groups * blocks * (4 * Tile::kVectors) + 4 * first;  // band_width, not divided
    const float* scale = w.scale + band * groups * kBandRows + lane;
    vf total[B], added = vf{};
    if (bias && rows == ASKEW_LANES)
      added = Floats::load(bias + row);
    else if (bias)
      __builtin_memcpy(&added, bias + row, rows * sizeof(float));
    float by[B];
    ASKEW_EACH (b, B) by[b] = w.step * x.scale[token + b];
    asm("" : "+m"(by));
    const auto write = [&](int b, vf sum) __attribute__((always_inline)) {
      const vf out = sum * by[b] + added;
      float* const to = y + (token + b) * w.n + row;
      if (rows == ASKEW_LANES)
        store_whole(to, out, x.past_caches);
      else
        store_first(to, out, (int)rows);
    };
    for (int64_t g = 0; g < groups; ++g, p += blocks * Tile::kBytes, q += blocks * Tile::kInputs) {
      Tile tile;
      tile.over(p, q, blocks, x.offsets + token * groups + g, groups, w.lo);
      const vf s = Floats::load(scale + g * kBandRows);
      const auto scaled = [&](int b, vf sum) __attribute__((always_inline)) {
        return multiply_add(__builtin_convertvector(tile.sum[b], vf), s, sum);
      };
      if (groups == 1) {
        ASKEW_EACH (b, B) write(b, scaled(b, vf{}));
        break;
      }
      if (g == 0)
        ASKEW_EACH (b, B) total[b] = vf{};
      if (B == BLOCK) asm("" : "+m"(total));  // the totals stay in memory, the sums in registers
      ASKEW_EACH (b, B) total[b] = scaled(b, total[b]);
      if (g + 1 == groups)
        ASKEW_EACH (b, B) write(b, total[b]);
    }
  }
}

static void unpack_codes(const PackedWeight& w, int64_t row, uint8_t* out) { unpack_row(w, row, out); }

static int64_t band_tokens(int64_t left) {
  int64_t count = kBandTokens;
  while (count > left) count /= 2;
  return count;
}

template <int BITS>
static void band_products(const BandsArg& w, int64_t band0, int64_t band1, const BandInput& x, int64_t token0,
                          int64_t token1, const float* bias, float* y) {
  for (int64_t band = band0; band < band1; ++band)
    for (int64_t t = token0, count; t < token1; t += count) {
      count = band_tokens(token1 - t);
#if defined(ASKEW_VNNI) && ASKEW_LANES == 16
      // Halves of a block, whose sums and totals both stay in registers: storing totals took longer than decoding
      // twice, but for trits.
      if (BITS != kTrits && count == 16 && w.groups > 1) {
        for (int first = 0; first < 16; first += 8) band_tile<BITS, 8, 16>(w, band, x, t, bias, y, first);
        continue;
      }
#endif
#define ASKEW_TOKENS(B)           \
  if constexpr (B <= kBandTokens) \
    if (count == B) band_tile<BITS, B>(w, band, x, t, bias, y);
      ASKEW_TOKENS(16)
      ASKEW_TOKENS(8)
      ASKEW_TOKENS(4)
      ASKEW_TOKENS(2)
      ASKEW_TOKENS(1)
#undef ASKEW_TOKENS
    }
}

static void multiply_bands(const BandsArg& w, int64_t band0, int64_t band1, const BandInput& x, int64_t token0,
                           int64_t token1, const float* bias, float* y) {
  constexpr decltype(PackedLoops::multiply_bands) products[] = {
      band_products<kTrits>, band_products<1>, band_products<2>, band_products<3>, band_products<4>,
      band_products<5>,      band_products<6>, band_products<7>, band_products<8>};
  products[w.bits](w, band0, band1, x, token0, token1, bias, y);
}
