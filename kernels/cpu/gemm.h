// C[m,n] = sum over k of A[m,k] B[n,k], in float32, for blocks that fit the caches.
//
//   rows    A is given by a pointer to each row, contiguous in k: gathered rows are read where they lie
//   B       a strided matrix.  Contiguous in k: read where it lies, each vector of k multiplied lane by lane, the lanes summed
//           at the end (nt_tile).  Otherwise: blocks are packed, and elements of A broadcast (nn_tile).
//
// An element of C is summed in an order that depends on K and on the layout of B alone, not on m, n or the tile it falls in.
#pragma once
#include <algorithm>
#include <type_traits>

#include "vector.h"

#if defined(MOE_AVX512)
constexpr int NT_M = 4, NT_N = 6, NN_M = 6, NN_V = 4, FEW = 2;
#else
constexpr int NT_M = 2, NT_N = 4, NN_M = 4, NN_V = 2, FEW = 1;
#endif
constexpr int FEW_N = 8;                           // instead of NT_N for up to FEW rows of A: what counts is to read B at its pace
constexpr int64_t PAGE = 4096;                     // bytes
constexpr int PANEL = NN_V * L;                    // columns of a packed panel
constexpr int64_t BLOCK_K = 512, BLOCK_N = 256;    // of a packed block of B
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

// N rows of B where they lie, or, once a tile has read them, in a panel[k / STEP][N][STEP]: rows whose distance is a power of
// two fall into the same few places of L1, and push each other out.
template <class E, int N>
struct Columns {
  const E* p;
  int64_t stride;
  int64_t every;                          // columns of C from one to the next
  const E* next;                          // the same for the rows to fetch meanwhile, or null
  typename Arithmetic<E>::Packed* panel;  // room for the panel, or null
};

enum class From { MEMORY, MEMORY_TO_PANEL, PANEL };

template <class E, int M, int N, From from>
static __attribute__((noinline)) void nt_tile(const typename Arithmetic<E>::Row* const* rows, int64_t k0, const Columns<E, N>& b,
                                              int64_t K, float* c, int64_t ldc, bool accumulate) {
  using A = Arithmetic<E>;
  const typename A::Row* a[M];
  V sum[M * N]{};
  for (int i = 0; i < M; i++) a[i] = rows[i] + k0;
  auto* panel = b.panel;
  auto step = [&](int64_t k, auto row, auto column) __attribute__((always_inline)) {
    typename A::Operand x[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) x[i] = row(a[i] + k);
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      typename A::Operand y;
      if constexpr (from == From::PANEL) y = A::packed(panel + j * A::STEP);
      else y = column(b.p + j * b.stride + k);
      if constexpr (from == From::MEMORY_TO_PANEL) std::memcpy(panel + j * A::STEP, &y, sizeof y);
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) A::add(sum[i * N + j], x[i], y);
    }
    if constexpr (from != From::MEMORY) panel += N * A::STEP;
  };
  auto whole = [](const auto* p) __attribute__((always_inline)) { return A::row(p); };
  auto whole_column = [](const E* p) __attribute__((always_inline)) { return A::column(p); };
  int64_t k = 0;
  if (from != From::PANEL && b.next) {
    for (; k + A::STEP <= K; k += A::STEP) {
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) prefetch(b.next + j * b.stride + k);
      step(k, whole, whole_column);
    }
  } else {
    for (; k + A::STEP <= K; k += A::STEP) step(k, whole, whole_column);
  }
  if (k < K)
    step(k, [&](const auto* p) __attribute__((always_inline)) { return A::row(p, K - k); },
         [&](const E* p) __attribute__((always_inline)) { return A::column(p, K - k); });
  // The sums of the lanes, L tiles elements at a time, through a small array: rows of c start anywhere.
  float t[(M * N + L - 1) / L * L];
  constexpr int full = M * N / L * L, rest = M * N - full;
#pragma GCC unroll 8
  for (int i = 0; i < full; i += L) store(t + i, sum_lanes<L>(sum + i));
  if constexpr (rest > 0) {
    constexpr int width = rest > 8 ? 16 : rest > 4 ? 8 : rest > 2 ? 4 : rest;
    V last[width]{};
#pragma GCC unroll 16
    for (int i = 0; i < rest; i++) last[i] = sum[full + i];
    store(t + full, sum_lanes<width>(last));
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      float& to = c[i * ldc + j * b.every];
      to = accumulate ? to + t[i * N + j] : t[i * N + j];
    }
}

template <class E, int N>
static void nt_rows(const typename Arithmetic<E>::Row* const* rows, int64_t m, int64_t k0, Columns<E, N> b, int64_t K, float* c,
                    int64_t ldc, bool accumulate) {
  int64_t i = 0;
  auto tiles = [&](auto height) __attribute__((always_inline)) {
    constexpr int M = decltype(height)::value;
    for (; i + M <= m; i += M, b.next = nullptr) {
      if (!b.panel) nt_tile<E, M, N, From::MEMORY>(rows + i, k0, b, K, c + i * ldc, ldc, accumulate);
      else if (i) nt_tile<E, M, N, From::PANEL>(rows + i, k0, b, K, c + i * ldc, ldc, accumulate);
      else nt_tile<E, M, N, From::MEMORY_TO_PANEL>(rows + i, k0, b, K, c + i * ldc, ldc, accumulate);
    }
  };
  if constexpr (N <= NT_N) tiles(std::integral_constant<int, NT_M>());
  if constexpr (N <= NT_N || FEW >= 2) tiles(std::integral_constant<int, 2>());
  tiles(std::integral_constant<int, 1>());
}

// Elements of k that nt_tile runs over: its rows of A and B then fill no more than L1.
template <class E>
constexpr int64_t nt_block() {
  return std::is_same<E, float>::value ? 768 : 4096 / (int64_t)sizeof(typename Arithmetic<E>::Row);
}

// float32 rows of B go through a panel, which doubled the rate at 64 rows; of 16-bit rows twice as many lie in L1, and it gained nothing.
template <class E, int N>
static void multiply_nt(const typename Arithmetic<E>::Row* const* rows, int64_t m, Matrix<E> b, int64_t n, int64_t K, float* c,
                        int64_t ldc, bool accumulate, char* scratch, const E* after) {
  constexpr int64_t block = nt_block<E>();
  // A CPU foresees one run of reads in a page: of shorter rows a tile takes every so many, each from a page of its own.
  const int64_t apart = (PAGE - 1) / std::max<int64_t>(b.n * (int64_t)sizeof(E), 1) + 1;
  auto* panel = std::is_same<E, float>::value && m > NT_M ? (typename Arithmetic<E>::Packed*)scratch : nullptr;
  for (int64_t k = 0; k < K; k += block, accumulate = true) {
    const int64_t kb = std::min(block, K - k);
    int64_t j = 0;
    const E* p = b.p + k;
    const E* then = k + kb < K ? b.p + k + kb : after;
    for (const int64_t every : {apart, int64_t(1)})
      for (; j + every * N <= n; j += every * N, p += every * N * b.n)
        for (int64_t i = 0; i < every; i++) {
          const E* next = i + 1 < every ? p + (i + 1) * b.n : j + (every + 1) * N <= n ? p + every * N * b.n : then;
          nt_rows<E, N>(rows, m, k, {p + i * b.n, every * b.n, every, next, panel}, kb, c + j + i, ldc, accumulate);
        }
    for (; j + 2 <= n; j += 2, p += 2 * b.n) nt_rows<E, 2>(rows, m, k, {p, b.n, 1, nullptr, nullptr}, kb, c + j, ldc, accumulate);
    if (j < n) nt_rows<E, 1>(rows, m, k, {p, b.n, 1, nullptr, nullptr}, kb, c + j, ldc, accumulate);
  }
}

// ---- B packed: panel[k / PAIR][PANEL][PAIR] of the columns n of a block, zeros beyond its edges

// What to fetch into the caches meanwhile: `lines` cache lines in each of a number of rows, one row for each k.
struct Ahead {
  const char* p = nullptr;
  int64_t stride = 0, rows = 0;
  int lines = 0;
};

template <class E, int M>
static __attribute__((noinline)) void nn_tile(const typename Arithmetic<E>::Row* const* rows, int64_t k0,
                                              const typename Arithmetic<E>::Packed* panel, int64_t K, float* c, int64_t ldc,
                                              bool accumulate, const Ahead& ahead) {
  using A = Arithmetic<E>;
  const typename A::Row* a[M];
  V sum[M][NN_V];
  for (int i = 0; i < M; i++) {
    a[i] = rows[i] + k0;
    for (int j = 0; j < NN_V; j++) sum[i][j] = accumulate ? load(c + i * ldc + j * L) : V{};
  }
  int64_t k = 0;
  auto step = [&]() __attribute__((always_inline)) {
    typename A::Operand y[NN_V];
#pragma GCC unroll 8
    for (int j = 0; j < NN_V; j++) y[j] = A::packed(panel + j * L * A::PAIR);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      auto x = A::broadcast(a[i] + k);
#pragma GCC unroll 8
      for (int j = 0; j < NN_V; j++) A::add(sum[i][j], x, y[j]);
    }
    k += A::PAIR, panel += PANEL * A::PAIR;
  };
  const int64_t whole = K / A::PAIR * A::PAIR, both = std::min(whole, ahead.rows / A::PAIR * A::PAIR);
  if (ahead.lines == 1) {
    for (const char* p = ahead.p; k < both; p += A::PAIR * ahead.stride) {
      for (int q = 0; q < A::PAIR; q++) prefetch(p + q * ahead.stride);
      step();
    }
  } else if (ahead.lines) {
    for (const char* p = ahead.p; k < both; p += A::PAIR * ahead.stride) {
      for (int q = 0; q < A::PAIR; q++)
        for (int l = 0; l < ahead.lines; l++) prefetch(p + q * ahead.stride + 64 * l);
      step();
    }
  }
  while (k < whole) step();
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
                    const typename Arithmetic<E>::Packed* panel, int64_t K, float* c, int64_t ldc, bool accumulate, Ahead ahead) {
  for (; m >= M; m -= M, rows += M, c += M * ldc, ahead.lines = 0) nn_tile<E, M>(rows, k0, panel, K, c, ldc, accumulate, ahead);
  if constexpr (M > 1)
    if (m) nn_rows<E, M - 1>(rows, m, k0, panel, K, c, ldc, accumulate, ahead);
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

// Rows row(0) .. row(K - 1) of B, n columns each.
template <class E, class F>
static void pack_rows(F row, int64_t n, int64_t K, typename Arithmetic<E>::Packed* to) {
  constexpr int P = Arithmetic<E>::PAIR;
  constexpr int64_t DISTANCE = 16, LINE = 64 / sizeof(E);
  const int64_t panels = (n + PANEL - 1) / PANEL, size = (K + P - 1) / P * P * PANEL;
  for (int64_t k = 0; k < K; k += P) {
    const E *low = row(k), *high = k + 1 < K ? row(k + 1) : nullptr;
    for (int64_t q = k + DISTANCE; q < std::min(K, k + DISTANCE + P); q++)
      for (int64_t j = 0; j < n; j += LINE) prefetch(row(q) + j);
    for (int64_t j = 0; j < panels; j++)
      for (int64_t l = 0; l < PANEL; l += L) {
        const int64_t at = j * PANEL + l;
        pack_columns<E>(low + at, high ? high + at : nullptr, std::max<int64_t>(n - at, 0), to + j * size + k * PANEL + l * P);
      }
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

// While a block is multiplied, the next one is fetched into L2.
template <class E>
static void multiply_nn(const typename Arithmetic<E>::Row* const* rows, int64_t m, Matrix<E> b, int64_t n, int64_t K, float* c,
                        int64_t ldc, bool accumulate, char* scratch) {
  auto* block = (typename Arithmetic<E>::Packed*)scratch;
  constexpr int P = Arithmetic<E>::PAIR;
  constexpr int64_t LINE = 64 / sizeof(E);
  for (int64_t j = 0; j < n; j += BLOCK_N) {
    bool add = accumulate;
    for (int64_t k = 0; k < K; k += BLOCK_K, add = true) {
      const int64_t kb = std::min(BLOCK_K, K - k), nb = std::min(BLOCK_N, n - j), size = (kb + P - 1) / P * P * PANEL;
      if (b.n == 1) pack_rows<E>([&](int64_t q) { return b.p + j + (k + q) * b.k; }, nb, kb, block);
      else pack_any<E>(b.at(j), k, nb, kb, block);
      const int64_t panels = (nb + PANEL - 1) / PANEL, lines = (nb + LINE - 1) / LINE, each = (lines + panels - 1) / panels;
      for (int64_t p = 0; p < panels; p++) {
        Ahead ahead;
        if (b.n == 1 && k + kb < K) {
          ahead.p = (const char*)(b.p + j + (k + kb) * b.k + p * each * LINE);
          ahead.stride = b.k * sizeof(E);
          ahead.rows = std::min(BLOCK_K, K - k - kb);
          ahead.lines = std::max<int64_t>(0, std::min(each, lines - p * each));
        }
        nn_rows<E, NN_M>(rows, m, k, block + p * size, kb, c + j + p * PANEL, ldc, add, ahead);
      }
    }
  }
}

// ---- the two together

// What one thread needs for the packed blocks, in bytes.
template <class E>
constexpr int64_t gemm_scratch() {
  return BLOCK_K * BLOCK_N * (int64_t)sizeof(typename Arithmetic<E>::Packed);
}
// Columns of C that are written: callers give rows of c of at least this length.
constexpr int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

// C[m, 0..n) = A[m, 0..K) . B[0..K, 0..n) for n up to BLOCK_N, B given by its rows: row(k) is contiguous in n.
// finished(i, count) is called once for each group of rows i .. i + count of C, as soon as they are complete.
template <class E, class R, class F>
static void multiply_rows(const typename Arithmetic<E>::Row* const* rows, int64_t m, R row, int64_t n, int64_t K, float* c,
                          int64_t ldc, char* scratch, F finished) {
  auto* block = (typename Arithmetic<E>::Packed*)scratch;
  constexpr int P = Arithmetic<E>::PAIR;
  for (int64_t k = 0; k < K; k += BLOCK_K) {
    const int64_t kb = std::min(BLOCK_K, K - k), size = (kb + P - 1) / P * P * PANEL;
    pack_rows<E>([&](int64_t q) { return row(k + q); }, n, kb, block);
    for (int64_t i = 0; i < m; i += NN_M) {
      const int64_t count = std::min<int64_t>(NN_M, m - i);
      for (int64_t p = 0; p * PANEL < n; p++)
        nn_rows<E, NN_M>(rows + i, count, k, block + p * size, kb, c + i * ldc + p * PANEL, ldc, k > 0, Ahead());
      if (k + kb == K) finished(i, count);
    }
  }
}

// C[m, 0..n) (+)= A[m, 0..K) . B[0..n, 0..K).  `after`: where the B of the same strides begins that will be wanted next, or null.
template <class E>
static void multiply(const typename Arithmetic<E>::Row* const* rows, int64_t m, Matrix<E> b, int64_t n, int64_t K, float* c,
                     int64_t ldc, bool accumulate, char* scratch, const E* after = nullptr) {
  if (b.k == 1 && m <= FEW) multiply_nt<E, FEW_N>(rows, m, b, n, K, c, ldc, accumulate, scratch, after);
  else if (b.k == 1) multiply_nt<E, NT_N>(rows, m, b, n, K, c, ldc, accumulate, scratch, after);
  else multiply_nn<E>(rows, m, b, n, K, c, ldc, accumulate, scratch);
}
