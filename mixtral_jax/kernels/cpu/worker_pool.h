// Threads that share the work of one kernel call.
//
// A layer calls five kernels of some hundred microseconds each, and waking a sleeping thread takes
// as long as one of them. So threads spin for a while after a job, waiting for the next.

#ifndef MIXTRAL_JAX_KERNELS_CPU_WORKER_POOL_H_
#define MIXTRAL_JAX_KERNELS_CPU_WORKER_POOL_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

namespace mixtral_jax {

// The state of a pool in one atomic word: the number of the current job in the upper 32 bits, and
// how many of its tasks nobody has taken yet in the lower 32 bits. Job numbers wrap around.
class Ticket {
 public:
  constexpr Ticket() = default;
  constexpr explicit Ticket(uint64_t word) : word_(word) {}
  constexpr Ticket(uint32_t job, uint32_t num_tasks)
      : word_(static_cast<uint64_t>(job) << 32 | num_tasks) {}

  constexpr uint64_t word() const { return word_; }
  constexpr uint32_t job() const { return static_cast<uint32_t>(word_ >> 32); }
  constexpr uint32_t num_tasks() const { return static_cast<uint32_t>(word_); }

  // The ticket of the job behind this one.
  constexpr Ticket NextJob(uint32_t num_tasks) const {
    return Ticket(static_cast<uint32_t>(job() + 1), num_tasks);
  }
  // The same job with one task fewer.
  constexpr Ticket WithoutOneTask() const { return Ticket(word_ - 1); }

 private:
  uint64_t word_ = 0;
};

// The job behind the last number is number 0, with all of its tasks.
static_assert(Ticket(UINT32_MAX, 0).NextJob(3).job() == 0);
static_assert(Ticket(UINT32_MAX, 0).NextJob(3).num_tasks() == 3);
static_assert(Ticket(7, 0).NextJob(2).word() == (uint64_t{8} << 32 | 2));
static_assert(Ticket(7, 2).WithoutOneTask().word() == Ticket(7, 1).word());

class WorkerPool {
 public:
  using Function = void (*)(const void* argument, int64_t task);

  // The pool of this process. It is never destroyed, because its threads may outlive everything
  // else.
  static WorkerPool& Instance();

  // Calls function(argument, i) once for each i in [0, num_tasks), on up to `num_threads` threads
  // including this one, and returns when all calls have returned. Without other threads, or while
  // another job runs, this thread makes all calls.
  void Run(int64_t num_threads, int64_t num_tasks, Function function, const void* argument);

 private:
  // How long a thread spins before it sleeps.
  static constexpr std::chrono::microseconds kSpinTime{300};

  void StartThreads(int64_t count);
  void RunTasks(uint32_t job);
  [[noreturn]] void WorkerLoop();
  uint32_t CurrentJob() const { return Ticket(ticket_.load(std::memory_order_acquire)).job(); }

  std::mutex job_mutex_;  // Held by the thread whose job runs.
  int64_t num_started_ = 0;
  Function function_ = nullptr;
  const void* argument_ = nullptr;
  std::atomic<int64_t> num_done_{0};
  std::atomic<uint64_t> ticket_{0};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::atomic<int> num_sleeping_{0};
};

// Calls work(i) once for each i in [0, num_tasks), on up to `num_threads` threads.
template <typename Work>
void ParallelFor(int64_t num_threads, int64_t num_tasks, const Work& work) {
  WorkerPool::Instance().Run(
      num_threads, num_tasks,
      [](const void* argument, int64_t task) { (*static_cast<const Work*>(argument))(task); },
      &work);
}

// Memory for n values, which the thread keeps for its next call: fresh memory costs a page fault
// for every 4 KiB. It begins at a cache line and is not cleared. Only one user at a time may have
// the memory of a type.
template <typename T>
T* ThreadScratch(int64_t n) {
  constexpr size_t kCacheLine = 64;
  thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local int64_t size = 0;
  if (size < n) {
    const size_t bytes =
        (static_cast<size_t>(n) * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
    size = 0;
    memory.reset(std::aligned_alloc(kCacheLine, bytes));
    if (memory == nullptr) throw std::bad_alloc();
    size = static_cast<int64_t>(bytes / sizeof(T));
  }
  return static_cast<T*>(memory.get());
}

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_WORKER_POOL_H_
