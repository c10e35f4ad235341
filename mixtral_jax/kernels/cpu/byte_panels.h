// Products of many int8 rows by dots of bytes.
//
// The weights are transposed first, in panels that stay in the L1 cache while all rows pass by: a
// vector of sums then belongs to as many outputs, and nothing is added up across a vector.

#ifndef MIXTRAL_JAX_KERNELS_CPU_BYTE_PANELS_H_
#define MIXTRAL_JAX_KERNELS_CPU_BYTE_PANELS_H_

#include "byte_dots.h"

#if defined(MIXTRAL_JAX_BYTE_DOTS)

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "int8_dots.h"
#include "int8_rows.h"
#include "vectors.h"
#include "worker_pool.h"

namespace mixtral_jax {

#if defined(MIXTRAL_JAX_BYTE_MATRICES)
constexpr int64_t kManyRows = INT64_MAX;  // Sums of a matrix need no transposed weights.
#else
constexpr int64_t kManyRows = 17;
#endif
constexpr int64_t kPanelOuts = 2 * kDotSums;           // In two vectors of sums.
constexpr int64_t kPanelDepth = 32768 / kPanelOuts;    // Values of each output: half an L1 cache.
#if defined(__AVX512VL__) || defined(__aarch64__)
constexpr int kPanelRows = 12;  // Their sums fill the registers.
#else
constexpr int kPanelRows = 6;
#endif

// Transposes kDotSums vectors of as many words: blocks of 1, 2, 4 ... words change places.
template <int kBlock, int... I>
[[gnu::always_inline]] inline void SwapBlocks(DotSums& a, DotSums& b,
                                              std::integer_sequence<int, I...>) {
  const DotSums left =
      __builtin_shufflevector(a, b, ((I & kBlock) == 0 ? I : kDotSums + I - kBlock)...);
  const DotSums right =
      __builtin_shufflevector(a, b, ((I & kBlock) == 0 ? I + kBlock : kDotSums + I)...);
  a = left, b = right;
}
template <int kBlock = 1>
[[gnu::always_inline]] inline void TransposeWords(DotSums (&rows)[kDotSums]) {
  if constexpr (kBlock < kDotSums) {
    Unroll<kDotSums>(INLINE_LAMBDA(i) {
      constexpr int kRow = decltype(i)::value;
      if constexpr ((kRow & kBlock) == 0)
        SwapBlocks<kBlock>(rows[kRow], rows[kRow + kBlock],
                           std::make_integer_sequence<int, kDotSums>{});
    });
    TransposeWords<2 * kBlock>(rows);
  }
}

// panel[k / 4][o][k % 4] = w[o, k], offset, for kPanelOuts outputs, whose weights are n values
// apart, and `depth` values of each. Outputs from `outs` on, and values from `depth` to the end of
// a vector, stand for zero.
inline void TransposePanel(const int8_t* w, int64_t n, int64_t outs, int64_t depth,
                           int8_t* panel) {
  for (int64_t k = 0; k < depth; k += kDotBytes) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t first = half * kDotSums;
      const int8_t* from = w + first * n + k;
      DotSums rows[kDotSums];
      if (first + kDotSums <= outs && k + kDotBytes <= depth) {
        Unroll<kDotSums>(INLINE_LAMBDA(i) { rows[i] = (DotSums)LoadWeights(from + i * n); });
      } else {
        for (int64_t i = 0; i < kDotSums; ++i) {
          const int64_t count = first + i < outs ? std::min<int64_t>(kDotBytes, depth - k) : 0;
          rows[i] = (DotSums)LoadWeights(count > 0 ? from + i * n : w, count);
        }
      }
      TransposeWords(rows);
      DotSums* to = reinterpret_cast<DotSums*>(panel + k * kPanelOuts + half * kDotBytes);
      Unroll<kDotSums>(INLINE_LAMBDA(i) { to[2 * i] = rows[i]; });
    }
  }
}

// Weights of the next panel, n values apart, that are prefetched beside the products of this one.
struct PanelAhead {
  const int8_t* w;
  int64_t n, rows;

  [[gnu::always_inline]] void Prefetch(int64_t k) const {
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(w + i * n + k, 0, 2);
  }
};

// sums += the products of kRows rows of bytes, `stride` apart, with a panel.
template <int kRows>
[[gnu::always_inline]] inline void AddPanel(const int8_t* x, int64_t stride, const int8_t* panel,
                                            int64_t depth, const PanelAhead& ahead,
                                            DotSums (&sums)[kRows][2]) {
  for (int64_t first = 0; first < depth; first += 64) {
    ahead.Prefetch(first);
    const int64_t last = std::min(depth, first + 64);
    for (int64_t k = first; k < last; k += 4) {
      DotBytes weights[2];
      Unroll<2>(INLINE_LAMBDA(j) { weights[j] = LoadRow(panel + k * kPanelOuts + j * kDotBytes); });
      Unroll<kRows>(INLINE_LAMBDA(r) {
        const DotBytes value = BroadcastFour(x + r * stride + k);
        Unroll<2>(INLINE_LAMBDA(j) { AddDots(weights[j], value, sums[r][j]); });
      });
    }
  }
}

inline DotSums LoadSums(const int32_t* p) { return *reinterpret_cast<const DotSums*>(p); }
inline void StoreSums(int32_t* p, DotSums v) { *reinterpret_cast<DotSums*>(p) = v; }

// Sums of rows and a panel between two parts of their depth.
template <int kRows>
[[gnu::always_inline]] inline void LoadTotals(bool is_first, const int32_t* totals,
                                              DotSums (&sums)[kRows][2]) {
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<2>(INLINE_LAMBDA(j) {
      sums[r][j] = is_first ? DotSums{} : LoadSums(totals + r * kPanelOuts + j * kDotSums);
    });
  });
}
template <int kRows>
[[gnu::always_inline]] inline void StoreTotals(const DotSums (&sums)[kRows][2], int32_t* totals) {
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<2>(INLINE_LAMBDA(j) { StoreSums(totals + r * kPanelOuts + j * kDotSums, sums[r][j]); });
  });
}

// Writes the first `count` of a panel's outputs.
[[gnu::always_inline]] inline void StoreOutputs(const DotFloats (&values)[2], int64_t count,
                                                float* y) {
  if (count == kPanelOuts) {
    Unroll<2>(INLINE_LAMBDA(j) { *reinterpret_cast<DotFloats*>(y + j * kDotSums) = values[j]; });
  } else {
    std::memcpy(y, values, static_cast<size_t>(count) * sizeof(float));
  }
}

// Products of kRows rows from r with a panel of the values [k, k + depth). They go to `totals`, or,
// if they are the last ones, to the `count` outputs at y. Within a larger function GCC keeps sums
// on the stack.
template <int kRows>
[[gnu::noinline]] void ProductOfPanel(const Int8Rows& x, int64_t r, int64_t k, const int8_t* panel,
                                      int64_t depth, bool is_last, const PanelAhead& ahead,
                                      int32_t* totals, const float (&scale)[kPanelOuts],
                                      int64_t count, float* y, int64_t outs) {
  DotSums sums[kRows][2];
  LoadTotals(k == 0, totals, sums);
  AddPanel<kRows>(x.Row(r) + k, x.stride, panel, depth, ahead, sums);
  if (!is_last) return StoreTotals(sums, totals);
  Unroll<kRows>(INLINE_LAMBDA(i) {
    const int32_t offset = x.Offset(r + i);
    const float row_scale = x.Scale(r + i);
    DotFloats values[2];
    Unroll<2>(INLINE_LAMBDA(j) {
      const DotFloats factor = *reinterpret_cast<const DotFloats*>(scale + j * kDotSums);
      values[j] = __builtin_convertvector(sums[i][j] - offset, DotFloats) * (row_scale * factor);
    });
    StoreOutputs(values, count, y + i * outs);
  });
}

// y[r, o] for the rows [from, to) of x and the outputs [first, last) of w [outs, n].
inline void ProductOfManyRows(const Int8Rows& x, int64_t from, int64_t to, int64_t n,
                              const int8_t* w, const float* scale, int64_t first, int64_t last,
                              float* y, int64_t outs) {
  alignas(64) thread_local int8_t panel[kPanelOuts * kPanelDepth];
  int32_t* totals = ThreadScratch<int32_t>((to - from) * kPanelOuts);
  const int64_t blocks = (to - from + kPanelRows - 1) / kPanelRows;
  for (int64_t o = first; o < last; o += kPanelOuts) {
    const int64_t count = std::min(kPanelOuts, last - o);
    float scales[kPanelOuts] = {};
    std::copy_n(scale + o, count, scales);
    for (int64_t k = 0; k < n; k += kPanelDepth) {
      const int64_t depth = std::min(kPanelDepth, n - k);
      const bool is_last = k + depth == n;
      TransposePanel(w + o * n + k, n, count, depth, panel);
      // The next panel's weights, to which each block of rows fetches its share.
      int64_t left = is_last ? std::clamp<int64_t>(last - o - kPanelOuts, 0, kPanelOuts) : count;
      PanelAhead ahead{is_last ? w + (o + kPanelOuts) * n : w + o * n + k + depth, n, 0};
      int64_t r = from;
      const auto add_rows = [&](auto rows) {
        for (; r + rows <= to; r += rows) {
          ahead.w += ahead.rows * n;
          ahead.rows = std::min(left, (kPanelOuts + blocks - 1) / blocks);
          left -= ahead.rows;
          ProductOfPanel<rows>(x, r, k, panel, depth, is_last, ahead,
                               totals + (r - from) * kPanelOuts, scales, count, y + r * outs + o,
                               outs);
        }
      };
      add_rows(std::integral_constant<int, kPanelRows>{});
      if constexpr (kPanelRows > 8) add_rows(std::integral_constant<int, 8>{});
      add_rows(std::integral_constant<int, 4>{});
      add_rows(std::integral_constant<int, 2>{});
      add_rows(std::integral_constant<int, 1>{});
    }
  }
}

}  // namespace mixtral_jax

#endif  // defined(MIXTRAL_JAX_BYTE_DOTS)
#endif  // MIXTRAL_JAX_KERNELS_CPU_BYTE_PANELS_H_
