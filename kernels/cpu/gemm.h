// C[m,n] = sum over k of A[m,k] B[n,k], in float32, for blocks that fit the caches.
//
//   rows    A is given by a pointer to each row, contiguous in k: gathered rows are read where they lie
//   B       a strided matrix.  Contiguous in k: read where it lies, each vector of k multiplied lane by lane, the lanes summed
//           at the end (nt_tile).  Otherwise: blocks are packed, and elements of A broadcast (nn_tile).
//
// An element of C is summed in an order that depends on K and on the layout of B alone, not on m, n or the tile it falls in.
#pragma once
#include "vector.h"

#if defined(MOE_AVX512)
constexpr int NT_M = 4, NT_N = 6, NN_M = 6, NN_V = 4;
#else
constexpr int NT_M = 2, NT_N = 4, NN_M = 4, NN_V = 2;
#endif
constexpr int PANEL = NN_V * L;                    // columns of a packed panel
constexpr int64_t BLOCK_K = 512, BLOCK_N = 256;    // of a packed block of B
constexpr int64_t NT_BYTES = 4096;                 // of a row of A that nt_tile runs over: with its 6 rows of B, half of L1
constexpr int64_t ROWS = 96;                       // rows of A that a caller should give at once: a multiple of NT_M and NN_M

template <class E>
struct Matrix {
  const E* p;
  int64_t n, k;  // strides in elements
  Matrix at(int64_t row) const { return {p + row * n, n, k}; }
};

MOE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// ---- how two operands are multiplied: Arithmetic<E> for stored elements E

// float32 sums of products of floats; 16-bit B is widened as it is loaded.
template <class E>
struct Arithmetic {
  using Row = float;                  // what rows of A hold
  static constexpr int STEP = L;      // elements of k per vector
  static constexpr int PAIR = 1;      // consecutive k in one lane
  using Operand = V;
  MOE_INLINE V row(const float* p) { return load(p); }
  MOE_INLINE V row(const float* p, int64_t n) { return load(p, n); }
  MOE_INLINE V column(const E* p) { return load(p); }
  MOE_INLINE V column(const E* p, int64_t n) { return load(p, n); }
  MOE_INLINE V broadcast(const float* p) { return splat(*p); }
  MOE_INLINE V broadcast_last(const float* p) { return splat(*p); }
  MOE_INLINE V packed(const float* p) { return load(p); }
  using Packed = float;
  MOE_INLINE void add(V& c, V a, V b) { c += a * b; }
};

#if defined(MOE_DPBF16)
template <>
struct Arithmetic<bf16> {
  using Row = bf16;
  static constexpr int STEP = 2 * L;
  static constexpr int PAIR = 2;
  using Operand = __m512i;
  MOE_INLINE __m512i row(const bf16* p) { return _mm512_loadu_si512(p); }
  MOE_INLINE __m512i row(const bf16* p, int64_t n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, p); }
  MOE_INLINE __m512i column(const bf16* p) { return row(p); }
  MOE_INLINE __m512i column(const bf16* p, int64_t n) { return row(p, n); }
  MOE_INLINE __m512i broadcast(const bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  MOE_INLINE __m512i broadcast_last(const bf16* p) { return _mm512_set1_epi32(p->bits); }
  MOE_INLINE __m512i packed(const bf16* p) { return _mm512_loadu_si512(p); }
  using Packed = bf16;
  MOE_INLINE void add(V& c, __m512i a, __m512i b) { c = (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
};
#endif

// ---- B contiguous in k

template <class E, int M, int N>
static __attribute__((noinline)) void nt_tile(const typename Arithmetic<E>::Row* const* rows, int64_t k0, const E* b, int64_t stride,
                                              int64_t K, float* c, int64_t ldc, bool accumulate, const E* next) {
  using A = Arithmetic<E>;
  const typename A::Row* a[M];
  V sum[M * N]{};
  for (int i = 0; i < M; i++) a[i] = rows[i] + k0;
  int64_t k = 0;
  auto steps = [&](auto ahead) __attribute__((always_inline)) {
    for (; k + A::STEP <= K; k += A::STEP) {
      typename A::Operand x[M];
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) x[i] = A::row(a[i] + k);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) {
        auto y = A::column(b + j * stride + k);
        if (ahead()) prefetch(next + j * stride + k);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) A::add(sum[i * N + j], x[i], y);
      }
    }
  };
  if (next) steps([] { return true; });
  else steps([] { return false; });
  if (k < K) {
    typename A::Operand x[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) x[i] = A::row(a[i] + k, K - k);
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      auto y = A::column(b + j * stride + k, K - k);
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) A::add(sum[i * N + j], x[i], y);
    }
  }
  // The sums of the lanes, L tiles elements at a time, through a small array: rows of c start anywhere.
  float t[(M * N + L - 1) / L * L];
  constexpr int whole = M * N / L * L, rest = M * N - whole;
#pragma GCC unroll 8
  for (int i = 0; i < whole; i += L) store(t + i, sum_lanes<L>(sum + i));
  if constexpr (rest > 0) {
    constexpr int width = rest > 8 ? 16 : rest > 4 ? 8 : rest > 2 ? 4 : rest;
    V last[width]{};
#pragma GCC unroll 16
    for (int i = 0; i < rest; i++) last[i] = sum[whole + i];
    store(t + whole, sum_lanes<width>(last));
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) c[i * ldc + j] = accumulate ? c[i * ldc + j] + t[i * N + j] : t[i * N + j];
}

template <class E, int N>
static void nt_rows(const typename Arithmetic<E>::Row* const* rows, int64_t m, int64_t k0, const E* b, int64_t stride, int64_t K, float* c,
                    int64_t ldc, bool accumulate, const E* next) {
  int64_t i = 0;
  for (; i + NT_M <= m; i += NT_M, next = nullptr) nt_tile<E, NT_M, N>(rows + i, k0, b, stride, K, c + i * ldc, ldc, accumulate, next);
  for (; i + 2 <= m; i += 2, next = nullptr) nt_tile<E, 2, N>(rows + i, k0, b, stride, K, c + i * ldc, ldc, accumulate, next);
  if (i < m) nt_tile<E, 1, N>(rows + i, k0, b, stride, K, c + i * ldc, ldc, accumulate, next);
}

// ---- B packed: panel[k / PAIR][PANEL][PAIR] of the columns n of a block, zeros beyond its edges

template <class E, int M>
static __attribute__((noinline)) void nn_tile(const typename Arithmetic<E>::Row* const* rows, int64_t k0,
                                              const typename Arithmetic<E>::Packed* panel, int64_t K, float* c, int64_t ldc,
                                              bool accumulate) {
  using A = Arithmetic<E>;
  const typename A::Row* a[M];
  V sum[M][NN_V];
  for (int i = 0; i < M; i++) {
    a[i] = rows[i] + k0;
    for (int j = 0; j < NN_V; j++) sum[i][j] = accumulate ? load(c + i * ldc + j * L) : V{};
  }
  int64_t k = 0;
  for (; k + A::PAIR <= K; k += A::PAIR, panel += PANEL * A::PAIR) {
    typename A::Operand y[NN_V];
#pragma GCC unroll 8
    for (int j = 0; j < NN_V; j++) y[j] = A::packed(panel + j * L * A::PAIR);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      auto x = A::broadcast(a[i] + k);
#pragma GCC unroll 8
      for (int j = 0; j < NN_V; j++) A::add(sum[i][j], x, y[j]);
    }
  }
  if (k < K)
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      auto x = A::broadcast_last(a[i] + k);
#pragma GCC unroll 8
      for (int j = 0; j < NN_V; j++) A::add(sum[i][j], x, A::packed(panel + j * L * A::PAIR));
    }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < NN_V; j++) store(c + i * ldc + j * L, sum[i][j]);
}

template <class E, int M>
static void nn_rows(const typename Arithmetic<E>::Row* const* rows, int64_t m, int64_t k0,
                    const typename Arithmetic<E>::Packed* panel, int64_t K, float* c, int64_t ldc, bool accumulate) {
  for (; m >= M; m -= M, rows += M, c += M * ldc) nn_tile<E, M>(rows, k0, panel, K, c, ldc, accumulate);
  if constexpr (M > 1)
    if (m) nn_rows<E, M - 1>(rows, m, k0, panel, K, c, ldc, accumulate);
}

// One packed pair (or single) of rows k, k + 1: L columns from `low` and `high` (high is null past the edge).
template <class E>
MOE_INLINE void pack_columns(const E* low, const E* high, int64_t n, typename Arithmetic<E>::Packed* to) {
  if constexpr (Arithmetic<E>::PAIR == 1) {
    store(to, load(low, n));
  } else {
#if defined(MOE_DPBF16)
    __m512i a = _mm512_cvtepu16_epi32(n >= L ? _mm256_loadu_si256((const __m256i*)low) : _mm256_maskz_loadu_epi16(first(n), low));
    __m512i b = !high     ? _mm512_setzero_si512()
                : n >= L ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high))
                         : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), high));
    _mm512_storeu_si512(to, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
#endif
  }
}

// Rows k of B, each contiguous in n, by pointer: columns n0 .. n0 + n of the rows `from`[0..K).
template <class E>
static void pack_rows(const E* const* from, int64_t n0, int64_t n, int64_t K, typename Arithmetic<E>::Packed* to) {
  constexpr int P = Arithmetic<E>::PAIR;
  const int64_t panels = (n + PANEL - 1) / PANEL, size = (K + P - 1) / P * P * PANEL;
  for (int64_t k = 0; k < K; k += P)
    for (int64_t j = 0; j < panels; j++)
      for (int64_t l = 0; l < PANEL; l += L) {
        const int64_t left = n - j * PANEL - l, at = n0 + j * PANEL + l;
        pack_columns<E>(from[k] + at, k + 1 < K ? from[k + 1] + at : nullptr, left < 0 ? 0 : left,
                        to + j * size + k * PANEL + l * P);
      }
}

// Any strides, element by element.
template <class E>
static void pack_any(Matrix<E> b, int64_t k0, int64_t n, int64_t K, typename Arithmetic<E>::Packed* to) {
  constexpr int P = Arithmetic<E>::PAIR;
  const int64_t panels = (n + PANEL - 1) / PANEL, size = (K + P - 1) / P * P * PANEL;
  for (int64_t j = 0; j < panels * PANEL; j++)
    for (int64_t k = 0; k < (K + P - 1) / P * P; k++) {
      typename Arithmetic<E>::Packed value{};
      if (j < n && k < K) {
        if constexpr (P == 1) value = to_float(b.p[j * b.n + (k0 + k) * b.k]);
        else value = b.p[j * b.n + (k0 + k) * b.k];
      }
      to[j / PANEL * size + (k / P * PANEL + j % PANEL) * P + k % P] = value;
    }
}

// ---- the two together

// What one thread needs for the packed blocks, in bytes.
template <class E>
constexpr int64_t gemm_scratch() {
  return BLOCK_K * BLOCK_N * (int64_t)sizeof(typename Arithmetic<E>::Packed) + BLOCK_K * (int64_t)sizeof(void*);
}
// Columns of C that are written: callers give rows of c of at least this length.
constexpr int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

// C[m, 0..n) = A[m, 0..K) . from[0..K)[n0..n0+n), B given by its rows k, contiguous in n; n is at most BLOCK_N.
// finished(i, count) is called once for each group of rows i .. i + count of C, as soon as they are complete.
template <class E, class F>
static void multiply_rows(const typename Arithmetic<E>::Row* const* rows, int64_t m, const E* const* from, int64_t n0, int64_t n,
                          int64_t K, float* c, int64_t ldc, char* scratch, F finished) {
  auto* block = (typename Arithmetic<E>::Packed*)scratch;
  constexpr int P = Arithmetic<E>::PAIR;
  for (int64_t k = 0; k < K; k += BLOCK_K) {
    const int64_t kb = K - k < BLOCK_K ? K - k : BLOCK_K;
    pack_rows<E>(from + k, n0, n, kb, block);
    for (int64_t i = 0; i < m; i += NN_M) {
      const int64_t count = m - i < NN_M ? m - i : NN_M;
      for (int64_t p = 0; p * PANEL < n; p++)
        nn_rows<E, NN_M>(rows + i, count, k, block + p * PANEL * ((kb + P - 1) / P * P), kb, c + i * ldc + p * PANEL, ldc, k > 0);
      if (k + kb == K) finished(i, count);
    }
  }
}

// C[m, 0..n) (+)= A[m, 0..K) . B[0..n, 0..K)
template <class E>
static void multiply(const typename Arithmetic<E>::Row* const* rows, int64_t m, Matrix<E> b, int64_t n, int64_t K, float* c,
                     int64_t ldc, bool accumulate, char* scratch) {
  if (b.k == 1) {
    constexpr int64_t block = NT_BYTES / (int64_t)sizeof(typename Arithmetic<E>::Row);
    for (int64_t k = 0; k < K; k += block, accumulate = true) {
      const int64_t kb = K - k < block ? K - k : block;
      int64_t j = 0;
      const E* p = b.p + k;
      for (; j + NT_N <= n; j += NT_N, p += NT_N * b.n)
        nt_rows<E, NT_N>(rows, m, k, p, b.n, kb, c + j, ldc, accumulate, j + 2 * NT_N <= n ? p + NT_N * b.n : nullptr);
      for (; j + 2 <= n; j += 2, p += 2 * b.n) nt_rows<E, 2>(rows, m, k, p, b.n, kb, c + j, ldc, accumulate, nullptr);
      if (j < n) nt_rows<E, 1>(rows, m, k, p, b.n, kb, c + j, ldc, accumulate, nullptr);
    }
    return;
  }
  auto* block = (typename Arithmetic<E>::Packed*)scratch;
  auto** from = (const E**)(scratch + BLOCK_K * BLOCK_N * sizeof(*block));
  constexpr int P = Arithmetic<E>::PAIR;
  for (int64_t k = 0; k < K; k += BLOCK_K, accumulate = true)
    for (int64_t j = 0; j < n; j += BLOCK_N) {
      const int64_t kb = K - k < BLOCK_K ? K - k : BLOCK_K, nb = n - j < BLOCK_N ? n - j : BLOCK_N;
      if (b.n == 1) {
        for (int64_t i = 0; i < kb; i++) from[i] = b.p + (k + i) * b.k;
        pack_rows<E>(from, j, nb, kb, block);
      } else {
        pack_any<E>(b.at(j), k, nb, kb, block);
      }
      for (int64_t p = 0; p * PANEL < nb; p++)
        nn_rows<E, NN_M>(rows, m, k, block + p * PANEL * ((kb + P - 1) / P * P), kb, c + j + p * PANEL, ldc, accumulate);
    }
}
