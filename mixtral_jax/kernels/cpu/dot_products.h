// Dot products of a few rows with a few weights, and the rounding of rows to int8.

#ifndef MIXTRAL_JAX_KERNELS_CPU_DOT_PRODUCTS_H_
#define MIXTRAL_JAX_KERNELS_CPU_DOT_PRODUCTS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace mixtral_jax {

// How many values ahead of their use weights are prefetched, because the processor's own prefetcher
// stops at the end of a page. It makes products of eight rows a third faster.
constexpr int64_t kPrefetchDistance = 4608;

// out[r][o] = the dot product of row r of x with row o of w. Rows of x are `stride` values apart,
// rows of w are n values apart. Every accumulator walks over the n values on its own, so a result
// does not depend on kRows and kOuts.
template <int kRows, int kOuts>
inline void DotProducts(const float* x, int64_t stride, const float* w, int64_t n,
                        float (&out)[kRows][kOuts]) {
  Floats sums[kRows][kOuts];
  Unroll<kRows>(INLINE_LAMBDA(r) { Unroll<kOuts>(INLINE_LAMBDA(o) { sums[r][o] = Floats{}; }); });
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    Floats weights[kOuts];
    Unroll<kOuts>(INLINE_LAMBDA(o) {
      weights[o] = Load(w + o * n + k);
      __builtin_prefetch(w + o * n + k + kPrefetchDistance);
    });
    Unroll<kRows>(INLINE_LAMBDA(r) {
      const Floats value = Load(x + r * stride + k);
      Unroll<kOuts>(INLINE_LAMBDA(o) { sums[r][o] = MulAdd(value, weights[o], sums[r][o]); });
    });
  }
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<kOuts>(INLINE_LAMBDA(o) {
      out[r][o] = Sum(sums[r][o]);
      for (int64_t i = k; i < n; ++i) out[r][o] += x[r * stride + i] * w[o * n + i];
    });
  });
}

// The largest magnitude of n floats.
inline float MaxMagnitude(const float* row, int64_t n) {
  Floats largest = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats value = Load(row + i), magnitude = value < 0.0f ? -value : value;
    largest = magnitude > largest ? magnitude : largest;
  }
  float result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result = std::max(result, largest[lane]);
  for (; i < n; ++i) result = std::max(result, std::fabs(row[i]));
  return result;
}

// Rounds n floats to integers in -127 .. 127 and returns their scale: row = values * scale. Their
// sum goes to `sum`, if it is not null.
template <typename Value>
inline float QuantizeRow(const float* row, int64_t n, Value* values, int32_t* sum = nullptr) {
  typedef Value Narrow __attribute__((vector_size(kLanes * sizeof(Value)), aligned(1)));
  const float scale = MaxMagnitude(row, n) / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
  const float shift = 12582912.0f;  // Adding 1.5 * 2^23 rounds to an integer, in the lowest bits.
  const Ints base = (Ints)Broadcast(shift);
  Ints sums = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Ints whole = (Ints)(Load(row + i) * inverse + shift) - base;
    *reinterpret_cast<Narrow*>(values + i) = __builtin_convertvector(whole, Narrow);
    sums += whole;
  }
  int32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  for (; i < n; ++i) {
    const int32_t whole = static_cast<int32_t>(__builtin_rintf(row[i] * inverse));
    values[i] = static_cast<Value>(whole);
    total += whole;
  }
  if (sum != nullptr) *sum = total;
  return scale;
}

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_DOT_PRODUCTS_H_
