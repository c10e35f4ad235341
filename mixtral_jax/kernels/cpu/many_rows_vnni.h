// Products of many int8 rows, for processors whose AVX-512 multiplies bytes (VNNI).
//
// One instruction adds four products to each of sixteen sums: four times as many as in many_rows.h.
// It takes unsigned bytes on one side, so weights are offset by 128, and 128 times the sum of a row
// is taken off again. All sums are of integers, and are turned to floats as there: equal bits.

#ifndef MIXTRAL_JAX_KERNELS_CPU_MANY_ROWS_VNNI_H_
#define MIXTRAL_JAX_KERNELS_CPU_MANY_ROWS_VNNI_H_

#include "form.h"

#if MIXTRAL_JAX_VECTOR_BITS == 512 && defined(__AVX512F__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define MIXTRAL_JAX_HAS_VNNI 1

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"
#include "worker_pool.h"

namespace mixtral_jax {

constexpr int64_t kBytePanelOuts = 32;     // Outputs of one panel, in two vectors of sums.
constexpr int64_t kBytePanelDepth = 1024;  // Values of each output: a panel fits the L1 cache.

// The lowest `count` bits, at most 64 and perhaps none.
inline uint64_t LowBits(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << std::max<int64_t>(0, count)) - 1;
}

// Transposes 16 vectors of 16 words each.
inline void TransposeWords(__m512i (&rows)[16]) {
  __m512i pairs[16], quads[16];
  Unroll<8>(INLINE_LAMBDA(i) {
    pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  });
  Unroll<4>(INLINE_LAMBDA(i) {
    Unroll<2>(INLINE_LAMBDA(j) {
      const __m512i upper = pairs[4 * i + j], lower = pairs[4 * i + j + 2];
      quads[4 * i + 2 * j] = _mm512_unpacklo_epi64(upper, lower);
      quads[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(upper, lower);
    });
  });
  // Lane l of quads[4 i + j] has column 4 l + j of the rows 4 i .. 4 i + 3.
  Unroll<4>(INLINE_LAMBDA(j) {
    const __m512i even = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
    const __m512i even_below = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512i odd_below = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(even, even_below, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
  });
}

// panel[k / 4][o][k % 4] = w[o, k] + 128 for 32 outputs, whose weights are n values apart, and
// `depth` values of each. Outputs from `outs` on, and values from `depth` to the next multiple of
// 64, stand for zero.
inline void TransposeBytePanel(const int8_t* w, int64_t n, int64_t outs, int64_t depth,
                               uint8_t* panel) {
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(-128));
  for (int64_t k = 0; k < depth; k += 64) {
    const __mmask64 values = _cvtu64_mask64(LowBits(depth - k));
    for (int half = 0; half < 2; ++half) {
      __m512i rows[16];
      Unroll<16>(INLINE_LAMBDA(i) {
        const int64_t o = half * 16 + i;
        rows[i] = _mm512_xor_si512(
            offset, o < outs ? _mm512_maskz_loadu_epi8(values, w + o * n + k)
                             : _mm512_setzero_si512());
      });
      TransposeWords(rows);
      Unroll<16>(INLINE_LAMBDA(i) {
        _mm512_store_si512(panel + (k / 4 + i) * 4 * kBytePanelOuts + half * 64, rows[i]);
      });
    }
  }
}

// Adds the products of kRows rows with a panel to sums; x holds bytes, zero behind the last one.
template <int kRows>
[[gnu::always_inline]] inline void AddBytePanel(const int8_t* x, int64_t stride,
                                                const uint8_t* panel, int64_t depth,
                                                __m512i (&sums)[kRows][2]) {
  for (int64_t k = 0; k < depth; k += 4) {
    const __m512i first = _mm512_load_si512(panel + k * kBytePanelOuts);
    const __m512i second = _mm512_load_si512(panel + k * kBytePanelOuts + 64);
    Unroll<kRows>(INLINE_LAMBDA(r) {
      int32_t four;
      std::memcpy(&four, x + r * stride + k, sizeof four);
      const __m512i value = _mm512_set1_epi32(four);
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], first, value);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], second, value);
    });
  }
}

// Where the results of a range of outputs go, and what finishes them.
struct ByteOutputs {
  float* y;  // That of the first row and output.
  int64_t stride, count;
  const float* scale;  // Of each output.
};

// Products of kRows rows from r with a panel of the values [k, k + depth). They go to `totals`, or,
// if they are the last ones, to the outputs. Within a larger function GCC keeps sums on the stack.
template <int kRows, typename Rows>
[[gnu::noinline]] void ProductOfBytePanel(const Rows& x, int64_t r, int64_t k, const uint8_t* panel, int64_t depth,
                        bool is_last, int32_t* totals, const ByteOutputs& outputs) {
  __m512i sums[kRows][2];
  Unroll<kRows>(INLINE_LAMBDA(i) {
    Unroll<2>(INLINE_LAMBDA(j) {
      sums[i][j] = k == 0 ? _mm512_setzero_si512()
                          : _mm512_loadu_si512(totals + i * kBytePanelOuts + j * 16);
    });
  });
  AddBytePanel<kRows>(x.bytes + r * x.stride + k, x.stride, panel, depth, sums);
  if (!is_last) {
    Unroll<kRows>(INLINE_LAMBDA(i) {
      Unroll<2>(INLINE_LAMBDA(j) {
        _mm512_storeu_si512(totals + i * kBytePanelOuts + j * 16, sums[i][j]);
      });
    });
    return;
  }
  Unroll<2>(INLINE_LAMBDA(j) {
    const __mmask16 mask = static_cast<__mmask16>(LowBits(outputs.count - j * 16));
    const __m512 scale = _mm512_maskz_loadu_ps(mask, outputs.scale + j * 16);
    Unroll<kRows>(INLINE_LAMBDA(i) {
      const size_t row = static_cast<size_t>(r + i);
      const __m512i total = _mm512_sub_epi32(sums[i][j], _mm512_set1_epi32(128 * x.sums[row]));
      const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(x.scales[row]), scale);
      float* to = outputs.y + i * outputs.stride + j * 16;
      _mm512_mask_storeu_ps(to, mask, _mm512_mul_ps(_mm512_cvtepi32_ps(total), factor));
    });
  });
}

// `ProductOfManyRows` by bytes: y[r, o] for the rows [from, to) of x, an Int8Rows, and the outputs
// [first, last) of w [outs, n].
template <typename Rows>
void ProductOfByteRows(const Rows& x, int64_t from, int64_t to, int64_t n, const int8_t* w,
                       const float* scale, int64_t first, int64_t last, float* y, int64_t outs) {
  alignas(64) thread_local uint8_t panel[kBytePanelOuts * kBytePanelDepth];
  int32_t* totals = ThreadScratch<int32_t>((to - from) * kBytePanelOuts);
  for (int64_t o = first; o < last; o += kBytePanelOuts) {
    const int64_t count = std::min(kBytePanelOuts, last - o);
    for (int64_t k = 0; k < n; k += kBytePanelDepth) {
      const int64_t depth = std::min(kBytePanelDepth, n - k);
      TransposeBytePanel(w + o * n + k, n, count, depth, panel);
      int64_t r = from;
      const auto add_rows = [&](auto rows) {
        for (; r + rows <= to; r += rows) {
          const ByteOutputs outputs{y + r * outs + o, outs, count, scale + o};
          ProductOfBytePanel<rows>(x, r, k, panel, depth, k + depth == n,
                                   totals + (r - from) * kBytePanelOuts, outputs);
        }
      };
      add_rows(std::integral_constant<int, 12>{});  // Sums of twelve rows fill the registers.
      add_rows(std::integral_constant<int, 4>{});
      add_rows(std::integral_constant<int, 1>{});
    }
  }
}

}  // namespace mixtral_jax

#endif  // defined(__AVX512VNNI__)
#endif  // MIXTRAL_JAX_KERNELS_CPU_MANY_ROWS_VNNI_H_
