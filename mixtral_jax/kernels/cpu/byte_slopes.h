// Products of many rows of slopes with int8 weights, the other way: what a gradient passes on.
//
// Each row of slopes, with the weights' scales multiplied in, is rounded to integers of 15 bits:
// 1 / 16256 of its largest magnitude is a step. Their upper and lower bytes are two rows of
// byte_panels.h, whose exact sums are put together again. That takes half as long as products
// of floats, and its error is a hundredth of bfloat16's for the largest slopes of a row.

#ifndef MIXTRAL_JAX_KERNELS_CPU_BYTE_SLOPES_H_
#define MIXTRAL_JAX_KERNELS_CPU_BYTE_SLOPES_H_

#include "byte_panels.h"

#if defined(MIXTRAL_JAX_BYTE_DOTS)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "dot_products.h"
#include "vectors.h"
#include "worker_pool.h"

namespace mixtral_jax {

constexpr int64_t kSlopeSteps = 127 * 128;  // Of the largest magnitude of a row.
constexpr int64_t kSlopeRows = 252;         // Of one task; a multiple of six.

// panel[k / 4][c][k % 4] = w[k, c], offset, for `columns` columns, at most kPanelOuts, of a weight
// whose rows are `stride` values apart, and `depth` rows. Others, up to a whole panel and to a
// multiple of 4, stand for zero.
inline void InterleavePanel(const int8_t* w, int64_t stride, int64_t columns, int64_t depth,
                            int8_t* panel) {
  typedef int8_t Sixteen __attribute__((vector_size(16), aligned(1), may_alias));
  const auto low = [](Sixteen a, Sixteen b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  };
  const auto high = [](Sixteen a, Sixteen b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31);
  };
  // A multiple of 16 columns at a time; kPanelOuts is 8 where vectors have 16 bytes.
  int8_t wide[64];
  for (int64_t k = 0; k < depth; k += 4) {
    for (int64_t c = 0; c < kPanelOuts; c += 16) {
      const int64_t count = std::clamp<int64_t>(columns - c, 0, 16);
      Sixteen rows[4] = {};
      Unroll<4>(INLINE_LAMBDA(i) {
        const int8_t* from = w + (k + i) * stride + c;
        if (k + i >= depth || count == 0) return;
        if (count == 16) {
          rows[i] = *reinterpret_cast<const Sixteen*>(from);
        } else {
          std::memcpy(&rows[i], from, static_cast<size_t>(count));
        }
      });
      // Bytes of two rows, then of the rows 0 and 2, and 1 and 3: a column's four stand together.
      const Sixteen even[2] = {low(rows[0], rows[2]), high(rows[0], rows[2])};
      const Sixteen odd[2] = {low(rows[1], rows[3]), high(rows[1], rows[3])};
      Unroll<2>(INLINE_LAMBDA(half) {
        const Sixteen first = low(even[half], odd[half]), second = high(even[half], odd[half]);
        const int8_t offset = kByteOffset == 0 ? 0 : -128;
        *reinterpret_cast<Sixteen*>(wide + half * 32) = first ^ offset;
        *reinterpret_cast<Sixteen*>(wide + half * 32 + 16) = second ^ offset;
      });
      std::memcpy(panel + k * kPanelOuts + c * 4, wide,
                  static_cast<size_t>(std::min<int64_t>(kPanelOuts - c, 16)) * 4);
    }
  }
}

// Slopes [rows, n] times the scales of their columns, as two rows of bytes each: the upper one,
// then the lower one.
struct SlopeRows {
  int64_t stride;
  int8_t* bytes;
  std::vector<uint32_t> sums;  // Of the bytes of each of the two rows.
  std::vector<float> steps;    // The value of a step of each row of slopes.

  SlopeRows(int64_t num_threads, const float* slopes, const float* scale, int64_t rows, int64_t n)
      : stride(((n + 63) / 64 | 1) * 64),
        bytes(ThreadScratch<int8_t>(2 * rows * stride)),
        sums(static_cast<size_t>(2 * rows)),
        steps(static_cast<size_t>(rows)) {
    ParallelFor(num_threads, rows, [&](int64_t r) {
      Round(slopes + r * n, scale, n, bytes + 2 * r * stride, static_cast<size_t>(r));
    });
  }

  void Round(const float* slopes, const float* scale, int64_t n, int8_t* upper, size_t r) {
    int8_t* lower = upper + stride;
    float largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float magnitude = std::fabs(slopes[i] * scale[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    const float inverse = largest > 0 ? static_cast<float>(kSlopeSteps) / largest : 0.0f;
    int32_t upper_sum = 0, lower_sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t value =
          static_cast<int32_t>(__builtin_rintf((slopes[i] * scale[i]) * inverse));
      const int32_t high = (value + 64) >> 7, low = value - high * 128;
      upper[i] = static_cast<int8_t>(high);
      lower[i] = static_cast<int8_t>(low);
      upper_sum += high;
      lower_sum += low;
    }
    std::fill(upper + n, upper + stride, int8_t{0});
    std::fill(lower + n, lower + stride, int8_t{0});
    sums[2 * r] = static_cast<uint32_t>(upper_sum);
    sums[2 * r + 1] = static_cast<uint32_t>(lower_sum);
    steps[r] = largest / static_cast<float>(kSlopeSteps);
  }
};

// Products of kRows rows of slopes from r with a panel of the weight's rows [k, k + depth).
template <int kRows>
[[gnu::noinline]] void ProductOfSlopePanel(const SlopeRows& x, int64_t r, int64_t k,
                                           const int8_t* panel, int64_t depth, bool is_last,
                                           int32_t* totals, int64_t count, float* y,
                                           int64_t columns) {
  DotSums sums[2 * kRows][2];
  LoadTotals(k == 0, totals, sums);
  AddPanel<2 * kRows>(x.bytes + 2 * r * x.stride + k, x.stride, panel, depth, PanelAhead{}, sums);
  if (!is_last) return StoreTotals(sums, totals);
  const auto total = [&](size_t row, DotSums sum) __attribute__((always_inline)) {
    const int32_t offset = static_cast<int32_t>(static_cast<uint32_t>(kByteOffset) * x.sums[row]);
    return __builtin_convertvector(sum - offset, DotFloats);
  };
  Unroll<kRows>(INLINE_LAMBDA(i) {
    const size_t row = static_cast<size_t>(r + i);
    DotFloats values[2];
    Unroll<2>(INLINE_LAMBDA(j) {
      const DotFloats upper = total(2 * row, sums[2 * i][j]);
      const DotFloats lower = total(2 * row + 1, sums[2 * i + 1][j]);
      // The upper sum times 128 is exact: a fused product has the same bits.
      values[j] = (upper * 128.0f + lower) * x.steps[row];
    });
    StoreOutputs(values, count, y + i * columns);
  });
}

// y [rows, columns] = x [rows, n] @ w [n, columns].
inline void ProductOfSlopes(int64_t num_threads, const SlopeRows& x, int64_t rows, int64_t n,
                            const int8_t* w, int64_t columns, float* y) {
  const int64_t panels = (columns + kPanelOuts - 1) / kPanelOuts;
  const int64_t blocks = (rows + kSlopeRows - 1) / kSlopeRows;
  ParallelFor(num_threads, panels * blocks, [&](int64_t task) {
    alignas(64) thread_local int8_t panel[kPanelOuts * kPanelDepth];
    alignas(64) thread_local int32_t totals[2 * kSlopeRows * kPanelOuts];
    const int64_t c = task / blocks * kPanelOuts, from = task % blocks * kSlopeRows;
    const int64_t to = std::min(rows, from + kSlopeRows);
    const int64_t count = std::min(kPanelOuts, columns - c);
    for (int64_t k = 0; k < n; k += kPanelDepth) {
      const int64_t depth = std::min(kPanelDepth, n - k);
      InterleavePanel(w + k * columns + c, columns, count, depth, panel);
      int64_t r = from;
      const auto add_rows = [&](auto some) {
        for (; r + some <= to; r += some) {
          ProductOfSlopePanel<some>(x, r, k, panel, depth, k + depth == n,
                                    totals + 2 * (r - from) * kPanelOuts, count,
                                    y + r * columns + c, columns);
        }
      };
      add_rows(std::integral_constant<int, kPanelRows / 2>{});
      if constexpr (kPanelRows > 6) add_rows(std::integral_constant<int, 2>{});
      add_rows(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace mixtral_jax

#endif  // defined(MIXTRAL_JAX_BYTE_DOTS)
#endif  // MIXTRAL_JAX_KERNELS_CPU_BYTE_SLOPES_H_
