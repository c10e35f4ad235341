// Products of many int8 rows, for processors with AVX2 that have no dots of bytes: byte_panels.h
// with pairs of int16 in place of fours of bytes.

#ifndef MIXTRAL_JAX_KERNELS_CPU_PAIR_PANELS_H_
#define MIXTRAL_JAX_KERNELS_CPU_PAIR_PANELS_H_

#include "byte_dots.h"

#if defined(__AVX2__) && !defined(MIXTRAL_JAX_BYTE_DOTS)
#define MIXTRAL_JAX_PAIR_PANELS 1

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "int8_dots.h"
#include "int8_rows.h"
#include "vectors.h"
#include "worker_pool.h"

namespace mixtral_jax {

constexpr int64_t kManyRows = 24;
constexpr int64_t kPanelOuts = 16;     // Outputs of one panel of transposed weights.
constexpr int64_t kPanelDepth = 2048;  // Values of each output, so that it stays in the L2 cache.

// panel[k / 2][o][k % 2] = w[o, k] for 16 outputs, whose weights are n values apart, and `depth`
// values of each. Outputs from `outs` on, and values from `depth` to the next multiple of 16, are
// zero.
inline void TransposePanel(const int8_t* w, int64_t n, int64_t outs, int64_t depth,
                           int16_t* panel) {
  alignas(32) int8_t padded[16];
  for (int64_t k = 0; k < depth; k += 16) {
    for (int half = 0; half < 2; ++half) {
      __m256i rows[8], pairs[8], quads[8];
      Unroll<8>(INLINE_LAMBDA(i) {
        const int64_t o = half * 8 + i;
        if (o < outs && k + 16 <= depth) {
          rows[i] = Widen(w + o * n + k);
        } else {
          std::memset(padded, 0, sizeof padded);
          if (o < outs) std::memcpy(padded, w + o * n + k, static_cast<size_t>(depth - k));
          rows[i] = Widen(padded);
        }
      });
      Unroll<4>(INLINE_LAMBDA(i) {
        pairs[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
      });
      Unroll<2>(INLINE_LAMBDA(i) {
        Unroll<2>(INLINE_LAMBDA(j) {
          quads[4 * i + 2 * j] = _mm256_unpacklo_epi64(pairs[4 * i + j], pairs[4 * i + j + 2]);
          quads[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[4 * i + j], pairs[4 * i + j + 2]);
        });
      });
      int16_t* to = panel + k * kPanelOuts + half * 16;
      Unroll<4>(INLINE_LAMBDA(i) {
        StoreInts(to + i * 2 * kPanelOuts, _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20));
        StoreInts(to + (i + 4) * 2 * kPanelOuts,
                  _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31));
      });
    }
  }
}

// Adds the products of kRows rows with a panel to totals [kRows][16].
template <int kRows>
void AddPanel(const int16_t* x, int64_t stride, const int16_t* panel, int64_t depth,
              int32_t* totals) {
  __m256i sums[kRows][2];
  const auto total = [&](int r, int j) { return totals + r * kPanelOuts + j * kLanes; };
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<2>(INLINE_LAMBDA(j) { sums[r][j] = LoadInts(total(r, j)); });
  });
  for (int64_t k = 0; k < depth; k += 2) {
    const __m256i first = LoadInts(panel + k * kPanelOuts);
    const __m256i second = LoadInts(panel + k * kPanelOuts + 16);
    Unroll<kRows>(INLINE_LAMBDA(r) {
      int32_t pair;
      std::memcpy(&pair, x + r * stride + k, sizeof pair);
      const __m256i value = _mm256_set1_epi32(pair);
      MulAdd(value, first, sums[r][0]);
      MulAdd(value, second, sums[r][1]);
    });
  }
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<2>(INLINE_LAMBDA(j) { StoreInts(total(r, j), sums[r][j]); });
  });
}

// y[r, o] for the rows [from, to) of x and the outputs [first, last) of w [outs, n].
inline void ProductOfManyRows(const Int8Rows& x, int64_t from, int64_t to, int64_t n,
                              const int8_t* w, const float* scale, int64_t first, int64_t last,
                              float* y, int64_t outs) {
  alignas(64) thread_local int16_t panel[kPanelOuts * kPanelDepth];
  int32_t* totals = ThreadScratch<int32_t>((to - from) * kPanelOuts);
  for (int64_t o = first; o < last; o += kPanelOuts) {
    const int64_t count = std::min(kPanelOuts, last - o);
    std::fill(totals, totals + (to - from) * kPanelOuts, 0);
    for (int64_t k = 0; k < n; k += kPanelDepth) {
      const int64_t depth = std::min(kPanelDepth, n - k);
      TransposePanel(w + o * n + k, n, count, depth, panel);
      int64_t r = from;
      const auto add_rows = [&](auto rows) {
        for (; r + rows <= to; r += rows)
          AddPanel<rows>(x.Row(r) + k, x.stride, panel, depth, totals + (r - from) * kPanelOuts);
      };
      add_rows(std::integral_constant<int, 6>{});  // Sums of six rows fill the registers.
      add_rows(std::integral_constant<int, 4>{});
      add_rows(std::integral_constant<int, 2>{});
      add_rows(std::integral_constant<int, 1>{});
    }
    for (int64_t r = from; r < to; ++r)
      for (int64_t i = 0; i < count; ++i)
        y[r * outs + o + i] =
            static_cast<float>(totals[(r - from) * kPanelOuts + i]) * (x.Scale(r) * scale[o + i]);
  }
}

}  // namespace mixtral_jax

#endif  // defined(MIXTRAL_JAX_PAIR_PANELS)
#endif  // MIXTRAL_JAX_KERNELS_CPU_PAIR_PANELS_H_
