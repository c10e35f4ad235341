// Rows of activations that are rounded to int8.

#ifndef MIXTRAL_JAX_KERNELS_CPU_INT8_ROWS_H_
#define MIXTRAL_JAX_KERNELS_CPU_INT8_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "byte_dots.h"
#include "dot_products.h"
#include "worker_pool.h"

namespace mixtral_jax {

// Rows with one scale each: x = values * scale. AVX2 multiplies pairs of int16, so that the values
// are widened there.
struct Int8Rows {
#if defined(__AVX2__) && !defined(MIXTRAL_JAX_BYTE_DOTS)
  using Value = int16_t;
#else
  using Value = int8_t;
#endif
  // An odd number of cache lines: rows do not begin in the same set of the L1 cache, as they would
  // 4,096 bytes apart, and no load touches two lines. Behind the last value of a row are zeros.
  int64_t stride;
  Value* values;
  std::vector<float> scales;
  std::vector<int32_t> sums;  // Of each row's values.

  Int8Rows(int64_t num_threads, const float* x, int64_t rows, int64_t n)
      : stride(((n + 63) / 64 | 1) * 64),
        values(ThreadScratch<Value>(rows * stride)),
        scales(static_cast<size_t>(rows)),
        sums(static_cast<size_t>(rows)) {
    const int64_t block = 16384 / std::max<int64_t>(1, n) + 1;  // Rows that are worth a task.
    ParallelFor(num_threads, (rows + block - 1) / block, [&](int64_t task) {
      for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); ++r) {
        const size_t at = static_cast<size_t>(r);
        Value* to = values + r * stride;
        scales[at] = QuantizeRow(x + r * n, n, to, &sums[at]);
        std::fill(to + n, to + stride, Value{0});
      }
    });
  }

  const Value* Row(int64_t r) const { return values + r * stride; }
  // What is taken off a sum of products with offset weights.
  int32_t Offset(int64_t r) const { return kByteOffset * sums[static_cast<size_t>(r)]; }
  float Scale(int64_t r) const { return scales[static_cast<size_t>(r)]; }
};

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_INT8_ROWS_H_
