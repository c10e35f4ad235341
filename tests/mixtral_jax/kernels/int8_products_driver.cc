// Compares products of few and of many int8 rows, those with weights in groups, and the products the
// other way of slopes, with sums that are written out. Prints how many results differ.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "byte_panels.h"
#include "byte_slopes.h"
#include "few_rows.h"
#include "group_products.h"
#include "int8_rows.h"
#include "pair_panels.h"

namespace {

using mixtral_jax::Int8Rows;

uint32_t state = 1;

// The next pseudo-random integer from 0 to size - 1.
int32_t Next(uint32_t size) {
  state = state * 1664525u + 1013904223u;
  return static_cast<int32_t>((state >> 16) % size);
}

std::vector<float> Floats(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = 0.013f * static_cast<float>(Next(601) - 300);
  return values;
}

// Random bytes, or all -128, which make the largest sums.
std::vector<int8_t> Weights(int64_t count, bool extreme) {
  std::vector<int8_t> values(static_cast<size_t>(count));
  for (int8_t& value : values) value = static_cast<int8_t>(extreme ? -128 : Next(256) - 128);
  return values;
}

int64_t Differences(const std::vector<float>& got, const std::vector<float>& want) {
  int64_t differences = 0;
  for (size_t i = 0; i < want.size(); ++i)
    differences += std::memcmp(&got[i], &want[i], sizeof(float)) != 0;
  return differences;
}

int64_t ProductDifferences(int64_t rows, int64_t n, int64_t outs, bool extreme) {
  std::vector<float> values = Floats(rows * n);
  if (extreme) values.assign(values.size(), -2.5f);
  const Int8Rows x(1, values.data(), rows, n);
  const std::vector<int8_t> w = Weights(outs * n, extreme);
  const std::vector<float> scale = Floats(outs);
  std::vector<float> want(static_cast<size_t>(rows * outs));
  // The first row and the last output are left out, so that ranges end within.
  for (int64_t r = 1; r < rows; ++r) {
    for (int64_t o = 0; o < outs - 1; ++o) {
      int32_t sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += x.Row(r)[i] * w[static_cast<size_t>(o * n + i)];
      want[static_cast<size_t>(r * outs + o)] =
          static_cast<float>(sum) * (x.Scale(r) * scale[static_cast<size_t>(o)]);
    }
  }
  std::vector<float> few(want.size());
  mixtral_jax::ProductOfFewRows(x, 1, rows, n, w.data(), scale.data(), 0, outs - 1, few.data(),
                                outs);
  int64_t differences = Differences(few, want);
#if defined(MIXTRAL_JAX_BYTE_DOTS) || defined(MIXTRAL_JAX_PAIR_PANELS)
  std::vector<float> many(want.size());
  mixtral_jax::ProductOfManyRows(x, 1, rows, n, w.data(), scale.data(), 0, outs - 1, many.data(),
                                 outs);
  differences += Differences(many, want);
#endif
  return differences;
}

// A weight in tiles of random bytes, or of all -128 or 15 15; scales are 1 / 4, 2 / 4 ... 5 / 4, and
// minima too.
template <typename Dtype>
int64_t GroupDifferences(int64_t rows, int64_t groups, int64_t outs, bool extreme) {
  using mixtral_jax::kTileOuts, mixtral_jax::kWordBytes, mixtral_jax::kWordsOfGroup;
  constexpr int64_t kGroup = Dtype::kGroup;
  constexpr bool kIsInt4 = kGroup == 32;
  const uint16_t quarters[] = {0x3400, 0x3800, 0x3a00, 0x3c00, 0x3d00};  // float16
  const int64_t n = groups * kGroup, words = groups * kWordsOfGroup;
  std::vector<float> values = Floats(rows * n);
  if (extreme) values.assign(values.size(), -2.5f);
  std::vector<int8_t> w = Weights(outs * words * kWordBytes, extreme);
  if (extreme && kIsInt4) w.assign(w.size(), -1);
  std::vector<uint16_t> scales(static_cast<size_t>(outs * groups * Dtype::kScales));
  for (uint16_t& scale : scales) scale = quarters[Next(5)];
  const mixtral_jax::GroupRows<Dtype> x(1, values.data(), rows, n);
  std::vector<float> got(static_cast<size_t>(rows * outs)), want(got.size());
  const mixtral_jax::GroupMatrix<Dtype> matrix{w.data(), scales.data(), got.data(), outs};
  mixtral_jax::Product(x, 0, rows, n, matrix, 0, outs);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < outs; ++o) {
      float total = 0;
      for (int64_t g = 0; g < groups; ++g) {
        int8_t row[kGroup];
        int32_t dot = 0, sum = 0;
        const float row_scale =
            mixtral_jax::QuantizeRow(&values[static_cast<size_t>(r * n + g * kGroup)], kGroup, row);
        for (int64_t k = 0; k < kGroup; ++k) {
          const int64_t byte = kIsInt4 ? k / 2 : k, word = g * kWordsOfGroup + byte / kWordBytes;
          const int64_t at = ((o / kTileOuts * words + word) * kTileOuts + o % kTileOuts) * kWordBytes;
          int32_t weight = w[static_cast<size_t>(at + byte % kWordBytes)];
          if (kIsInt4) weight = (weight >> (k % 2 * 4)) & 15;
          dot += row[k] * weight;
          sum += row[k];
        }
        const int64_t first = (o / kTileOuts * groups + g) * Dtype::kScales * kTileOuts;
        const auto scale = [&](int64_t kind) {
          const int64_t at = first + kind * kTileOuts + o % kTileOuts;
          return mixtral_jax::FloatOf(scales[static_cast<size_t>(at)]);
        };
        float part = static_cast<float>(dot) * scale(0);
        if (kIsInt4) part += static_cast<float>(sum) * scale(1);
        total += part * row_scale;
      }
      want[static_cast<size_t>(r * outs + o)] = total;
    }
  }
  return Differences(got, want);
}

int64_t RoundingDifferences(int64_t n) {
  const std::vector<float> values = Floats(n);
  std::vector<int8_t> got(static_cast<size_t>(n));
  int32_t sum = 0, want_sum = 0;
  const float scale = mixtral_jax::QuantizeRow(values.data(), n, got.data(), &sum);
  float largest = 0;
  for (float value : values) largest = std::max(largest, std::fabs(value));
  int64_t differences = scale != largest / 127.0f;
  for (size_t i = 0; i < values.size(); ++i) {
    const int32_t want = static_cast<int32_t>(std::rint(values[i] * (1.0f / scale)));
    differences += want != got[i];
    want_sum += want;
  }
  return differences + (sum != want_sum);
}

int64_t SlopeDifferences([[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t n,
                         [[maybe_unused]] int64_t columns) {
#if defined(MIXTRAL_JAX_BYTE_DOTS)
  const std::vector<float> slopes = Floats(rows * n), scale = Floats(n);
  const std::vector<int8_t> w = Weights(n * columns, false);
  const mixtral_jax::SlopeRows x(1, slopes.data(), scale.data(), rows, n);
  std::vector<float> got(static_cast<size_t>(rows * columns)), want(got.size());
  mixtral_jax::ProductOfSlopes(1, x, rows, n, w.data(), columns, got.data());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      int32_t upper = 0, lower = 0;
      for (int64_t k = 0; k < n; ++k) {
        const int32_t weight = w[static_cast<size_t>(k * columns + c)];
        upper += x.bytes[2 * r * x.stride + k] * weight;
        lower += x.bytes[(2 * r + 1) * x.stride + k] * weight;
      }
      want[static_cast<size_t>(r * columns + c)] =
          (static_cast<float>(upper) * 128.0f + static_cast<float>(lower)) *
          x.steps[static_cast<size_t>(r)];
    }
  }
  return Differences(got, want);
#else
  return 0;
#endif
}

}  // namespace

int main() {
  int64_t differences = 0;
  for (int64_t n : {1, 3, 64, 131, 1024, 2500}) {
    for (int64_t rows : {2, 3, 5, 7, 9, 10, 14, 25, 42}) {
      for (int64_t outs : {2, 33, 70}) differences += ProductDifferences(rows, n, outs, false);
      differences += ProductDifferences(rows, n, 20, true);
    }
    differences += RoundingDifferences(n);
  }
  for (int64_t rows : {1, 2, 3, 7, 21}) {
    for (int64_t groups : {1, 3, 70}) {
      differences += GroupDifferences<mixtral_jax::Int4>(rows, groups, 48, groups == 3);
      differences += GroupDifferences<mixtral_jax::Int8Groups>(rows, groups, 48, groups == 3);
    }
  }
  for (int64_t rows : {1, 7, 260})
    for (int64_t n : {1, 70, 1100}) differences += SlopeDifferences(rows, n, n == 70 ? 75 : 40);
  std::printf("%lld results differ\n", static_cast<long long>(differences));
}
