// Vectors of eight floats, and loops that are unrolled while they are compiled.

#ifndef MIXTRAL_JAX_KERNELS_CPU_VECTORS_H_
#define MIXTRAL_JAX_KERNELS_CPU_VECTORS_H_

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mixtral_jax {

constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4)));

inline Floats Load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void Store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
inline Floats Broadcast(float v) { return v - Floats{}; }

// a * b + c, with one rounding where the machine has such an instruction. The instruction is
// written out, and contraction by the compiler is turned off, because the compiler contracts one
// loop and not the next.
inline Floats MulAdd(Floats a, Floats b, Floats c) {
#if defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

inline float Sum(Floats v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Writes the sums of four vectors to out[0 .. 3].
inline void SumsOfFour(const Floats (&v)[4], float* out) {
#if defined(__AVX2__)
  const __m256 first = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]);
  const __m256 second = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
  const __m256 both = _mm256_hadd_ps(first, second);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = Sum(v[i]);
#endif
}

// exp(x) for x <= 0, within 2 units in the last place; 0 where the result would be denormal.
//
// exp(x) is 2^n * 2^f with an integer n and f in [-1/2, 1/2]; 2^f is the power series of exp in
// t = f ln 2 up to the seventh power.
inline Floats Exp(Floats x) {
  const Floats scaled = x * 1.4426950408889634f;
  const Floats shift = Broadcast(12582912.0f);  // Adding 1.5 * 2^23 rounds to an integer.
  const Floats whole = (scaled + shift) - shift;
  const Floats t = (x - whole * 0.693145751953125f) - whole * 1.428606820309417e-6f;
  Floats p = Broadcast(1.0f / 5040);
  p = MulAdd(p, t, Broadcast(1.0f / 720));
  p = MulAdd(p, t, Broadcast(1.0f / 120));
  p = MulAdd(p, t, Broadcast(1.0f / 24));
  p = MulAdd(p, t, Broadcast(1.0f / 6));
  p = MulAdd(p, t, Broadcast(0.5f));
  p = MulAdd(p, t, Broadcast(1.0f));
  p = MulAdd(p, t, Broadcast(1.0f));
  const Ints n = __builtin_convertvector(whole, Ints);
  const Ints bits = (n + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  const Ints is_denormal = x < -87.0f;
  Floats value = p * power;
  Ints value_bits;
  std::memcpy(&value_bits, &value, sizeof value_bits);
  value_bits &= ~is_denormal;
  std::memcpy(&value, &value_bits, sizeof value);
  return value;
}

// Calls f with the constants 0 .. N - 1. Arrays that are indexed by such constants stay in
// registers; in a plain loop, which the compiler unrolls too late, they go through memory.
template <typename F, int... I>
[[gnu::always_inline]] inline void Unroll(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
[[gnu::always_inline]] inline void Unroll(F f) {
  Unroll(f, std::make_integer_sequence<int, N>{});
}

// The head of the function that is given to Unroll.
#define INLINE_LAMBDA(i) [&](auto i) __attribute__((always_inline))

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_VECTORS_H_
