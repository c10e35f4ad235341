// Products of few int8 rows, which take as long as reading the weights does.
//
// A weight is read once, in the order of memory, while the rows' values stay in the L1 cache: deep
// rows are taken in chunks. What is read next is prefetched meanwhile.

#ifndef MIXTRAL_JAX_KERNELS_CPU_FEW_ROWS_H_
#define MIXTRAL_JAX_KERNELS_CPU_FEW_ROWS_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "int8_dots.h"
#include "int8_rows.h"
#include "worker_pool.h"

namespace mixtral_jax {

constexpr int64_t kBlockOuts = 16;      // Outputs whose sums are kept between chunks.
constexpr int64_t kChunkBytes = 32768;  // Of all rows: an L1 cache.
constexpr int64_t kLeastAhead = 4096;   // Bytes from reading to what is prefetched.

// Adds the dot products of a tile to totals [kRows][kBlockOuts]. Within a larger function GCC keeps
// sums on the stack.
template <int kRows, int kOuts>
[[gnu::noinline]] void AddTile(const DotTile& tile, int32_t* totals) {
  int32_t dots[kRows][kOuts];
  IntegerDots<kRows, kOuts>(tile, dots);
  Unroll<kRows>(INLINE_LAMBDA(r) {
    Unroll<kOuts>(INLINE_LAMBDA(o) { totals[r * kBlockOuts + o] += dots[r][o]; });
  });
}

// AddTile for 1, 2 ... rows.
using AddTileOfRows = void (*)(const DotTile&, int32_t*);
template <int kOuts, int... kRowsLessOne>
constexpr std::array<AddTileOfRows, sizeof...(kRowsLessOne)> TileTable(
    std::integer_sequence<int, kRowsLessOne...>) {
  return {AddTile<kRowsLessOne + 1, kOuts>...};
}
template <int kOuts, int kMost>
constexpr auto kAddTile = TileTable<kOuts>(std::make_integer_sequence<int, kMost>{});

inline AddTileOfRows AddTileFor(int64_t rows, int64_t outs) {
  const size_t i = static_cast<size_t>(rows - 1);
  if (outs == 4) return kAddTile<4, kRowsByFour>[i];
  return outs == 2 ? kAddTile<2, kMostRows>[i] : kAddTile<1, kMostRows>[i];
}

// y[r, o] for the rows [from, to) of x and the outputs [first, last) of w [outs, n].
inline void ProductOfFewRows(const Int8Rows& x, int64_t from, int64_t to, int64_t n,
                             const int8_t* w, const float* scale, int64_t first, int64_t last,
                             float* y, int64_t outs) {
  const int64_t rows = to - from, groups = (rows + kMostRows - 1) / kMostRows;
  const int64_t width = (rows + groups - 1) / groups <= kRowsByFour ? 4 : 2;
  const int64_t row_bytes = rows * static_cast<int64_t>(sizeof(Int8Rows::Value));
  const int64_t chunk = std::max<int64_t>(256, kChunkBytes / row_bytes & ~int64_t{63});
  int32_t* totals = ThreadScratch<int32_t>(rows * kBlockOuts);
  for (int64_t o = first; o < last; o += kBlockOuts) {
    const int64_t count = std::min(kBlockOuts, last - o);
    std::fill(totals, totals + rows * kBlockOuts, 0);
    for (int64_t k = 0; k < n; k += chunk) {
      const int64_t depth = std::min(chunk, n - k);
      for (int64_t j = 0, some; j < count; j += some) {
        some = j + width <= count ? width : 1;
        // What is read next: of the next outputs, or of these ones' next chunk.
        int64_t next = o + j + some, next_k = k;
        if (depth == n) {
          next = o + j + some * ((kLeastAhead - 1) / (some * n) + 1);
        } else if (j + some == count) {
          next = k + depth < n ? o : o + count, next_k = k + depth < n ? k + depth : 0;
        }
        if (next + some > last) next = o + j, next_k = k;
        DotTile tile{nullptr, x.stride,           w + (o + j) * n + k, n,
                     depth,   w + next * n + next_k, 64 / groups};
        for (int64_t r = from, left = groups; left > 0; --left) {
          const int64_t size = (to - r + left - 1) / left;
          tile.x = x.Row(r) + k;
          AddTileFor(size, some)(tile, totals + (r - from) * kBlockOuts + j);
          tile.ahead += depth / groups;
          r += size;
        }
      }
    }
    for (int64_t r = from; r < to; ++r) {
      const int32_t* total = totals + (r - from) * kBlockOuts;
      const int32_t offset = x.Offset(r);
      const float row_scale = x.Scale(r);
      float* result = y + r * outs + o;
      for (int64_t i = 0; i < count; ++i)
        result[i] = static_cast<float>(total[i] - offset) * (row_scale * scale[o + i]);
    }
  }
}

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_FEW_ROWS_H_
