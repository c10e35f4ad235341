// Kernels for CPU, part 3: what low-rank adapters add to products, each row by an adapter of its own.
//
// Rows of one adapter are computed together, so that its matrices are read once. As in products.cc
// every number is computed in an order that depends on its own row alone.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "dot_products.h"
#include "form.h"
#include "vectors.h"
#include "worker_pool.h"
#include "xla/ffi/api/ffi.h"

namespace mixtral_jax {
namespace {

namespace ffi = xla::ffi;

// A few rows of one group: first, first + step, first + 2 step ...
struct RowBlock {
  int64_t group, first, step;
  int count;
};

// What is beside one weight.
struct LowRank {
  const float* a;  // [groups, rank, n]
  const float* b;  // [groups, rank, outs]
  float* y;        // [rows, outs], to which the product is added
  int64_t outs;
};

// Blocks of the rows that have a group. A block's rows are equally far apart, as DotProducts wants
// them: two rows always are, four often, because a prompt's rows stand next to one another.
std::vector<RowBlock> Blocks(const int32_t* groups, int64_t rows, int64_t num_groups) {
  std::vector<std::vector<int64_t>> members(static_cast<size_t>(num_groups));
  for (int64_t r = 0; r < rows; ++r)
    if (groups[r] >= 0 && groups[r] < num_groups)
      members[static_cast<size_t>(groups[r])].push_back(r);
  std::vector<RowBlock> blocks;
  for (int64_t group = 0; group < num_groups; ++group) {
    const std::vector<int64_t>& row = members[static_cast<size_t>(group)];
    for (size_t i = 0; i < row.size();) {
      const size_t rest = row.size() - i;
      const int64_t step = rest > 1 ? row[i + 1] - row[i] : 1;
      const bool are_four =
          rest >= 4 && row[i + 2] - row[i + 1] == step && row[i + 3] - row[i + 2] == step;
      const int count = are_four ? 4 : rest > 1 ? 2 : 1;
      blocks.push_back({group, row[i], step, count});
      i += static_cast<size_t>(count);
    }
  }
  return blocks;
}

// Calls work(std::integral_constant<int, count>) for a count of 1, 2 or 4.
template <typename Work>
void WithCount(int count, const Work& work) {
  if (count == 4) return work(std::integral_constant<int, 4>());
  if (count == 2) return work(std::integral_constant<int, 2>());
  work(std::integral_constant<int, 1>());
}

// h[i, u] = the dot product of row i of x with row u of a, for u in [first, last).
template <int kRows>
void Shrink(const float* x, int64_t stride, const float* a, int64_t n, int64_t first, int64_t last,
            float* h, int64_t h_stride) {
  constexpr int kOuts = kRows <= 2 ? 4 : 2;
  int64_t u = first;
  for (; u + kOuts <= last; u += kOuts) {
    float totals[kRows][kOuts];
    DotProducts<kRows, kOuts>(x, stride, a + u * n, n, totals);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kOuts; ++j) h[i * h_stride + u + j] = totals[i][j];
  }
  for (; u < last; ++u) {
    float totals[kRows][1];
    DotProducts<kRows, 1>(x, stride, a + u * n, n, totals);
    for (int i = 0; i < kRows; ++i) h[i * h_stride + u] = totals[i][0];
  }
}

// y[i, o] += the sum over u of h[i, u] b[u, o], for o in [first, last).
template <int kRows>
void Expand(const float* h, int64_t h_stride, const float* b, int64_t rank, int64_t outs,
            int64_t first, int64_t last, float* y, int64_t stride) {
  constexpr int kVectors = 2;
  int64_t o = first;
  for (; o + kVectors * kLanes <= last; o += kVectors * kLanes) {
    Floats sums[kRows][kVectors];
    Unroll<kRows>(INLINE_LAMBDA(i) { Unroll<kVectors>(INLINE_LAMBDA(j) { sums[i][j] = Floats{}; }); });
    for (int64_t u = 0; u < rank; ++u) {
      Floats weights[kVectors];
      Unroll<kVectors>(INLINE_LAMBDA(j) { weights[j] = Load(b + u * outs + o + j * kLanes); });
      Unroll<kRows>(INLINE_LAMBDA(i) {
        const Floats value = Broadcast(h[i * h_stride + u]);
        Unroll<kVectors>(INLINE_LAMBDA(j) { sums[i][j] = MulAdd(value, weights[j], sums[i][j]); });
      });
    }
    Unroll<kRows>(INLINE_LAMBDA(i) {
      Unroll<kVectors>(INLINE_LAMBDA(j) {
        float* to = y + i * stride + o + j * kLanes;
        Store(to, Load(to) + sums[i][j]);
      });
    });
  }
  for (; o < last; ++o)
    for (int i = 0; i < kRows; ++i) {
      float sum = 0.0f;
      for (int64_t u = 0; u < rank; ++u) sum += h[i * h_stride + u] * b[u * outs + o];
      y[i * stride + o] += sum;
    }
}

// A part of the work on one block beside one weight: ranks of Shrink, or outputs of Expand.
struct Task {
  const RowBlock* block;
  size_t weight;
  int64_t first, last;
};

// Tasks of about 100,000 multiplications; `size` is what a block's work is split along, and `cost`
// the multiplications of one row for one of them.
std::vector<Task> Tasks(const std::vector<RowBlock>& blocks, size_t weight, int64_t size,
                        int64_t cost, std::vector<Task> tasks) {
  for (const RowBlock& block : blocks) {
    const int64_t step = (100'000 / std::max<int64_t>(1, block.count * cost) / 16 + 1) * 16;
    for (int64_t i = 0; i < size; i += step)
      tasks.push_back({&block, weight, i, std::min(size, i + step)});
  }
  return tasks;
}

// add_low_rank(x [R I] f32, groups [R] s32, y [R O], a [G U I], b [G U O], y' ...) ->
// y + (x a^T) b of each row's group, ... f32. Rows whose group is negative stay as they are.
ffi::Error AddLowRank(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> groups,
                      ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1], num_threads = pool.num_threads();
  if (args.size() != 3 * rets.size() || args.size() == 0)
    return ffi::Error::InvalidArgument("add_low_rank: args");
  std::vector<LowRank> lows;
  int64_t rank = 0, num_groups = 0;
  for (size_t i = 0; i < rets.size(); ++i) {
    auto before = args.get<ffi::Buffer<ffi::F32>>(3 * i);
    auto a = args.get<ffi::Buffer<ffi::F32>>(3 * i + 1);
    auto b = args.get<ffi::Buffer<ffi::F32>>(3 * i + 2);
    auto y = rets.get<ffi::Buffer<ffi::F32>>(i);
    if (!before.has_value() || !a.has_value() || !b.has_value() || !y.has_value())
      return ffi::Error::InvalidArgument("add_low_rank: all but the groups must be f32");
    if (i > 0 && (num_groups != a->dimensions()[0] || rank != a->dimensions()[1]))
      return ffi::Error::InvalidArgument("add_low_rank: all must have the same groups and rank");
    num_groups = a->dimensions()[0], rank = a->dimensions()[1];
    float* to = (*y)->typed_data();
    if (to != before->typed_data())
      std::memcpy(to, before->typed_data(), before->element_count() * sizeof(float));
    lows.push_back({a->typed_data(), b->typed_data(), to, b->dimensions()[2]});
  }
  const std::vector<RowBlock> blocks = Blocks(groups.typed_data(), rows, num_groups);
  // [weights, rows, rank]
  float* shrunk = ThreadScratch<float>(static_cast<int64_t>(lows.size()) * rows * rank);
  const auto at = [&](size_t weight, int64_t row) {
    return shrunk + (static_cast<int64_t>(weight) * rows + row) * rank;
  };

  std::vector<Task> tasks;
  for (size_t i = 0; i < lows.size(); ++i) tasks = Tasks(blocks, i, rank, n, std::move(tasks));
  ParallelFor(num_threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    const RowBlock& block = *task.block;
    WithCount(block.count, [&](auto count) {
      Shrink<count()>(x.typed_data() + block.first * n, block.step * n,
                      lows[task.weight].a + block.group * rank * n, n, task.first, task.last,
                      at(task.weight, block.first), block.step * rank);
    });
  });

  tasks.clear();
  for (size_t i = 0; i < lows.size(); ++i)
    tasks = Tasks(blocks, i, lows[i].outs, rank, std::move(tasks));
  ParallelFor(num_threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    const RowBlock& block = *task.block;
    const LowRank& low = lows[task.weight];
    WithCount(block.count, [&](auto count) {
      Expand<count()>(at(task.weight, block.first), block.step * rank,
                      low.b + block.group * rank * low.outs, rank, low.outs, task.first, task.last,
                      low.y + block.first * low.outs, block.step * low.outs);
    });
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mixtral_jax

MIXTRAL_JAX_HANDLER(add_low_rank, mixtral_jax::AddLowRank,
                    xla::ffi::Ffi::Bind()
                        .Ctx<xla::ffi::ThreadPool>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                        .RemainingArgs()
                        .RemainingRets());
