// Products of float rows with panels of sixteen columns: what gradients are made of.
//
// A gradient contracts another axis of a weight than the product does, so the weight's own rows are
// the columns here. They are copied to a panel first, which stays in the L1 cache while all rows
// pass by; int8 values are widened and scaled on the way.

#ifndef MIXTRAL_JAX_KERNELS_CPU_FLOAT_PANELS_H_
#define MIXTRAL_JAX_KERNELS_CPU_FLOAT_PANELS_H_

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "vectors.h"
#include "worker_pool.h"

namespace mixtral_jax {

constexpr int64_t kFloatPanelColumns = 16;
constexpr int64_t kFloatPanelDepth = 256;
constexpr int64_t kFloatPanelRows = 96;  // Rows of one task: they stay in the L2 cache.

// A matrix whose element [r, k] is values[r * row + k * step].
struct StridedRows {
  const float* values;
  int64_t row, step;
};

// A matrix [depth, columns] of floats, or of int8 with a scale for each of its rows.
template <typename Value>
struct PanelSource {
  const Value* values;
  const float* scale;  // Of each row, or null.
  int64_t columns;

  // panel[k][c] = the element [first + k, column + c]; columns behind the last are zero.
  void Copy(int64_t first, int64_t depth, int64_t column, float* panel) const {
    const int64_t width = std::min(kFloatPanelColumns, columns - column);
    for (int64_t k = 0; k < depth; ++k) {
      const Value* from = values + (first + k) * columns + column;
      const float factor = scale == nullptr ? 1.0f : scale[first + k];
      float* to = panel + k * kFloatPanelColumns;
      for (int64_t c = 0; c < width; ++c) to[c] = static_cast<float>(from[c]) * factor;
      for (int64_t c = width; c < kFloatPanelColumns; ++c) to[c] = 0;
    }
  }
};

// Adds the products of kRows rows with a panel to totals [kRows][16].
template <int kRows>
void AddFloatPanel(const StridedRows& x, int64_t r, int64_t first, const float* panel,
                   int64_t depth, float* totals) {
  Floats sums[kRows][2];
  Unroll<kRows>(INLINE_LAMBDA(i) {
    Unroll<2>(INLINE_LAMBDA(j) {
      sums[i][j] = Load(totals + i * kFloatPanelColumns + j * kLanes);
    });
  });
  const float* from = x.values + r * x.row + first * x.step;
  for (int64_t k = 0; k < depth; ++k, from += x.step) {
    const Floats left = Load(panel + k * kFloatPanelColumns);
    const Floats right = Load(panel + k * kFloatPanelColumns + kLanes);
    Unroll<kRows>(INLINE_LAMBDA(i) {
      const Floats value = Broadcast(from[i * x.row]);
      sums[i][0] = MulAdd(value, left, sums[i][0]);
      sums[i][1] = MulAdd(value, right, sums[i][1]);
    });
  }
  Unroll<kRows>(INLINE_LAMBDA(i) {
    Unroll<2>(INLINE_LAMBDA(j) {
      Store(totals + i * kFloatPanelColumns + j * kLanes, sums[i][j]);
    });
  });
}

// y[r, c] = sum over k of x[r, k] * w[k, c], for the rows [from, to) and the columns [first, last).
template <typename Value>
void PanelProduct(const StridedRows& x, int64_t from, int64_t to, int64_t depth,
                  const PanelSource<Value>& w, int64_t first, int64_t last, float* y) {
  alignas(64) thread_local float panel[kFloatPanelColumns * kFloatPanelDepth];
  alignas(64) float totals[kFloatPanelRows * kFloatPanelColumns];
  for (int64_t c = first; c < last; c += kFloatPanelColumns) {
    std::fill(totals, totals + (to - from) * kFloatPanelColumns, 0.0f);
    for (int64_t k = 0; k < depth; k += kFloatPanelDepth) {
      const int64_t count = std::min(kFloatPanelDepth, depth - k);
      w.Copy(k, count, c, panel);
      int64_t r = from;
      const auto add_rows = [&](auto rows) {
        for (; r + rows <= to; r += rows)
          AddFloatPanel<rows>(x, r, k, panel, count, totals + (r - from) * kFloatPanelColumns);
      };
      add_rows(std::integral_constant<int, 6>{});  // Sums of six rows fill the registers.
      add_rows(std::integral_constant<int, 2>{});
      add_rows(std::integral_constant<int, 1>{});
    }
    const int64_t width = std::min(kFloatPanelColumns, last - c);
    for (int64_t r = from; r < to; ++r)
      std::copy_n(totals + (r - from) * kFloatPanelColumns, width, y + r * w.columns + c);
  }
}

// One product of a batch: y [rows, w.columns] = x [rows, depth] @ w [depth, w.columns].
template <typename Value>
struct PanelJob {
  StridedRows x;
  PanelSource<Value> w;
  int64_t rows, depth;
  float* y;
};

template <typename Value>
void PanelProducts(int64_t num_threads, const std::vector<PanelJob<Value>>& jobs) {
  constexpr int64_t kColumns = 8 * kFloatPanelColumns;  // Of one task.
  struct Task {
    const PanelJob<Value>* job;
    int64_t from, first;
  };
  std::vector<Task> tasks;
  for (const PanelJob<Value>& job : jobs)
    for (int64_t r = 0; r < job.rows; r += kFloatPanelRows)
      for (int64_t c = 0; c < job.w.columns; c += kColumns) tasks.push_back({&job, r, c});
  ParallelFor(num_threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    const PanelJob<Value>& job = *task.job;
    PanelProduct(job.x, task.from, std::min(job.rows, task.from + kFloatPanelRows), job.depth,
                 job.w, task.first, std::min(job.w.columns, task.first + kColumns), job.y);
  });
}

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_FLOAT_PANELS_H_
