// Dot products of a few rows of int8 values with a few weights of int8.
//
// There are four of them: by bytes (byte_dots.h), by pairs of bytes in a matrix (ARM's i8mm), by
// pairs of int16 (AVX2), and one that any machine runs. Sums are of integers, so that all have the
// same bits.

#ifndef MIXTRAL_JAX_KERNELS_CPU_INT8_DOTS_H_
#define MIXTRAL_JAX_KERNELS_CPU_INT8_DOTS_H_

#include <algorithm>
#include <cstdint>

#include "byte_dots.h"
#include "int8_rows.h"
#include "vectors.h"

#if defined(MIXTRAL_JAX_BYTE_DOTS) && defined(__ARM_FEATURE_MATMUL_INT8)
#define MIXTRAL_JAX_BYTE_MATRICES 1
#endif

namespace mixtral_jax {

constexpr int kAheadHint = 2;  // Into the L2 cache.

// `depth` values of a few rows and of a few weights. Rows of x are `stride` values apart, and behind
// their last value are zeros; weights are n values apart.
struct DotTile {
  const Int8Rows::Value* x;
  int64_t stride;
  const int8_t* w;
  int64_t n, depth;
  // Weights that are read soon, likewise n values apart: of each, `ahead_step` bytes are prefetched
  // for every 64 that are read, because the processor's own prefetcher stops at the end of a page.
  const int8_t* ahead;
  int64_t ahead_step;
};

#if defined(MIXTRAL_JAX_BYTE_DOTS)

// Rows whose sums for two weights fit the registers, and for four weights.
#if defined(MIXTRAL_JAX_BYTE_MATRICES)
constexpr int kMostRows = 12, kRowsByFour = 12;
#elif defined(__AVX512VL__) || defined(__aarch64__)
constexpr int kMostRows = 6, kRowsByFour = 6;
#else
constexpr int kMostRows = 5, kRowsByFour = 2;
#endif

#if defined(MIXTRAL_JAX_BYTE_MATRICES)
// Two rows of x times two weights at a time, of eight values each: a sum of four words has the two
// products of the first row, then those of the second. A row without a neighbour is its own.
template <int kRows, int kOuts>
[[gnu::always_inline]] inline void IntegerDots(const DotTile& tile, int32_t (&out)[kRows][kOuts]) {
  constexpr int kRowPairs = (kRows + 1) / 2, kOutPairs = (kOuts + 1) / 2;
  const int64_t n = tile.n, stride = tile.stride;
  const int8_t *x = tile.x, *w = tile.w, *ahead = tile.ahead;
  int32x4_t sums[kRowPairs][kOutPairs];
  Unroll<kRowPairs>(INLINE_LAMBDA(r) {
    Unroll<kOutPairs>(INLINE_LAMBDA(o) { sums[r][o] = vdupq_n_s32(0); });
  });
  const auto half = [](int64x2_t pair) { return vreinterpretq_s8_s64(pair); };
  const auto add = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    int8x16_t low[kOutPairs], high[kOutPairs];
    Unroll<kOutPairs>(INLINE_LAMBDA(o) {
      const int8_t *first = w + 2 * o * n + k, *second = w + std::min(2 * o + 1, kOuts - 1) * n + k;
      const int64x2_t a = (int64x2_t)(count < 16 ? LoadWeights(first, count) : LoadRow(first));
      const int64x2_t b = (int64x2_t)(count < 16 ? LoadWeights(second, count) : LoadRow(second));
      low[o] = half(vzip1q_s64(a, b)), high[o] = half(vzip2q_s64(a, b));
    });
    Unroll<kRowPairs>(INLINE_LAMBDA(r) {
      const int64x2_t a = (int64x2_t)LoadRow(x + 2 * r * stride + k);
      const int64x2_t b = (int64x2_t)LoadRow(x + std::min(2 * r + 1, kRows - 1) * stride + k);
      const int8x16_t before = half(vzip1q_s64(a, b)), after = half(vzip2q_s64(a, b));
      Unroll<kOutPairs>(INLINE_LAMBDA(o) {
        sums[r][o] = vmmlaq_s32(vmmlaq_s32(sums[r][o], before, low[o]), after, high[o]);
      });
    });
  };
  int64_t k = 0;
  for (; k + 64 <= tile.depth; k += 64, ahead += tile.ahead_step) {
    Unroll<kOuts>(INLINE_LAMBDA(o) { __builtin_prefetch(ahead + o * n, 0, kAheadHint); });
    add(k, 16), add(k + 16, 16), add(k + 32, 16), add(k + 48, 16);
  }
  for (; k < tile.depth; k += 16) add(k, std::min<int64_t>(16, tile.depth - k));
  Unroll<kRowPairs>(INLINE_LAMBDA(r) {
    Unroll<kOutPairs>(INLINE_LAMBDA(o) {
      int32_t sum[4];
      vst1q_s32(sum, sums[r][o]);
      out[2 * r][2 * o] = sum[0];
      if constexpr (2 * decltype(o)::value + 1 < kOuts) out[2 * r][2 * o + 1] = sum[1];
      if constexpr (2 * decltype(r)::value + 1 < kRows) {
        out[2 * r + 1][2 * o] = sum[2];
        if constexpr (2 * decltype(o)::value + 1 < kOuts) out[2 * r + 1][2 * o + 1] = sum[3];
      }
    });
  });
}

#else

template <int kRows, int kOuts>
[[gnu::always_inline]] inline void IntegerDots(const DotTile& tile, int32_t (&out)[kRows][kOuts]) {
  const int64_t n = tile.n, stride = tile.stride;
  const int8_t *x = tile.x, *w = tile.w, *ahead = tile.ahead;
  DotSums sums[kRows][kOuts];
  Unroll<kRows>(INLINE_LAMBDA(r) { Unroll<kOuts>(INLINE_LAMBDA(o) { sums[r][o] = DotSums{}; }); });
  const auto add = [&](int64_t k, const DotBytes(&weights)[kOuts]) __attribute__((always_inline)) {
    Unroll<kRows>(INLINE_LAMBDA(r) {
      const DotBytes value = LoadRow(x + r * stride + k);
      Unroll<kOuts>(INLINE_LAMBDA(o) { AddDots(weights[o], value, sums[r][o]); });
    });
  };
  int64_t k = 0;
  for (; k + 64 <= tile.depth; k += 64, ahead += tile.ahead_step) {
    Unroll<kOuts>(INLINE_LAMBDA(o) { __builtin_prefetch(ahead + o * n, 0, kAheadHint); });
    Unroll<64 / kDotBytes>(INLINE_LAMBDA(part) {
      DotBytes weights[kOuts];
      Unroll<kOuts>(INLINE_LAMBDA(o) {
        weights[o] = LoadWeights(w + o * n + k + part * kDotBytes);
      });
      add(k + part * kDotBytes, weights);
    });
  }
  for (; k < tile.depth; k += kDotBytes) {
    DotBytes weights[kOuts];
    const int64_t count = std::min<int64_t>(kDotBytes, tile.depth - k);
    Unroll<kOuts>(INLINE_LAMBDA(o) { weights[o] = LoadWeights(w + o * n + k, count); });
    add(k, weights);
  }
  // Four vectors of sums at a time are added up together.
  Unroll<(kRows * kOuts + 3) / 4>(INLINE_LAMBDA(four) {
    constexpr int kFirst = 4 * decltype(four)::value;
    const auto sum = [&](auto i) __attribute__((always_inline)) {
      constexpr int kAt = std::min(kFirst + decltype(i)::value, kRows * kOuts - 1);
      return sums[kAt / kOuts][kAt % kOuts];
    };
    using std::integral_constant;
    const FourSums totals =
        SumsOfFour(sum(integral_constant<int, 0>{}), sum(integral_constant<int, 1>{}),
                   sum(integral_constant<int, 2>{}), sum(integral_constant<int, 3>{}));
    std::memcpy(&out[0][0] + kFirst, &totals,
                sizeof(int32_t) * std::min(4, kRows * kOuts - kFirst));
  });
}

#endif  // defined(MIXTRAL_JAX_BYTE_MATRICES)

#else

constexpr int kMostRows = 6, kRowsByFour = 2;

#if defined(__AVX2__)
// sum += the products of two vectors of int16, added in pairs. The empty assembly hides the sum
// from the compiler, which would add up several steps first and run out of registers.
[[gnu::always_inline]] inline void MulAdd(__m256i a, __m256i b, __m256i& sum) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  asm("" : "+x"(sum));
}

// Sixteen int8 values as int16.
inline __m256i Widen(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline __m256i LoadInts(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void StoreInts(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline int32_t Sum(__m256i v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  return _mm_cvtsi128_si32(half);
}
#endif

template <int kRows, int kOuts>
[[gnu::always_inline]] inline void IntegerDots(const DotTile& tile, int32_t (&out)[kRows][kOuts]) {
  const int64_t n = tile.n, stride = tile.stride;
  const Int8Rows::Value* x = tile.x;
  const int8_t* w = tile.w;
  int64_t k = 0;
#if defined(__AVX2__)
  __m256i sums[kRows][kOuts];
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<kOuts>(INLINE_LAMBDA(o) { sums[r][o] = _mm256_setzero_si256(); });
  });
  const auto add_sixteen = [&](int64_t at) __attribute__((always_inline)) {
    __m256i weights[kOuts];
    Unroll<kOuts>(INLINE_LAMBDA(o) { weights[o] = Widen(w + o * n + at); });
    Unroll<kRows>(INLINE_LAMBDA(r) {
      const __m256i value = LoadInts(x + r * stride + at);
      Unroll<kOuts>(INLINE_LAMBDA(o) { MulAdd(value, weights[o], sums[r][o]); });
    });
  };
  const int8_t* ahead = tile.ahead;
  for (; k + 64 <= tile.depth; k += 64, ahead += tile.ahead_step) {
    Unroll<kOuts>(INLINE_LAMBDA(o) { __builtin_prefetch(ahead + o * n, 0, kAheadHint); });
    add_sixteen(k), add_sixteen(k + 16), add_sixteen(k + 32), add_sixteen(k + 48);
  }
  for (; k + 16 <= tile.depth; k += 16) add_sixteen(k);
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<kOuts>(INLINE_LAMBDA(o) { out[r][o] = Sum(sums[r][o]); });
  });
#else
  for (auto& row : out)
    for (auto& sum : row) sum = 0;
#endif
  for (int r = 0; r < kRows; ++r)
    for (int o = 0; o < kOuts; ++o)
      for (int64_t i = k; i < tile.depth; ++i)
        out[r][o] += int32_t{x[r * stride + i]} * int32_t{w[o * n + i]};
}

#endif

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_INT8_DOTS_H_
