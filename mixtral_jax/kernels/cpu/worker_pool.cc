#include "worker_pool.h"

#include <system_error>
#include <thread>

namespace mixtral_jax {
namespace {

// Tells the processor that this thread spins.
void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

WorkerPool& WorkerPool::Instance() {
  static WorkerPool* const pool = new WorkerPool;
  return *pool;
}

void WorkerPool::Run(int64_t num_threads, int64_t num_tasks, Function function,
                     const void* argument) {
  std::unique_lock<std::mutex> lock(job_mutex_, std::try_to_lock);
  if (num_threads < 2 || num_tasks < 2 || num_tasks > UINT32_MAX || !lock.owns_lock()) {
    for (int64_t i = 0; i < num_tasks; ++i) function(argument, i);
    return;
  }
  StartThreads(num_threads - 1);
  function_ = function;
  argument_ = argument;
  num_done_.store(0, std::memory_order_relaxed);
  const Ticket last(ticket_.load(std::memory_order_relaxed));
  const Ticket ticket = last.NextJob(static_cast<uint32_t>(num_tasks));
  ticket_.store(ticket.word());
  if (num_sleeping_.load() > 0) {
    std::lock_guard<std::mutex> sleep_lock(sleep_mutex_);
    wake_.notify_all();
  }
  RunTasks(ticket.job());
  for (int spins = 0; num_done_.load(std::memory_order_acquire) < num_tasks; ++spins) {
    // After many spins the thread with the last task may have lost its processor: this one yields.
    spins < 1000 ? Pause() : std::this_thread::yield();
  }
}

void WorkerPool::StartThreads(int64_t count) {
  try {
    for (; num_started_ < count; ++num_started_) {
      std::thread([this] { WorkerLoop(); }).detach();
    }
  } catch (const std::system_error&) {
    // The system gives no more threads; the pool works with those that it has.
  }
}

// Runs tasks of a job, the last one first, until none is left. The job's function may be read only
// by a thread that holds one of its tasks: until that task is done the job does not end, and the
// next job does not overwrite the function.
void WorkerPool::RunTasks(uint32_t job) {
  for (;;) {
    const Ticket ticket(ticket_.load(std::memory_order_acquire));
    if (ticket.job() != job || ticket.num_tasks() == 0) return;
    uint64_t expected = ticket.word();
    if (!ticket_.compare_exchange_weak(expected, ticket.WithoutOneTask().word())) continue;
    function_(argument_, static_cast<int64_t>(ticket.num_tasks()) - 1);
    num_done_.fetch_add(1, std::memory_order_release);
  }
}

void WorkerPool::WorkerLoop() {
  uint32_t last_job = 0;
  for (;;) {
    const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
    while (CurrentJob() == last_job) {
      if (std::chrono::steady_clock::now() < deadline) {
        for (int i = 0; i < 32; ++i) Pause();
        continue;
      }
      std::unique_lock<std::mutex> lock(sleep_mutex_);
      num_sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return Ticket(ticket_.load()).job() != last_job; });
      num_sleeping_.fetch_sub(1);
    }
    last_job = CurrentJob();
    RunTasks(last_job);
  }
}

}  // namespace mixtral_jax
