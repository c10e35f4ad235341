// The names of a form: these files, compiled for one instruction set.
//
// A library may hold several forms (forms.py has their table). What differs between them asks the
// compiler's own macros (__AVX2__, __AVX512VNNI__, __ARM_FEATURE_DOTPROD ...); where two forms have
// the same instructions in registers of another width, MIXTRAL_JAX_VECTOR_BITS says how wide the
// registers are that products and attention should use: 128, 256 or 512.

#ifndef MIXTRAL_JAX_KERNELS_CPU_FORM_H_
#define MIXTRAL_JAX_KERNELS_CPU_FORM_H_

#if !defined(MIXTRAL_JAX_FORM)
#define MIXTRAL_JAX_FORM portable
#endif
#if !defined(MIXTRAL_JAX_VECTOR_BITS)
#define MIXTRAL_JAX_VECTOR_BITS 128
#endif

#define MIXTRAL_JAX_EXPORT __attribute__((visibility("default")))
#define MIXTRAL_JAX_JOIN_(name, form) mixtral_jax_##name##_##form
#define MIXTRAL_JAX_JOIN(name, form) MIXTRAL_JAX_JOIN_(name, form)

// The exported symbol of `name` in this form, such as mixtral_jax_linear_avx2.
#define MIXTRAL_JAX_SYMBOL(name) MIXTRAL_JAX_JOIN(name, MIXTRAL_JAX_FORM)

// Defines the handler of a function, as XLA's macro does, under its symbol in this form. Python
// registers the chosen form's under the name without a form.
#define MIXTRAL_JAX_HANDLER(name, function, ...)                                             \
  extern "C" MIXTRAL_JAX_EXPORT XLA_FFI_Error* MIXTRAL_JAX_SYMBOL(name)(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(MIXTRAL_JAX_SYMBOL(name), function, __VA_ARGS__)

#endif  // MIXTRAL_JAX_KERNELS_CPU_FORM_H_
