// Attention of a few query heads over one block of keys.

#ifndef MIXTRAL_JAX_KERNELS_CPU_ATTEND_BLOCK_H_
#define MIXTRAL_JAX_KERNELS_CPU_ATTEND_BLOCK_H_

#include <algorithm>
#include <cstdint>

#include "page_cache.h"
#include "vectors.h"

namespace mixtral_jax {

constexpr int64_t kKeyBlock = 64;       // Keys that are scored before their values are added up.
constexpr float kMaskedScore = -1e30f;  // The score of a key that a query does not see.

// The unfinished attention of one query head (online softmax, arXiv:2205.14135).
struct PartialSum {
  float max_score;
  float total;   // sum of exp(score - max_score)
  float* mixed;  // [H], sum of exp(score - max_score) * value
};

// One query head, and which keys of a block it sees.
struct QueryRow {
  const float* query;   // [H], scaled
  int64_t first, last;  // It sees the keys [first, last) of the block.
  PartialSum* sum;
};

// mixed = mixed * shrink + sum over i of weights[i] * values[i], for kRows query rows and kVectors
// vectors of the values from element h on. A value stands `offset` floats behind its key.
template <int kRows, int kVectors>
inline void AddValues(const float* const* keys, int64_t offset, int64_t count,
                      const float (*weights)[kKeyBlock], const float* shrink, const QueryRow* rows,
                      int64_t h) {
  Floats sums[kRows][kVectors];
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<kVectors>(INLINE_LAMBDA(j) {
      sums[r][j] = Load(rows[r].sum->mixed + h + j * kLanes) * shrink[r];
    });
  });
  for (int64_t i = 0; i < count; ++i) {
    const float* value = keys[i] + offset + h;
    Unroll<kVectors>(INLINE_LAMBDA(j) {
      const Floats lanes = Load(value + j * kLanes);
      Unroll<kRows>(INLINE_LAMBDA(r) {
        sums[r][j] = MulAdd(Broadcast(weights[r][i]), lanes, sums[r][j]);
      });
    });
  }
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<kVectors>(INLINE_LAMBDA(j) {
      Store(rows[r].sum->mixed + h + j * kLanes, sums[r][j]);
    });
  });
}

// scores[r][i] = the dot product of query row r with key i. The last multiple of four is filled up
// with the last key. Meanwhile `bytes` bytes at each address of `next`, if it is not null, are
// prefetched.
template <int kRows>
inline void ScoreKeys(const float* const* keys, const char* const* next, int64_t bytes,
                      int64_t count, int64_t size, const QueryRow* rows,
                      float (*scores)[kKeyBlock]) {
  for (int64_t i = 0; i < count; i += 4) {
    const float* four[4];
    for (int j = 0; j < 4; ++j) {
      four[j] = keys[std::min(i + j, count - 1)];
      if (next != nullptr) Prefetch(next[std::min(i + j, count - 1)], bytes);
    }
    Floats dots[kRows][4];
    Unroll<kRows>(INLINE_LAMBDA(r) { Unroll<4>(INLINE_LAMBDA(j) { dots[r][j] = Floats{}; }); });
    for (int64_t h = 0; h < size; h += kLanes) {
      Floats query[kRows];
      Unroll<kRows>(INLINE_LAMBDA(r) { query[r] = Load(rows[r].query + h); });
      Unroll<4>(INLINE_LAMBDA(j) {
        const Floats key = Load(four[j] + h);
        Unroll<kRows>(INLINE_LAMBDA(r) { dots[r][j] = MulAdd(query[r], key, dots[r][j]); });
      });
    }
    Unroll<kRows>(INLINE_LAMBDA(r) { SumsOfFour(dots[r], scores[r] + i); });
  }
}

// Turns the scores of one query row into weights exp(score - max_score), updates the row's maximum
// and total, and returns the factor by which what was summed up before shrinks.
inline float ScoresToWeights(float* score, int64_t count, const QueryRow& row) {
  PartialSum& sum = *row.sum;
  std::fill(score, score + row.first, kMaskedScore);
  std::fill(score + row.last, score + (count + kLanes - 1) / kLanes * kLanes, kMaskedScore);
  Floats highest = Broadcast(sum.max_score);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats lanes = Load(score + i);
    highest = lanes > highest ? lanes : highest;
  }
  float max_score = highest[0];
  for (int lane = 1; lane < kLanes; ++lane) max_score = std::max(max_score, highest[lane]);
  const float shrink = Exp(Broadcast(sum.max_score - max_score))[0];
  Floats total = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats weight = Exp(Load(score + i) - max_score);
    Store(score + i, weight);
    total += weight;
  }
  sum.total = sum.total * shrink + Sum(total);
  sum.max_score = max_score;
  return shrink;
}

// Adds a block of up to kKeyBlock keys to the sums of kRows query rows that share a key/value head.
// keys[i] is the key of token i, with its value behind it. Keys that a row does not see get the
// weight 0.
template <int kRows>
[[gnu::noinline]] void AttendBlock(const float* const* keys, const char* const* next, int64_t bytes,
                                   int64_t count, int64_t size, const QueryRow* rows) {
  alignas(32) float scores[kRows][kKeyBlock];
  float shrink[kRows];
  ScoreKeys<kRows>(keys, next, bytes, count, size, rows, scores);
  for (int r = 0; r < kRows; ++r) shrink[r] = ScoresToWeights(scores[r], count, rows[r]);
  int64_t h = 0;
  for (; h + 4 * kLanes <= size; h += 4 * kLanes)
    AddValues<kRows, 4>(keys, size, count, scores, shrink, rows, h);
  for (; h < size; h += kLanes) AddValues<kRows, 1>(keys, size, count, scores, shrink, rows, h);
}

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_ATTEND_BLOCK_H_
