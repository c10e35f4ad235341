// Kernels for CPU, part 2: attention over pages in place.
//
// XLA:CPU copies the pages of a cache before it reads them. This kernel writes new keys and values
// into the pages where they lie, and reads them there.
//
// Every number is computed in an order that depends on its own query alone, never on how queries
// were batched, on the thread that computes it or on the places of its pages. So equal queries give
// equal bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attend_block.h"
#include "form.h"
#include "page_cache.h"
#include "vectors.h"
#include "worker_pool.h"
#include "xla/ffi/api/ffi.h"

namespace mixtral_jax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kSpan = 512;      // Keys of one task; spans begin at multiples of it.
constexpr int64_t kQueryBlock = 8;  // Queries of one task.

// Consecutive queries of one sequence, and the span of keys that a task attends to.
struct Task {
  const int32_t* table;  // The pages of the sequence.
  int64_t token, count;  // The first query's place in the flat row, and the number of queries.
  int64_t position;      // The first query's position in the sequence.
  int64_t span, num_spans;
  int64_t window;   // The number of keys that a query sees, itself included; 0 for all.
  float* partials;  // [count, heads, 2 + H]: maximum, total and mixed values of this span.

  // Query j sees the keys [First(j), Last(j)) of the span.
  int64_t First(int64_t j) const {
    return std::max(FirstVisible(position + j, window), span * kSpan);
  }
  int64_t Last(int64_t j) const { return std::min(position + j + 1, (span + 1) * kSpan); }

  static int64_t FirstVisible(int64_t position, int64_t window) {
    return window == 0 ? 0 : std::max<int64_t>(0, position - window + 1);
  }
};

// Adds the keys of a task's span to the sums [count, heads] of its queries [count, heads, H]. Of
// the heads, `group` neighbours share a key/value head. Blocks begin at multiples of kKeyBlock, so
// a query's sums do not depend on the queries beside it.
void AttendSpan(const PageCache& cache, const Task& task, const float* queries, int64_t group,
                PartialSum* sums) {
  const int64_t size = cache.head_size, heads = cache.kv_heads * group;
  const int64_t begin = task.First(0), end = task.Last(task.count - 1);
  const int64_t bytes = cache.PairBytes();
  const float* keys[kKeyBlock];
  const char *tokens[kKeyBlock], *next_pairs[kKeyBlock];
  std::vector<float> floats(static_cast<size_t>(cache.is_int8 ? kKeyBlock * 2 * size : 0));
  std::vector<QueryRow> rows;
  for (int64_t start = begin / kKeyBlock * kKeyBlock; start < end; start += kKeyBlock) {
    const int64_t from = std::max(start, begin), to = std::min(start + kKeyBlock, end);
    const bool has_next = to < end;
    // Tokens before the first that is seen may have left the pages; the first stands in for them.
    for (int64_t i = 0; i < to - start; ++i) {
      tokens[i] = cache.Token(task.table, std::max(start + i, from));
    }
    for (int64_t k = 0; k < cache.kv_heads; ++k) {
      rows.clear();
      for (int64_t j = 0; j < task.count; ++j) {
        const int64_t first = std::max(task.First(j), start), last = std::min(task.Last(j), to);
        for (int64_t head = k * group; first < last && head < (k + 1) * group; ++head) {
          const int64_t row = j * heads + head;
          rows.push_back({queries + row * size, first - start, last - start, sums + row});
        }
      }
      // Each head of this block prefetches its share of the next block, in the order of memory.
      for (int64_t i = 0; has_next && i < kKeyBlock; ++i) {
        const int64_t pair = k * kKeyBlock + i;
        const int64_t token = std::min(to + pair / cache.kv_heads, end - 1);
        next_pairs[i] = cache.Token(task.table, token) + pair % cache.kv_heads * bytes;
      }
      for (int64_t i = 0; i < to - start; ++i) {
        float* buffer = cache.is_int8 ? floats.data() + i * 2 * size : nullptr;
        keys[i] = cache.ReadPair(tokens[i] + k * bytes, buffer);
      }
      const int64_t n = static_cast<int64_t>(rows.size());
      const char* const* next = has_next ? next_pairs : nullptr;
      int64_t r = 0;
      for (; r + 3 <= n; r += 3, next = nullptr)
        AttendBlock<3>(keys, next, bytes, to - start, size, rows.data() + r);
      if (r + 2 <= n) {
        AttendBlock<2>(keys, next, bytes, to - start, size, rows.data() + r);
        r += 2, next = nullptr;
      }
      if (r < n) AttendBlock<1>(keys, next, bytes, to - start, size, rows.data() + r);
    }
  }
}

// Computes the partial sums of a task. q is [T, heads, H].
void RunTask(const PageCache& cache, const Task& task, const float* q, int64_t group, float scale) {
  const int64_t size = cache.head_size, heads = cache.kv_heads * group, record = 2 + size;
  const int64_t begin = task.First(0);
  const int64_t end = std::min(begin + kKeyBlock, task.Last(task.count - 1));
  for (int64_t key = begin; key < end; ++key)
    Prefetch(cache.Token(task.table, key), cache.TokenBytes());
  const int64_t rows = task.count * heads;
  const float* queries = q + task.token * heads * size;
  std::vector<float> scaled(static_cast<size_t>(rows * size));
  for (size_t i = 0; i < scaled.size(); ++i) scaled[i] = queries[i] * scale;
  std::fill(task.partials, task.partials + rows * record, 0.0f);
  std::vector<PartialSum> sums(static_cast<size_t>(rows));
  float* partial = task.partials;
  for (PartialSum& sum : sums) {
    sum = {kMaskedScore, 0.0f, partial + 2};
    partial += record;
  }
  AttendSpan(cache, task, scaled.data(), group, sums.data());
  partial = task.partials;
  for (const PartialSum& sum : sums) {
    partial[0] = sum.max_score;
    partial[1] = sum.total;
    partial += record;
  }
}

// Adds up the spans of the same queries, in the order of the spans; y is [count, heads, H].
void AddSpans(const Task* tasks, int64_t heads, int64_t size, float* y) {
  const int64_t record = 2 + size;
  for (int64_t row = 0; row < tasks->count * heads; ++row, y += size) {
    float max_score = kMaskedScore, total = 0;
    for (int64_t span = 0; span < tasks->num_spans; ++span)
      max_score = std::max(max_score, tasks[span].partials[row * record]);
    std::fill(y, y + size, 0.0f);
    for (int64_t span = 0; span < tasks->num_spans; ++span) {
      const float* partial = tasks[span].partials + row * record;
      const float shrink = Exp(Broadcast(partial[0] - max_score))[0];
      total += partial[1] * shrink;
      for (int64_t h = 0; h < size; ++h) y[h] += partial[2 + h] * shrink;
    }
    for (int64_t h = 0; h < size; ++h) y[h] /= total;
  }
}

// The sequences of a batch, as RaggedBatch of cache.py holds them.
struct Sequences {
  const int32_t *lengths, *query_starts, *page_table;  // [S], [S + 1], [S W]
  int64_t count, width;

  const int32_t* Table(int64_t s) const { return page_table + s * width; }
  // The position of the query at place t of the flat row, which belongs to sequence s.
  int64_t Position(int64_t s, int64_t t) const { return lengths[s] - (query_starts[s + 1] - t); }
};

// Writes the new keys and values [T, K, H] into the pages.
void WriteNewTokens(const PageCache& cache, const Sequences& sequences, const float* k,
                    const float* v) {
  for (int64_t s = 0; s < sequences.count; ++s) {
    for (int64_t t = sequences.query_starts[s]; t < sequences.query_starts[s + 1]; ++t) {
      char* token = cache.Token(sequences.Table(s), sequences.Position(s, t));
      for (int64_t head = 0; head < cache.kv_heads; ++head) {
        const int64_t from = (t * cache.kv_heads + head) * cache.head_size;
        char* pair = token + head * cache.PairBytes();
        cache.Write(pair, k + from);
        cache.Write(pair + cache.HeadBytes(), v + from);
      }
    }
  }
}

// The tasks of a batch. All spans of the same queries stand together, in order.
std::vector<Task> MakeTasks(const Sequences& sequences, int64_t window) {
  std::vector<Task> tasks;
  for (int64_t s = 0; s < sequences.count; ++s) {
    const int64_t end = sequences.query_starts[s + 1];
    for (int64_t t = sequences.query_starts[s]; t < end; t += kQueryBlock) {
      const int64_t count = std::min<int64_t>(kQueryBlock, end - t);
      const int64_t position = sequences.Position(s, t);
      const int64_t first = Task::FirstVisible(position, window) / kSpan;
      const int64_t last = (position + count - 1) / kSpan;
      for (int64_t span = first; span <= last; ++span) {
        tasks.push_back({sequences.Table(s), t, count, position, span, last - first + 1, window,
                         nullptr});
      }
    }
  }
  return tasks;
}

// paged(q [T N H], k [T K H], v [T K H], pages [P Y 2K H] f32 or [P Y 2K H+4] s8, lengths [S],
//       query_starts [S+1], page_table [S W], num_sequences []) -> mixed [T N H], pages
//
// Writes the new keys and values into the pages, which are the same buffer before and after, then
// attends: a query at position p of its sequence sees the positions max(0, p - window + 1) .. p;
// all up to p if `window` is 0. Places of unused tokens give zeros.
ffi::Error Paged(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                 ffi::Buffer<ffi::F32> v, ffi::AnyBuffer pages, ffi::Buffer<ffi::S32> lengths,
                 ffi::Buffer<ffi::S32> query_starts, ffi::Buffer<ffi::S32> page_table,
                 ffi::Buffer<ffi::S32> num_sequences, ffi::ResultBuffer<ffi::F32> mixed,
                 ffi::Result<ffi::AnyBuffer> pages_out, int64_t window) {
  const int64_t tokens = q.dimensions()[0], heads = q.dimensions()[1], size = q.dimensions()[2];
  const int64_t kv_heads = k.dimensions()[1], group = heads / kv_heads;
  if (size % kLanes)
    return ffi::Error::InvalidArgument("paged: the head size must be a multiple of 8");
  const bool is_int8 = pages.element_type() == ffi::S8;
  if (!is_int8 && pages.element_type() != ffi::F32)
    return ffi::Error::InvalidArgument("paged: pages must be f32 or s8");
  if (pages_out->untyped_data() != pages.untyped_data())
    std::memcpy(pages_out->untyped_data(), pages.untyped_data(), pages.size_bytes());
  const PageCache cache{static_cast<char*>(pages_out->untyped_data()), pages.dimensions()[1],
                        kv_heads, size, is_int8};
  const Sequences sequences{lengths.typed_data(), query_starts.typed_data(),
                            page_table.typed_data(), num_sequences.typed_data()[0],
                            page_table.dimensions()[1]};
  float* out = mixed->typed_data();
  const int64_t used = sequences.query_starts[sequences.count];
  std::fill(out + used * heads * size, out + tokens * heads * size, 0.0f);
  WriteNewTokens(cache, sequences, k.typed_data(), v.typed_data());

  std::vector<Task> tasks = MakeTasks(sequences, window);
  int64_t scratch_size = 0;
  for (const Task& task : tasks) scratch_size += task.count * heads * (2 + size);
  float* scratch = ThreadScratch<float>(scratch_size);
  for (Task& task : tasks) {
    task.partials = scratch;
    scratch += task.count * heads * (2 + size);
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  ParallelFor(pool.num_threads(), static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    RunTask(cache, tasks[static_cast<size_t>(i)], q.typed_data(), group, scale);
  });
  for (size_t i = 0; i < tasks.size(); i += static_cast<size_t>(tasks[i].num_spans))
    AddSpans(&tasks[i], heads, size, out + tasks[i].token * heads * size);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mixtral_jax

MIXTRAL_JAX_HANDLER(paged, mixtral_jax::Paged,
                    xla::ffi::Ffi::Bind()
                        .Ctx<xla::ffi::ThreadPool>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::AnyBuffer>()
                        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                        .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Ret<xla::ffi::AnyBuffer>()
                        .Attr<int64_t>("window"));
