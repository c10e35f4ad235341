// Compares products of few and of many int8 rows, and the products the other way of slopes, with
// sums that are written out. Prints how many results differ.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "byte_panels.h"
#include "byte_slopes.h"
#include "few_rows.h"
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
  for (int64_t rows : {1, 7, 260})
    for (int64_t n : {1, 70, 1100}) differences += SlopeDifferences(rows, n, n == 70 ? 75 : 40);
  std::printf("%lld results differ\n", static_cast<long long>(differences));
}
