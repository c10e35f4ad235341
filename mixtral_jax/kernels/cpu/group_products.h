// Products of rows with weights in groups, int4 and int8x16, in tiles (weight.py has the forms).
//
// Rows are rounded to int8 group by group too, so a group's part of a product is a dot of bytes,
// which is exact, times the scale of the weight's group, for int4 with the sum of the row's bytes
// times the minimum; and that times the scale of the row's group. These are rounded one by one, and
// added to the product in the order of the inputs: every form, every number of rows and every
// number of threads gives the same bits.
//
// A tile has 16 outputs. Word by word, of four bytes, it holds one word of each, so that a vector's
// sums are those of outputs, nothing is added across a vector, and memory is read in its order. A
// group of either dtype is four words of each output.

#ifndef MIXTRAL_JAX_KERNELS_CPU_GROUP_PRODUCTS_H_
#define MIXTRAL_JAX_KERNELS_CPU_GROUP_PRODUCTS_H_

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "dot_products.h"
#include "group_dots.h"
#include "vectors.h"
#include "worker_pool.h"

namespace mixtral_jax {

constexpr int64_t kTileOuts = 16, kWordsOfGroup = 4, kWordBytes = 4;
constexpr int64_t kTileGroupBytes = kTileOuts * kWordsOfGroup * kWordBytes;

// A word has eight inputs, of which the even ones stand in the low halves of bytes.
struct Int4 {
  static constexpr int64_t kGroup = 32, kScales = 2;  // Inputs; scale and minimum.
  using Sum = float;                                  // The sum of a row's group.

  // Rows are kept as a word needs them: of each eight bytes the even ones, then the odd ones.
  static int64_t Place(int64_t k) { return k / 8 * 8 + k % 2 * 4 + k % 8 / 2; }
  static Sum SumOf(int32_t total) { return static_cast<Sum>(total); }

  template <int kRows, typename Row>
  [[gnu::always_inline]] static void AddWord(DotBytes w, const Row& row,
                                             DotSums (&sums)[kRows]) {
    const DotBytes even = LowHalves(w), odd = HighHalves(w);
    Unroll<kRows>(INLINE_LAMBDA(i) {
      AddHalves(even, BroadcastFour(row(i)), sums[i]);
      AddHalves(odd, BroadcastFour(row(i) + kWordBytes), sums[i]);
    });
  }

  [[gnu::always_inline]] static DotFloats Scaled(DotSums sums, Sum sum, const uint16_t* scales) {
    return __builtin_convertvector(sums, DotFloats) * LoadHalfFloats(scales) +
           sum * LoadHalfFloats(scales + kTileOuts);
  }
};

// A word has four inputs.
struct Int8Groups {
  static constexpr int64_t kGroup = 16, kScales = 1;
  using Sum = int32_t;  // What is taken off the sums of a row's group.

  static int64_t Place(int64_t k) { return k; }
  static Sum SumOf(int32_t total) { return kByteOffset * total; }

  template <int kRows, typename Row>
  [[gnu::always_inline]] static void AddWord(DotBytes w, const Row& row,
                                             DotSums (&sums)[kRows]) {
    Unroll<kRows>(INLINE_LAMBDA(i) { AddBytes(w, BroadcastFour(row(i)), sums[i]); });
  }

  [[gnu::always_inline]] static DotFloats Scaled(DotSums sums, Sum sum, const uint16_t* scales) {
    return __builtin_convertvector(sums - sum, DotFloats) * LoadHalfFloats(scales);
  }
};

template <typename Dtype>
struct GroupMatrix {
  static constexpr int64_t kInputsOfByte = Dtype::kGroup / (kWordsOfGroup * kWordBytes);

  const int8_t* values;    // [outs / 16, words, 16] of four bytes
  const uint16_t* scales;  // float16 [outs / 16, groups, kScales, 16]
  float* y;                // [rows, outs], the product's place
  int64_t outs;

  static int64_t Groups(int64_t n) { return n / Dtype::kGroup; }
  const int8_t* Values(int64_t o, int64_t n) const {
    return values + o * Groups(n) * kWordsOfGroup * kWordBytes;
  }
  const uint16_t* Scales(int64_t o, int64_t n) const {
    return scales + o * Groups(n) * Dtype::kScales;
  }
  GroupMatrix Expert(int64_t e, int64_t n) const {
    return {Values(e * outs, n), Scales(e * outs, n), y, outs};
  }
};

// Rows that are rounded to int8, each group by its own scale.
template <typename Dtype>
struct GroupRows {
  struct Group {
    typename Dtype::Sum sum;
    float scale;
  };
  int64_t stride, num_groups;
  int8_t* values;  // [rows, stride]
  Group* groups;   // [rows, num_groups]

  GroupRows(int64_t num_threads, const float* x, int64_t rows, int64_t n)
      : stride(((n + 63) / 64 | 1) * 64),  // An odd number of lines: rows take all sets of a cache.
        num_groups(n / Dtype::kGroup),
        values(ThreadScratch<int8_t>(rows * stride)),
        groups(ThreadScratch<Group>(rows * num_groups)) {
    const int64_t block = 16384 / std::max<int64_t>(1, n) + 1;  // Rows that are worth a task.
    const GroupRows to = *this;  // The scratch memory is this thread's.
    ParallelFor(num_threads, (rows + block - 1) / block, [&](int64_t task) {
      for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); ++r)
        to.Round(x + r * n, r);
    });
  }

 private:
  void Round(const float* x, int64_t r) const {
    int8_t rounded[Dtype::kGroup];
    for (int64_t g = 0; g < num_groups; ++g) {
      int32_t total;
      const float scale = QuantizeRow(x + g * Dtype::kGroup, Dtype::kGroup, rounded, &total);
      groups[r * num_groups + g] = {Dtype::SumOf(total), scale};
      int8_t* value = values + r * stride + g * Dtype::kGroup;
      for (int64_t k = 0; k < Dtype::kGroup; ++k) value[Dtype::Place(k)] = rounded[k];
    }
  }
};

// Rows of a product whose sums and totals stay in the registers, and the vectors of each.
constexpr int kTileVectors = kDotBytes == 64 ? 1 : 2;
#if defined(__AVX512VL__) || defined(__aarch64__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;
#endif

// Bytes from reading to what is prefetched: the processor's own prefetcher stops at a page's end.
constexpr int64_t kGroupsAhead = 4096;

// y[r, o] for kRows rows from r and the kTileVectors vectors of outputs from o.
template <int kRows, typename Dtype>
[[gnu::noinline]] void ProductOfTile(const GroupRows<Dtype>& x, int64_t r,
                                     const GroupMatrix<Dtype>& w, int64_t n, int64_t o) {
  const int64_t tile = o / kTileOuts * kTileOuts, within = o % kTileOuts;
  const int8_t* values = w.Values(tile, n) + within * kWordBytes;
  const uint16_t* scales = w.Scales(tile, n) + within;
  const int8_t* rows = x.values + r * x.stride;
  const int64_t stride = x.stride, num_groups = x.num_groups;
  DotFloats totals[kTileVectors][kRows] = {};
  for (int64_t g = 0; g < num_groups; ++g) {
    DotSums sums[kTileVectors][kRows] = {};
    Unroll<kWordsOfGroup>(INLINE_LAMBDA(word) {
      __builtin_prefetch(values + word * kTileOuts * kWordBytes + kGroupsAhead, 0, 2);
      const int8_t* row = rows + word * (Dtype::kGroup / kWordsOfGroup);
      Unroll<kTileVectors>(INLINE_LAMBDA(j) {
        const DotBytes bytes =
            LoadRow(values + word * kTileOuts * kWordBytes + j * kDotBytes);
        Dtype::AddWord(bytes, [&](int64_t i) __attribute__((always_inline)) {
          return row + i * stride;
        }, sums[j]);
      });
    });
    __builtin_prefetch(scales + kGroupsAhead / 8, 0, 2);
    Unroll<kRows>(INLINE_LAMBDA(i) {
      const auto& group = x.groups[(r + i) * num_groups + g];
      Unroll<kTileVectors>(INLINE_LAMBDA(j) {
        totals[j][i] += Dtype::Scaled(sums[j][i], group.sum, scales + j * kDotSums) * group.scale;
      });
    });
    values += kTileGroupBytes;
    scales += Dtype::kScales * kTileOuts;
    rows += Dtype::kGroup;
  }
  Unroll<kRows>(INLINE_LAMBDA(i) {
    Unroll<kTileVectors>(INLINE_LAMBDA(j) {
      *reinterpret_cast<DotFloats*>(w.y + (r + i) * w.outs + o + j * kDotSums) = totals[j][i];
    });
  });
}

// The outputs [first, last), which are whole tiles, for the rows [from, to).
template <typename Dtype>
inline void Product(const GroupRows<Dtype>& x, int64_t from, int64_t to, int64_t n,
                    const GroupMatrix<Dtype>& w, int64_t first, int64_t last) {
  constexpr int64_t kStep = kTileVectors * kDotSums;
  // The weights of a block stay in near memory while all rows pass by, and some rows meet all of
  // them.
  const int64_t output_bytes = std::max<int64_t>(1, n / Dtype::kGroup) * kTileGroupBytes / kTileOuts;
  const int64_t block = std::max(kTileOuts, 131072 / output_bytes / kTileOuts * kTileOuts);
  for (int64_t begin = first; begin < last; begin += block) {
    const int64_t end = std::min(last, begin + block);
    int64_t r = from;
    const auto add_rows = [&](auto rows) {
      for (; r + rows <= to; r += rows)
        for (int64_t o = begin; o < end; o += kStep) ProductOfTile<rows>(x, r, w, n, o);
    };
    add_rows(std::integral_constant<int, kTileRows>{});
    if constexpr (kTileRows > 4) add_rows(std::integral_constant<int, 4>{});
    if constexpr (kTileRows > 2) add_rows(std::integral_constant<int, 2>{});
    add_rows(std::integral_constant<int, 1>{});
  }
}

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_GROUP_PRODUCTS_H_
