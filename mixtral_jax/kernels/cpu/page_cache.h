// Pages of keys and values, float or int8, as attention reads and writes them.

#ifndef MIXTRAL_JAX_KERNELS_CPU_PAGE_CACHE_H_
#define MIXTRAL_JAX_KERNELS_CPU_PAGE_CACHE_H_

#include <algorithm>
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
};

// Prefetches the pairs of consecutive tokens into the L2 cache, in the order of memory, a few cache
// lines at each step of what is computed meanwhile: as many as the memory gives in that time.
class Prefetcher {
 public:
  Prefetcher() = default;
  // The pairs of some heads of the tokens [position, end); `steps` steps will fetch them.
  Prefetcher(const PageCache& cache, const int32_t* table, int64_t position, int64_t end,
             int64_t first_head, int64_t num_heads, int64_t steps)
      : cache_(&cache), table_(table), position_(position), end_(end), first_head_(first_head),
        num_heads_(num_heads) {
    const int64_t lines = (end - position) * num_heads * cache.PairBytes() / kLine + 1;
    pace_ = (lines + steps - 1) / steps * kLine;
    BeginRun();
  }

  // Several steps at once.
  void Step(int64_t steps) {
    if (at_ >= run_end_) {
      if (position_ >= end_) return;
      BeginRun();
    }
    const char* const at = at_;
    const int64_t bytes = pace_ * steps;
    at_ = at + bytes;
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(at + i, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;

  // Begins the next run of bytes that lie behind each other: a page, or a token of fewer heads.
  [[gnu::noinline]] void BeginRun() {
    const bool is_whole = num_heads_ == cache_->kv_heads;
    const int64_t page_end = position_ - position_ % cache_->page_size + cache_->page_size;
    const int64_t tokens = is_whole ? std::min(page_end, end_) - position_ : 1;
    const int64_t bytes = tokens * num_heads_ * cache_->PairBytes();
    const char* begin = cache_->Token(table_, position_) + first_head_ * cache_->PairBytes();
    run_end_ = begin + bytes;
    at_ = begin - reinterpret_cast<uintptr_t>(begin) % kLine;
    position_ += tokens;
  }

  const PageCache* cache_ = nullptr;
  const int32_t* table_ = nullptr;
  int64_t position_ = 0, end_ = 0, first_head_ = 0, num_heads_ = 0, pace_ = 0;
  const char *at_ = nullptr, *run_end_ = nullptr;
};

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_PAGE_CACHE_H_
