// The experts of one layer, backward.  s = activation(z) and its derivatives are computed again from the saved projections z.
//
//   1  dz = (weight * grad D) * s'(z)      a task is an expert and a chunk of F columns
//      dweight = <grad D, s> + <grad, d>   partial sums by grain of F, added in order at the end
//   2  dx = sum over pairs of dz W         a task is a chunk of H columns over all experts, in their order
//   3  dW = dz^T x, dD = (weight * s)^T .. a task is a matrix of an expert and a chunk of its rows; experts without pairs get zeros
//
// Every element of every gradient that a view covers is written once; sums are float32, in one order.
#pragma once
#include "forward.h"

// n values of c to E, past the caches where they are large and aligned.
template <class E>
MOE_INLINE void stream_row(E* to, const float* c, int64_t n) {
  int64_t j = 0;
#if defined(MOE_AVX512)
  if ((uintptr_t)to % 64 == 0) {
    if constexpr (sizeof(E) == 4) {
      for (; j + L <= n; j += L) _mm512_stream_ps((float*)to + j, (__m512)load(c + j));
    } else {
      for (; j + 2 * L <= n; j += 2 * L) {
        VH low = narrow(load(c + j), E()), high = narrow(load(c + j + L), E());
        _mm512_stream_si512((__m512i*)(to + j), _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1));
      }
    }
  }
#endif
  for (; j < n; j += L) store(to + j, load(c + j), n - j);
}
MOE_INLINE void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// One gradient matrix G[n,k] = sum over pairs r of left[r][n] right[r][k]; rows of both by pointer, for n in n0..n0+n.
template <class E>
static void weight_gradient(E* const* left, const E* const* right, int64_t pairs, int64_t n0, int64_t n, int64_t k, E* g,
                            int64_t stride_n, int64_t stride_k, typename Arithmetic<E>::Row* turned, float* c, char* gemm) {
  using Row = typename Arithmetic<E>::Row;
  const Row* rows[ROWS];
  const int64_t length = (pairs + 1) / 2 * 2;
  for (int64_t i = 0; i < n; i++) rows[i] = turned + i * length;
  for (int64_t r = 0; r < pairs; r++)
    for (int64_t i = 0; i < n; i++) {
      if constexpr (std::is_same<Row, E>::value) turned[i * length + r] = left[r][n0 + i];
      else turned[i * length + r] = to_float(left[r][n0 + i]);
    }
  for (int64_t j = 0; j < k; j += BLOCK_N) {
    const int64_t nb = std::min(BLOCK_N, k - j);
    auto finished = [&](int64_t i, int64_t count) {
      for (; count > 0; i++, count--) {
        E* to = g + (n0 + i) * stride_n + j * stride_k;
        const float* from = c + i * BLOCK_N;
        if (stride_k == 1) stream_row(to, from, nb);
        else
          for (int64_t q = 0; q < nb; q++) to[q * stride_k] = from_float<E>(from[q]);
      }
    };
    if (pairs) {
      multiply_rows<E>(rows, n, [&](int64_t r) { return right[r] + j; }, nb, pairs, c, BLOCK_N, gemm, finished);
    } else {
      std::memset(c, 0, BLOCK_N * sizeof(float));
      for (int64_t i = 0; i < n; i++) {
        E* to = g + (n0 + i) * stride_n + j * stride_k;
        if (stride_k == 1) stream_row(to, c, nb);
        else
          for (int64_t q = 0; q < nb; q++) to[q * stride_k] = E{};
      }
    }
  }
}

template <class E, int P>
struct BackwardWorkspace : Workspace<E, P> {
  typename Arithmetic<E>::Row* turned;  // [ROWS][pairs of an expert]
  const E **left, **right;              // [pairs of an expert]
  float* bias_sum[P];
  void take(Arena& arena, int64_t K, int64_t sum_size, int64_t pairs) {
    Workspace<E, P>::take(arena, K, sum_size);
    turned = arena.take<typename Arithmetic<E>::Row>(ROWS * (pairs + 1));
    left = arena.take<const E*>(pairs);
    right = arena.take<const E*>(pairs);
    for (int i = 0; i < P; i++) bias_sum[i] = arena.take<float>(BLOCK_N + L);
  }
};

template <class E, int P, class Activation>
struct Backward {
  const Call<P>& call;
  const int64_t T = call.T, K = call.K, H = call.H, F = call.F, O = call.O, R = T * K;
  const int64_t grains_f = (F + GRAIN - 1) / GRAIN, grains_h = (H + GRAIN - 1) / GRAIN;
  Sorted sorted;
  E *dz, *weighted, *scaled;  // [R, P * F], [R, F]: weight * s, [R, H]: weight * x for weight_on = input
  float* partial;             // [R][grains]: parts of dweights
  int64_t grains;

  const E* x_row(int64_t r) const {
    return call.weight_on == INPUT ? scaled + r * H : (const E*)call.x + sorted.pair[r] / K * call.x_stride;
  }
  const E* grad_row(int64_t r) const { return (const E*)call.grad + sorted.pair[r] / K * O; }
  bool merged_projections() const { return P == 2 && call.merged; }

  // Phase 1 for rows r0 .. r0 + m: c[0] holds grad D.
  void through_activation(BackwardWorkspace<E, P>& w, int64_t r0, int64_t m, int64_t f0, int64_t n, int64_t ld) const {
    for (int64_t r = 0; r < m; r++) {
      const E* saved = (const E*)call.saved + (r0 + r) * P * F;
      E *to = dz + (r0 + r) * P * F, *s_to = weighted + (r0 + r) * F + f0;
      const float* c = w.c[0] + r * ld;
      const float scale = call.weight_on == OUTPUT ? call.weight(sorted.pair[r0 + r]) : 1.0f;
      V dot{};
      for (int64_t f = 0; f < n; f += L) {
        const int64_t left = std::min<int64_t>(n - f, L);
        V h[P], d[P];
        if (merged_projections()) unzip(saved + 2 * (f0 + f), left, h[0], h[P - 1]);
        else
          for (int i = 0; i < P; i++) h[i] = load(saved + i * F + f0 + f, left);
        V s = Activation::backward(h, d), dy = load(c + f);
        if (left < L) {  // lanes past the edge hold anything
          VI lane;
          for (int l = 0; l < L; l++) lane[l] = l;
          VI inside = lane < (int32_t)left;
          V zero{};
          s = inside ? s : zero;
          dy = inside ? dy : zero;
          for (int i = 0; i < P; i++) d[i] = inside ? d[i] : zero;
        }
        dot += dy * s;
        for (int i = 0; i < P; i++) {
          d[i] *= dy * scale;
          store(w.bias_sum[i] + f, load(w.bias_sum[i] + f) + d[i]);
        }
        if (merged_projections()) zip(to + 2 * (f0 + f), left, d[0], d[P - 1]);
        else
          for (int i = 0; i < P; i++) store(to + i * F + f0 + f, d[i], left);
        store(s_to + f, s * scale, left);
        if (call.weight_on == OUTPUT && call.dweights && (f % GRAIN == GRAIN - L || f + L >= n)) {
          partial[(r0 + r) * grains + (f0 + f) / GRAIN] = sum(dot);
          dot = V{};
        }
      }
    }
  }

  void phase_activation(BackwardWorkspace<E, P>& w, int64_t e, int64_t f0, int64_t n) const {
    const int64_t ld = padded(n);
    for (int i = 0; i < P; i++) std::memset(w.bias_sum[i], 0, (BLOCK_N + L) * sizeof(float));
    for (int64_t r0 = sorted.offset[e]; r0 < sorted.offset[e + 1]; r0 += ROWS) {
      const int64_t m = std::min(ROWS, sorted.offset[e + 1] - r0);
      w.rows.set(m, O, [&](int64_t i) { return grad_row(r0 + i); });
      multiply<E>(w.rows.p, m, transposed<E>(call.down, e).at(f0), n, O, w.c[0], ld, false, w.gemm);
      through_activation(w, r0, m, f0, n, ld);
    }
    for (int i = 0; i < P; i++)
      if (call.d_projection_bias[i])
        for (int64_t f = 0; f < n; f++) call.d_projection_bias[i].set_element(e, f0 + f, w.bias_sum[i][f]);
  }

  void phase_input(BackwardWorkspace<E, P>& w, int64_t h0, int64_t n) const {
    const int64_t ld = padded(n);
    std::memset(w.sum, 0, T * ld * sizeof(float));
    for (int64_t hit = 0; hit < sorted.hits; hit++) {
      const int64_t e = sorted.hit[hit];
      for (int64_t r0 = sorted.offset[e]; r0 < sorted.offset[e + 1]; r0 += ROWS) {
        const int64_t m = std::min(ROWS, sorted.offset[e + 1] - r0);
        if (merged_projections()) {
          w.rows.set(m, P * F, [&](int64_t i) { return dz + (r0 + i) * P * F; });
          const Matrix<E> b = merged<E, P>(call.projection, e);
          multiply<E>(w.rows.p, m, Matrix<E>{b.p, b.k, b.n}.at(h0), n, P * F, w.c[0], ld, false, w.gemm);
        } else {
          for (int p = 0; p < P; p++) {
            w.rows.set(m, F, [&](int64_t i) { return dz + (r0 + i) * P * F + p * F; });
            multiply<E>(w.rows.p, m, transposed<E>(call.projection[p], e).at(h0), n, F, w.c[0], ld, p > 0, w.gemm);
          }
        }
        for (int64_t i = 0; i < m; i++) add_input_gradient(w, r0 + i, w.c[0] + i * ld, h0, n, ld);
      }
    }
    if (call.dx) convert(w.sum, ld, T, n, (E*)call.dx + h0, H);
  }

  void add_input_gradient(BackwardWorkspace<E, P>& w, int64_t r, const float* c, int64_t h0, int64_t n, int64_t ld) const {
    const int64_t t = sorted.pair[r] / K;
    const float scale = call.weight_on == INPUT ? call.weight(sorted.pair[r]) : 1.0f;
    float* sum_row = w.sum + t * ld;
    for (int64_t j = 0; j < n; j += L) store(sum_row + j, load(sum_row + j) + load(c + j) * scale);
    if (call.weight_on != INPUT || !call.dweights) return;
    const E* x = (const E*)call.x + t * call.x_stride + h0;
    for (int64_t j = 0; j < n; j += GRAIN) {
      float dot = 0;
      for (int64_t q = j; q < std::min(n, j + GRAIN); q++) dot += c[q] * to_float(x[q]);
      partial[r * grains + (h0 + j) / GRAIN] = dot;
    }
  }

  // Rows n0.. of the gradient of piece p: a projection, all projections merged (p = 0), or the down matrix (p = P).
  void phase_weight(BackwardWorkspace<E, P>& w, int64_t e, int p, int64_t task_row) const {
    const View& g = p == P ? call.d_down : call.d_projection[p];
    const int64_t first = sorted.offset[e], pairs = sorted.offset[e + 1] - first;
    const int64_t n = p == P ? O : merged_projections() ? P * F : F, k = p == P ? F : H;
    const int64_t stride_n = p < P && merged_projections() ? 1 : g.n;
    for (int64_t i = 0; i < pairs; i++) {
      const int64_t r = first + i;
      w.left[i] = p == P ? grad_row(r) : dz + r * P * F + (merged_projections() ? 0 : p * F);
      w.right[i] = p == P ? weighted + r * F : x_row(r);
    }
    const bool turn = stride_n == 1 && g.k != 1;  // the gradient is contiguous in n: make its transpose
    const int64_t rows = turn ? k : n, columns = turn ? n : k;
    weight_gradient<E>((E* const*)(turn ? w.right : w.left), turn ? w.left : w.right, pairs, task_row, std::min(ROWS, rows - task_row),
                       columns, g.expert<E>(e), turn ? g.k : stride_n, turn ? stride_n : g.k, w.turned, w.c[0], w.gemm);
  }
  int64_t weight_rows(int p) const {
    const View& g = p == P ? call.d_down : call.d_projection[p];
    if (!g || (p < P && p > 0 && merged_projections())) return 0;
    const int64_t stride_n = p < P && merged_projections() ? 1 : g.n;
    if (stride_n == 1 && g.k != 1) return p == P ? F : H;
    return p == P ? O : merged_projections() ? P * F : F;
  }

  void phase_down_bias(BackwardWorkspace<E, P>& w, int64_t e) const {
    for (int64_t o0 = 0; o0 < O; o0 += BLOCK_N) {
      const int64_t n = std::min(BLOCK_N, O - o0);
      std::memset(w.c[0], 0, BLOCK_N * sizeof(float));
      for (int64_t r = sorted.offset[e]; r < sorted.offset[e + 1]; r++) {
        const float scale = call.weight_on == OUTPUT ? call.weight(sorted.pair[r]) : 1.0f;
        const E* from = grad_row(r) + o0;
        for (int64_t o = 0; o < n; o += L) store(w.c[0] + o, load(w.c[0] + o) + load(from + o, n - o) * scale);
      }
      for (int64_t o = 0; o < n; o++) call.d_down_bias.set_element(e, o0 + o, w.c[0][o]);
    }
  }

  void sum_weight_gradients() const {
    for (int64_t r = 0; r < R; r++) call.dweights[r] = 0;
    for (int64_t e = 0; e < call.E; e++)
      for (int64_t r = sorted.offset[e]; r < sorted.offset[e + 1]; r++) {
        float total = 0;
        for (int64_t g = 0; g < grains; g++) total += partial[r * grains + g];
        if (call.weight_on == OUTPUT && call.down_bias)
          for (int64_t o = 0; o < O; o++) total += to_float(grad_row(r)[o]) * call.down_bias.element(e, o);
        call.dweights[sorted.pair[r]] = total;
      }
  }

  int run() {
    const bool want_dweights = call.dweights && call.weight_on != NOWHERE;
    grains = call.weight_on == INPUT ? grains_h : grains_f;
    const bool nt1 = call.merged || call.projection[0].n == 1, nt2 = call.down.n == 1;
    const int64_t hc = chunk(H, 1, call.threads, nt1);
    const bool want_input = call.dx || (want_dweights && call.weight_on == INPUT);
    std::vector<BackwardWorkspace<E, P>> work(call.threads);
    Arena arena, arena2;
    sorted.take(arena, call.E, R);
    if (!arena.allocate()) return NO_MEMORY;
    sorted.take(arena, call.E, R);
    if (Status status = sorted.sort(call)) return status;
    int64_t most = 0;
    for (int64_t e = 0; e < call.E; e++) most = std::max(most, sorted.offset[e + 1] - sorted.offset[e]);
    for (int pass = 0; pass < 2; pass++) {
      dz = arena2.take<E>(R * P * F);
      weighted = arena2.take<E>(R * F);
      scaled = arena2.take<E>(call.weight_on == INPUT ? R * H : 0);
      partial = arena2.take<float>(want_dweights ? R * grains : 0);
      for (auto& w : work) w.take(arena2, std::max({H, F * P, O}), want_input ? T * padded(hc) : 0, most);
      if (pass == 0 && !arena2.allocate()) return NO_MEMORY;
    }
    const int64_t fc = chunk(F, std::max<int64_t>(sorted.hits, 1), call.threads, nt2), chunks = (F + fc - 1) / fc;
    int64_t tasks[P + 2] = {0};  // of each weight matrix, summed
    for (int p = 0; p <= P; p++) tasks[p + 1] = tasks[p] + (weight_rows(p) + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(call.threads)
    {
      BackwardWorkspace<E, P>& w = work[omp_get_thread_num()];
      if (call.weight_on == INPUT) scale_rows<E, P>(call, sorted, scaled);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < sorted.hits * chunks; task++) {
        const int64_t f0 = task % chunks * fc;
        phase_activation(w, sorted.hit[task / chunks], f0, std::min(fc, F - f0));
      }
      if (want_input) {
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t h0 = 0; h0 < H; h0 += hc) phase_input(w, h0, std::min(hc, H - h0));
      }
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t task = 0; task < call.E * tasks[P + 1]; task++) {
        const int64_t e = task / tasks[P + 1], at = task % tasks[P + 1];
        int p = 0;
        while (at >= tasks[p + 1]) p++;
        phase_weight(w, e, p, (at - tasks[p]) * ROWS);
      }
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t e = 0; e < call.E; e++) {
        if (call.d_down_bias) phase_down_bias(w, e);
        if (sorted.offset[e] == sorted.offset[e + 1])
          for (int p = 0; p < P; p++)
            if (call.d_projection_bias[p])
              for (int64_t f = 0; f < F; f++) call.d_projection_bias[p].set_element(e, f, 0.0f);
      }
      stream_end();
    }
    if (call.dweights) {
      if (want_dweights) sum_weight_gradients();
      else std::memset(call.dweights, 0, R * sizeof(float));
    }
    return DONE;
  }
};

template <class E, int P, class Activation>
static int experts_backward(const Call<P>& call) {
  Backward<E, P, Activation> backward{call};
  return backward.run();
}
