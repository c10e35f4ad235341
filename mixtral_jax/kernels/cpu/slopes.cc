// Kernels for CPU, part 5: the gradient of a product with int8 weights, by bytes.
//
// Only in forms that multiply bytes; in others XLA's product of floats takes its place, and
// `multiplies_bytes` tells which of the two it is.

#include <cstdint>

#include "byte_slopes.h"
#include "form.h"
#include "xla/ffi/api/ffi.h"

namespace mixtral_jax {
namespace {

namespace ffi = xla::ffi;

// The largest number of outputs of a weight whose sums of 127 * 127 fit 32 bits.
[[maybe_unused]] constexpr int64_t kMostOutputs = INT32_MAX / (127 * 127);

// linear_back(dy [R O] f32, weight [O I] s8, scales [O] f32) -> dx [R I] f32
ffi::Error LinearBack([[maybe_unused]] ffi::ThreadPool pool,
                      [[maybe_unused]] ffi::Buffer<ffi::F32> dy,
                      [[maybe_unused]] ffi::Buffer<ffi::S8> weight,
                      [[maybe_unused]] ffi::Buffer<ffi::F32> scales,
                      [[maybe_unused]] ffi::ResultBuffer<ffi::F32> dx) {
#if defined(MIXTRAL_JAX_BYTE_DOTS)
  const int64_t rows = dy.dimensions()[0], n = dy.dimensions()[1];
  if (n > kMostOutputs) return ffi::Error::InvalidArgument("linear_back: too many outputs");
  const SlopeRows x(pool.num_threads(), dy.typed_data(), scales.typed_data(), rows, n);
  ProductOfSlopes(pool.num_threads(), x, rows, n, weight.typed_data(), weight.dimensions()[1],
                  dx->typed_data());
  return ffi::Error::Success();
#else
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "linear_back: no dots of bytes");
#endif
}

}  // namespace
}  // namespace mixtral_jax

extern "C" MIXTRAL_JAX_EXPORT int32_t MIXTRAL_JAX_SYMBOL(multiplies_bytes)() {
#if defined(MIXTRAL_JAX_BYTE_DOTS)
  return 1;
#else
  return 0;
#endif
}

MIXTRAL_JAX_HANDLER(linear_back, mixtral_jax::LinearBack,
                    xla::ffi::Ffi::Bind()
                        .Ctx<xla::ffi::ThreadPool>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                        .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
