// The experts of one layer, forward.
//
//   1  act = activation(x W_i^T + b_i)     a task is an expert and a chunk of F columns; rows of x are read where they lie
//   2  out = sum of weight * (act D^T + d) a task is a chunk of O columns over all experts, in their order, summed in float32
//
// Nothing of size [R,O] exists, and every sum has one order: results do not depend on threads or timing.
#pragma once
#include <omp.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "call.h"
#include "gemm.h"

constexpr int64_t NT_COLUMNS = 16 * NT_N;  // of one task, B contiguous in k
constexpr int64_t GRAIN = 32;              // every chunk of columns is a multiple of this, but the last

// Columns of a task: enough for long runs in memory, few enough that all threads have work.
static int64_t chunk(int64_t columns, int64_t others, int64_t threads, bool contiguous_k) {
  int64_t size = contiguous_k ? NT_COLUMNS / GRAIN * GRAIN : BLOCK_N;
  while (size > 2 * GRAIN && (columns + size - 1) / size * others < 12 * threads) size = (size / 2 + GRAIN - 1) / GRAIN * GRAIN;
  return size;
}

// Rows of A for one block: pointers to where they lie, or to float32 copies.
template <class E>
struct Rows {
  using Row = typename Arithmetic<E>::Row;
  static constexpr bool COPY = !std::is_same<Row, E>::value;
  const Row* p[ROWS];
  Row* copies;

  template <class F>
  void set(int64_t m, int64_t K, F row) {
    for (int64_t i = 0; i < m; i++) {
      const E* from = row(i);
      if constexpr (COPY) {
        Row* to = copies + i * K;
        for (int64_t k = 0; k < K; k += L) store(to + k, load(from + k, K - k), K - k);
        p[i] = to;
      } else {
        p[i] = from;
      }
    }
  }
};

// What one thread works in.
template <class E, int P>
struct Workspace {
  Rows<E> rows;
  char* gemm;
  float* c[P];      // [ROWS][ld]
  float* bias[P];
  float* sum;       // [T][ld] of a task of phase 2
  static constexpr int64_t LD = BLOCK_N * P;

  void take(Arena& arena, int64_t K, int64_t sum_size) {
    gemm = arena.take<char>(gemm_scratch<E>());
    rows.copies = arena.take<typename Rows<E>::Row>(Rows<E>::COPY ? ROWS * K : 0);
    float* all = arena.take<float>(ROWS * LD + P * LD);
    for (int i = 0; i < P; i++) c[i] = all + i * ROWS * BLOCK_N, bias[i] = all + ROWS * LD + i * LD;
    sum = arena.take<float>(sum_size);
  }
};

template <class E>
static Matrix<E> matrix(const View& v, int64_t e) {
  return {v.expert<const E>(e), v.n, v.k};
}
template <class E>
static Matrix<E> transposed(const View& v, int64_t e) {
  return {v.expert<const E>(e), v.k, v.n};
}
// All projections as one matrix of P * F columns.
template <class E, int P>
static Matrix<E> merged(const View* v, int64_t e) {
  return {v[0].expert<const E>(e), 1, v[0].k};
}

MOE_INLINE void unzip(const float* p, int64_t n, V& a, V& b) {  // n pairs
  V low = load(p, 2 * n), high = load(p + L, std::max<int64_t>(2 * n - L, 0));
  a = shuffle(low, high, EvenSource());
  b = shuffle(low, high, OddSource());
}
template <class E>
MOE_INLINE void unzip(const E* p, int64_t n, V& a, V& b) {
  V low = load(p, 2 * n), high = load(p + L, std::max<int64_t>(2 * n - L, 0));
  a = shuffle(low, high, EvenSource());
  b = shuffle(low, high, OddSource());
}
template <class E>
MOE_INLINE void zip(E* p, int64_t n, V a, V b) {
  store(p, shuffle(a, b, LowZip()), 2 * n);
  if (2 * n > L) store(p + L, shuffle(a, b, HighZip()), 2 * n - L);
}

// x scaled by the routing weight, for weight_on = input: [R,H] in the order of the sorted pairs.
template <class E, int P>
static void scale_rows(const Call<P>& call, const Sorted& sorted, E* to) {
  const int64_t rows = sorted.offset[call.E], H = call.H;
#pragma omp for schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const E* from = (const E*)call.x + sorted.pair[r] / call.K * call.x_stride;
    const float w = call.weight(sorted.pair[r]);
    for (int64_t h = 0; h < H; h += L) store(to + r * H + h, load(from + h, H - h) * w, H - h);
  }
}

// c[m][n] of the projections to act and saved.
template <class E, int P, class Activation>
static void activate(const Call<P>& call, Workspace<E, P>& w, int64_t r0, int64_t m, int64_t f0, int64_t n, int64_t ld, E* act) {
  const int64_t F = call.F;
  for (int64_t r = 0; r < m; r++) {
    E* to = act + (r0 + r) * F + f0;
    E* saved = call.saved ? (E*)call.saved + (r0 + r) * P * F : nullptr;
    for (int64_t f = 0; f < n; f += L) {
      V h[P];
      if (P == 2 && call.merged) unzip(w.c[0] + r * ld + 2 * f, L, h[0], h[P - 1]);
      else
        for (int i = 0; i < P; i++) h[i] = load(w.c[i] + r * ld + f);
      for (int i = 0; i < P; i++)
        if (call.projection_bias[i]) h[i] += load(w.bias[i] + f);
      if (saved) {
        if (P == 2 && call.merged) zip(saved + 2 * (f0 + f), std::min<int64_t>(n - f, L), h[0], h[P - 1]);
        else
          for (int i = 0; i < P; i++) store(saved + i * F + f0 + f, h[i], n - f);
      }
      store(to + f, Activation::value(h), n - f);
    }
  }
}

// [T][n] float32 sums to rows of E.
template <class E>
static void convert(const float* sum, int64_t ld, int64_t T, int64_t n, E* to, int64_t stride) {
  for (int64_t t = 0; t < T; t++)
    for (int64_t j = 0; j < n; j += L) store(to + t * stride + j, load(sum + t * ld + j), n - j);
}

template <class E, int P, class Activation>
static int experts_forward(const Call<P>& call) {
  const int64_t T = call.T, K = call.K, H = call.H, F = call.F, O = call.O, R = T * K;
  if (T == 0) return DONE;
  const bool nt1 = call.projection[0].k == 1 && !call.merged, nt2 = call.down.k == 1;
  const int64_t oc = chunk(O, 1, call.threads, nt2);
  Arena arena;
  Sorted sorted;
  E *act, *scaled;
  std::vector<Workspace<E, P>> work(call.threads);
  for (int pass = 0; pass < 2; pass++) {
    sorted.take(arena, call.E, R);
    act = arena.take<E>(R * F);
    scaled = arena.take<E>(call.weight_on == INPUT ? R * H : 0);
    for (int64_t i = 0; i < call.threads; i++) work[i].take(arena, std::max(H, F), T * padded(oc));
    if (pass == 0 && !arena.allocate()) return NO_MEMORY;
  }
  if (Status status = sorted.sort(call)) return status;
  const int64_t fc = chunk(F, std::max<int64_t>(sorted.hits, 1), call.threads, nt1), chunks = (F + fc - 1) / fc;
  // Where the weights of a task begin.  A thread's next task is most likely the one as many further on as there are threads.
  auto begin = [&](int64_t task) -> const E* {
    if (task >= sorted.hits * chunks) return nullptr;
    return matrix<E>(call.projection[0], sorted.hit[task / chunks]).at(task % chunks * fc).p;
  };
  auto begin_down = [&](int64_t o0) -> const E* {
    return o0 < O ? matrix<E>(call.down, sorted.hit[0]).at(o0).p : nullptr;
  };
#pragma omp parallel num_threads(call.threads)
  {
    Workspace<E, P>& w = work[omp_get_thread_num()];
    if (call.weight_on == INPUT) scale_rows<E, P>(call, sorted, scaled);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < sorted.hits * chunks; task++) {
      const int64_t e = sorted.hit[task / chunks], f0 = task % chunks * fc, n = std::min(fc, F - f0);
      const int64_t ld = padded(call.merged ? n * P : n);
      for (int i = 0; i < P; i++)
        if (call.projection_bias[i])
          for (int64_t f = 0; f < n; f++) w.bias[i][f] = call.projection_bias[i].element(e, f0 + f);
      for (int64_t r0 = sorted.offset[e]; r0 < sorted.offset[e + 1]; r0 += ROWS) {
        const int64_t m = std::min(ROWS, sorted.offset[e + 1] - r0);
        const bool last = r0 + m == sorted.offset[e + 1];
        w.rows.set(m, H, [&](int64_t i) {
          return call.weight_on == INPUT ? scaled + (r0 + i) * H : (const E*)call.x + sorted.pair[r0 + i] / K * call.x_stride;
        });
        if (call.merged) {
          multiply<E>(w.rows.p, m, merged<E, P>(call.projection, e).at(f0 * P), n * P, H, w.c[0], ld, false, w.gemm);
        } else {
          for (int i = 0; i < P; i++) {
            const E* after = !last ? nullptr : i + 1 < P ? matrix<E>(call.projection[i + 1], e).at(f0).p : begin(task + call.threads);
            multiply<E>(w.rows.p, m, matrix<E>(call.projection[i], e).at(f0), n, H, w.c[i], ld, false, w.gemm, after);
          }
        }
        activate<E, P, Activation>(call, w, r0, m, f0, n, ld, act);
      }
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t o0 = 0; o0 < O; o0 += oc) {
      const int64_t n = std::min(oc, O - o0), ld = padded(n);
      std::memset(w.sum, 0, T * ld * sizeof(float));
      for (int64_t h = 0; h < sorted.hits; h++) {
        const int64_t e = sorted.hit[h];
        if (call.down_bias)
          for (int64_t o = 0; o < n; o++) w.bias[0][o] = call.down_bias.element(e, o0 + o);
        for (int64_t r0 = sorted.offset[e]; r0 < sorted.offset[e + 1]; r0 += ROWS) {
          const int64_t m = std::min(ROWS, sorted.offset[e + 1] - r0);
          w.rows.set(m, F, [&](int64_t i) { return act + (r0 + i) * F; });
          const E* after = r0 + m < sorted.offset[e + 1] ? nullptr
                           : h + 1 < sorted.hits         ? matrix<E>(call.down, sorted.hit[h + 1]).at(o0).p
                                                         : begin_down(o0 + call.threads * oc);
          multiply<E>(w.rows.p, m, matrix<E>(call.down, e).at(o0), n, F, w.c[0], ld, false, w.gemm, after);
          for (int64_t i = 0; i < m; i++) {
            const int64_t pair = sorted.pair[r0 + i];
            const float scale = call.weight_on == OUTPUT ? call.weight(pair) : 1.0f;
            float *sum = w.sum + pair / K * ld, *c = w.c[0] + i * ld;
            for (int64_t o = 0; o < n; o += L) {
              V y = load(c + o);
              if (call.down_bias) y += load(w.bias[0] + o);
              store(sum + o, load(sum + o) + y * scale);
            }
          }
        }
      }
      if (call.out_dtype == FLOAT32) convert(w.sum, ld, T, n, (float*)call.out + o0, O);
      else if (call.out_dtype == BFLOAT16) convert(w.sum, ld, T, n, (bf16*)call.out + o0, O);
      else convert(w.sum, ld, T, n, (fp16*)call.out + o0, O);
    }
  }
  return DONE;
}

// The router first.  RoutedCall is changed.
template <class E, int P, class Activation>
static int experts_routed(RoutedCall<P>& call) {
  const int64_t R = call.router.T * call.router.K;
  std::vector<int64_t> ids(R);
  std::vector<float> weights(R);  // of a dtype that is no wider
  call.router.ids = ids.data();
  call.router.weights = (char*)weights.data();
  if (int status = call.route(&call.router)) return status;
  call.experts.ids = (const char*)ids.data();
  call.experts.ids_wide = true;
  call.experts.weights = call.router.weights;
  call.experts.weights_dtype = call.router.weights_dtype;
  return experts_forward<E, P, Activation>(call.experts);
}
