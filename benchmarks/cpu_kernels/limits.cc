// What bounds the kernels of one form on this machine: the bytes that all threads read a second,
// and the multiplications with additions that they do in registers.
//
// Prints a line "NAME RATE" for each limit that the form has. The first argument is the number of
// threads. Compiled with the flags of the form, without optimizations that drop a loop.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int64_t kBytes = 400'000'000;
constexpr int64_t kSteps = 4'000'000;  // Of a loop of twelve independent sums.
constexpr int kRepeats = 9;
constexpr int kSums = 12;

int num_threads = 1;

// The shortest of several times that all threads take for work(thread), begun together.
template <typename Work>
double Seconds(const Work& work) {
  double best = 1e9;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> threads;
    for (int t = 0; t < num_threads; ++t) {
      threads.emplace_back([&, t] {
        ready.fetch_add(1);
        while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
        work(t);
      });
    }
    while (ready.load() < num_threads) std::this_thread::yield();
    const auto begun = std::chrono::steady_clock::now();
    go.store(true, std::memory_order_release);
    for (std::thread& thread : threads) thread.join();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begun;
    best = taken.count() < best ? taken.count() : best;
  }
  return best;
}

void PrintBandwidth() {
  typedef int64_t Words __attribute__((vector_size(64), may_alias));
  char* bytes = static_cast<char*>(std::aligned_alloc(4096, (kBytes + 4095) / 4096 * 4096));
  if (bytes == nullptr) std::exit(1);
  std::memset(bytes, 1, kBytes);
  std::vector<int64_t> sums(static_cast<size_t>(num_threads));
  const double seconds = Seconds([&](int t) {
    const int64_t share = kBytes / num_threads / 256 * 256;
    const char* from = bytes + t * share;
    Words part[4] = {};
    for (int64_t i = 0; i < share; i += 256)
      for (int j = 0; j < 4; ++j) part[j] ^= *reinterpret_cast<const Words*>(from + i + j * 64);
    sums[static_cast<size_t>(t)] = ((part[0] ^ part[1]) ^ (part[2] ^ part[3]))[0];
  });
  std::printf("bandwidth %.6g\n", static_cast<double>(kBytes) / seconds);
  std::fprintf(stderr, "%lld\n", static_cast<long long>(sums[0]));  // The sums are used.
  std::free(bytes);
}

// Prints the rate of add(sum), which does `count` multiplications with additions. The empty assembly
// keeps each sum in a register of its own, and each addition where it is.
template <typename Sum, typename Add>
[[maybe_unused]] void PrintPeak(const char* name, int64_t count, const Add& add) {
  const double seconds = Seconds([&](int) {
    Sum s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{};
    const auto step = [&](Sum& sum) __attribute__((always_inline)) {
      add(sum);
#if defined(__x86_64__)
      asm volatile("" : "+v"(sum));
#else
      asm volatile("" : "+w"(sum));
#endif
    };
    for (int64_t i = 0; i < kSteps; ++i) {
      step(s0), step(s1), step(s2), step(s3), step(s4), step(s5);
      step(s6), step(s7), step(s8), step(s9), step(s10), step(s11);
    }
  });
  const double sums = static_cast<double>(kSteps) * kSums * num_threads;
  std::printf("%s %.6g\n", name, sums * static_cast<double>(count) / seconds);
}

#define INLINE(sum) [=](auto & sum) __attribute__((always_inline))

void PrintPeaks() {
#if defined(__AVX512F__) && MIXTRAL_JAX_VECTOR_BITS == 512
  const __m512i ones = _mm512_set1_epi8(1);
  const __m512 one = _mm512_set1_ps(1.0f);
#if defined(__AVX512VNNI__)
  PrintPeak<__m512i>("int8", 64, INLINE(s) { s = _mm512_dpbusd_epi32(s, ones, ones); });
#endif
  PrintPeak<__m512>("float32", 16, INLINE(s) { s = _mm512_fmadd_ps(one, one, s); });
#if defined(__AVX512BF16__)
  const __m512bh pairs = (__m512bh)ones;
  PrintPeak<__m512>("bfloat16", 32, INLINE(s) { s = _mm512_dpbf16_ps(s, pairs, pairs); });
#endif
#elif defined(__AVX2__)
  const __m256i ones = _mm256_set1_epi8(1);
  const __m256 one = _mm256_set1_ps(1.0f);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  PrintPeak<__m256i>("int8", 32, INLINE(s) { s = _mm256_dpbusd_epi32(s, ones, ones); });
#elif defined(__AVXVNNI__)
  PrintPeak<__m256i>("int8", 32, INLINE(s) { s = _mm256_dpbusd_avx_epi32(s, ones, ones); });
#else
  PrintPeak<__m256i>("int8", 16, INLINE(s) {
    __m256i factor = ones;
    asm volatile("" : "+x"(factor));
    s = _mm256_add_epi32(s, _mm256_madd_epi16(factor, ones));
  });
#endif
  PrintPeak<__m256>("float32", 8, INLINE(s) { s = _mm256_fmadd_ps(one, one, s); });
#elif defined(__aarch64__)
  const int8x16_t ones = vdupq_n_s8(1);
  const float32x4_t one = vdupq_n_f32(1.0f);
#if defined(__ARM_FEATURE_MATMUL_INT8)
  PrintPeak<int32x4_t>("int8", 32, INLINE(s) { s = vmmlaq_s32(s, ones, ones); });
#elif defined(__ARM_FEATURE_DOTPROD)
  PrintPeak<int32x4_t>("int8", 16, INLINE(s) { s = vdotq_s32(s, ones, ones); });
#endif
  PrintPeak<float32x4_t>("float32", 4, INLINE(s) { s = vfmaq_f32(s, one, one); });
#endif
}

}  // namespace

int main(int, char** arguments) {
  num_threads = std::atoi(arguments[1]);
  PrintBandwidth();
  PrintPeaks();
}
