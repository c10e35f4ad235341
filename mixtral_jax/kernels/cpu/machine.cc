// What this machine's processor can do, as far as its operating system lets it.
//
// Only the table of forms.py decides by it. The words are ours: "v3" is all of x86-64-v3 (AVX2, FMA
// ...) and "v4" all of x86-64-v4 (AVX-512 F, BW, CD, DQ and VL).

#include <cstdint>
#include <initializer_list>

#include "form.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

struct Words {
  char text[128] = {};
  int64_t length = 0;

  void Add(bool has, const char* word) {
    if (!has) return;
    if (length > 0) text[length++] = ' ';
    while (*word != '\0') text[length++] = *word++;
  }
};

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// The registers that the processor answers with; zeros if it does not know the question.
Registers Ask(unsigned leaf, unsigned part = 0) {
  Registers r;
  __get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool Has(unsigned bits, std::initializer_list<int> wanted) {
  for (const int bit : wanted)
    if ((bits >> bit & 1) == 0) return false;
  return true;
}

Words Features() {
  const Registers basic = Ask(1), more = Ask(7), late = Ask(7, 1), old = Ask(0x80000001);
  // The operating system must save the registers: the lower halves of 256 bits, then AVX-512's.
  unsigned saved = 0, upper = 0;
  if (Has(basic.c, {27})) asm volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  const bool v3 = Has(saved, {1, 2}) && Has(basic.c, {0, 9, 12, 13, 19, 20, 22, 23, 28, 29}) &&
                  Has(more.b, {3, 5, 8}) && Has(old.c, {5});
  const bool v4 = v3 && Has(saved, {5, 6, 7}) && Has(more.b, {16, 17, 28, 30, 31});
  Words words;
  words.Add(v3, "v3");
  words.Add(v3 && Has(late.a, {4}), "avxvnni");
  words.Add(v4, "v4");
  words.Add(v4 && Has(more.c, {11}), "avx512vnni");
  words.Add(v4 && Has(late.a, {5}), "avx512bf16");
  return words;
}

#elif defined(__aarch64__) && defined(__linux__)

Words Features() {
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  Words words;
  words.Add((first >> 20 & 1) != 0, "dotprod");  // HWCAP_ASIMDDP
  words.Add((second >> 13 & 1) != 0, "i8mm");    // HWCAP2_I8MM
  return words;
}

#elif defined(__aarch64__) && defined(__APPLE__)

bool Has(const char* name) {
  int32_t value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

Words Features() {
  Words words;
  words.Add(Has("hw.optional.arm.FEAT_DotProd"), "dotprod");
  words.Add(Has("hw.optional.arm.FEAT_I8MM"), "i8mm");
  return words;
}

#else

Words Features() { return {}; }

#endif

}  // namespace

// The machine's features, with spaces between them.
extern "C" MIXTRAL_JAX_EXPORT const char* mixtral_jax_features() {
  static const Words words = Features();
  return words.text;
}
