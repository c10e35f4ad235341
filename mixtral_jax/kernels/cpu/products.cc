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
#include <type_traits>
#include <vector>

#include "byte_panels.h"
#include "dot_products.h"
#include "few_rows.h"
#include "form.h"
#include "group_products.h"
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

struct FloatMatrix {
  const float* values;  // [outs, n]
  float* y;             // [rows, outs], the product's place
  int64_t outs;
  FloatMatrix Expert(int64_t e, int64_t n) const { return {values + e * outs * n, y, outs}; }
};

struct Int8Matrix {
  const int8_t* values;  // [outs, n]
  const float* scale;    // [outs]
  float* y;              // [rows, outs], the product's place
  int64_t outs;
  Int8Matrix Expert(int64_t e, int64_t n) const {
    return {values + e * outs * n, scale + e * outs, y, outs};
  }
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
void Product(const FloatRows& x, int64_t from, int64_t to, int64_t n, const FloatMatrix& matrix,
             int64_t first, int64_t last) {
  const auto [w, y, outs] = matrix;
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

void Product(const Int8Rows& x, int64_t from, int64_t to, int64_t n, const Int8Matrix& matrix,
             int64_t first, int64_t last) {
  const auto [w, scale, y, outs] = matrix;
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
    // A part of a panel takes as long as the whole.
    if (rows >= kManyRows) unit = std::max(kBlockOuts, kPanelOuts);
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

// The products of the same rows with several weights.
template <typename Rows, typename Matrix>
void Products(int64_t num_threads, const Rows& x, int64_t rows, int64_t n,
              const std::vector<Matrix>& weights) {
  struct Task {
    const Matrix* weight;
    int64_t first, last;
  };
  std::vector<Task> tasks;
  int64_t outs = 0;
  for (const Matrix& weight : weights) outs += weight.outs;
  TaskSizes sizes(num_threads, outs * TaskSizes::WorkOf(rows, n));
  for (const Matrix& weight : weights) {
    for (int64_t o = 0, size; o < weight.outs; o += size) {
      size = sizes.Next(weight.outs - o, rows, n);
      tasks.push_back({&weight, o, o + size});
    }
  }
  std::reverse(tasks.begin(), tasks.end());  // The last task is taken first.
  ParallelFor(num_threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    Product(x, 0, rows, n, *task.weight, task.first, task.last);
  });
}

// What stands for a weight [*E O I] among a function's arguments: the values, f32; or s8 and their
// scales f32 [*E O]; or a weight in tiles (weight.py): words u32 of int4 or s32 of int8, and what
// its groups have, f16.
constexpr size_t kFloatArguments = 1, kScaledArguments = 2;

bool Are(const ffi::RemainingArgs& args, ffi::DataType type) {
  const auto buffer = args.get<ffi::AnyBuffer>(0);
  return buffer.has_value() && buffer->element_type() == type;
}

// The matrix whose arguments begin at `at`, or an error's text. `outs` is the axis of the outputs.
template <typename Matrix>
const char* ReadMatrix(const ffi::RemainingArgs& args, size_t at, size_t outs, int64_t n, float* y,
                       Matrix* matrix) {
  const auto values = args.get<ffi::AnyBuffer>(at);
  if (!values.has_value()) return "a weight is missing";
  matrix->y = y, matrix->outs = values->dimensions()[outs];
  if constexpr (std::is_same_v<Matrix, FloatMatrix>) {
    if (values->element_type() != ffi::F32) return "weights must be f32, or integers with scales";
    matrix->values = static_cast<const float*>(values->untyped_data());
  } else if constexpr (std::is_same_v<Matrix, Int8Matrix>) {
    const auto scale = args.get<ffi::Buffer<ffi::F32>>(at + 1);
    if (values->element_type() != ffi::S8 || !scale.has_value()) return "s8 weights take f32 scales";
    matrix->values = static_cast<const int8_t*>(values->untyped_data());
    matrix->scale = scale->typed_data();
  } else {
    const auto scales = args.get<ffi::Buffer<ffi::F16>>(at + 1);
    if (!scales.has_value()) return "weights in tiles take f16 scales";
    if (matrix->outs % kTileOuts != 0) return "weights in tiles have 16 outputs each";
    if (values->dimensions()[outs + 1] * kWordBytes * Matrix::kInputsOfByte != n)
      return "weights in tiles and rows have other inputs";
    matrix->values = static_cast<const int8_t*>(values->untyped_data());
    matrix->scales = reinterpret_cast<const uint16_t*>(scales->untyped_data());
  }
  return nullptr;
}

// linear(x [R I] f32, weight [O I], weight [O' I], ...) -> y [R O], y' [R O'], ... f32.
// All weights are of one kind, see above.
ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs args,
                  ffi::RemainingRets rets) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1], num_threads = pool.num_threads();
  const auto products = [&](auto matrix, const auto& row_values) {
    std::vector<decltype(matrix)> weights;
    const size_t step = args.size() / rets.size();
    for (size_t i = 0; i < rets.size(); ++i) {
      auto y = rets.get<ffi::AnyBuffer>(i);
      if (!y.has_value()) return ffi::Error::InvalidArgument("linear: a result is missing");
      float* out = static_cast<float*>((*y)->untyped_data());
      if (const char* error = ReadMatrix(args, i * step, 0, n, out, &matrix))
        return ffi::Error::InvalidArgument(error);
      weights.push_back(matrix);
    }
    Products(num_threads, row_values, rows, n, weights);
    return ffi::Error::Success();
  };
  const float* values = x.typed_data();
  if (args.size() == kFloatArguments * rets.size())
    return products(FloatMatrix{}, FloatRows{values, n});
  if (args.size() != kScaledArguments * rets.size())
    return ffi::Error::InvalidArgument("linear: arguments of different kinds of weights");
  if (Are(args, ffi::U32))
    return products(GroupMatrix<Int4>{}, GroupRows<Int4>(num_threads, values, rows, n));
  if (Are(args, ffi::S32))
    return products(GroupMatrix<Int8Groups>{}, GroupRows<Int8Groups>(num_threads, values, rows, n));
  return products(Int8Matrix{}, Int8Rows(num_threads, values, rows, n));
}

// ---- grouped ----------------------------------------------------------------------------------

// The products of E groups of rows, each with its own expert's weights.
template <typename Rows, typename Matrix>
void GroupedProducts(int64_t num_threads, const Rows& x, int64_t n, const Matrix& w,
                     const int32_t* sizes, int64_t experts) {
  struct Task {
    int64_t expert, from, to, first, last;
  };
  std::vector<Task> tasks;
  int64_t from = 0, work = 0;
  for (int64_t e = 0; e < experts; ++e)
    if (sizes[e] > 0) work += w.outs * TaskSizes::WorkOf(sizes[e], n);
  TaskSizes task_sizes(num_threads, work);
  for (int64_t e = 0; e < experts; from += sizes[e++]) {
    if (sizes[e] == 0) continue;
    for (int64_t o = 0, size; o < w.outs; o += size) {
      size = task_sizes.Next(w.outs - o, sizes[e], n);
      tasks.push_back({e, from, from + sizes[e], o, o + size});
    }
  }
  std::reverse(tasks.begin(), tasks.end());  // The last task is taken first.
  ParallelFor(num_threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    Product(x, task.from, task.to, n, w.Expert(task.expert, n), task.first, task.last);
  });
}

// grouped(x [M I] f32, sizes [E] s32, weight [E O I]) -> y [M O] f32.
// The rows of x stand in E groups, each of which is multiplied with its own weights. Rows behind
// the last group give zeros.
ffi::Error Grouped(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> sizes,
                   ffi::RemainingArgs args, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1], num_threads = pool.num_threads();
  const int64_t experts = sizes.dimensions()[0], outs = y->dimensions()[1];
  const int32_t* size = sizes.typed_data();
  int64_t used = 0;
  for (int64_t e = 0; e < experts; ++e) used += size[e];
  if (used > rows) return ffi::Error::InvalidArgument("grouped: more rows in groups than rows");
  float* out = y->typed_data();
  std::fill(out + used * outs, out + rows * outs, 0.0f);
  const auto products = [&](auto matrix, const auto& row_values) {
    if (const char* error = ReadMatrix(args, 0, 1, n, out, &matrix))
      return ffi::Error::InvalidArgument(error);
    GroupedProducts(num_threads, row_values, n, matrix, size, experts);
    return ffi::Error::Success();
  };
  const float* values = x.typed_data();
  if (args.size() == kFloatArguments) return products(FloatMatrix{}, FloatRows{values, n});
  if (args.size() != kScaledArguments)
    return ffi::Error::InvalidArgument("grouped: takes one weight");
  if (Are(args, ffi::U32))
    return products(GroupMatrix<Int4>{}, GroupRows<Int4>(num_threads, values, used, n));
  if (Are(args, ffi::S32))
    return products(GroupMatrix<Int8Groups>{}, GroupRows<Int8Groups>(num_threads, values, used, n));
  return products(Int8Matrix{}, Int8Rows(num_threads, values, used, n));
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
