// What a call of a kernel is given, and the sorting of its pairs.  Every member is 64 bits wide: the caller fills an
// array of integers in this order.
#pragma once
#include <atomic>
#include <cstdlib>

#include "vector.h"

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum WeightOn : int64_t { NOWHERE = 0, OUTPUT = 1, INPUT = 2 };
enum Status : int { DONE = 0, BAD_ID = 1, NO_MEMORY = 2, UNSURE = 3 };

// One parameter view [E, N, K], or [E, N] with k = 0.  Expert e starts `start` elements into table[e] or e * e_ elements
// further into base.  base and table 0: absent.
struct View {
  char* base;
  char* const* table;
  int64_t e, n, k, start, dtype;

  explicit operator bool() const { return base || table; }
  template <class E>
  E* expert(int64_t i) const {
    return (table ? (E*)table[i] : (E*)base + i * e) + start;
  }
  float element(int64_t i, int64_t at) const {
    if (dtype == FLOAT32) return expert<float>(i)[at * n];
    return dtype == BFLOAT16 ? to_float(expert<bf16>(i)[at * n]) : to_float(expert<fp16>(i)[at * n]);
  }
  void set_element(int64_t i, int64_t at, float x) const {
    if (dtype == FLOAT32) expert<float>(i)[at * n] = x;
    else if (dtype == BFLOAT16) expert<bf16>(i)[at * n] = from_float<bf16>(x);
    else expert<fp16>(i)[at * n] = from_float<fp16>(x);
  }
};

// Letters as in the spec.  merged: the projections are the columns n % P of one matrix whose n is contiguous.
template <int P>
struct Call {
  int64_t T, K, H, F, O, E, threads, weight_on, index_ids, merged;
  const char* x;         // [T,H] of the spec's dtype
  int64_t x_stride;
  const char* ids;       // [T,K] int64, or int32
  int64_t ids_wide;
  const char* weights;   // [T,K] or null
  int64_t weights_dtype;
  char* out;             // forward: [T,O] of out_dtype
  int64_t out_dtype;
  char* saved;           // [R, P * F] or null: projections in the order of the sorted pairs
  View projection[P], projection_bias[P], down, down_bias;
  // backward only; outputs are null where not needed
  const char* grad;      // [T,O] of the spec's dtype
  char* dx;              // [T,H] of the spec's dtype
  float* dweights;       // [T,K]
  View d_projection[P], d_projection_bias[P], d_down, d_down_bias;

  float weight(int64_t pair) const {
    if (weights_dtype == FLOAT32) return ((const float*)weights)[pair];
    return weights_dtype == BFLOAT16 ? to_float(((const bf16*)weights)[pair]) : to_float(((const fp16*)weights)[pair]);
  }
  int64_t id(int64_t pair) const {
    const int64_t i = ids_wide ? ((const int64_t*)ids)[pair] : ((const int32_t*)ids)[pair];
    return i < 0 && index_ids ? i + E : i;
  }
};

// A router's call: see router.h.
struct RouterCall {
  int64_t T, E, K, threads, sorted;       // sorted 2: the first of the largest, as argmax has it
  const char *scores, *bias, *logits;     // [T,E] contiguous or null, [E] or null, [T,E] contiguous (for softmax, weights from logits)
  int64_t softmax;                        // scores are the softmax of logits in float32, with neither bias nor groups
  int64_t score_dtype, bias_dtype, logits_dtype, choice_dtype;
  int64_t groups, group_k, group_top2;    // groups 0: no limit
  double fill;
  int64_t weights_from;                   // 0 score, 1 choice, 2 logits
  const int64_t* steps;                   // triples: Step, and two doubles or a dtype
  int64_t count;
  char* weights;                          // [T,K]
  int64_t weights_dtype;
  int64_t* ids;                           // [T,K]
};

// A router and its experts: what lies between them, [T,K] each, is in memory of this call.
template <int P>
struct RoutedCall {
  int (*route)(const RouterCall*);        // entry of the router's library
  RouterCall router;                      // weights and ids null
  Call<P> experts;                        // weights and ids null
};

// Memory of one call, in pieces aligned to cache lines.  One block between KEEP and MOST bytes outlives its call and serves the next:
// given back to the system, it would be paged in again.
class Arena {
 public:
  static constexpr int64_t KEEP = 1 << 20, MOST = 1 << 28;

  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() {
    if (block && block->size >= KEEP && block->size <= MOST) block = kept().exchange(block);
    std::free(block);
  }
  // First pass: sizes only.  allocate(), then the same requests again give addresses.
  template <class T>
  T* take(int64_t count) {
    char* at = block ? (char*)block + used : nullptr;
    used += (count * (int64_t)sizeof(T) + 127) / 64 * 64;
    return (T*)at;
  }
  bool allocate() {
    const int64_t size = used + 64;
    if (size >= KEEP) block = kept().exchange(nullptr);
    if (block && block->size < size) {
      std::free(block);
      block = nullptr;
    }
    if (!block) {
      block = (Block*)std::aligned_alloc(64, size);
      if (!block) return false;
      block->size = size;
    }
#if defined(MOE_POISON)
    std::memset((char*)block + 64, 0xff, size - 64);  // NaN in every dtype: tests see what was read before it was written
#endif
    used = 64;
    return true;
  }

 private:
  struct Block {
    int64_t size;  // of all of it: what is handed out begins at 64 bytes
  };
  static std::atomic<Block*>& kept() {
    static std::atomic<Block*> block{nullptr};
    return block;
  }
  Block* block = nullptr;
  int64_t used = 64;
};

// Pairs in the order of their experts; within an expert in token order.
struct Sorted {
  int64_t* offset;  // [E + 1]: pairs of expert e are at offset[e] .. offset[e + 1]
  int64_t* pair;    // [R]: t * K + k
  int64_t* hit;     // the experts with pairs, ascending
  int64_t hits;

  void take(Arena& arena, int64_t E, int64_t R) {
    offset = arena.take<int64_t>(E + 2);
    pair = arena.take<int64_t>(R);
    hit = arena.take<int64_t>(E);
  }
  template <int P>
  Status sort(const Call<P>& call) {
    const int64_t R = call.T * call.K, E = call.E;
    std::memset(offset, 0, (E + 2) * sizeof(int64_t));
    for (int64_t r = 0; r < R; r++) {
      const int64_t e = call.id(r);
      if (e >= 0 && e < E) offset[e + 2]++;
      else if (call.index_ids) return BAD_ID;
    }
    for (int64_t e = 0; e < E; e++) offset[e + 2] += offset[e + 1];
    for (int64_t r = 0; r < R; r++) {
      const int64_t e = call.id(r);
      if (e >= 0 && e < E) pair[offset[e + 1]++] = r;
    }
    hits = 0;
    for (int64_t e = 0; e < E; e++)
      if (offset[e + 1] > offset[e]) hit[hits++] = e;
    return DONE;
  }
};
