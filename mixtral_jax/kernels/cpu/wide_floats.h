// Vectors of floats as wide as the form's registers, for attention.
//
// Every function computes the same bits in each lane whatever the width, where the machine has a
// fused multiply-add.

#ifndef MIXTRAL_JAX_KERNELS_CPU_WIDE_FLOATS_H_
#define MIXTRAL_JAX_KERNELS_CPU_WIDE_FLOATS_H_

#include <cstdint>
#include <cstring>

#include "form.h"
#include "vectors.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mixtral_jax::wide {

// The floats of a register, and how many registers hold sums while others hold what is multiplied.
#if defined(__AVX512F__) && MIXTRAL_JAX_VECTOR_BITS == 512
#define MIXTRAL_JAX_WIDE_IS_512 1
constexpr int kLanes = 16, kSums = 24;
#elif defined(__AVX512VL__)
#define MIXTRAL_JAX_WIDE_IS_256 1
constexpr int kLanes = 8, kSums = 24;
#elif defined(__AVX2__) && defined(__FMA__)
#define MIXTRAL_JAX_WIDE_IS_256 1
constexpr int kLanes = 8, kSums = 12;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kSums = 24;
#else
constexpr int kLanes = 4, kSums = 12;
#endif

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4)));

inline Floats Load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void Store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
inline Floats Broadcast(float v) { return v - Floats{}; }
inline Floats Max(Floats a, Floats b) { return a > b ? a : b; }

// The first n <= kLanes floats at p, and zeros.
inline Floats LoadPart(const float* p, int64_t n) {
  Floats v = {};
  std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
}

// kLanes values of int8 as floats.
inline Floats Load(const int8_t* p) {
#if defined(MIXTRAL_JAX_WIDE_IS_512)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Floats)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif defined(MIXTRAL_JAX_WIDE_IS_256)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
  Ints values;
  for (int i = 0; i < kLanes; ++i) values[i] = p[i];
  return __builtin_convertvector(values, Floats);
#endif
}
inline Floats LoadPart(const int8_t* p, int64_t n) {
  int8_t values[kLanes] = {};
  std::memcpy(values, p, static_cast<size_t>(n));
  return Load(values);
}

// a * b + c, with one rounding where the machine has such an instruction; vectors.h says why it is
// written out.
inline Floats MulAdd(Floats a, Floats b, Floats c) {
#if defined(MIXTRAL_JAX_WIDE_IS_512)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(MIXTRAL_JAX_WIDE_IS_256)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// exp(x) for x <= 0, as Exp of vectors.h: within 2 units in the last place; 0 below -87.
inline Floats Exp(Floats x) {
  const Floats lowest = Broadcast(-87.0f);
  const Floats shift = Broadcast(12582912.0f);  // Adding 1.5 * 2^23 rounds to an integer.
  const Floats bounded = Max(x, lowest);
  const Floats shifted = MulAdd(bounded, Broadcast(1.4426950408889634f), shift);
  const Floats whole = shifted - shift;
  Floats t = MulAdd(whole, Broadcast(-0.693145751953125f), bounded);
  t = MulAdd(whole, Broadcast(-1.428606820309417e-6f), t);
  Floats p = Broadcast(1.0f / 5040);
  p = MulAdd(p, t, Broadcast(1.0f / 720));
  p = MulAdd(p, t, Broadcast(1.0f / 120));
  p = MulAdd(p, t, Broadcast(1.0f / 24));
  p = MulAdd(p, t, Broadcast(1.0f / 6));
  p = MulAdd(p, t, Broadcast(0.5f));
  p = MulAdd(p, t, Broadcast(1.0f));
  p = MulAdd(p, t, Broadcast(1.0f));
  // The lowest bits of `shifted` are the integer; in the exponent's place they multiply by 2^n.
  const Ints power = (Ints)shifted << 23;
  const Floats value = (Floats)((Ints)p + power);
  return x < lowest ? Floats{} : value;
}

// Swaps rows and columns of kLanes vectors.
inline void Transpose(Floats (&v)[kLanes]) {
#if defined(MIXTRAL_JAX_WIDE_IS_512)
  // With a mask of all lanes, because GCC 12 warns of an undefined value in the plain functions.
  constexpr __mmask16 kAll = 0xffff;
  __m512 a[16], b[16];
  Unroll<8>(INLINE_LAMBDA(i) {
    a[2 * i] = _mm512_maskz_unpacklo_ps(kAll, (__m512)v[2 * i], (__m512)v[2 * i + 1]);
    a[2 * i + 1] = _mm512_maskz_unpackhi_ps(kAll, (__m512)v[2 * i], (__m512)v[2 * i + 1]);
  });
  Unroll<8>(INLINE_LAMBDA(i) {  // Each quarter of b[4 q + c] is a column of four rows from 4 q on.
    constexpr int kFirst = i / 2 * 4 + i % 2, kOut = i / 2 * 4 + i % 2 * 2;
    const __m512d low = _mm512_castps_pd(a[kFirst]), high = _mm512_castps_pd(a[kFirst + 2]);
    b[kOut] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, low, high));
    b[kOut + 1] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, low, high));
  });
  Unroll<4>(INLINE_LAMBDA(c) {
    const __m512 even_low = _mm512_maskz_shuffle_f32x4(kAll, b[c], b[c + 4], 0x88);
    const __m512 odd_low = _mm512_maskz_shuffle_f32x4(kAll, b[c], b[c + 4], 0xdd);
    const __m512 even_high = _mm512_maskz_shuffle_f32x4(kAll, b[c + 8], b[c + 12], 0x88);
    const __m512 odd_high = _mm512_maskz_shuffle_f32x4(kAll, b[c + 8], b[c + 12], 0xdd);
    v[c] = (Floats)_mm512_maskz_shuffle_f32x4(kAll, even_low, even_high, 0x88);
    v[c + 4] = (Floats)_mm512_maskz_shuffle_f32x4(kAll, odd_low, odd_high, 0x88);
    v[c + 8] = (Floats)_mm512_maskz_shuffle_f32x4(kAll, even_low, even_high, 0xdd);
    v[c + 12] = (Floats)_mm512_maskz_shuffle_f32x4(kAll, odd_low, odd_high, 0xdd);
  });
#elif defined(MIXTRAL_JAX_WIDE_IS_256)
  __m256 a[8], b[8];
  Unroll<4>(INLINE_LAMBDA(i) {
    a[2 * i] = _mm256_unpacklo_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
  });
  Unroll<4>(INLINE_LAMBDA(i) {
    constexpr int kFirst = i / 2 * 4 + i % 2, kOut = i / 2 * 4 + i % 2 * 2;
    const __m256d low = _mm256_castps_pd(a[kFirst]), high = _mm256_castps_pd(a[kFirst + 2]);
    b[kOut] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
    b[kOut + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
  });
  Unroll<4>(INLINE_LAMBDA(c) {
    v[c] = (Floats)_mm256_permute2f128_ps(b[c], b[c + 4], 0x20);
    v[c + 4] = (Floats)_mm256_permute2f128_ps(b[c], b[c + 4], 0x31);
  });
#elif defined(__aarch64__)
  const float32x4x2_t low = vtrnq_f32((float32x4_t)v[0], (float32x4_t)v[1]);
  const float32x4x2_t high = vtrnq_f32((float32x4_t)v[2], (float32x4_t)v[3]);
  v[0] = (Floats)vcombine_f32(vget_low_f32(low.val[0]), vget_low_f32(high.val[0]));
  v[1] = (Floats)vcombine_f32(vget_low_f32(low.val[1]), vget_low_f32(high.val[1]));
  v[2] = (Floats)vcombine_f32(vget_high_f32(low.val[0]), vget_high_f32(high.val[0]));
  v[3] = (Floats)vcombine_f32(vget_high_f32(low.val[1]), vget_high_f32(high.val[1]));
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float swapped = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = swapped;
    }
  }
#endif
}

// The largest lane.
inline float Highest(Floats v) {
#if defined(MIXTRAL_JAX_WIDE_IS_512)
  const __m512 halves = _mm512_maskz_shuffle_f32x4(0xffff, (__m512)v, (__m512)v, 0x4e);
  const Floats highest = Max(v, (Floats)halves);
  __m256 eight;
  std::memcpy(&eight, &highest, sizeof eight);
#elif defined(MIXTRAL_JAX_WIDE_IS_256)
  const __m256 eight = (__m256)v;
#endif
#if defined(MIXTRAL_JAX_WIDE_IS_512) || defined(MIXTRAL_JAX_WIDE_IS_256)
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#else
  float highest = v[0];
  for (int i = 1; i < kLanes; ++i) highest = v[i] > highest ? v[i] : highest;
  return highest;
#endif
}

// Sums of many floats are taken in sixteen lanes whatever the width: float i stands in lane i % 16.
constexpr int kSumLanes = 16;

}  // namespace mixtral_jax::wide

#endif  // MIXTRAL_JAX_KERNELS_CPU_WIDE_FLOATS_H_
