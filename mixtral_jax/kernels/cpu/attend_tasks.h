// How attention over pages is divided into tasks, and what a thread computes of one.

#ifndef MIXTRAL_JAX_KERNELS_CPU_ATTEND_TASKS_H_
#define MIXTRAL_JAX_KERNELS_CPU_ATTEND_TASKS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <vector>

#include "attend_block.h"
#include "key_block.h"
#include "page_cache.h"
#include "wide_floats.h"
#include "worker_pool.h"

namespace mixtral_jax {

// Keys of a span; spans begin at multiples of it. What a query attends to in each span is computed
// by itself and then added up in the order of the spans, by whatever threads.
constexpr int64_t kSpan = 256;
constexpr int64_t kQueryBlock = 32;  // Queries of one task.
constexpr int64_t kManyRows = 16;    // Rows of a key/value head that are worth a task of their own.
constexpr int64_t kTasksPerThread = 3;  // Fewer could leave threads without work.
constexpr int64_t kManyTasks = 8;       // A thread; with more, tasks only begin to read more often.
constexpr int64_t kMostPartials = int64_t{1} << 26;  // Floats that tasks keep for each other.

// Consecutive queries of one sequence.
struct QueryBlock {
  const int32_t* table;  // The pages of the sequence.
  int64_t token, count;  // The first query's place in the flat row, and the number of queries.
  int64_t position;      // The first query's position in the sequence.
  int64_t window;        // The number of keys that a query sees, itself included; 0 for all.

  // Query j sees the keys [First(j), Last(j)).
  int64_t First(int64_t j) const {
    return window == 0 ? 0 : std::max<int64_t>(0, position + j - window + 1);
  }
  int64_t Last(int64_t j) const { return position + j + 1; }
  int64_t End() const { return Last(count - 1); }
  int64_t FirstSpan() const { return First(0) / kSpan; }
  int64_t NumSpans() const { return (End() - 1) / kSpan + 1 - FirstSpan(); }
};

// What all tasks of a call share.
struct Call {
  PageCache cache;
  const float* q;  // [T, heads, H]
  float* y;        // [T, heads, H]
  int64_t group;   // The number of neighbouring query heads that share a key/value head.
  float scale;

  int64_t Heads() const { return cache.kv_heads * group; }
  int64_t PaddedSize() const { return RoundUp(cache.head_size, wide::kLanes); }
};

// The unfinished attention of `count` query heads, each of `size` floats.
struct Sums {
  PartialSum* rows;
  int64_t count, size;

  static int64_t NumFloats(int64_t count, int64_t size) {
    return RoundUp(count * size, 16) + count * static_cast<int64_t>(sizeof(PartialSum) / 4);
  }
  // Sums of nothing, in memory for NumFloats, which begins at a cache line.
  static Sums In(float* memory, int64_t count, int64_t size) {
    const Sums sums = At(memory, count, size);
    std::fill(memory, memory + count * size, 0.0f);
    for (int64_t row = 0; row < count; ++row)
      new (sums.rows + row) PartialSum{{}, memory + row * size, kMaskedScore};
    return sums;
  }
  // Sums that are there.
  static Sums At(float* memory, int64_t count, int64_t size) {
    return {reinterpret_cast<PartialSum*>(memory + RoundUp(count * size, 16)), count, size};
  }

  // Adds the sums of the next span. A row that saw nothing there stays as it is in every bit.
  void Add(const Sums& next) const {
    for (int64_t row = 0; row < count; ++row) {
      PartialSum &to = rows[row], &from = next.rows[row];
      if (from.max_score == kMaskedScore) continue;
      if (to.max_score == kMaskedScore) {
        std::copy(from.mixed, from.mixed + size, to.mixed);
        std::copy(from.totals, from.totals + wide::kSumLanes, to.totals);
        to.max_score = from.max_score;
        continue;
      }
      const float max_score = std::max(to.max_score, from.max_score);
      const wide::Floats shrink = wide::Exp(wide::Broadcast(to.max_score - max_score));
      const wide::Floats other = wide::Exp(wide::Broadcast(from.max_score - max_score));
      to.max_score = max_score;
      const auto add = [=](float* sum, const float* more) {
        wide::Store(sum, wide::MulAdd(wide::Load(more), other, wide::Load(sum) * shrink));
      };
      for (int64_t h = 0; h < size; h += wide::kLanes) add(to.mixed + h, from.mixed + h);
      for (int64_t i = 0; i < wide::kSumLanes; i += wide::kLanes)
        add(to.totals + i, from.totals + i);
    }
  }
};

// Queries, key/value heads and spans that one thread works on. Its rows are (query, head).
struct Task {
  QueryBlock queries;
  int64_t first_head, num_heads;  // of the key/value heads
  int64_t first_span, num_spans;
  // Where tasks share the spans of the same queries and heads: the sums of the spans, one behind
  // the other, and how many of the tasks are not done; the last one adds up. Otherwise null.
  float* partials;
  std::atomic<int64_t>* unfinished;

  int64_t Rows(int64_t group) const { return queries.count * num_heads * group; }
  int64_t End() const { return std::min(queries.End(), (first_span + num_spans) * kSpan); }
  bool IsShared() const { return num_spans < queries.NumSpans(); }
};

// The memory in which a thread computes a task.
struct Workspace {
  KeyBlock block;
  float* queries;  // [rows, H], scaled
  QueryRow* rows;  // of one key/value head
  float *sums, *span_sums;

  Workspace(const Call& call, int64_t num_rows) {
    const int64_t size = call.PaddedSize(), floats_of_sums = Sums::NumFloats(num_rows, size);
    const int64_t num_floats = 2 * kKeyBlock * size + RoundUp(num_rows * size, 16) +
                               2 * RoundUp(floats_of_sums, 16);
    float* memory = reinterpret_cast<float*>(ThreadScratch<CacheLine>(num_floats / 16));
    block.head_size = call.cache.head_size;
    block.keys = memory;
    block.copies = block.keys + kKeyBlock * size;
    queries = block.copies + kKeyBlock * size;
    sums = queries + RoundUp(num_rows * size, 16);
    span_sums = sums + RoundUp(floats_of_sums, 16);
    rows = ThreadScratch<QueryRow>(num_rows);
  }

 private:
  struct CacheLine {
    float values[16];
  };
};

// Adds the keys of a span to the sums of a task's rows. Blocks begin at multiples of kKeyBlock, so
// a query's sums do not depend on the queries beside it. All heads of a block are read before the
// next block, which is prefetched meanwhile in the order of memory.
inline void AttendSpan(const Call& call, const Task& task, int64_t span, Workspace& work,
                const Sums& sums) {
  const PageCache& cache = call.cache;
  const QueryBlock& queries = task.queries;
  const int64_t size = cache.head_size, heads = task.num_heads * call.group;
  const int64_t begin = std::max(queries.First(0), span * kSpan);
  const int64_t end = std::min(queries.End(), (span + 1) * kSpan), task_end = task.End();
  const int64_t bytes = cache.PairBytes();
  const char* pairs[kKeyBlock];
  for (int64_t start = begin / kKeyBlock * kKeyBlock; start < end; start += kKeyBlock) {
    const int64_t from = std::max(start, begin), to = std::min(start + kKeyBlock, end);
    work.block.count = to - start;
    const int64_t steps = task.num_heads * (work.block.ReadSteps() + 2 * size);
    Prefetcher next(cache, queries.table, to, std::min(to + kKeyBlock, task_end), task.first_head,
                    task.num_heads, steps);
    for (int64_t k = 0; k < task.num_heads; ++k) {
      int64_t n = 0;
      for (int64_t j = 0; j < queries.count; ++j) {
        const int64_t first = std::max(queries.First(j), start);
        const int64_t last = std::min(queries.Last(j), to);
        for (int64_t head = k * call.group; first < last && head < (k + 1) * call.group; ++head) {
          const int64_t row = j * heads + head;
          work.rows[n++] = {work.queries + row * size, first - start, last - start,
                            sums.rows + row};
        }
      }
      // Tokens before the first that is seen may have left the pages; the first stands in for them,
      // and the last for those behind it.
      for (int64_t i = 0; i < RoundUp(to - start, wide::kSumLanes); ++i) {
        const int64_t token = std::clamp(start + i, from, to - 1);
        pairs[i] = cache.Token(queries.table, token) + (task.first_head + k) * bytes;
      }
      work.block.Read(cache, pairs, n, next);
      AttendBlock(work.block, work.rows, n, next);
    }
  }
}

// The sum of sixteen floats, halved again and again.
inline float Sum(const float* floats) {
  float lanes[wide::kSumLanes];
  std::copy(floats, floats + wide::kSumLanes, lanes);
  for (int half = wide::kSumLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Divides the sums of a task by their totals, into y.
inline void Finish(const Call& call, const Task& task, const Sums& sums) {
  const int64_t size = call.cache.head_size, heads = task.num_heads * call.group;
  for (int64_t row = 0; row < sums.count; ++row) {
    const int64_t token = task.queries.token + row / heads;
    const int64_t head = task.first_head * call.group + row % heads;
    const PartialSum& sum = sums.rows[row];
    float* y = call.y + (token * call.Heads() + head) * size;
    const float total = Sum(sum.totals);
    for (int64_t h = 0; h < size; ++h) y[h] = sum.mixed[h] / total;
  }
}

inline void RunTask(const Call& call, const Task& task) {
  const PageCache& cache = call.cache;
  const int64_t size = cache.head_size, heads = task.num_heads * call.group;
  const int64_t rows = task.Rows(call.group), padded = call.PaddedSize();
  const int64_t begin = std::max(task.queries.First(0), task.first_span * kSpan);
  const int64_t first_end = std::min(begin / kKeyBlock * kKeyBlock + kKeyBlock, task.End());
  Prefetcher first(cache, task.queries.table, begin, first_end, task.first_head, task.num_heads,
                   first_end - begin);
  for (int64_t i = begin; i < first_end; ++i) first.Step(1);
  Workspace work(call, rows);
  for (int64_t j = 0; j < task.queries.count; ++j) {
    const int64_t head = (task.queries.token + j) * call.Heads() + task.first_head * call.group;
    for (int64_t i = 0; i < heads * size; ++i)
      work.queries[j * heads * size + i] = call.q[head * size + i] * call.scale;
  }
  if (!task.IsShared()) {
    const Sums sums = Sums::In(work.sums, rows, padded);
    AttendSpan(call, task, task.first_span, work, sums);
    for (int64_t i = 1; i < task.num_spans; ++i) {
      const Sums next = Sums::In(work.span_sums, rows, padded);
      AttendSpan(call, task, task.first_span + i, work, next);
      sums.Add(next);
    }
    Finish(call, task, sums);
    return;
  }
  const int64_t floats = Sums::NumFloats(rows, padded), first_span = task.queries.FirstSpan();
  for (int64_t span = task.first_span; span < task.first_span + task.num_spans; ++span) {
    float* memory = task.partials + (span - first_span) * floats;
    AttendSpan(call, task, span, work, Sums::In(memory, rows, padded));
  }
  if (task.unfinished->fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  const Sums sums = Sums::At(task.partials, rows, padded);
  for (int64_t i = 1; i < task.queries.NumSpans(); ++i)
    sums.Add(Sums::At(task.partials + i * floats, rows, padded));
  Finish(call, task, sums);
}

// The sequences of a batch, as RaggedBatch of cache.py holds them.
struct Sequences {
  const int32_t *lengths, *query_starts, *page_table;  // [S], [S + 1], [S W]
  int64_t count, width;

  const int32_t* Table(int64_t s) const { return page_table + s * width; }
  // The position of the query at place t of the flat row, which belongs to sequence s.
  int64_t Position(int64_t s, int64_t t) const { return lengths[s] - (query_starts[s + 1] - t); }
};

// The tasks of a batch for a number of threads, those with the most work last, which are taken
// first. Queries of few rows are taken for all heads at once, because the pages are then read in
// the order of memory, and for some spans; queries of many rows head by head, over all spans.
class Tasks {
 public:
  Tasks(const Call& call, const Sequences& sequences, int64_t window, int64_t num_threads)
      : call_(call) {
    for (int64_t s = 0; s < sequences.count; ++s) {
      const int64_t end = sequences.query_starts[s + 1];
      for (int64_t t = sequences.query_starts[s]; t < end; t += kQueryBlock) {
        const int64_t count = std::min<int64_t>(kQueryBlock, end - t);
        blocks_.push_back({sequences.Table(s), t, count, sequences.Position(s, t), window});
      }
    }
    const int64_t kv_heads = call.cache.kv_heads;
    int64_t num_tasks = 0, num_partials = 0;
    for (const QueryBlock& block : blocks_) {
      num_tasks += HasManyRows(block) ? kv_heads : block.NumSpans();
      num_partials += NumPartials(block);
    }
    const int64_t wanted = num_threads < 2 ? 0 : kTasksPerThread * num_threads;
    const bool are_few = num_tasks < wanted;
    const bool may_share = num_threads > 1 && num_partials <= kMostPartials;
    const int64_t parts =
        are_few ? std::min(kv_heads, wanted / std::max<int64_t>(num_tasks, 1) + 1) : 1;
    const int64_t many = kManyTasks * std::max<int64_t>(1, num_threads);
    const int64_t some_spans = std::max<int64_t>(1, num_tasks / many);
    for (const QueryBlock& block : blocks_) {
      const bool has_many = HasManyRows(block);
      const int64_t heads = has_many ? 1 : (kv_heads + parts - 1) / parts;
      const bool is_shared = may_share && (are_few || !has_many);
      const int64_t spans = is_shared ? some_spans : block.NumSpans();
      for (int64_t head = 0; head < kv_heads; head += heads)
        Push(block, head, std::min(heads, kv_heads - head), spans);
    }
    PlacePartials();
  }

  int64_t size() const { return static_cast<int64_t>(tasks_.size()); }
  const Task& operator[](int64_t i) const { return tasks_[static_cast<size_t>(i)]; }

 private:
  bool HasManyRows(const QueryBlock& block) const { return block.count * call_.group >= kManyRows; }
  int64_t NumPartials(const QueryBlock& block) const {
    return block.NumSpans() * Sums::NumFloats(block.count * call_.Heads(), call_.PaddedSize());
  }

  // Adds the tasks of a block of queries and some heads, each of up to `each` spans.
  void Push(const QueryBlock& block, int64_t head, int64_t heads, int64_t each) {
    const int64_t first = block.FirstSpan(), end = first + block.NumSpans();
    for (int64_t span = first; span < end; span += each)
      tasks_.push_back({block, head, heads, span, std::min(each, end - span), nullptr, nullptr});
    num_shared_ += each < block.NumSpans() ? 1 : 0;
  }

  // Gives tasks that share the spans of the same queries memory for the sums of all spans.
  void PlacePartials() {
    unfinished_ = std::vector<std::atomic<int64_t>>(static_cast<size_t>(num_shared_));
    int64_t num_floats = 0;
    for (const Task& task : tasks_) num_floats += task.IsShared() ? FloatsOf(task) : 0;
    float* partials = ThreadScratch<float>(num_floats);
    auto unfinished = unfinished_.begin();
    for (Task& task : tasks_) {
      if (!task.IsShared()) continue;
      task.partials = partials;
      task.unfinished = &*unfinished;
      unfinished->fetch_add(1, std::memory_order_relaxed);
      if (task.first_span + task.num_spans < task.queries.FirstSpan() + task.queries.NumSpans())
        continue;
      partials += task.queries.NumSpans() * Sums::NumFloats(task.Rows(call_.group),
                                                            call_.PaddedSize());
      ++unfinished;
    }
  }
  int64_t FloatsOf(const Task& task) const {
    return task.num_spans * Sums::NumFloats(task.Rows(call_.group), call_.PaddedSize());
  }

  const Call& call_;
  std::vector<QueryBlock> blocks_;
  std::vector<Task> tasks_;
  std::vector<std::atomic<int64_t>> unfinished_;
  int64_t num_shared_ = 0;
};

}  // namespace mixtral_jax

#endif  // MIXTRAL_JAX_KERNELS_CPU_ATTEND_TASKS_H_
