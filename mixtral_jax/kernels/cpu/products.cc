// Kernels for CPU: products with weights as they are stored, and attention over pages in place.
//
// What XLA:CPU lacks. It has no fast product of one row with int8 weights (30 times slower than
// reading them), no grouped product, and it copies the pages of a cache before it looks at them.
//
// Every number is computed in an order that depends on its own row alone: never on how many rows
// stand beside it, which thread takes it, or where its pages lie. Equal rows give equal bits.
//
// The XLA forms in layers.py, moe.py and attention.py compute the same; tests hold them together.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// ---- Threads ------------------------------------------------------------------------------------

// Threads that wait for the next kernel awake for a while: a layer calls five of them, each takes
// some hundred microseconds, and to wake a sleeping thread takes as long.
class Crew {
 public:
  // Calls work(i) once for each i in [0, n), on `threads` threads with this one.
  template <typename Work>
  static void Run(int64_t threads, int64_t n, const Work& work) {
    Crew* const crew = One();
    std::unique_lock<std::mutex> turn(crew->turn_, std::try_to_lock);
    if (threads < 2 || n < 2 || !turn.owns_lock()) {
      for (int64_t i = 0; i < n; ++i) work(i);
      return;
    }
    try {
      for (; crew->hired_ < threads - 1; ++crew->hired_) {
        std::thread([crew] { crew->Serve(); }).detach();
      }
    } catch (const std::system_error&) {  // no more threads to be had: with those there are
    }
    crew->call_ = [](const void* work, int64_t i) { (*static_cast<const Work*>(work))(i); };
    crew->work_ = &work;
    crew->done_.store(0, std::memory_order_relaxed);
    const uint64_t job = (crew->ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    crew->ticket_.store(job << 32 | static_cast<uint64_t>(n));
    if (crew->asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(crew->bed_);
      crew->alarm_.notify_all();
    }
    crew->Take(job);
    for (int spins = 0; crew->done_.load(std::memory_order_acquire) < n; ++spins) {
      // Long enough for whoever holds the last part to be elsewhere: the machine may be shared.
      spins < 1000 ? Pause() : std::this_thread::yield();
    }
  }

 private:
  static constexpr std::chrono::microseconds kAwake{300};

  // Not in Run: there would be one crew for each kind of work, awake beside the others.
  static Crew* One() {
    static Crew* const crew = new Crew;  // never ended: its threads may outlive everything else
    return crew;
  }

  // Takes parts of this job, the last first, until none is left. A ticket is the job's number and
  // how many parts are left: what a job is may be read only after a part of it was taken, for then
  // it cannot end and the next one cannot be written over it.
  void Take(uint64_t job) {
    for (;;) {
      uint64_t ticket = ticket_.load(std::memory_order_acquire);
      const int64_t left = static_cast<int64_t>(ticket & 0xffffffff);
      if (ticket >> 32 != job || left == 0) return;
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1)) continue;
      call_(work_, left - 1);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void Serve() {
    uint64_t seen = 0;
    for (;;) {
      const auto bedtime = std::chrono::steady_clock::now() + kAwake;
      while (ticket_.load(std::memory_order_acquire) >> 32 == seen) {
        if (std::chrono::steady_clock::now() < bedtime) {
          for (int i = 0; i < 32; ++i) Pause();
          continue;
        }
        std::unique_lock<std::mutex> lock(bed_);
        asleep_.fetch_add(1);
        alarm_.wait(lock, [&] { return ticket_.load() >> 32 != seen; });
        asleep_.fetch_sub(1);
      }
      seen = ticket_.load(std::memory_order_acquire) >> 32;
      Take(seen);
    }
  }

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::mutex turn_;  // one job at a time; who finds it taken works alone
  int64_t hired_ = 0;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* work_ = nullptr;
  std::atomic<int64_t> done_{0};
  std::atomic<uint64_t> ticket_{0};
  std::mutex bed_;
  std::condition_variable alarm_;
  std::atomic<int> asleep_{0};
};

template <typename Work>
void ParallelFor(ffi::ThreadPool& pool, int64_t n, const Work& work) {
  Crew::Run(pool.num_threads(), n, work);
}

// Room for n values, kept for the thread's next call: fresh memory costs a page fault every 4 KiB.
// One user at a time for each type. It begins at a cache line; what is in it is left over.
template <typename T>
T* Room(int64_t n) {
  constexpr size_t kLine = 64;
  thread_local std::unique_ptr<void, decltype(&std::free)> kept(nullptr, &std::free);
  thread_local int64_t size = 0;
  if (size < n) {
    const size_t bytes = (n * sizeof(T) + kLine - 1) / kLine * kLine;
    size = 0;
    kept.reset(std::aligned_alloc(kLine, bytes));
    size = kept ? static_cast<int64_t>(bytes / sizeof(T)) : throw std::bad_alloc();
  }
  return static_cast<T*>(kept.get());
}

// ---- Vectors of eight floats --------------------------------------------------------------------

constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4)));

inline Floats Load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void Store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
inline Floats Spread(float v) { return v - Floats{}; }

// a * b + c with one rounding where the machine can. Said outright, and contraction is turned off:
// left to itself the compiler does it in one loop and not in the next.
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

// exp(x) for x <= 0, within 2 units in the last place; 0 where it would be denormal.
inline Floats Exp(Floats x) {
  // 2^n * 2^f with f in [-1/2, 1/2]; the series of 2^f in t = f ln 2 to the seventh power.
  Floats scaled = x * 1.4426950408889634f;
  const Floats shift = Spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Floats whole = (scaled + shift) - shift;
  Floats t = (x - whole * 0.693145751953125f) - whole * 1.428606820309417e-6f;
  Floats p = Spread(1.0f / 5040);
  p = MulAdd(p, t, Spread(1.0f / 720));
  p = MulAdd(p, t, Spread(1.0f / 120));
  p = MulAdd(p, t, Spread(1.0f / 24));
  p = MulAdd(p, t, Spread(1.0f / 6));
  p = MulAdd(p, t, Spread(0.5f));
  p = MulAdd(p, t, Spread(1.0f));
  p = MulAdd(p, t, Spread(1.0f));
  Ints n = __builtin_convertvector(whole, Ints);
  Ints bits = (n + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  Ints small = x < -87.0f;
  Floats value = p * power;
  Ints kept;
  std::memcpy(&kept, &value, sizeof kept);
  kept &= ~small;
  std::memcpy(&value, &kept, sizeof value);
  return value;
}

// ---- Products -----------------------------------------------------------------------------------

// How many values ahead weights are called from memory; the processor's own guessing stops at
// the end of a page. Worth a third at eight rows.
constexpr int64_t kAhead = 4608;

// Calls f with 0 .. N - 1 as constants. Arrays that are indexed so stay in registers; those of a
// plain loop, which the compiler unrolls too late, go through memory.
template <typename F, int... I>
[[gnu::always_inline]] inline void Each(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
[[gnu::always_inline]] inline void Each(F f) {
  Each(f, std::make_integer_sequence<int, N>{});
}
#define EACH(i) [&](auto i) __attribute__((always_inline))

// Dot products of kRows rows of x, `stride` apart, with kOuts rows of w; all of n values.
// Each accumulator walks over n on its own, so kRows and kOuts do not change a result.
template <int kRows, int kOuts>
inline void Dots(const float* x, int64_t stride, const float* w, int64_t n,
                 float (&out)[kRows][kOuts]) {
  Floats sums[kRows][kOuts];
  Each<kRows>(EACH(r) { Each<kOuts>(EACH(o) { sums[r][o] = Floats{}; }); });
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    Floats weights[kOuts];
    Each<kOuts>(EACH(o) {
      weights[o] = Load(w + o * n + k);
      __builtin_prefetch(w + o * n + k + kAhead);
    });
    Each<kRows>(EACH(r) {
      const Floats value = Load(x + r * stride + k);
      Each<kOuts>(EACH(o) { sums[r][o] = MulAdd(value, weights[o], sums[r][o]); });
    });
  }
  Each<kRows>(EACH(r) {
    Each<kOuts>(EACH(o) {
      out[r][o] = Sum(sums[r][o]);
      for (int64_t i = k; i < n; ++i) out[r][o] += x[r * stride + i] * w[o * n + i];
    });
  });
}

#if defined(__AVX2__)
// sum + the products of two vectors of int16, added in pairs. Opaque, because the compiler would
// add sums of later steps first and run out of registers.
[[gnu::always_inline]] inline void MulAdd(__m256i a, __m256i b, __m256i& sum) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  asm("" : "+x"(sum));
}

inline __m256i Widen(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline __m256i LoadInts(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void StoreInts(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
#endif

template <int kRows, int kOuts>
inline void Dots(const int16_t* x, int64_t stride, const int8_t* w, int64_t n,
                 int32_t (&out)[kRows][kOuts]) {
  int64_t k = 0;
#if defined(__AVX2__)
  __m256i sums[kRows][kOuts];
  Each<kRows>(EACH(r) { Each<kOuts>(EACH(o) { sums[r][o] = _mm256_setzero_si256(); }); });
  const auto take = [&](int64_t k) __attribute__((always_inline)) {
    __m256i weights[kOuts];
    Each<kOuts>(EACH(o) { weights[o] = Widen(w + o * n + k); });
    Each<kRows>(EACH(r) {
      const __m256i value = LoadInts(x + r * stride + k);
      Each<kOuts>(EACH(o) { MulAdd(value, weights[o], sums[r][o]); });
    });
  };
  for (; k + 64 <= n; k += 64) {
    for (int o = 0; o < kOuts; ++o) __builtin_prefetch(w + o * n + k + kAhead);
    take(k), take(k + 16), take(k + 32), take(k + 48);
  }
  for (; k + 16 <= n; k += 16) take(k);
  Each<kRows>(EACH(r) {
    Each<kOuts>(EACH(o) {
      __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums[r][o]),
                                   _mm256_extracti128_si256(sums[r][o], 1));
      half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
      half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
      out[r][o] = _mm_cvtsi128_si32(half);
    });
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
inline float Peak(const float* row, int64_t n) {
  Floats most = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats value = Load(row + i), size = value < 0.0f ? -value : value;
    most = size > most ? size : most;
  }
  float peak = 0;
  for (int lane = 0; lane < kLanes; ++lane) peak = std::max(peak, most[lane]);
  for (; i < n; ++i) peak = std::max(peak, std::fabs(row[i]));
  return peak;
}

// Rounds n floats to -127 .. 127; returns their scale: row = values * scale.
template <typename Value>
inline float Round(const float* row, int64_t n, Value* values) {
  const float scale = Peak(row, n) / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<Value>(__builtin_rintf(row[i] * inverse));
  return scale;
}

// Rows of activations as the products take them.
struct FloatRows {
  using Weight = float;
  using Total = float;
  const float* values;
  int64_t stride;
  const float* Row(int64_t r) const { return values + r * stride; }
  static float Finish(float total, int64_t, const float*, int64_t) { return total; }
};

// Quantised: x = values * scale, one scale a row, values in -127 .. 127 (widened for the products).
struct Int8Rows {
  using Weight = int8_t;
  using Total = int32_t;
  int64_t stride;  // rows begin at cache lines, or every second load would touch two
  int16_t* values;
  std::vector<float> scales;

  Int8Rows(ffi::ThreadPool& pool, const float* x, int64_t rows, int64_t n)
      : stride((n + 31) / 32 * 32), values(Room<int16_t>(rows * stride)), scales(rows) {
    constexpr int64_t kBlock = 8;
    ParallelFor(pool, (rows + kBlock - 1) / kBlock, [&](int64_t block) {
      for (int64_t r = block * kBlock; r < std::min(rows, (block + 1) * kBlock); ++r) {
        int16_t* to = values + r * stride;
        scales[r] = Round(x + r * n, n, to);
        std::fill(to + n, to + stride, int16_t{0});
      }
    });
  }
  const int16_t* Row(int64_t r) const { return values + r * stride; }
  float Finish(int32_t total, int64_t r, const float* scale, int64_t o) const {
    return static_cast<float>(total) * (scales[r] * scale[o]);
  }
};

// y[r, o] for kRows rows from r and the outputs [first, last).
template <int kRows, typename Rows>
void Strip(const Rows& x, int64_t r, int64_t n, const typename Rows::Weight* w, const float* scale,
           int64_t first, int64_t last, float* y, int64_t outs) {
  // As many products at a time as fit the registers.
  constexpr int kOuts = kRows == 1 ? 4 : kRows == 2 ? 4 : 2;
  int64_t o = first;
  for (; o + kOuts <= last; o += kOuts) {
    typename Rows::Total totals[kRows][kOuts];
    Dots<kRows, kOuts>(x.Row(r), x.stride, w + o * n, n, totals);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kOuts; ++j)
        y[(r + i) * outs + o + j] = x.Finish(totals[i][j], r + i, scale, o + j);
  }
  for (; o < last; ++o) {
    typename Rows::Total totals[kRows][1];
    Dots<kRows, 1>(x.Row(r), x.stride, w + o * n, n, totals);
    for (int i = 0; i < kRows; ++i)
      y[(r + i) * outs + o] = x.Finish(totals[i][0], r + i, scale, o);
  }
}

#if defined(__AVX2__)
// ---- Products of many rows ----
//
// From so many rows on it pays to turn the weights around first: then a vector of sums belongs to
// eight outputs, and there is nothing to add up at the end. Sums of integers: the same bits.
constexpr int64_t kMany = 24;
constexpr int64_t kPanel = 16;    // outputs that are turned around together
constexpr int64_t kDeep = 2048;   // values of them at a time: what stays in the second cache

// panel[k / 2][o][k % 2] = w[o, k] for 16 outputs, n apart, and `deep` values.
// Outputs from `outs` on, and values from `deep` to the next multiple of 16, are zero.
void Turn(const int8_t* w, int64_t n, int64_t outs, int64_t deep, int16_t* panel) {
  alignas(32) int8_t rest[16];
  for (int64_t k = 0; k < deep; k += 16) {
    for (int half = 0; half < 2; ++half) {
      __m256i rows[8], pairs[8], quads[8];
      Each<8>(EACH(i) {
        const int64_t o = half * 8 + i;
        const int8_t* from = w + o * n + k;
        if (o >= outs || k + 16 > deep) {
          std::memset(rest, 0, sizeof rest);
          if (o < outs) std::memcpy(rest, from, deep - k);
          from = rest;
        }
        rows[i] = Widen(from);
      });
      Each<4>(EACH(i) {
        pairs[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
      });
      Each<2>(EACH(i) {
        Each<2>(EACH(j) {
          quads[4 * i + 2 * j] = _mm256_unpacklo_epi64(pairs[4 * i + j], pairs[4 * i + j + 2]);
          quads[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[4 * i + j], pairs[4 * i + j + 2]);
        });
      });
      int16_t* to = panel + k * kPanel + half * 16;
      Each<4>(EACH(i) {
        StoreInts(to + i * 2 * kPanel, _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20));
        StoreInts(to + (i + 4) * 2 * kPanel, _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31));
      });
    }
  }
}

// Adds the products of kRows rows with a panel to totals [kRows][16].
template <int kRows>
void Tile(const int16_t* x, int64_t stride, const int16_t* panel, int64_t deep, int32_t* totals) {
  __m256i sums[kRows][2];
  const auto total = [&](int r, int j) { return totals + r * kPanel + j * kLanes; };
  Each<kRows>(EACH(r) {
    Each<2>(EACH(j) { sums[r][j] = LoadInts(total(r, j)); });
  });
  for (int64_t k = 0; k < deep; k += 2) {
    const __m256i first = LoadInts(panel + k * kPanel);
    const __m256i second = LoadInts(panel + k * kPanel + 16);
    Each<kRows>(EACH(r) {
      int32_t pair;
      std::memcpy(&pair, x + r * stride + k, sizeof pair);
      const __m256i value = _mm256_set1_epi32(pair);
      MulAdd(value, first, sums[r][0]);
      MulAdd(value, second, sums[r][1]);
    });
  }
  Each<kRows>(EACH(r) { Each<2>(EACH(j) { StoreInts(total(r, j), sums[r][j]); }); });
}

// As Product below, for many rows.
void ManyRows(const Int8Rows& x, int64_t from, int64_t to, int64_t n, const int8_t* w,
              const float* scale, int64_t first, int64_t last, float* y, int64_t outs) {
  alignas(64) thread_local int16_t panel[kPanel * kDeep];
  int32_t* totals = Room<int32_t>((to - from) * kPanel);
  for (int64_t o = first; o < last; o += kPanel) {
    const int64_t count = std::min(kPanel, last - o);
    std::fill(totals, totals + (to - from) * kPanel, 0);
    for (int64_t k = 0; k < n; k += kDeep) {
      const int64_t deep = std::min(kDeep, n - k);
      Turn(w + o * n + k, n, count, deep, panel);
      int64_t r = from;
      const auto tile = [&](auto rows) {
        for (; r + rows <= to; r += rows)
          Tile<rows>(x.Row(r) + k, x.stride, panel, deep, totals + (r - from) * kPanel);
      };
      tile(std::integral_constant<int, 6>{});  // what the registers hold
      tile(std::integral_constant<int, 4>{});
      tile(std::integral_constant<int, 2>{});
      tile(std::integral_constant<int, 1>{});
    }
    for (int64_t r = from; r < to; ++r)
      for (int64_t i = 0; i < count; ++i)
        y[r * outs + o + i] = x.Finish(totals[(r - from) * kPanel + i], r, scale, o + i);
  }
}
#endif

// y[r, o] = sum over i of x[r, i] w[o, i], for the rows [from, to) and outputs [first, last).
template <typename Rows>
void Product(const Rows& x, int64_t from, int64_t to, int64_t n, const typename Rows::Weight* w,
             const float* scale, int64_t first, int64_t last, float* y, int64_t outs) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<Rows, Int8Rows>) {
    if (to - from >= kMany) return ManyRows(x, from, to, n, w, scale, first, last, y, outs);
  }
#endif
  // Weights that stay in the first cache while all rows pass by.
  const int64_t block = std::max<int64_t>(
      4, 16384 / (n * static_cast<int64_t>(sizeof(typename Rows::Weight))) & ~int64_t{3});
  for (int64_t o = first; o < last; o += block) {
    const int64_t end = std::min(last, o + block);
    int64_t r = from;
    for (; r + 4 <= to; r += 4) Strip<4>(x, r, n, w, scale, o, end, y, outs);
    if (r + 2 <= to) Strip<2>(x, r, n, w, scale, o, end, y, outs), r += 2;
    if (r < to) Strip<1>(x, r, n, w, scale, o, end, y, outs);
  }
}

// Outputs of one task: enough work to be worth a task, and several tasks for each thread.
int64_t OutsPerTask(ffi::ThreadPool& pool, int64_t outs, int64_t rows, int64_t n) {
  int64_t worth = 200'000 / std::max<int64_t>(1, rows * n) + 1;
  int64_t fair = outs / (8 * std::max<int64_t>(1, pool.num_threads())) + 1;
  return (std::max(worth, fair) + 15) & ~int64_t{15};
}

struct Weights {
  const void* values;
  const float* scale;  // null for floats
  float* y;
  int64_t outs;
};

// The products of the same rows with several weights.
template <typename Rows>
void Products(ffi::ThreadPool& pool, const Rows& x, int64_t rows, int64_t n,
              const std::vector<Weights>& all) {
  struct Task {
    const Weights* weights;
    int64_t first, last;
  };
  std::vector<Task> tasks;
  for (const Weights& each : all) {
    int64_t step = OutsPerTask(pool, each.outs, rows, n);
    for (int64_t o = 0; o < each.outs; o += step)
      tasks.push_back({&each, o, std::min(each.outs, o + step)});
  }
  ParallelFor(pool, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[i];
    Product(x, 0, rows, n, static_cast<const typename Rows::Weight*>(task.weights->values),
            task.weights->scale, task.first, task.last, task.weights->y, task.weights->outs);
  });
}

// linear(x [R I] f32, weight [O I], weight [O' I], ...) -> y [R O], y' [R O'], ... f32.
// int8 weights are each followed by their scales [O].
ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs args,
                  ffi::RemainingRets rets) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1];
  const bool quantised = args.size() == 2 * rets.size();
  std::vector<Weights> all;
  for (size_t i = 0; i < rets.size(); ++i) {
    auto weight = args.get<ffi::AnyBuffer>(quantised ? 2 * i : i);
    auto y = rets.get<ffi::AnyBuffer>(i);
    if (!weight.has_value() || !y.has_value()) return ffi::Error::InvalidArgument("linear: args");
    const float* scale = nullptr;
    if (quantised) {
      auto buffer = args.get<ffi::Buffer<ffi::F32>>(2 * i + 1);
      if (!buffer.has_value()) return ffi::Error::InvalidArgument("linear: scales must be f32");
      scale = buffer->typed_data();
    }
    auto dtype = weight->element_type();
    if (dtype != (quantised ? ffi::S8 : ffi::F32))
      return ffi::Error::InvalidArgument("linear: weights must be f32, or s8 with scales");
    all.push_back({weight->untyped_data(), scale, static_cast<float*>((*y)->untyped_data()),
                   weight->dimensions()[0]});
  }
  if (quantised) {
    Products(pool, Int8Rows(pool, x.typed_data(), rows, n), rows, n, all);
  } else {
    Products(pool, FloatRows{x.typed_data(), n}, rows, n, all);
  }
  return ffi::Error::Success();
}

template <typename Rows>
void Grouped(ffi::ThreadPool& pool, const Rows& x, int64_t n, const typename Rows::Weight* w,
             const float* scale, const int32_t* sizes, int64_t experts, float* y, int64_t outs) {
  struct Task {
    int64_t expert, from, to, first, last;
  };
  std::vector<Task> tasks;
  int64_t from = 0;
  for (int64_t e = 0; e < experts; from += sizes[e++]) {
    if (sizes[e] == 0) continue;
    int64_t step = OutsPerTask(pool, outs, sizes[e], n);
    for (int64_t o = 0; o < outs; o += step)
      tasks.push_back({e, from, from + sizes[e], o, std::min(outs, o + step)});
  }
  ParallelFor(pool, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& t = tasks[i];
    Product(x, t.from, t.to, n, w + t.expert * outs * n,
            scale == nullptr ? nullptr : scale + t.expert * outs, t.first, t.last, y, outs);
  });
}

// grouped(x [M I] f32, sizes [E] s32, weight [E O I], (scales [E O])) -> y [M O] f32: the rows of x
// stand in E groups, each of which meets its own weights. Rows behind the last group are zero.
ffi::Error GroupedLinear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> sizes,
                         ffi::AnyBuffer weight, ffi::RemainingArgs args,
                         ffi::ResultBuffer<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1];
  const int64_t experts = weight.dimensions()[0], outs = weight.dimensions()[1];
  const int32_t* size = sizes.typed_data();
  int64_t used = 0;
  for (int64_t e = 0; e < experts; ++e) used += size[e];
  if (used > rows) return ffi::Error::InvalidArgument("grouped: more rows in groups than rows");
  float* out = y->typed_data();
  std::fill(out + used * outs, out + rows * outs, 0.0f);
  if (args.size() == 1) {
    auto scale = args.get<ffi::Buffer<ffi::F32>>(0);
    if (!scale.has_value() || weight.element_type() != ffi::S8)
      return ffi::Error::InvalidArgument("grouped: s8 weights take f32 scales");
    Grouped(pool, Int8Rows(pool, x.typed_data(), used, n), n,
            static_cast<const int8_t*>(weight.untyped_data()), scale->typed_data(), size, experts,
            out, outs);
  } else {
    if (weight.element_type() != ffi::F32)
      return ffi::Error::InvalidArgument("grouped: weights must be f32, or s8 with scales");
    Grouped(pool, FloatRows{x.typed_data(), n}, n, static_cast<const float*>(weight.untyped_data()),
            nullptr, size, experts, out, outs);
  }
  return ffi::Error::Success();
}

// ---- Norm ---------------------------------------------------------------------------------------

// norm(x [R D] f32, weight [D] f32, eps) -> x / sqrt(mean(x^2) + eps) * weight
ffi::Error Norm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight,
                ffi::ResultBuffer<ffi::F32> y, float eps) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1];
  constexpr int64_t kBlock = 16;  // fewer are not worth a task
  ParallelFor(pool, (rows + kBlock - 1) / kBlock, [&](int64_t block) {
    for (int64_t r = block * kBlock; r < std::min(rows, (block + 1) * kBlock); ++r) {
      const float* row = x.typed_data() + r * n;
      float squares[1][1];
      Dots<1, 1>(row, n, row, n, squares);
      const float scale = 1.0f / std::sqrt(squares[0][0] / static_cast<float>(n) + eps);
      for (int64_t i = 0; i < n; ++i)
        y->typed_data()[r * n + i] = row[i] * scale * weight.typed_data()[i];
    }
  });
  return ffi::Error::Success();
}

// ---- SwiGLU -------------------------------------------------------------------------------------

// swiglu(gate [R F] f32, up [R F] f32) -> gate / (1 + exp(-gate)) * up
ffi::Error Swiglu(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> gate, ffi::Buffer<ffi::F32> up,
                  ffi::ResultBuffer<ffi::F32> y) {
  const int64_t n = static_cast<int64_t>(gate.element_count());
  const auto product = [](Floats g, Floats u) {
    const Floats power = Exp(g < 0.0f ? g : -g);  // exp(-|g|)
    return g * ((g < 0.0f ? power : Spread(1.0f)) / (1.0f + power)) * u;
  };
  constexpr int64_t kBlock = 8192;
  ParallelFor(pool, (n + kBlock - 1) / kBlock, [&](int64_t block) {
    const float *g = gate.typed_data(), *u = up.typed_data();
    float* out = y->typed_data();
    int64_t i = block * kBlock;
    const int64_t end = std::min(n, i + kBlock);
    for (; i + kLanes <= end; i += kLanes) Store(out + i, product(Load(g + i), Load(u + i)));
    for (; i < end; ++i) out[i] = product(Spread(g[i]), Spread(u[i]))[0];
  });
  return ffi::Error::Success();
}

// ---- Attention over pages -----------------------------------------------------------------------

constexpr int64_t kKeyBlock = 64;     // keys that are scored before their values are weighed
constexpr int64_t kSpan = 512;        // keys of one task of a long context; at absolute positions
constexpr int64_t kQueryBlock = 8;    // queries of one task
constexpr float kUnseen = -1e30f;     // the score of a key that a query does not see

struct Cache {
  char* pages;  // [P Y 2K H] float, or [P Y 2K H+4] int8: a head's values and their scale
  int64_t page_size, kv_heads, head_size;
  bool rounded;

  int64_t HeadBytes() const { return head_size * (rounded ? 1 : 4) + (rounded ? 4 : 0); }
  int64_t PairBytes() const { return 2 * HeadBytes(); }  // a key and its value
  int64_t TokenBytes() const { return kv_heads * PairBytes(); }
  char* Token(const int32_t* table, int64_t position) const {
    return pages + (table[position / page_size] * page_size + position % page_size) * TokenBytes();
  }
  void Put(char* head, const float* row) const {
    if (!rounded) {
      std::memcpy(head, row, head_size * sizeof(float));
      return;
    }
    const float scale = Round(row, head_size, reinterpret_cast<int8_t*>(head));
    std::memcpy(head + head_size, &scale, sizeof scale);
  }
  // The 2 H floats of a key and its value; `room` is for those that are not floats yet.
  const float* Pair(const char* pair, float* room) const {
    if (!rounded) return reinterpret_cast<const float*>(pair);
    for (int64_t part = 0; part < 2; ++part) {
      const char* head = pair + part * HeadBytes();
      float scale;
      std::memcpy(&scale, head + head_size, sizeof scale);
      for (int64_t h = 0; h < head_size; h += kLanes) {
        Bytes values;
        std::memcpy(&values, head + h, sizeof values);
        Store(room + part * head_size + h,
              __builtin_convertvector(__builtin_convertvector(values, Ints), Floats) * scale);
      }
    }
    return room;
  }
};

// A softmax-weighted sum under way (arXiv:2205.14135) for one query head.
struct Partial {
  float peak, total;
  float* mixed;  // [H], sum of exp(score - peak) * value
};

// Calls n bytes into the second cache; a block would push itself out of the first. Keys of one
// head lie too far apart for the processor to guess.
inline void Prefetch(const char* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// The sums of four vectors.
inline void Sum4(const Floats (&v)[4], float* out) {
#if defined(__AVX2__)
  const __m256 first = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]);
  const __m256 second = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
  const __m256 both = _mm256_hadd_ps(first, second);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = Sum(v[i]);
#endif
}

// One query head over a block of keys: which of them it sees, and what it has summed up so far.
struct Row {
  const float* query;  // [H], scaled
  int64_t first, last;  // of the block's keys, those it sees
  Partial* sum;
};

// mixed = mixed * shrink + the sum over i of scores[i] * values[i], for kRows rows and kVectors
// vectors of the values at `offset`.
template <int kRows, int kVectors>
inline void Weigh(const float* const* values, int64_t offset, int64_t count,
                  const float (*scores)[kKeyBlock], const float* shrink, const Row* rows,
                  int64_t h) {
  Floats sums[kRows][kVectors];
  Each<kRows>(EACH(r) {
    Each<kVectors>(EACH(j) {
      sums[r][j] = Load(rows[r].sum->mixed + h + j * kLanes) * shrink[r];
    });
  });
  for (int64_t i = 0; i < count; ++i) {
    const float* value = values[i] + offset + h;
    Each<kVectors>(EACH(j) {
      const Floats part = Load(value + j * kLanes);
      Each<kRows>(EACH(r) { sums[r][j] = MulAdd(Spread(scores[r][i]), part, sums[r][j]); });
    });
  }
  Each<kRows>(EACH(r) {
    Each<kVectors>(EACH(j) { Store(rows[r].sum->mixed + h + j * kLanes, sums[r][j]); });
  });
}

// Takes a block of up to kKeyBlock keys into the sums of kRows rows that share a kv head; the key
// of token i stands at keys[i], its value behind it. Keys that a row does not see weigh nothing.
// Meanwhile the keys and values at `ahead`, if any, of so many bytes, are called from memory.
template <int kRows>
[[gnu::noinline]] void AttendBlock(const float* const* keys, const char* const* ahead, int64_t bytes, int64_t count,
                 int64_t size, const Row* rows) {
  alignas(32) float scores[kRows][kKeyBlock];
  float shrink[kRows];
  for (int64_t i = 0; i < count; i += 4) {
    const float* four[4];
    for (int j = 0; j < 4; ++j) {
      four[j] = keys[std::min(i + j, count - 1)];
      if (ahead != nullptr) Prefetch(ahead[std::min(i + j, count - 1)], bytes);
    }
    Floats dots[kRows][4];
    Each<kRows>(EACH(r) { Each<4>(EACH(j) { dots[r][j] = Floats{}; }); });
    for (int64_t h = 0; h < size; h += kLanes) {
      Floats parts[kRows];
      Each<kRows>(EACH(r) { parts[r] = Load(rows[r].query + h); });
      Each<4>(EACH(j) {
        const Floats key = Load(four[j] + h);
        Each<kRows>(EACH(r) { dots[r][j] = MulAdd(parts[r], key, dots[r][j]); });
      });
    }
    Each<kRows>(EACH(r) { Sum4(dots[r], scores[r] + i); });
  }
  for (int r = 0; r < kRows; ++r) {
    Partial& sum = *rows[r].sum;
    float* score = scores[r];
    std::fill(score, score + rows[r].first, kUnseen);
    std::fill(score + rows[r].last, score + (count + kLanes - 1) / kLanes * kLanes, kUnseen);
    Floats most = Spread(sum.peak);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats part = Load(score + i);
      most = part > most ? part : most;
    }
    float peak = most[0];
    for (int lane = 1; lane < kLanes; ++lane) peak = std::max(peak, most[lane]);
    shrink[r] = Exp(Spread(sum.peak - peak))[0];
    Floats total = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats weight = Exp(Load(score + i) - peak);
      Store(score + i, weight);
      total += weight;
    }
    sum.total = sum.total * shrink[r] + Sum(total);
    sum.peak = peak;
  }
  int64_t h = 0;
  for (; h + 4 * kLanes <= size; h += 4 * kLanes)
    Weigh<kRows, 4>(keys, size, count, scores, shrink, rows, h);
  for (; h < size; h += kLanes) Weigh<kRows, 1>(keys, size, count, scores, shrink, rows, h);
}

// Takes keys of a sequence into the sums [count, heads] of some queries, `group` heads of which
// share a kv head: of query j the keys [first(j), last(j)). Blocks lie at multiples of kKeyBlock,
// so a query's sums do not depend on the queries beside it.
template <typename First, typename Last>
void Attend(const Cache& cache, const int32_t* table, const float* queries, int64_t count,
            int64_t group, const First& first, const Last& last, Partial* sums) {
  const int64_t size = cache.head_size, heads = cache.kv_heads * group, end = last(count - 1);
  const int64_t bytes = cache.PairBytes();
  const float* keys[kKeyBlock];
  const char *tokens[kKeyBlock], *ahead[kKeyBlock];
  std::vector<float> wide(cache.rounded ? kKeyBlock * 2 * size : 0);
  std::vector<Row> rows;
  for (int64_t start = first(0) / kKeyBlock * kKeyBlock; start < end; start += kKeyBlock) {
    const int64_t from = std::max(start, first(0)), to = std::min(start + kKeyBlock, end);
    const bool more = to < end;
    // Tokens before the first that is seen may have left the pages: their places stand for no one.
    for (int64_t i = 0; i < to - start; ++i) {
      tokens[i] = cache.Token(table, std::max(start + i, from));
    }
    for (int64_t k = 0; k < cache.kv_heads; ++k) {
      rows.clear();
      for (int64_t j = 0; j < count; ++j) {
        const int64_t seen = std::max(first(j), start), unseen = std::min(last(j), to);
        for (int64_t head = k * group; seen < unseen && head < (k + 1) * group; ++head) {
          const int64_t row = j * heads + head;
          rows.push_back({queries + row * size, seen - start, unseen - start, sums + row});
        }
      }
      // The next block in the order of memory, a part with each head of this one.
      for (int64_t i = 0; more && i < kKeyBlock; ++i) {
        const int64_t part = k * kKeyBlock + i, token = std::min(to + part / cache.kv_heads, end - 1);
        ahead[i] = cache.Token(table, token) + part % cache.kv_heads * bytes;
      }
      for (int64_t i = 0; i < to - start; ++i)
        keys[i] = cache.Pair(tokens[i] + k * bytes, wide.data() + i * 2 * size);
      const int64_t n = static_cast<int64_t>(rows.size());
      const char* const* next = more ? ahead : nullptr;
      int64_t r = 0;
      for (; r + 3 <= n; r += 3, next = nullptr)
        AttendBlock<3>(keys, next, bytes, to - start, size, rows.data() + r);
      if (r + 2 <= n) {
        AttendBlock<2>(keys, next, bytes, to - start, size, rows.data() + r);
        r += 2, next = nullptr;
      }
      if (r < n) AttendBlock<1>(keys, next, bytes, to - start, size, rows.data() + r);
    }
  }
}

// paged(q [T N H], k [T K H], v [T K H], pages [P Y 2K H] or s8 [P Y 2K H+4], lengths [S], query_starts [S+1],
//       page_table [S W], num_sequences []) -> mixed [T N H], pages
//
// Writes the new keys and values into the pages, which are the same buffer before and after, then
// attends: query t at position p of its sequence sees positions max(0, p - window + 1) .. p.
// `window` 0 means all. Places of unused tokens are zero.
ffi::Error Paged(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                 ffi::Buffer<ffi::F32> v, ffi::AnyBuffer pages,
                 ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::S32> query_starts,
                 ffi::Buffer<ffi::S32> page_table, ffi::Buffer<ffi::S32> num_sequences,
                 ffi::ResultBuffer<ffi::F32> mixed, ffi::Result<ffi::AnyBuffer> pages_out,
                 int64_t window) {
  const int64_t tokens = q.dimensions()[0], heads = q.dimensions()[1], size = q.dimensions()[2];
  const int64_t kv_heads = k.dimensions()[1], group = heads / kv_heads;
  if (size % kLanes) return ffi::Error::InvalidArgument("paged: the head size must be a multiple of 8");
  const bool rounded = pages.element_type() == ffi::S8;
  if (!rounded && pages.element_type() != ffi::F32)
    return ffi::Error::InvalidArgument("paged: pages must be f32 or s8");
  if (pages_out->untyped_data() != pages.untyped_data())
    std::memcpy(pages_out->untyped_data(), pages.untyped_data(), pages.size_bytes());
  const Cache cache{static_cast<char*>(pages_out->untyped_data()), pages.dimensions()[1], kv_heads,
                    size, rounded};
  const int32_t* starts = query_starts.typed_data();
  const int64_t sequences = num_sequences.typed_data()[0], width = page_table.dimensions()[1];
  float* out = mixed->typed_data();
  std::fill(out + starts[sequences] * heads * size, out + tokens * heads * size, 0.0f);

  for (int64_t s = 0; s < sequences; ++s) {
    const int32_t* table = page_table.typed_data() + s * width;
    for (int64_t t = starts[s]; t < starts[s + 1]; ++t) {
      char* place = cache.Token(table, lengths.typed_data()[s] - (starts[s + 1] - t));
      for (int64_t head = 0; head < kv_heads; ++head) {
        const int64_t from = (t * kv_heads + head) * size;
        cache.Put(place + head * cache.PairBytes(), k.typed_data() + from);
        cache.Put(place + head * cache.PairBytes() + cache.HeadBytes(), v.typed_data() + from);
      }
    }
  }

  // One task: some queries of a sequence against one span of its keys. Spans begin at multiples of
  // kSpan and are added up in order, so a query's result does not depend on how it was batched.
  struct Task {
    const int32_t* table;
    int64_t token, count, position, span, spans;  // first token, its position; span and how many
    float* partial;                               // [count, heads, 2 + H] of this span
  };
  const auto visible = [window](int64_t position) {
    return window == 0 ? 0 : std::max<int64_t>(0, position - window + 1);
  };
  std::vector<Task> tasks;
  const int64_t record = heads * (2 + size);
  int64_t scratch_size = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int32_t* table = page_table.typed_data() + s * width;
    for (int64_t t = starts[s]; t < starts[s + 1]; t += kQueryBlock) {
      const int64_t count = std::min<int64_t>(kQueryBlock, starts[s + 1] - t);
      const int64_t position = lengths.typed_data()[s] - (starts[s + 1] - t);
      const int64_t first = visible(position) / kSpan, last = (position + count - 1) / kSpan;
      for (int64_t span = first; span <= last; ++span) {
        tasks.push_back({table, t, count, position, span, last - first + 1, nullptr});
        scratch_size += count * record;
      }
    }
  }
  float* scratch = Room<float>(scratch_size);
  int64_t used = 0;
  for (Task& task : tasks) {
    task.partial = scratch + used;
    used += task.count * record;
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  ParallelFor(pool, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[i];
    const auto first = [&](int64_t j) {
      return std::max(visible(task.position + j), task.span * kSpan);
    };
    const auto last = [&](int64_t j) {
      return std::min(task.position + j + 1, (task.span + 1) * kSpan);
    };
    const int64_t begin = first(0), end = std::min(begin + kKeyBlock, last(task.count - 1));
    for (int64_t key = begin; key < end; ++key)
      Prefetch(cache.Token(task.table, key), cache.TokenBytes());
    const int64_t rows = task.count * heads;
    std::vector<float> scaled(rows * size);
    std::vector<Partial> sums(rows);
    const float* queries = q.typed_data() + task.token * heads * size;
    for (int64_t h = 0; h < rows * size; ++h) scaled[h] = queries[h] * scale;
    std::fill(task.partial, task.partial + task.count * record, 0.0f);
    for (int64_t row = 0; row < rows; ++row)
      sums[row] = {kUnseen, 0.0f, task.partial + row * (2 + size) + 2};
    Attend(cache, task.table, scaled.data(), task.count, group, first, last, sums.data());
    for (int64_t row = 0; row < rows; ++row) {
      task.partial[row * (2 + size)] = sums[row].peak;
      task.partial[row * (2 + size) + 1] = sums[row].total;
    }
  });
  for (size_t i = 0; i < tasks.size(); i += tasks[i].spans) {
    for (int64_t row = 0; row < tasks[i].count * heads; ++row) {
      float* y = out + (tasks[i].token * heads + row) * size;
      float peak = kUnseen, total = 0;
      for (int64_t span = 0; span < tasks[i].spans; ++span)
        peak = std::max(peak, tasks[i + span].partial[row * (2 + size)]);
      std::fill(y, y + size, 0.0f);
      for (int64_t span = 0; span < tasks[i].spans; ++span) {
        const float* partial = tasks[i + span].partial + row * (2 + size);
        const float shrink = Exp(Spread(partial[0] - peak))[0];
        total += partial[1] * shrink;
        for (int64_t h = 0; h < size; ++h) y[h] += partial[2 + h] * shrink;
      }
      for (int64_t h = 0; h < size; ++h) y[h] /= total;
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mixtral_jax_linear, Linear,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(mixtral_jax_grouped, GroupedLinear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(mixtral_jax_norm, Norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mixtral_jax_swiglu, Swiglu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(mixtral_jax_paged, Paged,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("window"));
