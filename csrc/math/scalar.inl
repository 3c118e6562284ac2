// F = float: the vocabulary of the math headers for one element (CUDA threads, scalar code on the CPU).
// cpu/vec.inl says the same words for vectors.
ASKEW_FN float select(bool m, float a, float b) { return m ? a : b; }
ASKEW_FN bool both(bool a, bool b) { return a && b; }
#if defined(__CUDA_ARCH__)
ASKEW_FN float absolute(float a) { return fabsf(a); }
ASKEW_FN float negate_where_negative(float a, float by) {  // by the sign bit, one instruction
  return __uint_as_float(__float_as_uint(a) ^ (__float_as_uint(by) & 0x80000000u));
}
ASKEW_FN float divide(float a, float b) { return __fdiv_rn(a, b); }
ASKEW_FN float root(float a) { return __fsqrt_rn(a); }
ASKEW_FN double root(double a) { return sqrt(a); }
ASKEW_FN double power(double a, double b) { return pow(a, b); }
#else
ASKEW_FN float absolute(float a) { return a < 0.f ? -a : (a == 0.f ? 0.f : a); }
ASKEW_FN float negate_where_negative(float a, float by) { return by < 0.f ? -a : a; }
ASKEW_FN float divide(float a, float b) { return a / b; }
ASKEW_FN float root(float a) { return __builtin_sqrtf(a); }
ASKEW_FN double root(double a) { return __builtin_sqrt(a); }
ASKEW_FN double power(double a, double b) { return __builtin_pow(a, b); }
#endif

template <class F>
struct Divisor;  // one that divides many
#if defined(__CUDA_ARCH__)
// Six operations, no branch: a correctly rounded quotient by Markstein's theorem (a quotient within one ulp, corrected
// once with the correctly rounded reciprocal; the first correction brings it within that ulp). The theorem needs a
// finite numerator and room in the exponents: a very large or very small divisor is moved by a power of two, exactly.
template <>
struct Divisor<float> {
  float value, reciprocal;
  float power, moved, inverse;  // moved = value * power
};
ASKEW_FN Divisor<float> divisor(float a) {
  const float reciprocal = __frcp_rn(a), size = fabsf(a);
  if (size > 0x1p-60f && size < 0x1p60f) return {a, reciprocal, 1.f, a, reciprocal};
  const float power = size < 1.f ? 0x1p64f : 0x1p-64f;
  return {a, reciprocal, power, a * power, __frcp_rn(a * power)};
}
ASKEW_FN float divide(float a, const Divisor<float>& b) {
  a = a * b.power;
  float q = a * b.inverse;
  q = __fmaf_rn(__fmaf_rn(-q, b.moved, a), b.inverse, q);
  return __fmaf_rn(__fmaf_rn(-q, b.moved, a), b.inverse, q);
}
ASKEW_FN float divide_roughly(float a, const Divisor<float>& b) { return a * b.reciprocal; }
// Without a branch, for 2^-80 <= b <= 2^80 and a = 0 or 2^-100 <= a / b, a <= 2^100: the correctly rounded 1 / b by a
// step of Newton's, the correctly rounded a / b by Markstein's theorem.
ASKEW_FN Divisor<float> quick_divisor(float b) {
  const float near = askew::cuda::reciprocal_near(b), y = __fmaf_rn(__fmaf_rn(-b, near, 1.f), near, near);
  return {b, y, 1.f, b, y};
}
ASKEW_FN float divide_quickly(float a, float b) { return divide(a, quick_divisor(b)); }
#else
template <>
struct Divisor<float> {
  float value, inverse;
};
ASKEW_FN Divisor<float> divisor(float a) { return {a, 1.f / a}; }
ASKEW_FN float divide(float a, const Divisor<float>& b) { return divide(a, b.value); }
// Within two units in the last place of a / b, for one multiplication.
ASKEW_FN float divide_roughly(float a, const Divisor<float>& b) { return a * b.inverse; }
ASKEW_FN Divisor<float> quick_divisor(float b) { return divisor(b); }
ASKEW_FN float divide_quickly(float a, float b) { return a / b; }
#endif

// Nearest integer, ties to even, for |a| <= 2^22; never returns -0.
constexpr float kRounding = 12582912.f;  // 1.5 * 2^23
ASKEW_FN float round_even(float a) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fadd_rn(a, kRounding), -kRounding);
#else
  return (a + kRounding) - kRounding;
#endif
}
