// The one operation of products with int8 weights, as each instruction set has it: to each of
// several 32-bit sums it adds the products of four bytes with four bytes.
//
// Loops over it are written once, for vectors of 64, 32 or 16 bytes. On x86 the instruction takes
// one side as unsigned, so weights are offset by 128, and 128 times the sum of a row is taken off
// the sums again (kByteOffset). All of it is of integers: every form has the same bits.

#ifndef MIXTRAL_JAX_KERNELS_CPU_BYTE_DOTS_H_
#define MIXTRAL_JAX_KERNELS_CPU_BYTE_DOTS_H_

#include <cstdint>
#include <cstring>
#include <utility>

#include "form.h"
#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && MIXTRAL_JAX_VECTOR_BITS == 512
#define MIXTRAL_JAX_BYTE_DOTS 64
#include <immintrin.h>
#elif (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define MIXTRAL_JAX_BYTE_DOTS 32
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#define MIXTRAL_JAX_BYTE_DOTS 16
#include <arm_neon.h>
#endif

namespace mixtral_jax {

// Bytes of a vector, also where there is no such instruction.
#if defined(MIXTRAL_JAX_BYTE_DOTS)
#define MIXTRAL_JAX_DOT_BYTES MIXTRAL_JAX_BYTE_DOTS
#elif defined(__AVX2__)
#define MIXTRAL_JAX_DOT_BYTES 32
#else
#define MIXTRAL_JAX_DOT_BYTES 16
#endif
constexpr int kDotBytes = MIXTRAL_JAX_DOT_BYTES;
constexpr int kDotSums = kDotBytes / 4;  // 32-bit sums of a vector.

typedef int8_t DotBytes __attribute__((vector_size(kDotBytes), aligned(1), may_alias));
typedef int32_t DotSums __attribute__((vector_size(kDotBytes), aligned(4), may_alias));
typedef float DotFloats __attribute__((vector_size(kDotBytes), aligned(4), may_alias));
typedef int32_t FourSums __attribute__((vector_size(16), aligned(4), may_alias));

[[gnu::always_inline]] inline DotBytes LoadRow(const int8_t* x) {
  return *reinterpret_cast<const DotBytes*>(x);
}
// The four bytes at x, again and again.
[[gnu::always_inline]] inline DotBytes BroadcastFour(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return (DotBytes)(four - DotSums{});
}

#if !defined(MIXTRAL_JAX_BYTE_DOTS) || !defined(__x86_64__)
constexpr int32_t kByteOffset = 0;
#else
constexpr int32_t kByteOffset = 128;
#endif

#if defined(MIXTRAL_JAX_BYTE_DOTS)

[[gnu::always_inline]] inline DotBytes OffsetWeights(DotBytes w) {
  return kByteOffset == 0 ? w : w ^ static_cast<int8_t>(-128);
}
[[gnu::always_inline]] inline DotBytes LoadWeights(const int8_t* w) {
  return OffsetWeights(LoadRow(w));
}
// The first `count` bytes, and zeros.
inline DotBytes LoadWeights(const int8_t* w, int64_t count) {
  DotBytes bytes = {};
  std::memcpy(&bytes, w, static_cast<size_t>(count));
  return OffsetWeights(bytes);
}

// sums += the products of offset weights with a row, added in fours.
[[gnu::always_inline]] inline void AddDots(DotBytes w, DotBytes x, DotSums& sums) {
#if MIXTRAL_JAX_BYTE_DOTS == 64
  sums = (DotSums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif MIXTRAL_JAX_BYTE_DOTS == 32 && defined(__AVX512VNNI__)
  sums = (DotSums)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
#elif MIXTRAL_JAX_BYTE_DOTS == 32
  sums = (DotSums)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
#else
  sums = (DotSums)vdotq_s32((int32x4_t)sums, (int8x16_t)w, (int8x16_t)x);
#endif
}

// The sums of neighbours of a and b, in turn, `kWords` words at a time: lanes of four words of a and
// of b become one of half-sums.
template <int kWords, int... I>
[[gnu::always_inline]] inline DotSums AddNeighbours(DotSums a, DotSums b,
                                                    std::integer_sequence<int, I...>) {
  constexpr auto kFrom = [](int i, int half) {
    const int lane = i / 4 * 4, pair = i % 4 / kWords, word = i % kWords;
    return (pair % 2 ? kDotSums : 0) + lane + pair / 2 * kWords + word + 2 * half;
  };
  return __builtin_shufflevector(a, b, kFrom(I, 0)...) +
         __builtin_shufflevector(a, b, kFrom(I, 1)...);
}

// The sums over the lanes of four words.
template <typename Sums>
[[gnu::always_inline]] inline FourSums AddLanes(Sums sums) {
  if constexpr (sizeof(Sums) == sizeof(FourSums)) {
    return (FourSums)sums;
  } else if constexpr (sizeof(Sums) == 32) {
    return __builtin_shufflevector(sums, sums, 0, 1, 2, 3) +
           __builtin_shufflevector(sums, sums, 4, 5, 6, 7);
  } else {
    return AddLanes(__builtin_shufflevector(sums, sums, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(sums, sums, 8, 9, 10, 11, 12, 13, 14, 15));
  }
}

// The sums over each of four vectors.
[[gnu::always_inline]] inline FourSums SumsOfFour(DotSums a, DotSums b, DotSums c, DotSums d) {
  constexpr auto kAll = std::make_integer_sequence<int, kDotSums>{};
  return AddLanes(
      AddNeighbours<2>(AddNeighbours<1>(a, b, kAll), AddNeighbours<1>(c, d, kAll), kAll));
}

#endif  // defined(MIXTRAL_JAX_BYTE_DOTS)

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_BYTE_DOTS_H_
