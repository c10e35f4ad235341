// The operations of products with weights in groups, as each instruction set has them: dots of a
// weight's bytes, or of halves of bytes, with a row's bytes, and numbers of 16 bits that become
// floats.
//
// A half is 0 .. 15 and a row's byte -127 .. 127, so that two products fit 16 bits: processors
// that have no dots of bytes add them up there first.

#ifndef MIXTRAL_JAX_KERNELS_CPU_GROUP_DOTS_H_
#define MIXTRAL_JAX_KERNELS_CPU_GROUP_DOTS_H_

#include <cstdint>
#include <cstring>

#include "byte_dots.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mixtral_jax {

[[gnu::always_inline]] inline DotBytes LowHalves(DotBytes v) { return v & int8_t{15}; }
[[gnu::always_inline]] inline DotBytes HighHalves(DotBytes v) {
  return (DotBytes)((DotSums)v >> 4) & int8_t{15};
}

// sums += the products of halves with a row's bytes, added in fours.
[[gnu::always_inline]] inline void AddHalves(DotBytes w, DotBytes x, DotSums& sums) {
#if defined(MIXTRAL_JAX_BYTE_DOTS)
  AddDots(w, x, sums);
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
  const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  sums = (DotSums)_mm256_add_epi32((__m256i)sums, fours);
#elif defined(__aarch64__)
  const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8((int8x16_t)x));
  const int16x8_t high = vmull_s8(vget_high_s8((int8x16_t)w), vget_high_s8((int8x16_t)x));
  sums = (DotSums)vpadalq_s16((int32x4_t)sums, vpaddq_s16(low, high));
#else
  for (int i = 0; i < kDotBytes; ++i) sums[i / 4] += int32_t{w[i]} * int32_t{x[i]};
#endif
}

// sums += the products of weights with a row's bytes, added in fours, and kByteOffset times the
// row's bytes.
[[gnu::always_inline]] inline void AddBytes(DotBytes w, DotBytes x, DotSums& sums) {
#if defined(MIXTRAL_JAX_BYTE_DOTS)
  AddHalves(OffsetWeights(w), x, sums);
#elif defined(__AVX2__)
  // The instruction takes one side as unsigned: magnitudes of weights, by rows of their signs. Pairs
  // of products with a row's bytes fit 16 bits even where a weight is -128.
  const __m256i size = _mm256_abs_epi8((__m256i)w);
  AddHalves((DotBytes)size, (DotBytes)_mm256_sign_epi8((__m256i)x, (__m256i)w), sums);
#else
  AddHalves(w, x, sums);
#endif
}

// A number of 16 bits, which is finite, as a float.
inline float FloatOf(uint16_t half) {
  const uint32_t magnitude = half & 0x7fff;
  // Small numbers are whole multiples of 2^-24; made from bits, they would be flushed to zero.
  float value = static_cast<float>(magnitude) * 0x1p-24f;
  if (magnitude >= 0x400) {
    const uint32_t bits = (magnitude << 13) + (112u << 23);
    std::memcpy(&value, &bits, sizeof value);
  }
  return half & 0x8000 ? -value : value;
}

// As many numbers of 16 bits as a vector has floats.
[[gnu::always_inline]] inline DotFloats LoadHalfFloats(const uint16_t* p) {
#if MIXTRAL_JAX_DOT_BYTES == 64
  // GCC warns of what the plain form leaves undefined.
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (DotFloats)_mm512_maskz_cvtph_ps(0xffff, halves);
#elif MIXTRAL_JAX_DOT_BYTES == 32
  return (DotFloats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (DotFloats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  DotFloats values = {};
  for (int i = 0; i < kDotSums; ++i) values[i] = FloatOf(p[i]);
  return values;
#endif
}

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_GROUP_DOTS_H_
