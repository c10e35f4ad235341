// Attends over pages of float and of int8 with 1, 2 and 64 threads' tasks, and prints how many
// results differ between them in a bit, and a digest of all bits.

#include "attend_tasks.h"

#include <cstdio>
#include <cstring>

namespace {

using namespace mixtral_jax;

// Numbers in [-1, 1), the same on every machine.
struct Dice {
  uint32_t state = 1;
  float Next() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state) >> 8) / 8388608.0f;
  }
};

uint64_t g_digest = 1469598103934665603u;

// Five sequences: decodes, a chunk that ends within a block of queries, and one of several blocks.
int Differing(int64_t group, int64_t size, bool is_int8, int64_t window) {
  constexpr int64_t kSequences = 5, kWidth = 90, kPage = 16, kHeads = 2;
  const int32_t lengths[kSequences] = {1, 700, 1300, 9, 1100};
  const int32_t starts[kSequences + 1] = {0, 1, 2, 3, 12, 82};
  const int64_t queries = starts[kSequences];
  std::vector<int32_t> table(kSequences * kWidth);
  for (size_t i = 0; i < table.size(); ++i)
    table[i] = static_cast<int32_t>(i * 7 % table.size());
  PageCache cache{nullptr, kPage, kHeads, size, is_int8};
  std::vector<char> pages(table.size() * static_cast<size_t>(kPage * cache.TokenBytes()));
  cache.pages = pages.data();
  Dice dice;
  const int64_t head_bytes = cache.HeadBytes();
  for (size_t at = 0; at < pages.size(); at += static_cast<size_t>(head_bytes)) {
    for (int64_t h = 0; h < size; ++h) {
      const float value = dice.Next();
      if (is_int8) pages[at + static_cast<size_t>(h)] = static_cast<char>(static_cast<int8_t>(value * 127));
      else std::memcpy(&pages[at + static_cast<size_t>(h) * 4], &value, 4);
    }
    const float scale = 1.0f / 127 + dice.Next() / 1024;
    if (is_int8) std::memcpy(&pages[at + static_cast<size_t>(size)], &scale, 4);
  }
  const size_t num_results = static_cast<size_t>(queries * kHeads * group * size);
  std::vector<float> q(num_results), first;
  for (float& value : q) value = 4 * dice.Next();
  int differing = 0;
  for (const int64_t threads : {1, 2, 64}) {
    std::vector<float> y(num_results);
    const Call call{cache, q.data(), y.data(), group, 0.25f};
    const Sequences sequences{lengths, starts, table.data(), kSequences, kWidth};
    const Tasks tasks(call, sequences, window, threads);
    for (int64_t i = tasks.size(); i-- > 0;) RunTask(call, tasks[i]);
    if (first.empty()) first = y;
    for (size_t i = 0; i < y.size(); ++i)
      differing += std::memcmp(&y[i], &first[i], sizeof(float)) != 0;
  }
  for (const float value : first) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    g_digest = (g_digest ^ bits) * 1099511628211u;
  }
  return differing;
}

}  // namespace

int main() {
  int differing = 0;
  for (const bool is_int8 : {false, true}) {
    for (const int64_t window : {0, 3, 600}) {
      differing += Differing(3, 64, is_int8, window);
      differing += Differing(1, 40, is_int8, window);
      differing += Differing(7, 24, is_int8, window);
    }
  }
  std::printf("%d results differ\n%016llx\n", differing,
              static_cast<unsigned long long>(g_digest));
}
