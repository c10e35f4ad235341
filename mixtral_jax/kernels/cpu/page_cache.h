// Pages of keys and values, float or int8, as attention reads and writes them.

#ifndef MIXTRAL_JAX_KERNELS_CPU_PAGE_CACHE_H_
#define MIXTRAL_JAX_KERNELS_CPU_PAGE_CACHE_H_

#include <cstdint>
#include <cstring>

#include "dot_products.h"
#include "vectors.h"

namespace mixtral_jax {

// An array [P Y 2K H] of floats, or [P Y 2K H+4] of int8, where each head's values are followed by
// their float scale. Key and value of a head are neighbours: a pair.
struct PageCache {
  char* pages;
  int64_t page_size, kv_heads, head_size;
  bool is_int8;

  int64_t HeadBytes() const {
    return is_int8 ? head_size + static_cast<int64_t>(sizeof(float))
                   : head_size * static_cast<int64_t>(sizeof(float));
  }
  int64_t PairBytes() const { return 2 * HeadBytes(); }
  int64_t TokenBytes() const { return kv_heads * PairBytes(); }

  // The pairs of the token at `position` of a sequence, whose pages `table` lists.
  char* Token(const int32_t* table, int64_t position) const {
    return pages + (table[position / page_size] * page_size + position % page_size) * TokenBytes();
  }

  // Writes the head_size floats of one key or value.
  void Write(char* head, const float* row) const {
    if (!is_int8) {
      std::memcpy(head, row, static_cast<size_t>(head_size) * sizeof(float));
      return;
    }
    const float scale = QuantizeRow(row, head_size, reinterpret_cast<int8_t*>(head));
    std::memcpy(head + head_size, &scale, sizeof scale);
  }

  // The 2 * head_size floats of a pair: where they lie, or converted into `buffer`.
  const float* ReadPair(const char* pair, float* buffer) const {
    if (!is_int8) return reinterpret_cast<const float*>(pair);
    for (int64_t i = 0; i < 2; ++i) {
      const char* head = pair + i * HeadBytes();
      float scale;
      std::memcpy(&scale, head + head_size, sizeof scale);
      for (int64_t h = 0; h < head_size; h += kLanes) {
        Bytes values;
        std::memcpy(&values, head + h, sizeof values);
        Store(buffer + i * head_size + h,
              __builtin_convertvector(__builtin_convertvector(values, Ints), Floats) * scale);
      }
    }
    return buffer;
  }
};

// Prefetches n bytes into the L2 cache; a block of keys would push itself out of the L1 cache. Keys
// of one head lie too far apart for the processor's own prefetcher.
inline void Prefetch(const char* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) __builtin_prefetch(p + i, 0, 2);
}

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_PAGE_CACHE_H_
