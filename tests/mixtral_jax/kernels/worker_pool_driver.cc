// Runs many small jobs of the worker pool, and jobs of two threads at once, and checks their sums.
// The exit status is 0 if every task ran exactly once.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "worker_pool.h"

namespace {

// Runs `jobs` jobs of 1 to 20 tasks; each task adds its number plus one to a place of its own.
int64_t CountWrongJobs(int jobs) {
  int64_t wrong = 0;
  for (int job = 0; job < jobs; ++job) {
    const int64_t num_tasks = 1 + job % 20;
    std::vector<int64_t> results(static_cast<size_t>(num_tasks));
    std::atomic<int64_t> calls{0};
    mixtral_jax::ParallelFor(4, num_tasks, [&](int64_t task) {
      results[static_cast<size_t>(task)] += task + 1;
      calls.fetch_add(1, std::memory_order_relaxed);
    });
    int64_t sum = 0;
    for (int64_t result : results) sum += result;
    if (sum != num_tasks * (num_tasks + 1) / 2 || calls.load() != num_tasks) ++wrong;
  }
  return wrong;
}

}  // namespace

int main() {
  constexpr int kJobs = 5000;
  int64_t wrong_of_other = 0;
  std::thread other([&] { wrong_of_other = CountWrongJobs(kJobs); });
  const int64_t wrong = CountWrongJobs(kJobs);
  other.join();
  std::printf("%lld jobs were wrong\n", static_cast<long long>(wrong + wrong_of_other));
  return wrong + wrong_of_other == 0 ? 0 : 1;
}
