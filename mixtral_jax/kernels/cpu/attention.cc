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

#include "attend_tasks.h"
#include "form.h"
#include "page_cache.h"
#include "worker_pool.h"
#include "xla/ffi/api/ffi.h"

namespace mixtral_jax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kTokensOfWrite = 16;  // New tokens that one thread writes at once.

// Writes the new keys and values [T, K, H] of the tokens [begin, end) into the pages.
void WriteNewTokens(const PageCache& cache, const Sequences& sequences, const float* k,
                    const float* v, int64_t begin, int64_t end) {
  const int32_t* starts = sequences.query_starts;
  int64_t s = std::upper_bound(starts, starts + sequences.count, begin) - starts - 1;
  for (int64_t t = begin; t < end; ++t) {
    while (t >= starts[s + 1]) ++s;
    char* token = cache.Token(sequences.Table(s), sequences.Position(s, t));
    for (int64_t head = 0; head < cache.kv_heads; ++head) {
      const int64_t from = (t * cache.kv_heads + head) * cache.head_size;
      char* pair = token + head * cache.PairBytes();
      cache.Write(pair, k + from);
      cache.Write(pair + cache.HeadBytes(), v + from);
    }
  }
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
  if (size % 8)
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
  const Call call{cache, q.typed_data(), mixed->typed_data(), group,
                  1.0f / std::sqrt(static_cast<float>(size))};
  const int64_t used = sequences.query_starts[sequences.count];
  std::fill(call.y + used * heads * size, call.y + tokens * heads * size, 0.0f);
  const int64_t writes = (used + kTokensOfWrite - 1) / kTokensOfWrite;
  ParallelFor(pool.num_threads(), writes, [&](int64_t i) {
    const int64_t begin = i * kTokensOfWrite, end = std::min(begin + kTokensOfWrite, used);
    WriteNewTokens(cache, sequences, k.typed_data(), v.typed_data(), begin, end);
  });
  const Tasks tasks(call, sequences, window, pool.num_threads());
  ParallelFor(pool.num_threads(), tasks.size(), [&](int64_t i) { RunTask(call, tasks[i]); });
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
