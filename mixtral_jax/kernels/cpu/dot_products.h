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

// The same for rows of int16 that hold int8 values, and weights of int8.
template <int kRows, int kOuts>
inline void DotProducts(const int16_t* x, int64_t stride, const int8_t* w, int64_t n,
                        int32_t (&out)[kRows][kOuts]) {
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
  for (; k + 64 <= n; k += 64) {
    for (int o = 0; o < kOuts; ++o) __builtin_prefetch(w + o * n + k + kPrefetchDistance);
    add_sixteen(k), add_sixteen(k + 16), add_sixteen(k + 32), add_sixteen(k + 48);
  }
  for (; k + 16 <= n; k += 16) add_sixteen(k);
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<kOuts>(INLINE_LAMBDA(o) { out[r][o] = Sum(sums[r][o]); });
  });
#else
  for (auto& row : out)
    for (auto& sum : row) sum = 0;
#endif
  for (int r = 0; r < kRows; ++r)
    for (int o = 0; o < kOuts; ++o)
      for (int64_t i = k; i < n; ++i)
        out[r][o] += int32_t{x[r * stride + i]} * int32_t{w[o * n + i]};
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

// Rounds n floats to integers in -127 .. 127 and returns their scale: row = values * scale.
template <typename Value>
inline float QuantizeRow(const float* row, int64_t n, Value* values) {
  const float scale = MaxMagnitude(row, n) / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<Value>(__builtin_rintf(row[i] * inverse));
  return scale;
}

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_DOT_PRODUCTS_H_
