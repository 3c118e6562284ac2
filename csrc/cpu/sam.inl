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

// Bit for bit: a conversion would change a signalling NaN.
template <int T, bool PAST_CACHES>
ASKEW_FN void copy_vector(const Stream& from, const Stream& to, int64_t i) {
  typedef typename Storage<T>::type S;
  typedef S Bits __attribute__((vector_size(ASKEW_LANES * sizeof(S))));
  Bits bits;
  __builtin_memcpy(&bits, from.template at<S>(i), sizeof bits);
  store_bits(to.template at<S>(i), bits, PAST_CACHES);
}
template <int T, bool PAST_CACHES>
ASKEW_FN void copy_columns(Stream from, Stream to, Columns c) {
  for_columns(vector_loop<T, 1>({from, to}, ASKEW_VECTOR { copy_vector<T, PAST_CACHES>(s[0], s[1], i); }), c);
}
template <int T>
ASKEW_FN void mean_columns(Stream second, Stream first, Stream mean, Columns c) {
  const auto loop = vector_loop<T, 2>(
      {second, first, mean}, ASKEW_VECTOR { store<T>(s[2], i, sam_mean(load<T>(s[0], i), load<T>(s[1], i))); });
  for_columns(loop, c);
}

template <int T, bool PAST_CACHES>
double sam_typed(SamPass pass, const SamTensor& x, SamArg arg, Tile t) {
  const Stream w{x.w, type_size(T), true}, w_read{x.w, type_size(T), false}, g{(void*)x.g, type_size(T), false};
  const Stream kept{x.kept, type_size(T), true}, kept_read{x.kept, type_size(T), false};
  const Columns all{t.col0, t.col1 - t.col0};
  const bool still = stands_still(arg);
  Lanes16 sum{};
  switch (pass) {
    case kSamNorm:
      for_bands(0, t, [&](Columns c) {
        for_columns(SamNormLoop<T>{{w_read, g}, arg, &sum}, c);
        flush(sum);
      });
      return finish(sum);
    case kSamPerturb:
      for_columns(vector_loop<T, 2>(
                      {w, g, kept},
                      ASKEW_VECTOR {
                        copy_vector<T, PAST_CACHES>(s[0], s[2], i);
                        if (!still) store<T>(s[0], i, sam_perturbed(load<T>(s[0], i), load<T>(s[1], i), arg));
                      }),
                  all);
      break;
    case kSamRestore:
      copy_columns<T, PAST_CACHES>(kept_read, w, all);
      break;
    case kSamAverage:
      mean_columns<T>(w_read, g, w, all);
  }
  finish_stores(PAST_CACHES);
  return 0;
}

static double sam(SamPass pass, const SamTensor& x, SamArg arg, bool past_caches, Tile t) {
  if (past_caches) ASKEW_BY_TYPE(x.type, return sam_typed<T, true>(pass, x, arg, t))
  ASKEW_BY_TYPE(x.type, return sam_typed<T, false>(pass, x, arg, t))
  return 0;
}
