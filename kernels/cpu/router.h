// From scores to expert ids and weights: bias, groups, top-k, weights and their steps, one token after the other.
//
// Ids are those of aten's topk on CPU, ties and NaN included: the same std:: algorithms on the same pairs.  Values are rounded
// to their dtype after each step, as PyTorch's ops do.
//
// A softmax may be left to this code.  Its last bits are not aten's, so ids are taken of the logits, and only where those are in
// the order that aten's scores are in: UNSURE otherwise, and the caller brings the scores.
#pragma once
#include <omp.h>

#include <algorithm>
#include <vector>

#include "call.h"
#include "math.h"

enum Step : int64_t { SOFTMAX = 0, SIGMOID = 1, CAST = 2, SCALE = 3, NORMALISE = 4 };

static float read(const char* p, int64_t dtype, int64_t i) {
  if (dtype == FLOAT32) return ((const float*)p)[i];
  return dtype == BFLOAT16 ? to_float(((const bf16*)p)[i]) : to_float(((const fp16*)p)[i]);
}
static float rounded(float x, int64_t dtype) {
  if (dtype == FLOAT32) return x;
  return dtype == BFLOAT16 ? to_float(from_float<bf16>(x)) : to_float(from_float<fp16>(x));
}
static void write(char* p, int64_t dtype, int64_t i, float x) {
  if (dtype == FLOAT32) ((float*)p)[i] = x;
  else if (dtype == BFLOAT16) ((bf16*)p)[i] = from_float<bf16>(x);
  else ((fp16*)p)[i] = from_float<fp16>(x);
}

using Candidate = std::pair<float, int64_t>;

// The k largest of queue to its front; NaN is larger than any number.
static void top_k(std::vector<Candidate>& queue, int64_t k, int64_t sorted) {
  const auto larger = [](const Candidate& a, const Candidate& b) {
    return (a.first != a.first && b.first == b.first) || a.first > b.first;
  };
  if (sorted == 2) {
    std::swap(queue[0], *std::min_element(queue.begin(), queue.end(), larger));
  } else if (k * 64 <= (int64_t)queue.size()) {
    std::partial_sort(queue.begin(), queue.begin() + k, queue.end(), larger);
  } else {
    std::nth_element(queue.begin(), queue.begin() + k - 1, queue.end(), larger);
    if (sorted) std::sort(queue.begin(), queue.begin() + k - 1, larger);
  }
}

// Softmax is exp(x - max) / sum.  The subtraction is off by up to 2^-18 for differences up to RANGE, aten's exp by 20 units in the
// last place: logits further apart than GAP have scores in the same order.  Equal logits have equal scores.
constexpr float GAP = 1.0f / (1 << 14), RANGE = 80;

struct TokenRouter {
  const RouterCall& call;
  std::vector<Candidate> queue, groups;
  std::vector<float> choice, weight, score, order;

  explicit TokenRouter(const RouterCall& c) : call(c), choice(c.E), weight(c.K), score(c.E), order(c.E) {}

  // Whether all logits are finite; then score[] is their softmax.
  bool softmax(int64_t t) {
    const int64_t E = call.E;
    float most = -INFINITY, total = 0;
    for (int64_t e = 0; e < E; e++) {
      score[e] = read(call.logits, call.logits_dtype, t * E + e);
      if (!std::isfinite(score[e])) return false;
      most = std::max(most, score[e]);
    }
    for (int64_t e = 0; e < E; e += L) store(&score[e], v_exp(load(&score[e], E - e) - most), E - e);
    for (int64_t e = 0; e < E; e++) total += score[e];
    for (int64_t e = 0; e < E; e++) score[e] /= total;
    return true;
  }
  // Whether top-k of the logits in choice[] is top-k of aten's scores.
  bool sure() {
    const int64_t E = call.E, K = call.K;
    std::copy(choice.begin(), choice.end(), order.begin());
    std::sort(order.begin(), order.end(), std::greater<float>());
    const auto far = [&](int64_t i) { return order[i] - order[i + 1] > GAP; };
    int64_t i = 0;
    while (i < K && i + 1 < E && far(i)) i++;
    if (call.sorted && (i == K || i + 1 == E) && order[0] - order[K - 1] < RANGE) return true;  // the best are apart: no algorithm errs
    for (i = 0; i + 1 < E; i++)
      if (order[i] != order[i + 1] && !far(i)) return false;
    return order[0] - order[E - 1] < RANGE;
  }

  void limit_groups() {
    const int64_t size = call.E / call.groups;
    groups.resize(call.groups);
    for (int64_t g = 0; g < call.groups; g++) {
      const float* c = choice.data() + g * size;
      float best;
      if (call.group_top2) {
        queue.resize(size);
        for (int64_t i = 0; i < size; i++) queue[i] = {c[i], i};
        top_k(queue, 2, true);
        best = rounded(queue[0].first + queue[1].first, call.choice_dtype);
      } else {
        best = c[0];
        for (int64_t i = 1; i < size; i++)
          if (c[i] > best || c[i] != c[i]) best = c[i];
          else if (best != best) break;
      }
      groups[g] = {best, g};
    }
    top_k(groups, call.group_k, false);
    std::vector<bool> keep(call.groups);
    for (int64_t i = 0; i < call.group_k; i++) keep[groups[i].second] = true;
    for (int64_t e = 0; e < call.E; e++)
      if (!keep[e / size]) choice[e] = rounded((float)call.fill, call.choice_dtype);
  }

  void run_steps(int64_t dtype) {
    for (int64_t s = 0; s < call.count; s++) {
      const int64_t* step = call.steps + 3 * s;
      const double a = bits<double>(step[1]), b = bits<double>(step[2]);
      if (step[0] == CAST) {
        dtype = step[1];
        for (float& w : weight) w = rounded(w, dtype);
      } else if (step[0] == SCALE) {
        for (float& w : weight) w = rounded(w * (float)a, dtype);
      } else if (step[0] == SIGMOID) {
        for (float& w : weight) w = rounded(1.0f / (1.0f + std::exp(-w)), dtype);
      } else if (step[0] == SOFTMAX) {
        float most = weight[0], total = 0;
        for (float w : weight) most = w > most || w != w ? w : most;
        for (float& w : weight) total += w = std::exp(w - most);
        for (float& w : weight) w = rounded(w / total, dtype);
      } else {
        float total = 0;
        for (float w : weight) total += w;
        total = rounded(total, dtype);
        if (a != 0) total = rounded(total + (float)a, dtype);
        if (b != 0 && total < (float)b) total = rounded((float)b, dtype);
        for (float& w : weight) w = rounded(w / total, dtype);
      }
    }
  }

  Status run(int64_t t) {
    const int64_t E = call.E, K = call.K;
    const bool own = call.softmax && softmax(t);
    if (!call.scores && !own) return UNSURE;
    const char* from = call.scores ? call.scores : call.logits;
    const int64_t dtype = call.scores ? call.score_dtype : call.logits_dtype;
    for (int64_t e = 0; e < E; e++) {
      choice[e] = read(from, dtype, t * E + e);
      if (call.bias) choice[e] = rounded(choice[e] + read(call.bias, call.bias_dtype, e), call.choice_dtype);
    }
    if (!call.scores && !sure()) return UNSURE;
    if (call.groups) limit_groups();
    queue.resize(E);
    for (int64_t e = 0; e < E; e++) queue[e] = {choice[e], e};
    top_k(queue, K, call.sorted);
    for (int64_t k = 0; k < K; k++) {
      const int64_t e = call.ids[t * K + k] = queue[k].second;
      weight[k] = own && call.weights_from < 2 ? score[e]
                  : call.weights_from == 0   ? read(call.scores, call.score_dtype, t * E + e)
                  : call.weights_from == 1 ? choice[e]
                                           : read(call.logits, call.logits_dtype, t * E + e);
    }
    run_steps(call.weights_from == 0 ? call.score_dtype : call.weights_from == 1 ? call.choice_dtype : call.logits_dtype);
    for (int64_t k = 0; k < K; k++) write(call.weights, call.weights_dtype, t * K + k, weight[k]);
    return DONE;
  }
};

static Status route(const RouterCall& call) {
  std::atomic<Status> status{DONE};
#pragma omp parallel num_threads(call.threads) if (call.T * call.E > 8192)
  {
    TokenRouter router(call);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < call.T; t++)
      if (Status s = router.run(t)) status = s;
  }
  return status;
}
