// F = float: the vocabulary of the math headers for one element (CUDA threads, scalar code on the CPU).
// cpu/vec.inl says the same words for vectors.
ASKEW_FN float select(bool m, float a, float b) { return m ? a : b; }
ASKEW_FN float absolute(float a) { return a < 0.f ? -a : (a == 0.f ? 0.f : a); }
ASKEW_FN bool both(bool a, bool b) { return a && b; }
#if defined(__CUDA_ARCH__)
ASKEW_FN float divide(float a, float b) { return __fdiv_rn(a, b); }
ASKEW_FN float root(float a) { return __fsqrt_rn(a); }
#else
ASKEW_FN float divide(float a, float b) { return a / b; }
ASKEW_FN float root(float a) { return __builtin_sqrtf(a); }
#endif
// Nearest integer, ties to even, for |a| <= 2^22; never returns -0.
ASKEW_FN float round_even(float a) {
  const float magic = 12582912.f;  // 1.5 * 2^23
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fadd_rn(a, magic), -magic);
#else
  return (a + magic) - magic;
#endif
}
