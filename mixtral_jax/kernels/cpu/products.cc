// Kernels for CPU, part 1: products with weights as they are stored, norm and SwiGLU.
//
// XLA:CPU lacks them: its product of one row with int8 weights takes three times as long as
// reading the weights, and it has no grouped product.
//
// Every number is computed in an order that depends on its own row alone, never on the number of
// rows beside it or on the thread that computes it. So equal rows give equal bits. The forms in
// kernels/xla compute the same, and tests hold both together.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "byte_panels.h"
#include "dot_products.h"
#include "few_rows.h"
#include "form.h"
#include "int8_rows.h"
#include "pair_panels.h"
#include "vectors.h"
#include "worker_pool.h"
#include "xla/ffi/api/ffi.h"

namespace mixtral_jax {
namespace {

namespace ffi = xla::ffi;

// ---- Products of a range of rows with a range of outputs --------------------------------------

struct FloatRows {
  const float* values;
  int64_t stride;
  const float* Row(int64_t r) const { return values + r * stride; }
};

// y[r, o] for kRows rows from r and the outputs [first, last).
template <int kRows>
void ProductOfFloats(const FloatRows& x, int64_t r, int64_t n, const float* w, int64_t first,
                     int64_t last, float* y, int64_t outs) {
  // As many products at a time as fit into the registers.
  constexpr int kOuts = kRows <= 2 ? 4 : 2;
  int64_t o = first;
  for (; o + kOuts <= last; o += kOuts) {
    float totals[kRows][kOuts];
    DotProducts<kRows, kOuts>(x.Row(r), x.stride, w + o * n, n, totals);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kOuts; ++j) y[(r + i) * outs + o + j] = totals[i][j];
  }
  for (; o < last; ++o) {
    float totals[kRows][1];
    DotProducts<kRows, 1>(x.Row(r), x.stride, w + o * n, n, totals);
    for (int i = 0; i < kRows; ++i) y[(r + i) * outs + o] = totals[i][0];
  }
}

// y[r, o] = sum over i of x[r, i] w[o, i], for the rows [from, to) and the outputs [first, last).
void Product(const FloatRows& x, int64_t from, int64_t to, int64_t n, const float* w, const float*,
             int64_t first, int64_t last, float* y, int64_t outs) {
  // The weights of a block stay in the L1 cache while all rows pass by.
  constexpr int64_t kBlockBytes = 16384;
  const int64_t output_bytes = n * static_cast<int64_t>(sizeof(float));
  const int64_t block = std::max<int64_t>(4, kBlockBytes / output_bytes & ~int64_t{3});
  for (int64_t o = first; o < last; o += block) {
    const int64_t end = std::min(last, o + block);
    int64_t r = from;
    for (; r + 4 <= to; r += 4) ProductOfFloats<4>(x, r, n, w, o, end, y, outs);
    if (r + 2 <= to) ProductOfFloats<2>(x, r, n, w, o, end, y, outs), r += 2;
    if (r < to) ProductOfFloats<1>(x, r, n, w, o, end, y, outs);
  }
}

void Product(const Int8Rows& x, int64_t from, int64_t to, int64_t n, const int8_t* w,
             const float* scale, int64_t first, int64_t last, float* y, int64_t outs) {
#if defined(MIXTRAL_JAX_BYTE_DOTS) || defined(MIXTRAL_JAX_PAIR_PANELS)
  if (to - from >= kManyRows)
    return ProductOfManyRows(x, from, to, n, w, scale, first, last, y, outs);
#endif
  ProductOfFewRows(x, from, to, n, w, scale, first, last, y, outs);
}

// How many outputs make a task. Each task takes a part of the work that is left, so that the first
// ones read long ranges of memory, the last ones are small, and no thread waits long for another.
class TaskSizes {
 public:
  TaskSizes(int64_t num_threads, int64_t work) : num_threads_(num_threads), left_(work) {}

  // The work of an output: its products with the rows, or reading its weights, which takes as long
  // as the products of some sixteen rows.
  static int64_t WorkOf(int64_t rows, int64_t n) { return (rows + 16) * n; }

  // The size of the next task, of `outs` outputs that are left of a weight.
  int64_t Next(int64_t outs, int64_t rows, int64_t n) {
    constexpr int64_t kWorthwhile = 450'000;  // About two microseconds.
    int64_t unit = kBlockOuts;
#if defined(MIXTRAL_JAX_BYTE_DOTS)
    if (rows >= kManyRows) unit = kPanelOuts;  // A part of a panel takes as long as the whole.
#endif
    const int64_t work = std::max(kWorthwhile, left_ / (2 * std::max<int64_t>(1, num_threads_)));
    const int64_t units = work / std::max<int64_t>(1, unit * WorkOf(rows, n));
    const int64_t size = std::min(outs, std::max<int64_t>(1, units) * unit);
    left_ -= size * WorkOf(rows, n);
    return size;
  }

 private:
  int64_t num_threads_, left_;
};

// ---- linear -----------------------------------------------------------------------------------

struct WeightMatrix {
  const void* values;  // [outs, n]
  const float* scale;  // [outs], or null for floats
  float* y;            // [rows, outs], the product's place
  int64_t outs;
};

// The products of the same rows with several weights.
template <typename Rows, typename Value>
void Products(int64_t num_threads, const Rows& x, int64_t rows, int64_t n,
              const std::vector<WeightMatrix>& weights) {
  struct Task {
    const WeightMatrix* weight;
    int64_t first, last;
  };
  std::vector<Task> tasks;
  int64_t outs = 0;
  for (const WeightMatrix& weight : weights) outs += weight.outs;
  TaskSizes sizes(num_threads, outs * TaskSizes::WorkOf(rows, n));
  for (const WeightMatrix& weight : weights) {
    for (int64_t o = 0, size; o < weight.outs; o += size) {
      size = sizes.Next(weight.outs - o, rows, n);
      tasks.push_back({&weight, o, o + size});
    }
  }
  std::reverse(tasks.begin(), tasks.end());  // The last task is taken first.
  ParallelFor(num_threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    const WeightMatrix& weight = *task.weight;
    Product(x, 0, rows, n, static_cast<const Value*>(weight.values), weight.scale,
            task.first, task.last, weight.y, weight.outs);
  });
}

// linear(x [R I] f32, weight [O I], weight [O' I], ...) -> y [R O], y' [R O'], ... f32.
// Weights of int8 are each followed by their scales [O].
ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs args,
                  ffi::RemainingRets rets) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1], num_threads = pool.num_threads();
  const bool is_int8 = args.size() == 2 * rets.size();
  std::vector<WeightMatrix> weights;
  for (size_t i = 0; i < rets.size(); ++i) {
    auto weight = args.get<ffi::AnyBuffer>(is_int8 ? 2 * i : i);
    auto y = rets.get<ffi::AnyBuffer>(i);
    if (!weight.has_value() || !y.has_value()) return ffi::Error::InvalidArgument("linear: args");
    const float* scale = nullptr;
    if (is_int8) {
      auto buffer = args.get<ffi::Buffer<ffi::F32>>(2 * i + 1);
      if (!buffer.has_value()) return ffi::Error::InvalidArgument("linear: scales must be f32");
      scale = buffer->typed_data();
    }
    if (weight->element_type() != (is_int8 ? ffi::S8 : ffi::F32))
      return ffi::Error::InvalidArgument("linear: weights must be f32, or s8 with scales");
    weights.push_back({weight->untyped_data(), scale, static_cast<float*>((*y)->untyped_data()),
                       weight->dimensions()[0]});
  }
  if (is_int8) {
    const Int8Rows quantized(num_threads, x.typed_data(), rows, n);
    Products<Int8Rows, int8_t>(num_threads, quantized, rows, n, weights);
  } else {
    Products<FloatRows, float>(num_threads, FloatRows{x.typed_data(), n}, rows, n, weights);
  }
  return ffi::Error::Success();
}

// ---- grouped ----------------------------------------------------------------------------------

// The products of E groups of rows, each with its own expert's weights.
template <typename Rows, typename Value>
void GroupedProducts(int64_t num_threads, const Rows& x, int64_t n, const Value* w,
                     const float* scale, const int32_t* sizes, int64_t experts, float* y,
                     int64_t outs) {
  struct Task {
    int64_t expert, from, to, first, last;
  };
  std::vector<Task> tasks;
  int64_t from = 0, work = 0;
  for (int64_t e = 0; e < experts; ++e)
    if (sizes[e] > 0) work += outs * TaskSizes::WorkOf(sizes[e], n);
  TaskSizes task_sizes(num_threads, work);
  for (int64_t e = 0; e < experts; from += sizes[e++]) {
    if (sizes[e] == 0) continue;
    for (int64_t o = 0, size; o < outs; o += size) {
      size = task_sizes.Next(outs - o, sizes[e], n);
      tasks.push_back({e, from, from + sizes[e], o, o + size});
    }
  }
  std::reverse(tasks.begin(), tasks.end());  // The last task is taken first.
  ParallelFor(num_threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    Product(x, task.from, task.to, n, w + task.expert * outs * n,
            scale == nullptr ? nullptr : scale + task.expert * outs, task.first, task.last, y,
            outs);
  });
}

// grouped(x [M I] f32, sizes [E] s32, weight [E O I], (scales [E O])) -> y [M O] f32.
// The rows of x stand in E groups, each of which is multiplied with its own weights. Rows behind
// the last group give zeros.
ffi::Error Grouped(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> sizes,
                   ffi::AnyBuffer weight, ffi::RemainingArgs args, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1], num_threads = pool.num_threads();
  const int64_t experts = weight.dimensions()[0], outs = weight.dimensions()[1];
  const int32_t* size = sizes.typed_data();
  int64_t used = 0;
  for (int64_t e = 0; e < experts; ++e) used += size[e];
  if (used > rows) return ffi::Error::InvalidArgument("grouped: more rows in groups than rows");
  float* out = y->typed_data();
  std::fill(out + used * outs, out + rows * outs, 0.0f);
  if (args.size() == 1) {
    auto scale = args.get<ffi::Buffer<ffi::F32>>(0);
    if (!scale.has_value() || weight.element_type() != ffi::S8)
      return ffi::Error::InvalidArgument("grouped: s8 weights take f32 scales");
    const Int8Rows quantized(num_threads, x.typed_data(), used, n);
    GroupedProducts(num_threads, quantized, n, static_cast<const int8_t*>(weight.untyped_data()),
                    scale->typed_data(), size, experts, out, outs);
  } else {
    if (weight.element_type() != ffi::F32)
      return ffi::Error::InvalidArgument("grouped: weights must be f32, or s8 with scales");
    GroupedProducts(num_threads, FloatRows{x.typed_data(), n}, n,
                    static_cast<const float*>(weight.untyped_data()), nullptr, size, experts, out,
                    outs);
  }
  return ffi::Error::Success();
}

// ---- norm and swiglu --------------------------------------------------------------------------

// norm(x [R D] f32, weight [D] f32, eps) -> x / sqrt(mean(x^2) + eps) * weight
ffi::Error Norm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight,
                ffi::ResultBuffer<ffi::F32> y, float eps) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1];
  constexpr int64_t kBlock = 16;  // Fewer rows are not worth a task.
  ParallelFor(pool.num_threads(), (rows + kBlock - 1) / kBlock, [&](int64_t block) {
    for (int64_t r = block * kBlock; r < std::min(rows, (block + 1) * kBlock); ++r) {
      const float* row = x.typed_data() + r * n;
      float squares[1][1];
      DotProducts<1, 1>(row, n, row, n, squares);
      const float scale = 1.0f / std::sqrt(squares[0][0] / static_cast<float>(n) + eps);
      for (int64_t i = 0; i < n; ++i)
        y->typed_data()[r * n + i] = row[i] * scale * weight.typed_data()[i];
    }
  });
  return ffi::Error::Success();
}

// swiglu(gate [R F] f32, up [R F] f32) -> gate / (1 + exp(-gate)) * up
ffi::Error Swiglu(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> gate, ffi::Buffer<ffi::F32> up,
                  ffi::ResultBuffer<ffi::F32> y) {
  const int64_t n = static_cast<int64_t>(gate.element_count());
  const auto product = [](Floats g, Floats u) {
    const Floats power = Exp(g < 0.0f ? g : -g);  // exp(-|g|)
    return g * ((g < 0.0f ? power : Broadcast(1.0f)) / (1.0f + power)) * u;
  };
  constexpr int64_t kBlock = 8192;
  ParallelFor(pool.num_threads(), (n + kBlock - 1) / kBlock, [&](int64_t block) {
    const float *g = gate.typed_data(), *u = up.typed_data();
    float* out = y->typed_data();
    int64_t i = block * kBlock;
    const int64_t end = std::min(n, i + kBlock);
    for (; i + kLanes <= end; i += kLanes) Store(out + i, product(Load(g + i), Load(u + i)));
    for (; i < end; ++i) out[i] = product(Broadcast(g[i]), Broadcast(u[i]))[0];
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mixtral_jax

MIXTRAL_JAX_HANDLER(linear, mixtral_jax::Linear,
                    xla::ffi::Ffi::Bind()
                        .Ctx<xla::ffi::ThreadPool>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .RemainingArgs()
                        .RemainingRets());

MIXTRAL_JAX_HANDLER(grouped, mixtral_jax::Grouped,
                    xla::ffi::Ffi::Bind()
                        .Ctx<xla::ffi::ThreadPool>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                        .Arg<xla::ffi::AnyBuffer>()
                        .RemainingArgs()
                        .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

MIXTRAL_JAX_HANDLER(norm, mixtral_jax::Norm,
                    xla::ffi::Ffi::Bind()
                        .Ctx<xla::ffi::ThreadPool>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Attr<float>("eps"));

MIXTRAL_JAX_HANDLER(swiglu, mixtral_jax::Swiglu,
                    xla::ffi::Ffi::Bind()
                        .Ctx<xla::ffi::ThreadPool>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
