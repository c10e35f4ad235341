// Products of int8 rows with int4 weights in groups (weight.py has the form).
//
// A weight is q * scale + minimum with q in 0 .. 15, so a group's part of a product is the dot of
// the row's bytes with the q, which is exact, times the scale, and the sum of the bytes times the
// minimum. Both are rounded, added to each other, and then, in the order of the inputs, to the
// product: every form, every number of rows and every number of threads gives the same bits.
//
// A byte holds two inputs, the even one in its low bits: rows are kept as even inputs, then odd
// ones, for each vector of weights, and nothing needs to be interleaved.

#ifndef MIXTRAL_JAX_KERNELS_CPU_INT4_PRODUCTS_H_
#define MIXTRAL_JAX_KERNELS_CPU_INT4_PRODUCTS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "byte_panels.h"
#include "dot_products.h"
#include "nibble_dots.h"
#include "vectors.h"
#include "worker_pool.h"

namespace mixtral_jax {

constexpr int64_t kGroup4 = 32;                             // Inputs of a group.
constexpr int64_t kChunk4 = 2 * kNibbleBytes;               // Inputs of a vector of weights.
constexpr int64_t kGroupsOfChunk = kNibbleBytes / 16;       // One for each lane of four words.

struct Int4Matrix {
  const uint8_t* values;   // [outs, n / 2]
  const uint16_t* groups;  // float16 [outs, n / 32, 2]: scale and minimum
  float* y;                // [rows, outs], the product's place
  int64_t outs;

  Int4Matrix Expert(int64_t e, int64_t n) const {
    return {values + e * outs * (n / 2), groups + e * outs * (n / kGroup4) * 2, y, outs};
  }
};

// Rows that are rounded to int8, x = values * scale, in chunks of even and odd inputs, with the sum
// of each group four times, as a lane needs it. Behind the last input are zeros.
struct Int4Rows {
  int64_t stride, sum_stride;
  int8_t* values;
  float* sums;
  std::vector<float> scales;

  Int4Rows(int64_t num_threads, const float* x, int64_t rows, int64_t n)
      : stride(((n + 127) / 128 | 1) * 128),
        sum_stride(stride / kGroup4 * 4),
        values(ThreadScratch<int8_t>(rows * stride)),
        sums(ThreadScratch<float>(rows * sum_stride)),
        scales(static_cast<size_t>(rows)) {
    const int64_t block = 16384 / std::max<int64_t>(1, n) + 1;  // Rows that are worth a task.
    int8_t* const to_values = values;  // The scratch memory is this thread's.
    float* const to_sums = sums;
    ParallelFor(num_threads, (rows + block - 1) / block, [&](int64_t task) {
      std::vector<int8_t> rounded(static_cast<size_t>(stride));
      for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); ++r) {
        scales[static_cast<size_t>(r)] = QuantizeRow(x + r * n, n, rounded.data());
        Arrange(rounded.data(), to_values + r * stride, to_sums + r * sum_stride);
      }
    });
  }

  const int8_t* Row(int64_t r) const { return values + r * stride; }
  const float* Sums(int64_t r) const { return sums + r * sum_stride; }
  float Scale(int64_t r) const { return scales[static_cast<size_t>(r)]; }

 private:
  void Arrange(const int8_t* from, int8_t* to, float* sum) const {
    for (int64_t k = 0; k < stride; k += kChunk4) {
      for (int64_t i = 0; i < kNibbleBytes; ++i) {
        to[k + i] = from[k + 2 * i];
        to[k + kNibbleBytes + i] = from[k + 2 * i + 1];
      }
    }
    for (int64_t k = 0; k < stride; k += kGroup4, sum += 4) {
      int32_t total = 0;
      for (int64_t i = 0; i < kGroup4; ++i) total += from[k + i];
      for (int64_t i = 0; i < 4; ++i) sum[i] = static_cast<float>(total);
    }
  }
};

// ---- A few rows: four outputs at a time, whose sums are added across vectors --------------------

// y[r, o] for kRows rows from r and the outputs from o: kFours times four of them, or one. Weights
// that are `ahead` bytes further on are prefetched.
template <int kRows, int kFours>
[[gnu::noinline]] void Int4Tile(const Int4Rows& x, int64_t r, int64_t n, const Int4Matrix& w,
                                int64_t o, int64_t ahead) {
  constexpr int kOuts = kFours == 0 ? 1 : 4 * kFours, kQuads = kFours == 0 ? 1 : kFours;
  const int64_t row_bytes = n / 2, of_output = n / kGroup4 * 2, stride = x.stride;
  const uint8_t* values = w.values + o * row_bytes;
  const uint16_t* groups = w.groups + o * of_output;
  const int8_t* rows = x.Row(r);
  const float* sums = x.Sums(r);
  FourFloats totals[kRows][kQuads] = {};
  const auto add = [&](int64_t k, const NibbleBytes(&bytes)[kOuts],
                       const NibbleFloats(&scale)[kQuads], const NibbleFloats(&minimum)[kQuads],
                       int64_t count) __attribute__((always_inline)) {
    Unroll<kRows>(INLINE_LAMBDA(i) {
      const NibbleBytes even = LoadNibbles(rows + i * stride + k);
      const NibbleBytes odd = LoadNibbles(rows + i * stride + k + kNibbleBytes);
      const NibbleFloats sum =
          *reinterpret_cast<const NibbleFloats*>(sums + i * x.sum_stride + k / kGroup4 * 4);
      Unroll<kQuads>(INLINE_LAMBDA(quad) {
        NibbleSums dot[4];
        Unroll<4>(INLINE_LAMBDA(j) {
          constexpr int kAt = std::min(4 * decltype(quad)::value + decltype(j)::value, kOuts - 1);
          dot[j] = NibbleSums{};
          AddNibbles(LowNibbles(bytes[kAt]), even, dot[j]);
          AddNibbles(HighNibbles(bytes[kAt]), odd, dot[j]);
        });
        const NibbleSums dots = SumsByLane(dot[0], dot[1], dot[2], dot[3]);
        const NibbleFloats part = __builtin_convertvector(dots, NibbleFloats) * scale[quad] +
                                  sum * minimum[quad];
        Unroll<kGroupsOfChunk>(INLINE_LAMBDA(lane) {
          if (lane < count) totals[i][quad] += Lane<decltype(lane)::value>(part);
        });
      });
    });
  };
  constexpr auto kAll = std::make_integer_sequence<int, kNibbleSums>{};
  NibbleBytes bytes[kOuts];
  NibbleFloats scale[kQuads], minimum[kQuads];
  int64_t k = 0;
  for (; k + kChunk4 <= n; k += kChunk4) {
    Unroll<kOuts>(INLINE_LAMBDA(j) {
      const uint8_t* from = values + j * row_bytes + k / 2;
      __builtin_prefetch(from + ahead, 0, 2);
      // A line of scales and minima is as long as those of four vectors of weights.
      __builtin_prefetch(groups + j * of_output + k / kGroup4 * 2 + ahead / 8, 0, 2);
      bytes[j] = LoadNibbles(from);
    });
    Unroll<kQuads>(INLINE_LAMBDA(quad) {
      const int64_t step = kFours == 0 ? 0 : of_output;
      LoadPairs(groups + 4 * quad * step + k / kGroup4 * 2, step, scale[quad], minimum[quad], kAll);
    });
    add(k, bytes, scale, minimum, kGroupsOfChunk);
  }
  if (k < n) {
    const int64_t count = (n - k) / kGroup4;
    alignas(64) uint16_t pairs[kOuts][2 * kGroupsOfChunk] = {};
    Unroll<kOuts>(INLINE_LAMBDA(j) {
      bytes[j] = NibbleBytes{};
      std::memcpy(&bytes[j], values + j * row_bytes + k / 2, static_cast<size_t>((n - k) / 2));
      std::memcpy(pairs[j], groups + j * of_output + k / kGroup4 * 2,
                  static_cast<size_t>(count) * 2 * sizeof(uint16_t));
    });
    Unroll<kQuads>(INLINE_LAMBDA(quad) {
      LoadPairs(pairs[4 * quad], kFours == 0 ? 0 : 2 * kGroupsOfChunk, scale[quad], minimum[quad],
                kAll);
    });
    add(k, bytes, scale, minimum, count);
  }
  Unroll<kRows>(INLINE_LAMBDA(i) {
    Unroll<kQuads>(INLINE_LAMBDA(quad) {
      const FourFloats y = totals[i][quad] * (x.Scale(r + i) - FourFloats{});
      std::memcpy(w.y + (r + i) * w.outs + o + 4 * quad, &y,
                  (kFours == 0 ? 1 : 4) * sizeof(float));
    });
  });
}

template <int kRows>
inline void Int4Tiles(const Int4Rows& x, int64_t r, int64_t n, const Int4Matrix& w, int64_t first,
                      int64_t last) {
  constexpr int kFours = kRows <= 2 ? 2 : 1, kOuts = 4 * kFours;
  // What is read next: outputs that begin some kilobytes further on, while they are of this task.
  const int64_t row_bytes = n / 2, tile = kOuts * row_bytes;
  const int64_t skip = (4096 + tile - 1) / tile * kOuts;
  int64_t o = first;
  for (; o + kOuts <= last; o += kOuts) {
    const int64_t ahead = o + skip + kOuts <= last ? skip * row_bytes : 0;
    Int4Tile<kRows, kFours>(x, r, n, w, o, ahead);
  }
  for (; o < last; ++o) Int4Tile<kRows, 0>(x, r, n, w, o, 0);
}

inline void Int4FewRows(const Int4Rows& x, int64_t from, int64_t to, int64_t n, const Int4Matrix& w,
                        int64_t first, int64_t last) {
  // A block of outputs stays in near memory while all rows pass by.
  const int64_t block = std::max<int64_t>(16, 65536 / (n / 2) & ~int64_t{3});
  for (int64_t o = first; o < last; o += block) {
    const int64_t end = std::min(last, o + block);
    int64_t r = from;
    for (; r + 4 <= to; r += 4) Int4Tiles<4>(x, r, n, w, o, end);
    if (r + 2 <= to) Int4Tiles<2>(x, r, n, w, o, end), r += 2;
    if (r < to) Int4Tiles<1>(x, r, n, w, o, end);
  }
}

#if defined(MIXTRAL_JAX_BYTE_DOTS)

// ---- Many rows: the weights are unpacked and transposed first, as in byte_panels.h ---------------

#if defined(__AVX512VL__) || defined(__aarch64__)
constexpr int kInt4PanelRows = 6;  // Two sums and two totals of each fill the registers.
#else
constexpr int kInt4PanelRows = 2;
#endif
constexpr int64_t kInt4PanelDepth = 1024;  // Inputs of a panel.

struct Int4Panel {
  alignas(64) int8_t words[kPanelOuts * kInt4PanelDepth];  // [depth / 4][outs][4], as rows are kept
  alignas(64) float scale[kInt4PanelDepth / kGroup4][kPanelOuts];
  alignas(64) float minimum[kInt4PanelDepth / kGroup4][kPanelOuts];

  // The inputs [k, k + depth) of `count` outputs from o; other outputs stand for zero.
  void Fill(const Int4Matrix& w, int64_t n, int64_t o, int64_t count, int64_t k, int64_t depth) {
    const int64_t row_bytes = n / 2, of_output = n / kGroup4 * 2;
    // The next panel's weights: of these outputs, or of the next ones.
    int64_t ahead = depth / 2;
    if (k + depth == n) ahead = o + 2 * kPanelOuts <= w.outs ? kPanelOuts * row_bytes - k / 2 : 0;
    for (int64_t at = 0; at < depth; at += kChunk4) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t first = half * kDotSums;
        const uint8_t* from = w.values + (o + first) * row_bytes + (k + at) / 2;
        NibbleBytes packed[kDotSums];
        if (first + kDotSums <= count && at + kChunk4 <= depth) {
          Unroll<kDotSums>(INLINE_LAMBDA(i) {
            __builtin_prefetch(from + i * row_bytes + ahead, 0, 2);
            packed[i] = LoadNibbles(from + i * row_bytes);
          });
        } else {
          const size_t bytes = static_cast<size_t>(std::min(kChunk4, depth - at) / 2);
          for (int64_t i = 0; i < kDotSums; ++i) {
            packed[i] = NibbleBytes{};
            if (first + i < count) std::memcpy(&packed[i], from + i * row_bytes, bytes);
          }
        }
        // Words of even and of odd inputs are transposed together, as what they stand in.
        DotSums turned[kDotSums];
        Unroll<kDotSums>(INLINE_LAMBDA(i) { turned[i] = (DotSums)packed[i]; });
        TransposeWords(turned);
        DotSums* to = reinterpret_cast<DotSums*>(words + at * kPanelOuts + half * kDotBytes);
        Unroll<kDotSums>(INLINE_LAMBDA(i) {
          to[2 * i] = (DotSums)LowNibbles((NibbleBytes)turned[i]);
          to[2 * (kDotSums + i)] = (DotSums)HighNibbles((NibbleBytes)turned[i]);
        });
      }
    }
    for (int64_t i = 0; i < kPanelOuts; ++i) {
      const uint16_t* pair = w.groups + (o + i) * of_output + k / kGroup4 * 2;
      for (int64_t g = 0; g < depth / kGroup4; ++g) {
        scale[g][i] = i < count ? FloatOf(pair[2 * g]) : 0.0f;
        minimum[g][i] = i < count ? FloatOf(pair[2 * g + 1]) : 0.0f;
      }
    }
  }
};

[[gnu::always_inline]] inline DotFloats LoadDotFloats(const float* p) {
  return *reinterpret_cast<const DotFloats*>(p);
}

// Adds the products of kRows rows from r with a panel of the inputs [k, k + depth) to `totals`
// [kRows, kPanelOuts]; if they are the last ones, they go to the `count` outputs at y.
template <int kRows>
[[gnu::noinline]] void ProductOfInt4Panel(const Int4Rows& x, int64_t r, int64_t k, int64_t depth,
                                          const Int4Panel& panel, bool is_last, float* totals,
                                          int64_t count, float* y, int64_t outs) {
  DotFloats sums[kRows][2];
  Unroll<kRows>(INLINE_LAMBDA(i) {
    Unroll<2>(INLINE_LAMBDA(j) {
      sums[i][j] = k == 0 ? DotFloats{} : LoadDotFloats(totals + i * kPanelOuts + j * kDotSums);
    });
  });
  for (int64_t g = 0; g < depth / kGroup4; ++g) {
    const int64_t chunk = g / kGroupsOfChunk * kChunk4, within = g % kGroupsOfChunk * 16;
    DotSums dots[kRows][2];
    Unroll<kRows>(INLINE_LAMBDA(i) { dots[i][0] = dots[i][1] = DotSums{}; });
    for (int64_t at = chunk + within; at < chunk + kChunk4; at += kNibbleBytes) {
      Unroll<4>(INLINE_LAMBDA(word) {
        const int64_t place = at + 4 * word;
        DotBytes weights[2];
        Unroll<2>(INLINE_LAMBDA(j) {
          weights[j] = LoadRow(panel.words + place * kPanelOuts + j * kDotBytes);
        });
        Unroll<kRows>(INLINE_LAMBDA(i) {
          const DotBytes value = BroadcastFour(x.Row(r + i) + k + place);
          Unroll<2>(INLINE_LAMBDA(j) { AddDots(weights[j], value, dots[i][j]); });
        });
      });
    }
    Unroll<2>(INLINE_LAMBDA(j) {
      const DotFloats scale = LoadDotFloats(panel.scale[g] + j * kDotSums);
      const DotFloats minimum = LoadDotFloats(panel.minimum[g] + j * kDotSums);
      Unroll<kRows>(INLINE_LAMBDA(i) {
        const float sum = x.Sums(r + i)[(k / kGroup4 + g) * 4];
        sums[i][j] += __builtin_convertvector(dots[i][j], DotFloats) * scale + sum * minimum;
      });
    });
  }
  Unroll<kRows>(INLINE_LAMBDA(i) {
    if (is_last) {
      const float factor = x.Scale(r + i);
      const DotFloats values[2] = {sums[i][0] * factor, sums[i][1] * factor};
      StoreOutputs(values, count, y + i * outs);
    } else {
      Unroll<2>(INLINE_LAMBDA(j) {
        *reinterpret_cast<DotFloats*>(totals + i * kPanelOuts + j * kDotSums) = sums[i][j];
      });
    }
  });
}

inline void Int4ManyRows(const Int4Rows& x, int64_t from, int64_t to, int64_t n,
                         const Int4Matrix& w, int64_t first, int64_t last) {
  thread_local Int4Panel panel;
  std::vector<float> totals(static_cast<size_t>((to - from) * kPanelOuts));
  for (int64_t o = first; o < last; o += kPanelOuts) {
    const int64_t count = std::min(kPanelOuts, last - o);
    for (int64_t k = 0; k < n; k += kInt4PanelDepth) {
      const int64_t depth = std::min(kInt4PanelDepth, n - k);
      panel.Fill(w, n, o, count, k, depth);
      int64_t r = from;
      const auto add_rows = [&](auto rows) {
        for (; r + rows <= to; r += rows)
          ProductOfInt4Panel<rows>(x, r, k, depth, panel, k + depth == n,
                                   totals.data() + (r - from) * kPanelOuts, count,
                                   w.y + r * w.outs + o, w.outs);
      };
      add_rows(std::integral_constant<int, kInt4PanelRows>{});
      if constexpr (kInt4PanelRows > 2) add_rows(std::integral_constant<int, 2>{});
      add_rows(std::integral_constant<int, 1>{});
    }
  }
}

constexpr int64_t kManyInt4Rows = 12;

#endif  // defined(MIXTRAL_JAX_BYTE_DOTS)

inline void Product(const Int4Rows& x, int64_t from, int64_t to, int64_t n, const Int4Matrix& w,
                    int64_t first, int64_t last) {
#if defined(MIXTRAL_JAX_BYTE_DOTS)
  if (to - from >= kManyInt4Rows) return Int4ManyRows(x, from, to, n, w, first, last);
#endif
  Int4FewRows(x, from, to, n, w, first, last);
}

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_INT4_PRODUCTS_H_
