// Kernels for CPU, part 3: gradients of the grouped product and of SwiGLU.
//
// XLA:CPU computes every expert for every row. The slopes are never rounded: weights of int8 are
// widened, and sums are of floats.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "float_panels.h"
#include "form.h"
#include "vectors.h"
#include "worker_pool.h"
#include "xla/ffi/api/ffi.h"

namespace mixtral_jax {
namespace {

namespace ffi = xla::ffi;

// The number of rows in all groups, or -1 if there are more than `rows`.
int64_t RowsInGroups(ffi::Buffer<ffi::S32> sizes, int64_t rows) {
  int64_t used = 0;
  for (size_t e = 0; e < sizes.element_count(); ++e) used += sizes.typed_data()[e];
  return used > rows ? -1 : used;
}

// ---- grouped_back -----------------------------------------------------------------------------

template <typename Value>
void GroupedBack(int64_t num_threads, ffi::Buffer<ffi::F32> dy, ffi::Buffer<ffi::S32> sizes,
                 ffi::AnyBuffer weight, const float* scale, float* dx) {
  const int64_t experts = weight.dimensions()[0], outs = weight.dimensions()[1];
  const int64_t n = weight.dimensions()[2];
  const Value* values = static_cast<const Value*>(weight.untyped_data());
  std::vector<PanelJob<Value>> jobs;
  for (int64_t e = 0, row = 0; e < experts; row += sizes.typed_data()[e++]) {
    jobs.push_back({{dy.typed_data() + row * outs, outs, 1},
                    {values + e * outs * n, scale == nullptr ? nullptr : scale + e * outs, n},
                    sizes.typed_data()[e],
                    outs,
                    dx + row * n});
  }
  PanelProducts(num_threads, jobs);
}

// grouped_back(dy [M O] f32, sizes [E] s32, weight [E O I], (scales [E O])) -> dx [M I] f32.
// Rows behind the last group give zeros.
ffi::Error GradientOfRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> dy,
                          ffi::Buffer<ffi::S32> sizes, ffi::AnyBuffer weight,
                          ffi::RemainingArgs args, ffi::ResultBuffer<ffi::F32> dx) {
  const int64_t rows = dy.dimensions()[0], n = weight.dimensions()[2];
  const int64_t used = RowsInGroups(sizes, rows), num_threads = pool.num_threads();
  if (used < 0) return ffi::Error::InvalidArgument("grouped_back: more rows in groups than rows");
  std::fill(dx->typed_data() + used * n, dx->typed_data() + rows * n, 0.0f);
  if (args.size() == 1) {
    auto scale = args.get<ffi::Buffer<ffi::F32>>(0);
    if (!scale.has_value() || weight.element_type() != ffi::S8)
      return ffi::Error::InvalidArgument("grouped_back: s8 weights take f32 scales");
    GroupedBack<int8_t>(num_threads, dy, sizes, weight, scale->typed_data(), dx->typed_data());
  } else {
    if (weight.element_type() != ffi::F32)
      return ffi::Error::InvalidArgument("grouped_back: weights must be f32, or s8 with scales");
    GroupedBack<float>(num_threads, dy, sizes, weight, nullptr, dx->typed_data());
  }
  return ffi::Error::Success();
}

// ---- grouped_weight ---------------------------------------------------------------------------

// grouped_weight(dy [M O] f32, x [M I] f32, sizes [E] s32) -> dw [E O I] f32: of each expert the
// sum over its rows of dy[m, o] * x[m, i].
ffi::Error GradientOfWeights(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> dy,
                             ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> sizes,
                             ffi::ResultBuffer<ffi::F32> dw) {
  const int64_t rows = dy.dimensions()[0], outs = dy.dimensions()[1], n = x.dimensions()[1];
  if (RowsInGroups(sizes, rows) < 0)
    return ffi::Error::InvalidArgument("grouped_weight: more rows in groups than rows");
  std::vector<PanelJob<float>> jobs;
  const int64_t experts = static_cast<int64_t>(sizes.element_count());
  for (int64_t e = 0, row = 0; e < experts; row += sizes.typed_data()[e++]) {
    jobs.push_back({{dy.typed_data() + row * outs, 1, outs},
                    {x.typed_data() + row * n, nullptr, n},
                    outs,
                    sizes.typed_data()[e],
                    dw->typed_data() + e * outs * n});
  }
  PanelProducts(pool.num_threads(), jobs);
  return ffi::Error::Success();
}

// ---- swiglu_back ------------------------------------------------------------------------------

// swiglu_back(gate [R F] f32, up [R F] f32, dy [R F] f32) -> the gradients of gate and of up.
// With s = 1 / (1 + exp(-gate)): d_up = gate s dy, d_gate = up s (1 + gate (1 - s)) dy.
ffi::Error SwigluBack(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> gate, ffi::Buffer<ffi::F32> up,
                      ffi::Buffer<ffi::F32> dy, ffi::ResultBuffer<ffi::F32> d_gate,
                      ffi::ResultBuffer<ffi::F32> d_up) {
  const int64_t n = static_cast<int64_t>(gate.element_count());
  const float *g = gate.typed_data(), *u = up.typed_data(), *slope = dy.typed_data();
  float *to_gate = d_gate->typed_data(), *to_up = d_up->typed_data();
  const auto sigmoid = [](Floats x) {
    const Floats power = Exp(x < 0.0f ? x : -x);  // exp(-|x|)
    return (x < 0.0f ? power : Broadcast(1.0f)) / (1.0f + power);
  };
  constexpr int64_t kBlock = 8192;
  ParallelFor(pool.num_threads(), (n + kBlock - 1) / kBlock, [&](int64_t block) {
    int64_t i = block * kBlock;
    const int64_t end = std::min(n, i + kBlock);
    for (; i + kLanes <= end; i += kLanes) {
      const Floats x = Load(g + i), s = sigmoid(x), d = Load(slope + i);
      Store(to_up + i, x * s * d);
      Store(to_gate + i, Load(u + i) * s * (1.0f + x * (1.0f - s)) * d);
    }
    for (; i < end; ++i) {
      const float x = g[i], s = sigmoid(Broadcast(x))[0];
      to_up[i] = x * s * slope[i];
      to_gate[i] = u[i] * s * (1.0f + x * (1.0f - s)) * slope[i];
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mixtral_jax

MIXTRAL_JAX_HANDLER(grouped_back, mixtral_jax::GradientOfRows,
                    xla::ffi::Ffi::Bind()
                        .Ctx<xla::ffi::ThreadPool>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                        .Arg<xla::ffi::AnyBuffer>()
                        .RemainingArgs()
                        .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

MIXTRAL_JAX_HANDLER(grouped_weight, mixtral_jax::GradientOfWeights,
                    xla::ffi::Ffi::Bind()
                        .Ctx<xla::ffi::ThreadPool>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                        .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

MIXTRAL_JAX_HANDLER(swiglu_back, mixtral_jax::SwigluBack,
                    xla::ffi::Ffi::Bind()
                        .Ctx<xla::ffi::ThreadPool>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
