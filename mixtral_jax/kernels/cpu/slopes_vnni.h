// Products of many rows of slopes with int8 weights, the other way: what a gradient passes on.
//
// Each row of slopes, with the weights' scales multiplied in, is rounded to integers of 15 bits:
// 1 / 16256 of its largest magnitude is a step. Their upper and lower bytes are two rows of
// many_rows_vnni.h, whose exact sums are put together again. That takes half as long as products
// of floats, and its error is a hundredth of bfloat16's for the largest slopes of a row.

#ifndef MIXTRAL_JAX_KERNELS_CPU_SLOPES_VNNI_H_
#define MIXTRAL_JAX_KERNELS_CPU_SLOPES_VNNI_H_

#include "many_rows_vnni.h"

#if defined(MIXTRAL_JAX_HAS_VNNI)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "dot_products.h"
#include "vectors.h"
#include "worker_pool.h"

namespace mixtral_jax {

constexpr int64_t kSlopeSteps = 127 * 128;  // Of the largest magnitude of a row.
constexpr int64_t kSlopeRows = 252;         // Of one task; a multiple of six.

// panel[k / 4][c][k % 4] = w[k, c] + 128 for `columns` columns, at most 32, of a weight whose rows
// are `stride` values apart, and `depth` rows. Others, up to multiples of 32 and 4, stand for zero.
inline void InterleaveBytePanel(const int8_t* w, int64_t stride, int64_t columns, int64_t depth,
                                uint8_t* panel) {
  const __m128i offset = _mm_set1_epi8(static_cast<char>(-128));
  for (int64_t k = 0; k < depth; k += 4) {
    for (int64_t half = 0; half < 2; ++half) {
      const __mmask16 mask = static_cast<__mmask16>(LowBits(columns - half * 16));
      __m128i rows[4];
      Unroll<4>(INLINE_LAMBDA(i) {
        const int8_t* from = w + (k + i) * stride + half * 16;
        rows[i] = _mm_xor_si128(
            offset, k + i < depth ? _mm_maskz_loadu_epi8(mask, from) : _mm_setzero_si128());
      });
      const __m128i low[2] = {_mm_unpacklo_epi8(rows[0], rows[1]),
                              _mm_unpacklo_epi8(rows[2], rows[3])};
      const __m128i high[2] = {_mm_unpackhi_epi8(rows[0], rows[1]),
                               _mm_unpackhi_epi8(rows[2], rows[3])};
      __m128i* to = reinterpret_cast<__m128i*>(panel + k * kBytePanelOuts + half * 64);
      _mm_store_si128(to, _mm_unpacklo_epi16(low[0], low[1]));
      _mm_store_si128(to + 1, _mm_unpackhi_epi16(low[0], low[1]));
      _mm_store_si128(to + 2, _mm_unpacklo_epi16(high[0], high[1]));
      _mm_store_si128(to + 3, _mm_unpackhi_epi16(high[0], high[1]));
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
      : stride((n + 63) / 64 * 64),
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
[[gnu::noinline]] void ProductOfSlopePanel(const SlopeRows& x, int64_t r, int64_t k, const uint8_t* panel,
                         int64_t depth, bool is_last, int32_t* totals, const ByteOutputs& outputs) {
  __m512i sums[2 * kRows][2];
  Unroll<2 * kRows>(INLINE_LAMBDA(i) {
    Unroll<2>(INLINE_LAMBDA(j) {
      sums[i][j] = k == 0 ? _mm512_setzero_si512()
                          : _mm512_loadu_si512(totals + i * kBytePanelOuts + j * 16);
    });
  });
  AddBytePanel<2 * kRows>(x.bytes + 2 * r * x.stride + k, x.stride, panel, depth, sums);
  if (!is_last) {
    Unroll<2 * kRows>(INLINE_LAMBDA(i) {
      Unroll<2>(INLINE_LAMBDA(j) {
        _mm512_storeu_si512(totals + i * kBytePanelOuts + j * 16, sums[i][j]);
      });
    });
    return;
  }
  const auto total = [&](size_t row, __m512i sum) __attribute__((always_inline)) {
    const __m512i offset = _mm512_set1_epi32(static_cast<int32_t>(128u * x.sums[row]));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, offset));
  };
  Unroll<2>(INLINE_LAMBDA(j) {
    const __mmask16 mask = static_cast<__mmask16>(LowBits(outputs.count - j * 16));
    Unroll<kRows>(INLINE_LAMBDA(i) {
      const size_t row = static_cast<size_t>(r + i);
      const __m512 upper = total(2 * row, sums[2 * i][j]);
      const __m512 lower = total(2 * row + 1, sums[2 * i + 1][j]);
      const __m512 both = _mm512_fmadd_ps(upper, _mm512_set1_ps(128.0f), lower);
      _mm512_mask_storeu_ps(outputs.y + i * outputs.stride + j * 16, mask,
                            _mm512_mul_ps(both, _mm512_set1_ps(x.steps[row])));
    });
  });
}

// y [rows, columns] = x [rows, n] @ w [n, columns].
inline void ProductOfSlopes(int64_t num_threads, const SlopeRows& x, int64_t rows, int64_t n,
                            const int8_t* w, int64_t columns, float* y) {
  const int64_t panels = (columns + kBytePanelOuts - 1) / kBytePanelOuts;
  const int64_t blocks = (rows + kSlopeRows - 1) / kSlopeRows;
  ParallelFor(num_threads, panels * blocks, [&](int64_t task) {
    alignas(64) thread_local uint8_t panel[kBytePanelOuts * kBytePanelDepth];
    alignas(64) thread_local int32_t totals[2 * kSlopeRows * kBytePanelOuts];
    const int64_t c = task / blocks * kBytePanelOuts, from = task % blocks * kSlopeRows;
    const int64_t to = std::min(rows, from + kSlopeRows);
    const int64_t count = std::min(kBytePanelOuts, columns - c);
    for (int64_t k = 0; k < n; k += kBytePanelDepth) {
      const int64_t depth = std::min(kBytePanelDepth, n - k);
      InterleaveBytePanel(w + k * columns + c, columns, count, depth, panel);
      int64_t r = from;
      const auto add_rows = [&](auto some) {
        for (; r + some <= to; r += some) {
          const ByteOutputs outputs{y + r * columns + c, columns, count, nullptr};
          ProductOfSlopePanel<some>(x, r, k, panel, depth, k + depth == n,
                                    totals + 2 * (r - from) * kBytePanelOuts, outputs);
        }
      };
      add_rows(std::integral_constant<int, 6>{});
      add_rows(std::integral_constant<int, 2>{});
      add_rows(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace mixtral_jax

#endif  // defined(MIXTRAL_JAX_HAS_VNNI)
#endif  // MIXTRAL_JAX_KERNELS_CPU_SLOPES_VNNI_H_
