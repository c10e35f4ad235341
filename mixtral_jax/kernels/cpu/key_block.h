// A block of keys and values of one head, read from the pages into the form that products take.

#ifndef MIXTRAL_JAX_KERNELS_CPU_KEY_BLOCK_H_
#define MIXTRAL_JAX_KERNELS_CPU_KEY_BLOCK_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "page_cache.h"
#include "wide_floats.h"

namespace mixtral_jax {

constexpr int64_t kKeyBlock = 64;  // Keys that are scored before their values are added up.

// Rounds n up to a multiple of m.
inline int64_t RoundUp(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// The keys stand in columns, so that a vector holds one element of many keys; the scores of a query
// are then a product of matrices, as the mixing of the values is. Heads are filled up with zeros to
// whole vectors.
struct KeyBlock {
  int64_t count, head_size;         // count <= kKeyBlock
  float* keys;                      // [H, kKeyBlock]; some columns behind `count` hold anything
  float* copies;                    // [kKeyBlock, H], room for values that cannot be used in place
  const float* values[kKeyBlock];   // [H] each
  bool is_scaled;                   // int8: keys and values are still to be multiplied by scales
  float key_scales[kKeyBlock], value_scales[kKeyBlock];

  int64_t PaddedSize() const { return RoundUp(head_size, wide::kLanes); }

  // The steps of the prefetcher while a block is read.
  int64_t ReadSteps() const {
    return kKeyBlock / wide::kLanes * PaddedSize() / wide::kLanes * kStepsOfTile;
  }

  // Reads the block from `pairs`, which has an address for each key and some more, up to a multiple
  // of 16. `row_count` query rows will use it.
  void Read(const PageCache& cache, const char* const* pairs, int64_t row_count,
            Prefetcher& next) {
    is_scaled = cache.is_int8;
    if (!cache.is_int8) {
      ReadKeys<float>(pairs, next);
      ReadValues<float>(pairs, cache.HeadBytes(), row_count);
      return;
    }
    head_size % kBytesOfTile == 0 ? ReadKeyBytes(pairs, next) : ReadKeys<int8_t>(pairs, next);
    ReadValues<int8_t>(pairs, cache.HeadBytes(), row_count);
    const int64_t end = RoundUp(count, wide::kSumLanes);
    const int64_t key_scale = head_size, value_scale = cache.HeadBytes() + head_size;
    for (int64_t i = 0; i < end; ++i) {
      std::memcpy(key_scales + i, pairs[i] + key_scale, sizeof(float));
      std::memcpy(value_scales + i, pairs[i] + value_scale, sizeof(float));
    }
  }

 private:
  static constexpr int kStepsOfTile = wide::kLanes / 2;
  static constexpr int64_t kBytesOfTile = wide::kLanes * 4;

  // Elements h .. of a head.
  template <typename Value>
  wide::Floats Elements(const char* head, int64_t h) const {
    const Value* values_of_head = reinterpret_cast<const Value*>(head);
    return h + wide::kLanes <= head_size ? wide::Load(values_of_head + h)
                                         : wide::LoadPart(values_of_head + h, head_size - h);
  }

  template <typename Value>
  void ReadKeys(const char* const* pairs, Prefetcher& next) {
    for (int64_t i = 0; i < count; i += wide::kLanes) {
      for (int64_t h = 0; h < head_size; h += wide::kLanes) {
        wide::Floats tile[wide::kLanes];
        Unroll<wide::kLanes>(
            INLINE_LAMBDA(j) { tile[j] = Elements<Value>(pairs[i + j], h); });
        wide::Transpose(tile);
        next.Step(kStepsOfTile);
        Unroll<wide::kLanes>(
            INLINE_LAMBDA(j) { wide::Store(keys + (h + j) * kKeyBlock + i, tile[j]); });
      }
    }
  }

  // The same as ReadKeys<int8_t> for heads of whole tiles. Four bytes are moved together, and then
  // taken apart in their columns: a quarter of the moves.
  void ReadKeyBytes(const char* const* pairs, Prefetcher& next) {
    for (int64_t i = 0; i < count; i += wide::kLanes) {
      for (int64_t h = 0; h < head_size; h += kBytesOfTile) {
        wide::Floats tile[wide::kLanes];
        Unroll<wide::kLanes>(INLINE_LAMBDA(j) {
          std::memcpy(&tile[j], pairs[i + j] + h, sizeof tile[j]);
        });
        wide::Transpose(tile);
        next.Step(kStepsOfTile);
        Unroll<wide::kLanes>(INLINE_LAMBDA(j) {
          const wide::Ints fours = (wide::Ints)tile[j];
          float* column = keys + (h + j * 4) * kKeyBlock + i;
          Unroll<4>(INLINE_LAMBDA(b) {
            const wide::Ints bytes = fours << (24 - 8 * b) >> 24;
            wide::Store(column + b * kKeyBlock, __builtin_convertvector(bytes, wide::Floats));
          });
        });
      }
    }
  }

  // Values of few rows are used where they lie. For many rows they are copied, because in the pages
  // they lie so far apart that they push each other out of the cache.
  template <typename Value>
  void ReadValues(const char* const* pairs, int64_t head_bytes, int64_t row_count) {
    constexpr bool kIsFloat = sizeof(Value) == sizeof(float);
    if (kIsFloat && row_count <= 8 && head_size % wide::kLanes == 0) {
      for (int64_t i = 0; i < count; ++i)
        values[i] = reinterpret_cast<const float*>(pairs[i] + head_bytes);
      return;
    }
    const int64_t padded = PaddedSize();
    for (int64_t i = 0; i < count; ++i) {
      values[i] = copies + i * padded;
      for (int64_t h = 0; h < padded; h += wide::kLanes)
        wide::Store(copies + i * padded + h, Elements<Value>(pairs[i] + head_bytes, h));
    }
  }
};

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_KEY_BLOCK_H_
