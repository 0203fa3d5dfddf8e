// One source, three instruction sets: a function template is compiled for each and the processor picks at run time.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastdiff {

enum class Isa { baseline, v3, v4 };

// FASTDIFF_FOR_EACH_ISA(DEFINE) expands DEFINE(suffix, target attribute) for each instruction set, and
// FASTDIFF_FOR_ISA(f, isa, <arguments>) picks f_baseline, f_v3 or f_v4 of the templates so defined. With
// FASTDIFF_ONE_ISA there is the first alone, for builds that watch the source or are not for speed.
#if defined(__x86_64__) && !defined(FASTDIFF_ONE_ISA)
#define FASTDIFF_FOR_EACH_ISA(DEFINE)                   \
  DEFINE(baseline, )                                    \
  DEFINE(v3, __attribute__((target("arch=x86-64-v3")))) \
  DEFINE(v4, __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))))
#define FASTDIFF_FOR_ISA(f, isa, ...) \
  ((isa) == Isa::v4 ? f##_v4 __VA_ARGS__ : (isa) == Isa::v3 ? f##_v3 __VA_ARGS__ : f##_baseline __VA_ARGS__)
#else
#define FASTDIFF_FOR_EACH_ISA(DEFINE) DEFINE(baseline, )
#define FASTDIFF_FOR_ISA(f, isa, ...) f##_baseline __VA_ARGS__
#endif

inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::v4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return Isa::v3;
#endif
  return Isa::baseline;
}

// FASTDIFF_CPU_ISA=baseline|v3|v4 asks for less than the processor has; more is an error.
inline Isa current_isa() {
  static const Isa isa = [] {
    const char* asked = std::getenv("FASTDIFF_CPU_ISA");
    if (!asked || !*asked) return best_isa();
    const std::string name = asked;
    const Isa wanted = name == "v4" ? Isa::v4 : name == "v3" ? Isa::v3 : Isa::baseline;
    if (wanted == Isa::baseline && name != "baseline")
      throw std::invalid_argument("FASTDIFF_CPU_ISA: expected baseline, v3 or v4, got " + name);
    if (wanted > best_isa()) throw std::invalid_argument("FASTDIFF_CPU_ISA: this processor does not have " + name);
    return wanted;
  }();
  return isa;
}

inline const char* isa_name(Isa isa) { return isa == Isa::v4 ? "v4" : isa == Isa::v3 ? "v3" : "baseline"; }

}  // namespace fastdiff
