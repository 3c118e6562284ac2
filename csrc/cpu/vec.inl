// F = vf: a vector of ASKEW_LANES floats, and loads and stores of the three storage types.
// GCC/Clang vector extensions: the same source becomes SSE2, AVX2 or AVX-512 (or NEON) code, lane for lane equal.
#pragma once
#include "../math/scalar.inl"

typedef float vf __attribute__((vector_size(4 * ASKEW_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * ASKEW_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * ASKEW_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * ASKEW_LANES)));
typedef uint8_t vb __attribute__((vector_size(ASKEW_LANES)));

ASKEW_FN vf select(vi m, vf a, vf b) { return m ? a : b; }
// a > b ? a : b; in one instruction, on which a chain waits a third as long as on a comparison and a choice.
ASKEW_FN vf greater(vf a, vf b) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif ASKEW_LANES == 8 && defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}
ASKEW_FN vi both(vi a, vi b) { return a & b; }
#if defined(__FMA__)
#if ASKEW_LANES == 16
ASKEW_FN vf fused_multiply_add(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#else
ASKEW_FN vf fused_multiply_add(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#endif
ASKEW_FN vf remainder_of(vf a, vf q, vf b) { return fused_multiply_add(-q, b, a); }
#endif
ASKEW_FN vf absolute(vf a) { return (vf)((vi)a & 0x7fffffff); }
ASKEW_FN vf negate_where_negative(vf a, vf by) { return (vf)((vi)a ^ ((vi)by & (int32_t)0x80000000)); }
ASKEW_FN vf divide(vf a, vf b) { return a / b; }

// Division by a row's scale: where there is FMA, a correctly rounded quotient without the divider, by Markstein's
// theorem (a quotient within one ulp, corrected once with the correctly rounded reciprocal; the first correction
// brings it within that ulp). The theorem needs a finite numerator and room in the exponents.
template <>
struct Divisor<vf> {
  vf value, inverse;
  bool corrected;
};
ASKEW_FN Divisor<vf> divisor(vf a) {
#if defined(__FMA__)
  return {a, 1.f / a, a[0] > 0x1p-60f && a[0] < 0x1p60f};
#else
  return {a, 1.f / a, false};
#endif
}
ASKEW_FN vf divide(vf a, const Divisor<vf>& b) {
#if defined(__FMA__)
  if (b.corrected) {
    vf q = a * b.inverse;
    q = fused_multiply_add(remainder_of(a, q, b.value), b.inverse, q);
    return fused_multiply_add(remainder_of(a, q, b.value), b.inverse, q);
  }
#endif
  return a / b.value;
}
ASKEW_FN vf divide_roughly(vf a, const Divisor<vf>& b) { return a * b.inverse; }  // the same on every instruction set
ASKEW_FN vf round_even(vf a) { return (a + kRounding) - kRounding; }
ASKEW_FN vf root(vf a) {
#if ASKEW_LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif ASKEW_LANES == 8 && defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)a);
#else
  vf r;
  for (int i = 0; i < ASKEW_LANES; ++i) r[i] = __builtin_sqrtf(a[i]);
  return r;
#endif
}

// F = Pair: two vectors side by side. A step is one long chain of dependent operations; the processor's window holds
// about two of them, and two that alternate instruction by instruction overlap as two in a row do not.
struct Pair {
  vf lo, hi;
};
struct PairMask {
  vi lo, hi;
};
#define ASKEW_PAIR(RESULT, OP)                                                         \
  ASKEW_FN RESULT operator OP(Pair a, Pair b) { return {a.lo OP b.lo, a.hi OP b.hi}; } \
  ASKEW_FN RESULT operator OP(Pair a, float b) { return {a.lo OP b, a.hi OP b}; }      \
  ASKEW_FN RESULT operator OP(float a, Pair b) { return {a OP b.lo, a OP b.hi}; }
ASKEW_PAIR(Pair, +)
ASKEW_PAIR(Pair, -)
ASKEW_PAIR(Pair, *)
ASKEW_PAIR(PairMask, >)
ASKEW_PAIR(PairMask, <)
ASKEW_PAIR(PairMask, >=)
ASKEW_PAIR(PairMask, ==)
#undef ASKEW_PAIR
ASKEW_FN Pair select(PairMask m, Pair a, Pair b) { return {select(m.lo, a.lo, b.lo), select(m.hi, a.hi, b.hi)}; }
ASKEW_FN Pair absolute(Pair a) { return {absolute(a.lo), absolute(a.hi)}; }
ASKEW_FN Pair negate_where_negative(Pair a, Pair by) {
  return {negate_where_negative(a.lo, by.lo), negate_where_negative(a.hi, by.hi)};
}
ASKEW_FN Pair divide(Pair a, Pair b) { return {a.lo / b.lo, a.hi / b.hi}; }
ASKEW_FN Pair round_even(Pair a) { return {round_even(a.lo), round_even(a.hi)}; }
ASKEW_FN Pair root(Pair a) { return {root(a.lo), root(a.hi)}; }
template <>
struct Divisor<Pair> {
  Pair value;
  Divisor<vf> of_each;
};
ASKEW_FN Pair divide_roughly(Pair a, const Divisor<Pair>& b) {
  return {divide_roughly(a.lo, b.of_each), divide_roughly(a.hi, b.of_each)};
}

ASKEW_FN vf widen_bf16(vu u) { return (vf)(u << 16); }
ASKEW_FN vu narrow_bf16(vf v) {  // ties to even; NaN stays NaN, quiet
  vu b = (vu)v;
  vu r = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return (vu)((v == v) ? (vi)r : (vi)((b >> 16) | 0x40u));
}
ASKEW_FN vf widen_f16(vu u) {  // exponent rebias by an exact multiplication, which also serves subnormals
  vu sign = (u & 0x8000u) << 16, body = (u & 0x7fffu) << 13;
  vf v = (vf)body * 0x1p112f;
  vf special = (vf)(body | 0x7f800000u);  // inf and NaN
  v = ((vi)(u & 0x7c00u) == 0x7c00) ? special : v;
  return (vf)((vu)v | sign);
}
ASKEW_FN vu narrow_f16(vf v) {  // ties to even, gradual underflow, overflow to inf
  vu b = (vu)v, sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
  vu normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  vu subnormal = (vu)((vf)a + 0.5f) - 0x3f000000u;  // the adder rounds to multiples of 2^-24
  vi r = ((vi)a < 0x38800000) ? (vi)subnormal : (vi)normal;
  r = ((vi)a >= 0x477ff000) ? vi{} + 0x7c00 : r;
  r = ((vi)a > 0x7f800000) ? (vi)(0x7e00u | ((a >> 13) & 0x3ffu)) : r;
  return (vu)r | sign;
}

ASKEW_FN vu narrow_e4m3(vf v) {  // ties to even, gradual underflow, ends at 448; NaN is 0x7f
  vu b = (vu)v, sign = (b >> 24) & 0x80u, a = b & 0x7fffffffu;
  vu normal = (a - 0x3c000000u + 0x7ffffu + ((a >> 20) & 1u)) >> 20;
  vu subnormal = (vu)((vf)a + 16384.f) - 0x46800000u;  // the adder rounds to multiples of 2^-9
  vi r = ((vi)a < 0x3c800000) ? (vi)subnormal : (vi)normal;
  r = ((vi)a > 0x43e00000) ? vi{} + 0x7e : r;
  return ((vi)a > 0x7f800000) ? vu{} + 0x7fu : (vu)r | sign;
}

template <int T>
struct Storage {  // 16 bits
  typedef uint16_t type;
  ASKEW_FN vf widen(vu u) { return T == kBFloat16 ? widen_bf16(u) : widen_f16(u); }
  ASKEW_FN vu narrow(vf v) { return T == kBFloat16 ? narrow_bf16(v) : narrow_f16(v); }
  ASKEW_FN vf load(const uint16_t* p) {
    vh h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(__builtin_convertvector(h, vu));
  }
  ASKEW_FN void store(uint16_t* p, vf v) {
    vh h = __builtin_convertvector(narrow(v), vh);
    __builtin_memcpy(p, &h, sizeof h);
  }
  ASKEW_FN vf rounded(vf v) { return widen(narrow(v)); }
};

template <>
struct Storage<kFloat32> {
  typedef float type;
  ASKEW_FN vf load(const float* p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  ASKEW_FN void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
  ASKEW_FN vf rounded(vf v) { return v; }
};

// What holds levels is written only.
template <int T>
struct LevelStorage {
  typedef uint8_t type;
  ASKEW_FN void store(uint8_t* p, vf v) {
    const vu code = T == kInt8 ? (vu) __builtin_convertvector(select(v == v, v, vf{}), vi) : narrow_e4m3(v);  // NaN: 0
    const vb bytes = __builtin_convertvector(code & 0xffu, vb);
    __builtin_memcpy(p, &bytes, sizeof bytes);
  }
};
template <>
struct Storage<kInt8> : LevelStorage<kInt8> {};
template <>
struct Storage<kFloat8> : LevelStorage<kFloat8> {};
