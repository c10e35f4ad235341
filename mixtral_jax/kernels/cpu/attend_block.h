// Attention of some query heads over one block of keys.

#ifndef MIXTRAL_JAX_KERNELS_CPU_ATTEND_BLOCK_H_
#define MIXTRAL_JAX_KERNELS_CPU_ATTEND_BLOCK_H_

#include <algorithm>
#include <cstdint>

#include "key_block.h"
#include "wide_floats.h"

namespace mixtral_jax {

constexpr float kMaskedScore = -1e30f;  // The score of a key that a query does not see.
constexpr int kTileRows = 6;            // Query rows that are computed together.

// The unfinished attention of one query head (online softmax, arXiv:2205.14135).
struct alignas(64) PartialSum {
  float totals[wide::kSumLanes];  // sums of exp(score - max_score), of every sixteenth key each
  float* mixed;     // [H, filled up to whole vectors], sum of exp(score - max_score) * value
  float max_score;  // kMaskedScore if no key was seen
};

// One query head, and which keys of a block it sees.
struct QueryRow {
  const float* query;   // [H], scaled
  int64_t first, last;  // It sees the keys [first, last) of the block.
  PartialSum* sum;
};

// The vectors of sums of each of `rows` rows that stay in registers.
constexpr int TileVectors(int rows) { return rows * 4 <= wide::kSums ? 4 : 2; }

constexpr int64_t kStepsTogether = 4;  // of the prefetcher, in what follows

// sums[r] += the sum over i of a[r][i] * row(i)[0 ..], each number in the order of i.
template <int kRows, int kVectors, typename Row>
[[gnu::always_inline]] inline void MulAddRows(wide::Floats (&sums)[kRows][kVectors],
                                              const float* const (&a)[kRows], int64_t count,
                                              Prefetcher& next, const Row& row) {
  for (int64_t i = 0; i < count; ++i) {
    if (i % kStepsTogether == 0) next.Step(kStepsTogether);
    const float* b = row(i);
    wide::Floats lanes[kVectors];
    Unroll<kVectors>(INLINE_LAMBDA(j) { lanes[j] = wide::Load(b + j * wide::kLanes); });
    Unroll<kRows>(INLINE_LAMBDA(r) {
      const wide::Floats factor = wide::Broadcast(a[r][i]);
      Unroll<kVectors>(
          INLINE_LAMBDA(j) { sums[r][j] = wide::MulAdd(factor, lanes[j], sums[r][j]); });
    });
  }
}

// scores[r][i] = the dot product of query row r with key i, for kVectors vectors of keys from i on.
template <int kRows, int kVectors>
inline void ScoreKeys(const KeyBlock& block, const QueryRow* rows, float (*scores)[kKeyBlock],
                      int64_t i, Prefetcher& next) {
  wide::Floats sums[kRows][kVectors];
  const float* queries[kRows];
  Unroll<kRows>(INLINE_LAMBDA(r) {
    queries[r] = rows[r].query;
    Unroll<kVectors>(INLINE_LAMBDA(j) { sums[r][j] = wide::Floats{}; });
  });
  const float* keys = block.keys + i;
  MulAddRows(sums, queries, block.head_size, next, [=](int64_t h) { return keys + h * kKeyBlock; });
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<kVectors>(INLINE_LAMBDA(j) {
      const int64_t at = i + j * wide::kLanes;
      if (block.is_scaled) sums[r][j] *= wide::Load(block.key_scales + at);
      wide::Store(scores[r] + at, sums[r][j]);
    });
  });
}

// mixed = mixed * shrink + the sum over i of weights[i] * values[i], for kRows query rows and
// kVectors vectors of the values from element h on.
template <int kRows, int kVectors>
inline void AddValues(const KeyBlock& block, const QueryRow* rows,
                      const float (*weights)[kKeyBlock], const float* shrink, int64_t h,
                      Prefetcher& next) {
  wide::Floats sums[kRows][kVectors];
  const float* factors[kRows];
  Unroll<kRows>(INLINE_LAMBDA(r) {
    factors[r] = weights[r];
    Unroll<kVectors>(INLINE_LAMBDA(j) {
      sums[r][j] = wide::Load(rows[r].sum->mixed + h + j * wide::kLanes) * shrink[r];
    });
  });
  const float* const* values = block.values;
  MulAddRows(sums, factors, block.count, next, [=](int64_t i) { return values[i] + h; });
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<kVectors>(INLINE_LAMBDA(j) {
      wide::Store(rows[r].sum->mixed + h + j * wide::kLanes, sums[r][j]);
    });
  });
}

// Turns the scores of query rows into weights exp(score - max_score), updates the rows' maxima and
// totals, and sets the factors by which what was summed up before shrinks.
template <int kRows>
inline void ScoresToWeights(const KeyBlock& block, const QueryRow* rows,
                            float (*scores)[kKeyBlock], float* shrink) {
  constexpr int64_t kRoom = (kRows + wide::kLanes - 1) / wide::kLanes * wide::kLanes;
  float steps[kRoom] = {};
  const int64_t end = RoundUp(block.count, wide::kSumLanes);
  Unroll<kRows>(INLINE_LAMBDA(r) {
    const QueryRow& row = rows[r];
    if (row.first > 0) std::fill(scores[r], scores[r] + row.first, kMaskedScore);
    if (row.last < end) std::fill(scores[r] + row.last, scores[r] + end, kMaskedScore);
    wide::Floats highest = wide::Broadcast(row.sum->max_score);
    for (int64_t i = 0; i < end; i += wide::kLanes)
      highest = wide::Max(wide::Load(scores[r] + i), highest);
    const float max_score = wide::Highest(highest);
    steps[r] = row.sum->max_score - max_score;
    row.sum->max_score = max_score;
  });
  for (int64_t r = 0; r < kRoom; r += wide::kLanes)
    wide::Store(steps + r, wide::Exp(wide::Load(steps + r)));
  Unroll<kRows>(INLINE_LAMBDA(r) {
    constexpr int kParts = wide::kSumLanes / wide::kLanes;
    PartialSum& sum = *rows[r].sum;
    shrink[r] = steps[r];
    wide::Floats totals[kParts];
    Unroll<kParts>(INLINE_LAMBDA(j) {
      totals[j] = wide::Load(sum.totals + j * wide::kLanes) * shrink[r];
    });
    for (int64_t i = 0; i < end; i += wide::kSumLanes) {
      Unroll<kParts>(INLINE_LAMBDA(j) {
        float* score = scores[r] + i + j * wide::kLanes;
        const wide::Floats weight = wide::Exp(wide::Load(score) - sum.max_score);
        totals[j] += weight;
        const int64_t at = i + j * wide::kLanes;
        wide::Store(score, block.is_scaled ? weight * wide::Load(block.value_scales + at) : weight);
      });
    }
    Unroll<kParts>(INLINE_LAMBDA(j) { wide::Store(sum.totals + j * wide::kLanes, totals[j]); });
  });
}

// Adds a block of keys to the sums of kRows query rows. Keys that a row does not see get the weight
// 0.
template <int kRows>
[[gnu::noinline]] void AttendRows(const KeyBlock& block, const QueryRow* rows,
                                  Prefetcher& next) {
  constexpr int kVectors = TileVectors(kRows);
  constexpr int64_t kTile = kVectors * wide::kLanes;
  alignas(64) float scores[kRows][kKeyBlock];
  float shrink[kRows];
  const int64_t columns = RoundUp(block.count, wide::kSumLanes), size = block.PaddedSize();
  int64_t i = 0;
  for (; i + kTile <= columns; i += kTile) ScoreKeys<kRows, kVectors>(block, rows, scores, i, next);
  for (; i < columns; i += wide::kLanes) ScoreKeys<kRows, 1>(block, rows, scores, i, next);
  ScoresToWeights<kRows>(block, rows, scores, shrink);
  int64_t h = 0;
  for (; h + kTile <= size; h += kTile)
    AddValues<kRows, kVectors>(block, rows, scores, shrink, h, next);
  for (; h < size; h += wide::kLanes) AddValues<kRows, 1>(block, rows, scores, shrink, h, next);
}

// Adds a block of keys to the sums of n query rows that share its key/value head.
inline void AttendBlock(const KeyBlock& block, const QueryRow* rows, int64_t n,
                        Prefetcher& next) {
  for (; n >= kTileRows; n -= kTileRows, rows += kTileRows)
    AttendRows<kTileRows>(block, rows, next);
  switch (n) {
    case 5: return AttendRows<5>(block, rows, next);
    case 4: return AttendRows<4>(block, rows, next);
    case 3: return AttendRows<3>(block, rows, next);
    case 2: return AttendRows<2>(block, rows, next);
    case 1: return AttendRows<1>(block, rows, next);
  }
}

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_ATTEND_BLOCK_H_
