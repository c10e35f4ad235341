// Compares the products of many int8 rows by bytes (VNNI) with those by pairs of int16 (AVX2).
// Prints how many results differ in their bits, or that this machine has only one of the forms.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "many_rows.h"
#include "many_rows_vnni.h"

#if defined(MIXTRAL_JAX_HAS_VNNI)
namespace {

uint32_t state = 1;

// The next pseudo-random integer from -127 to 127.
int Next() {
  state = state * 1664525u + 1013904223u;
  return static_cast<int>((state >> 16) % 255) - 127;
}

// Rows of random values, widened and as bytes, as products.cc makes them.
struct Rows {
  int64_t stride;
  std::vector<int16_t> wide;
  std::vector<int8_t> narrow;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  const int8_t* bytes;

  Rows(int64_t rows, int64_t n) : stride((n + 63) / 64 * 64) {
    const size_t size = static_cast<size_t>(rows * stride);
    wide.assign(size, 0), narrow.assign(size, 0);
    for (int64_t r = 0; r < rows; ++r) {
      int32_t sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        const size_t at = static_cast<size_t>(r * stride + i);
        wide[at] = static_cast<int16_t>(Next());
        narrow[at] = static_cast<int8_t>(wide[at]);
        sum += wide[at];
      }
      sums.push_back(sum);
      scales.push_back(0.001f * static_cast<float>(Next()));
    }
    bytes = narrow.data();
  }
  const int16_t* Row(int64_t r) const { return wide.data() + r * stride; }
  float Finish(int32_t total, int64_t r, const float* scale, int64_t o) const {
    return static_cast<float>(total) * (scales[static_cast<size_t>(r)] * scale[o]);
  }
};

int64_t CountDifferences(int64_t rows, int64_t n, int64_t outs) {
  const Rows x(rows, n);
  std::vector<int8_t> w(static_cast<size_t>(outs * n));
  for (int8_t& value : w) value = static_cast<int8_t>(Next());
  std::vector<float> scale(static_cast<size_t>(outs), 0.37f);
  std::vector<float> pairs(static_cast<size_t>(rows * outs)), bytes(pairs.size());
  // The last output is left out, so that a range ends within the weight.
  mixtral_jax::ProductOfManyRows(x, 1, rows, n, w.data(), scale.data(), 0, outs - 1, pairs.data(),
                                 outs);
  mixtral_jax::ProductOfByteRows(x, 1, rows, n, w.data(), scale.data(), 0, outs - 1, bytes.data(),
                                 outs);
  int64_t differences = 0;
  for (size_t i = 0; i < pairs.size(); ++i)
    differences += std::memcmp(&pairs[i], &bytes[i], sizeof(float)) != 0;
  return differences;
}

}  // namespace

int main() {
  int64_t differences = 0;
  for (int64_t rows : {25, 42})
    for (int64_t n : {3, 64, 131, 1024, 2500})
      for (int64_t outs : {2, 33, 70}) differences += CountDifferences(rows, n, outs);
  std::printf("%lld results differ\n", static_cast<long long>(differences));
}
#else
int main() { std::puts("this machine has one form"); }
#endif
