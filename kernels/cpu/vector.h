// V: a vector of L floats in the widest registers the target has, its conversions and its mathematics.
//
// Everything is written with the compiler's vector extensions, so that one source serves AVX-512, AVX2 and targets known
// to the compiler alone; intrinsics stand only where no expression generates the instruction.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define MOE_AVX512 1
constexpr int L = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MOE_AVX2 1
constexpr int L = 8;
#else
constexpr int L = 4;
#endif
#if defined(MOE_AVX512) && defined(__AVX512BF16__)
#define MOE_DPBF16 1
#endif

#define MOE_INLINE static inline __attribute__((always_inline))

typedef float V __attribute__((vector_size(L * 4)));
typedef int32_t VI __attribute__((vector_size(L * 4)));
typedef uint32_t VW __attribute__((vector_size(L * 4)));
typedef uint16_t VH __attribute__((vector_size(L * 2)));  // L values of a 16-bit type

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

MOE_INLINE V splat(float x) { return V{} + x; }
MOE_INLINE VI splat(int32_t x) { return VI{} + x; }
template <class To, class From>
MOE_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// ---- loads and stores of L values, or of the first n of them (the rest reads as zero and is not written)

MOE_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
MOE_INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }

MOE_INLINE V widen(VH h, bf16) { return (V)(__builtin_convertvector(h, VW) << 16); }
MOE_INLINE VH narrow(V v, bf16) {  // to nearest, ties to even; NaN stays NaN
#if defined(MOE_DPBF16)
  return (VH)_mm512_cvtneps_pbh((__m512)v);
#else
  VW w = (VW)v;
  VW rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  VW quiet = (w >> 16) | 0x40;
  return __builtin_convertvector((VW)(v != v ? (VI)quiet : (VI)rounded), VH);
#endif
}
#if defined(MOE_AVX512)
MOE_INLINE V widen(VH h, fp16) { return (V)_mm512_cvtph_ps((__m256i)h); }
MOE_INLINE VH narrow(V v, fp16) { return (VH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif defined(MOE_AVX2)
MOE_INLINE V widen(VH h, fp16) { return (V)_mm256_cvtph_ps((__m128i)h); }
MOE_INLINE VH narrow(V v, fp16) { return (VH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
MOE_INLINE V widen(VH h, fp16) {
  V v;
  for (int i = 0; i < L; i++) v[i] = (float)bits<_Float16>((uint16_t)h[i]);
  return v;
}
MOE_INLINE VH narrow(V v, fp16) {
  VH h;
  for (int i = 0; i < L; i++) h[i] = bits<uint16_t>((_Float16)v[i]);
  return h;
}
#endif

template <class E>
MOE_INLINE V load(const E* p) {
  VH h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, E());
}
template <class E>
MOE_INLINE void store(E* p, V v) {
  VH h = narrow(v, E());
  std::memcpy(p, &h, sizeof h);
}

#if defined(MOE_AVX512)
MOE_INLINE __mmask16 first(int64_t n) { return (__mmask16)((1u << n) - 1); }
MOE_INLINE V load(const float* p, int64_t n) { return n >= L ? load(p) : (V)_mm512_maskz_loadu_ps(first(n), p); }
MOE_INLINE void store(float* p, V v, int64_t n) {
  if (n >= L) return store(p, v);
  _mm512_mask_storeu_ps(p, first(n), (__m512)v);
}
template <class E>
MOE_INLINE V load(const E* p, int64_t n) {
  return n >= L ? load(p) : widen((VH)_mm256_maskz_loadu_epi16(first(n), p), E());
}
template <class E>
MOE_INLINE void store(E* p, V v, int64_t n) {
  if (n >= L) return store(p, v);
  _mm256_mask_storeu_epi16(p, first(n), (__m256i)narrow(v, E()));
}
#else
MOE_INLINE V load(const float* p, int64_t n) {
  if (n >= L) return load(p);
  V v{};
  for (int i = 0; i < L; i++)
    if (i < n) v[i] = p[i];
  return v;
}
MOE_INLINE void store(float* p, V v, int64_t n) {
  if (n >= L) return store(p, v);
  for (int i = 0; i < L; i++)
    if (i < n) p[i] = v[i];
}
template <class E>
MOE_INLINE V load(const E* p, int64_t n) {
  if (n >= L) return load(p);
  VH h{};
  for (int i = 0; i < L; i++)
    if (i < n) h[i] = p[i].bits;
  return widen(h, E());
}
template <class E>
MOE_INLINE void store(E* p, V v, int64_t n) {
  if (n >= L) return store(p, v);
  VH h = narrow(v, E());
  for (int i = 0; i < L; i++)
    if (i < n) p[i].bits = h[i];
}
#endif

MOE_INLINE float to_float(float x) { return x; }
MOE_INLINE float to_float(bf16 x) { return bits<float>((uint32_t)x.bits << 16); }
MOE_INLINE float to_float(fp16 x) {
  VH h{};
  h[0] = x.bits;
  return widen(h, fp16())[0];
}
template <class E>
MOE_INLINE E from_float(float x) {
  if constexpr (sizeof(E) == 4) return x;
  else return E{narrow(splat(x), E())[0]};
}

// ---- rearrangements

template <class F, int... I>
constexpr VI lanes(F f, std::integer_sequence<int, I...>) {
  return VI{f(I)...};
}
// shuffle<f>(a, b): lane i is lane f(i) of a, or lane f(i) - L of b.
template <class F>
MOE_INLINE V shuffle(V a, V b, F f) {
  constexpr VI m = lanes(F(), std::make_integer_sequence<int, L>());
  (void)f;
  return __builtin_shuffle(a, b, m);
}

template <int N>
struct HalfSource {  // the lower halves of the groups of 2 * L / N lanes of a, then of b
  constexpr int operator()(int i) const { return i / (L / N) * 2 * (L / N) + i % (L / N); }
};
template <int N>
struct UpperSource {
  constexpr int operator()(int i) const { return HalfSource<N>()(i) + L / N; }
};
template <int W>
struct Exchange {
  constexpr int operator()(int i) const { return i ^ (W / 2); }
};
template <int W>
struct Every {
  constexpr int operator()(int i) const { return i * W % L; }
};

// N vectors in (a power of two, at most L), N groups of L / N lanes out: group i holds partial sums of vector i.
template <int N>
MOE_INLINE V sum_groups(const V* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    V a = sum_groups<N / 2>(v), b = sum_groups<N / 2>(v + N / 2);
    return shuffle(a, b, HalfSource<N>()) + shuffle(a, b, UpperSource<N>());
  }
}
template <int W>
MOE_INLINE V fold_groups(V v) {
  if constexpr (W == 1) return v;
  else return fold_groups<W / 2>(v + shuffle(v, v, Exchange<W>()));
}
// Lane i of the result is the sum of the lanes of v[i].  The order of the additions does not depend on N.
template <int N>
MOE_INLINE V sum_lanes(const V* v) {
  V r = fold_groups<L / N>(sum_groups<N>(v));
  return shuffle(r, r, Every<L / N>());
}
MOE_INLINE float sum(V v) { return sum_lanes<1>(&v)[0]; }

struct EvenSource {
  constexpr int operator()(int i) const { return 2 * i; }
};
struct OddSource {
  constexpr int operator()(int i) const { return 2 * i + 1; }
};
struct LowZip {
  constexpr int operator()(int i) const { return i / 2 + (i % 2) * L; }
};
struct HighZip {
  constexpr int operator()(int i) const { return i / 2 + L / 2 + (i % 2) * L; }
};
