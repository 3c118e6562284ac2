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
ASKEW_FN void store_bits(void* p, Bits v, [[maybe_unused]] bool past_caches) {
#if defined(__AVX__)
  if (past_caches) {
#if ASKEW_LANES == 16
    if constexpr (sizeof v == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
    if constexpr (sizeof v == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
    if constexpr (sizeof v == 16) return _mm_stream_si128((__m128i*)p, (__m128i)v);
  }
#endif
  __builtin_memcpy(p, &v, sizeof v);
}
ASKEW_FN void finish_stores([[maybe_unused]] bool past_caches) {  // before another thread is told that they are done
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

template <int T, bool PAST_CACHES>
double sam_typed(SamPass pass, const SamTensor& s, SamArg arg, Tile t) {
  const Stream w{s.w, type_size(T), true}, w_read{s.w, type_size(T), false}, g{(void*)s.g, type_size(T), false};
  const Stream kept{s.kept, type_size(T), true}, kept_read{s.kept, type_size(T), false};
  Lanes16 sum;
  switch (pass) {
    case kSamNorm:
      clear(sum);
      for (int64_t c = t.col0; c < t.col1; c += kBand) {
        for_columns(SamNormLoop<T>{{w_read, g}, arg, &sum}, 0, c, c + kBand < t.col1 ? c + kBand : t.col1);
        flush(sum);
      }
      return finish(sum);
    case kSamPerturb:
      for_columns(SamPerturbLoop<T, PAST_CACHES>{{w, g, kept}, arg}, 0, t.col0, t.col1);
      break;
    case kSamRestore:
      for_columns(CopyLoop<T, PAST_CACHES>{{w, kept_read}}, 0, t.col0, t.col1);
      break;
    case kSamAverage:
      for_columns(SamMeanLoop<T>{{w, w_read, g}}, 0, t.col0, t.col1);
  }
  finish_stores(PAST_CACHES);
  return 0;
}

static double sam(SamPass pass, const SamTensor& s, SamArg arg, bool past_caches, Tile t) {
  if (past_caches) ASKEW_BY_TYPE(s.type, return sam_typed<T, true>(pass, s, arg, t))
  ASKEW_BY_TYPE(s.type, return sam_typed<T, false>(pass, s, arg, t))
  return 0;
}
