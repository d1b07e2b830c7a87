// Mathematics on V, for the activation expressions.  Errors are a few units in the last place; infinities and NaN behave as
// in PyTorch.
#pragma once
#include "vector.h"

MOE_INLINE V v_where(VI mask) { return bits<V>(mask & bits<VI>(splat(1.0f))); }
MOE_INLINE V v_select(VI mask, V a, V b) { return bits<V>((mask & bits<VI>(a)) | (~mask & bits<VI>(b))); }
MOE_INLINE V v_abs(V x) { return bits<V>(bits<VI>(x) & 0x7fffffff); }
MOE_INLINE V v_sign(V x) { return v_where(x > 0.0f) - v_where(x < 0.0f); }
// NaN in either argument gives NaN.
MOE_INLINE V v_maximum(V a, V b) { return v_select(~(a < b) & ~(b != b), a, b); }
MOE_INLINE V v_minimum(V a, V b) { return v_select(~(a > b) & ~(b != b), a, b); }

MOE_INLINE V v_sqrt(V x) {
#if defined(MOE_AVX512)
  return (V)_mm512_sqrt_ps((__m512)x);
#elif defined(MOE_AVX2)
  return (V)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < L; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// To the nearest integer, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
MOE_INLINE V v_round(V x) { return (x + 12582912.0f) - 12582912.0f; }

// 2^n for integers n in -126..127.
MOE_INLINE V v_power_of_two(VI n) { return bits<V>((n + 127) << 23); }

// exp(x) = 2^n exp(r), |r| <= ln(2)/2; the polynomial is the Taylor series of degree 7, whose remainder is below 6e-9.
MOE_INLINE V v_exp(V x) {
  V clamped = v_select(x > 89.0f, splat(89.0f), v_select(x < -104.0f, splat(-104.0f), x));
  V n = v_round(clamped * 1.44269504088896341f);
  V r = (clamped - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  V p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  VI whole = __builtin_convertvector(n, VI), half = whole >> 1;  // in two steps: 2^n may be subnormal or overflow
  return v_select(x != x, x, p * v_power_of_two(half) * v_power_of_two(whole - half));
}

MOE_INLINE V v_sigmoid(V x) { return 1.0f / (1.0f + v_exp(-x)); }

// log(x) = e ln 2 + log(m), m in sqrt(1/2)..sqrt(2), log(m) = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172.
MOE_INLINE V v_log(V x) {
  VI tiny = x < 1.17549435e-38f;
  V scaled = v_select(tiny, x * 8388608.0f, x);
  VI word = bits<VI>(scaled);
  VI e = ((word - 0x3f3504f3) >> 23);
  V m = bits<V>(word - (e << 23));
  V exponent = __builtin_convertvector(e, V) - bits<V>(tiny & bits<VI>(splat(23.0f)));
  V s = (m - 1.0f) / (m + 1.0f), q = s * s;
  V p = splat(2.0f / 9);
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  V r = exponent * 0.693145751953125f + (s * (q * p + 2.0f) + exponent * 1.42860682030941723e-6f);
  r = v_select(x == bits<V>(splat((int32_t)0x7f800000)), x, r);
  r = v_select(x == 0.0f, splat(-INFINITY), r);
  return v_select(~(x >= 0.0f), splat(NAN), r);
}

// tanh by (1 - t) / (1 + t) with t = exp(-2|x|); the odd Taylor series where that would cancel.
MOE_INLINE V v_tanh(V x) {
  V a = v_abs(x), t = v_exp(-2.0f * a), far = (1.0f - t) / (1.0f + t), q = x * x;
  V p = splat(-929569.0f / 638512875);
  p = p * q + 21844.0f / 6081075;
  p = p * q - 1382.0f / 155925;
  p = p * q + 62.0f / 2835;
  p = p * q - 17.0f / 315;
  p = p * q + 2.0f / 15;
  p = p * q - 1.0f / 3;
  V near = a + a * q * p;
  V r = v_select(a < 0.5f, near, far);
  return v_select(x < 0.0f, -r, v_select(x != x, x, r));
}

// erf by x P(x^2) below 0.9, and by 1 - exp(-x^2) Q(t), t = 1 / (1 + |x| / 2), above.  P and Q are Chebyshev fits with relative
// errors below 1e-9.
MOE_INLINE V v_erf(V x) {
  V a = v_abs(x), q = x * x;
  V p = splat(-9.673590238e-06f);
  p = p * q + 0.000112682537f;
  p = p * q - 0.0008484396524f;
  p = p * q + 0.005221053411f;
  p = p * q - 0.02686543831f;
  p = p * q + 0.1128378262f;
  p = p * q - 0.3761263848f;
  p = p * q + 1.128379167f;
  V t = 1.0f / (1.0f + 0.5f * a);
  V u = splat(0.1203503332f);
  u = u * t - 0.4747579125f;
  u = u * t + 0.5686243114f;
  u = u * t - 0.1080374068f;
  u = u * t + 0.3499702874f;
  u = u * t + 0.259058774f;
  u = u * t + 0.2850126039f;
  u = u * t - 0.000160921551f;
  V far = 1.0f - v_exp(-q) * u;
  V r = v_select(a < 0.9f, a * p, v_select(a > 4.0f, splat(1.0f), far));
  return v_select(x < 0.0f, -r, v_select(x != x, x, r));
}
