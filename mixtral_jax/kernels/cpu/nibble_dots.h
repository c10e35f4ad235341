// The operations of products with int4 weights, as each instruction set has them: halves of bytes,
// dots of them with a row's bytes, and numbers of 16 bits that become floats.
//
// A half is 0 .. 15 and a row's byte -127 .. 127, so that four products fit 16 bits: processors
// that have no dots of bytes add them up there first.

#ifndef MIXTRAL_JAX_KERNELS_CPU_NIBBLE_DOTS_H_
#define MIXTRAL_JAX_KERNELS_CPU_NIBBLE_DOTS_H_

#include <cstdint>
#include <cstring>
#include <utility>

#include "byte_dots.h"
#include "vectors.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mixtral_jax {

#if defined(MIXTRAL_JAX_BYTE_DOTS)
#define MIXTRAL_JAX_NIBBLE_BYTES MIXTRAL_JAX_BYTE_DOTS
#elif defined(__AVX2__)
#define MIXTRAL_JAX_NIBBLE_BYTES 32
#else
#define MIXTRAL_JAX_NIBBLE_BYTES 16
#endif
constexpr int kNibbleBytes = MIXTRAL_JAX_NIBBLE_BYTES;  // Bytes of a vector.
constexpr int kNibbleSums = kNibbleBytes / 4;

typedef int8_t NibbleBytes __attribute__((vector_size(kNibbleBytes), aligned(1), may_alias));
typedef int32_t NibbleSums __attribute__((vector_size(kNibbleBytes), aligned(4), may_alias));
typedef float NibbleFloats __attribute__((vector_size(kNibbleBytes), aligned(4), may_alias));
typedef float FourFloats __attribute__((vector_size(16), aligned(4), may_alias));

[[gnu::always_inline]] inline NibbleBytes LoadNibbles(const void* p) {
  return *static_cast<const NibbleBytes*>(p);
}
[[gnu::always_inline]] inline NibbleBytes LowNibbles(NibbleBytes v) { return v & int8_t{15}; }
[[gnu::always_inline]] inline NibbleBytes HighNibbles(NibbleBytes v) {
  return (NibbleBytes)((NibbleSums)v >> 4) & int8_t{15};
}

// sums += the products of halves with a row's bytes, added in fours.
[[gnu::always_inline]] inline void AddNibbles(NibbleBytes w, NibbleBytes x, NibbleSums& sums) {
#if defined(MIXTRAL_JAX_BYTE_DOTS)
  DotSums total = (DotSums)sums;
  AddDots((DotBytes)w, (DotBytes)x, total);
  sums = (NibbleSums)total;
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
  const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  sums = (NibbleSums)_mm256_add_epi32((__m256i)sums, fours);
#elif defined(__aarch64__)
  const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8((int8x16_t)x));
  const int16x8_t high = vmull_s8(vget_high_s8((int8x16_t)w), vget_high_s8((int8x16_t)x));
  sums = (NibbleSums)vpadalq_s16((int32x4_t)sums, vpaddq_s16(low, high));
#else
  for (int i = 0; i < kNibbleBytes; ++i) sums[i / 4] += int32_t{w[i]} * int32_t{x[i]};
#endif
}

// The sums of neighbours of a and b, `kWords` words at a time, within lanes of four words: see
// AddNeighbours of byte_dots.h.
template <int kWords, int... I>
[[gnu::always_inline]] inline NibbleSums AddNeighbours4(NibbleSums a, NibbleSums b,
                                                        std::integer_sequence<int, I...>) {
  constexpr auto kFrom = [](int i, int half) {
    const int lane = i / 4 * 4, pair = i % 4 / kWords, word = i % kWords;
    return (pair % 2 ? kNibbleSums : 0) + lane + pair / 2 * kWords + word + 2 * half;
  };
  return __builtin_shufflevector(a, b, kFrom(I, 0)...) +
         __builtin_shufflevector(a, b, kFrom(I, 1)...);
}

// Of each lane of four words, the sums of a, b, c and d.
[[gnu::always_inline]] inline NibbleSums SumsByLane(NibbleSums a, NibbleSums b, NibbleSums c,
                                                    NibbleSums d) {
  constexpr auto kAll = std::make_integer_sequence<int, kNibbleSums>{};
  return AddNeighbours4<2>(AddNeighbours4<1>(a, b, kAll), AddNeighbours4<1>(c, d, kAll), kAll);
}

// A lane's four floats.
template <int kLane>
[[gnu::always_inline]] inline FourFloats Lane(NibbleFloats v) {
  return __builtin_shufflevector(v, v, 4 * kLane, 4 * kLane + 1, 4 * kLane + 2, 4 * kLane + 3);
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

// Numbers of 16 bits: as many as a vector has floats, and half of them.
typedef uint16_t Halves __attribute__((vector_size(kNibbleBytes / 2), aligned(2), may_alias));
typedef uint16_t FewHalves __attribute__((vector_size(kNibbleBytes / 4), aligned(2), may_alias));

[[gnu::always_inline]] inline NibbleFloats FloatsOf(Halves halves) {
#if MIXTRAL_JAX_NIBBLE_BYTES == 64
  return (NibbleFloats)_mm512_cvtph_ps((__m256i)halves);
#elif MIXTRAL_JAX_NIBBLE_BYTES == 32
  return (NibbleFloats)_mm256_cvtph_ps((__m128i)halves);
#elif defined(__aarch64__)
  return (NibbleFloats)vcvt_f32_f16((float16x4_t)halves);
#else
  NibbleFloats values = {};
  for (int i = 0; i < kNibbleSums; ++i) values[i] = FloatOf(halves[i]);
  return values;
#endif
}

// The scale and the minimum of each lane's group, of four outputs: lane by lane, those of the
// outputs. Those of an output's groups follow each other; `stride` numbers further on are those of
// the next output. (They are joined in registers: a load of what was just stored in parts waits.)
template <int... I>
[[gnu::always_inline]] inline void LoadPairs(const uint16_t* p, int64_t stride,
                                             NibbleFloats& scale, NibbleFloats& minimum,
                                             std::integer_sequence<int, I...>) {
  constexpr int kOfOutput = kNibbleSums / 2;
  const auto two = [&](int64_t o) __attribute__((always_inline)) {
    const FewHalves a = *reinterpret_cast<const FewHalves*>(p + o * stride);
    const FewHalves b = *reinterpret_cast<const FewHalves*>(p + (o + 1) * stride);
    return FloatsOf((Halves)__builtin_shufflevector(a, b, I...));
  };
  const NibbleFloats first = two(0), second = two(2);
  constexpr auto kFrom = [](int i, int kind) { return i % 4 * kOfOutput + i / 4 * 2 + kind; };
  scale = __builtin_shufflevector(first, second, kFrom(I, 0)...);
  minimum = __builtin_shufflevector(first, second, kFrom(I, 1)...);
}

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_NIBBLE_DOTS_H_
