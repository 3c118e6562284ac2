// The sharpness-aware passes: norm, perturbation with a copy kept, restore, mean of two gradients. Included by
// loops.inl, whose streams and sums they use.

template <int T>
struct SamNormLoop {
  static constexpr int kStreams = 2;
  Stream streams[kStreams];  // w, g
  SamArg arg;
  Lanes16* sum;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const SamNormLoop l = *this;
    const int64_t ahead = tuning.prefetch_columns;
    vf squares[kVectors] = {};
    for (const int64_t end = i + n; i < end; i += 16)
      for (int k = 0; k < kVectors; ++k) {
        const int64_t at = i + k * ASKEW_LANES;
        prefetch<T>(l.streams[0], at, ahead);
        prefetch<T>(l.streams[1], at, ahead);
        const vf x = sam_scaled(load<T>(l.streams[0], at), load<T>(l.streams[1], at), l.arg);
        squares[k] += x * x;
      }
    for (int k = 0; k < kVectors; ++k) l.sum->now[k] += squares[k];
  }
};

static double sam_norm(const void* w, const void* g, int type, SamArg arg, Tile t) {
  Lanes16 sum;
  clear(sum);
  const int size = type_size(type);
  for (int64_t c = t.col0; c < t.col1; c += kBand) {
    const int64_t end = c + kBand < t.col1 ? c + kBand : t.col1;
    ASKEW_BY_TYPE(type,
                  for_columns(SamNormLoop<T>{{{(void*)w, size, false}, {(void*)g, size, false}}, arg, &sum}, 0, c, end))
    flush(sum);
  }
  return finish(sum);
}

// A vector of a storage type, bit for bit (a conversion would change a signalling NaN).
template <int T>
struct Raw {
  typedef vh type;
};
template <>
struct Raw<kFloat32> {
  typedef vf type;
};

// Without bringing the line into the caches, which a plain store does first.
template <class Bits>
ASKEW_FN void store_bits(void* p, Bits v, bool past_caches) {
#if defined(__AVX__)
  if (past_caches) {
    if constexpr (sizeof v == 64) {
#if ASKEW_LANES == 16
      __m512i bits;
      __builtin_memcpy(&bits, &v, sizeof bits);
      _mm512_stream_si512((__m512i*)p, bits);
#endif
    } else if constexpr (sizeof v == 32) {
      __m256i bits;
      __builtin_memcpy(&bits, &v, sizeof bits);
      _mm256_stream_si256((__m256i*)p, bits);
    } else {
      __m128i bits;
      __builtin_memcpy(&bits, &v, sizeof bits);
      _mm_stream_si128((__m128i*)p, bits);
    }
    return;
  }
#endif
  __builtin_memcpy(p, &v, sizeof v);
}
ASKEW_FN void finish_stores(bool past_caches) {  // before another thread is told that they are done
#if defined(__AVX__)
  if (past_caches) _mm_sfence();
#endif
}

template <int T, bool PAST_CACHES>
struct SamPerturbLoop {
  static constexpr int kStreams = 3;
  Stream streams[kStreams];  // w, g, kept
  SamArg arg;
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    typedef typename Storage<T>::type S;
    const SamPerturbLoop l = *this;
    const int64_t ahead = tuning.prefetch_columns;
    const bool still = stands_still(l.arg);
    for (const int64_t end = i + n; i < end; i += ASKEW_LANES) {
      prefetch<T>(l.streams[0], i, ahead);
      prefetch<T>(l.streams[1], i, ahead);
      typename Raw<T>::type bits;
      __builtin_memcpy(&bits, l.streams[0].template at<S>(i), sizeof bits);
      store_bits(l.streams[2].template at<S>(i), bits, PAST_CACHES);
      if (!still) store<T>(l.streams[0], i, sam_perturbed(load<T>(l.streams[0], i), load<T>(l.streams[1], i), l.arg));
    }
  }
};

template <bool PAST_CACHES>
static void sam_perturb_as(void* w, const void* g, void* kept, int type, SamArg arg, Tile t) {
  const int size = type_size(type);
  const Stream ws{w, size, true}, gs{(void*)g, size, false}, keep{kept, size, true};
  ASKEW_BY_TYPE(type, for_columns(SamPerturbLoop<T, PAST_CACHES>{{ws, gs, keep}, arg}, 0, t.col0, t.col1))
  finish_stores(PAST_CACHES);
}

static void sam_perturb(void* w, const void* g, void* kept, int type, SamArg arg, bool past_caches, Tile t) {
  if (past_caches)
    sam_perturb_as<true>(w, g, kept, type, arg, t);
  else
    sam_perturb_as<false>(w, g, kept, type, arg, t);
}

template <int T, bool PAST_CACHES>
struct CopyLoop {
  static constexpr int kStreams = 2;
  Stream streams[kStreams];  // to, from
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    typedef typename Storage<T>::type S;
    const CopyLoop l = *this;
    const int64_t ahead = tuning.prefetch_columns;
    for (const int64_t end = i + n; i < end; i += ASKEW_LANES) {
      prefetch<T>(l.streams[1], i, ahead);
      typename Raw<T>::type bits;
      __builtin_memcpy(&bits, l.streams[1].template at<S>(i), sizeof bits);
      store_bits(l.streams[0].template at<S>(i), bits, PAST_CACHES);
    }
  }
};

static void sam_restore(void* w, const void* kept, int type, bool past_caches, Tile t) {
  const int size = type_size(type);
  const Stream to{w, size, true}, from{(void*)kept, size, false};
  if (past_caches)
    ASKEW_BY_TYPE(type, for_columns(CopyLoop<T, true>{{to, from}}, 0, t.col0, t.col1))
  else
    ASKEW_BY_TYPE(type, for_columns(CopyLoop<T, false>{{to, from}}, 0, t.col0, t.col1))
  finish_stores(past_caches);
}

template <int T>
struct SamMeanLoop {
  static constexpr int kStreams = 3;
  Stream streams[kStreams];  // mean, second, first
  ASKEW_LOOP void run(int64_t i, int64_t n) const {
    const SamMeanLoop l = *this;
    const int64_t ahead = tuning.prefetch_columns;
    for (const int64_t end = i + n; i < end; i += ASKEW_LANES) {
      prefetch<T>(l.streams[1], i, ahead);
      prefetch<T>(l.streams[2], i, ahead);
      store<T>(l.streams[0], i, sam_mean(load<T>(l.streams[1], i), load<T>(l.streams[2], i)));
    }
  }
};

static void sam_average(void* g, const void* first, int type, Tile t) {
  const int size = type_size(type);
  const Stream mean{g, size, true}, second{g, size, false}, other{(void*)first, size, false};
  ASKEW_BY_TYPE(type, for_columns(SamMeanLoop<T>{{mean, second, other}}, 0, t.col0, t.col1))
}
