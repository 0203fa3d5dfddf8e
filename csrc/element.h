// How a stored number is read into, and written from, the type it is computed in.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"  // FASTDIFF_HD

namespace fastdiff {

template <typename To, typename From>
FASTDIFF_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

FASTDIFF_HD float load(float x) { return x; }
FASTDIFF_HD double load(double x) { return x; }
FASTDIFF_HD float load(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

FASTDIFF_HD float load(Float16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  // Shifted into float's fields the value is 2^112 too small, which one exact product mends, subnormals too.
  const uint32_t magnitude = uint32_t{x.bits & 0x7FFFu} << 13;
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t finite_or_not = magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : scaled;
  return bit_cast<float>(finite_or_not | uint32_t{x.bits & 0x8000u} << 16);
#endif
}

FASTDIFF_HD void store(float* to, float x) { *to = x; }
FASTDIFF_HD void store(double* to, double x) { *to = x; }

// A NaN stays one: those that arithmetic makes, or passes on from a BFloat16, have an empty lower half.
FASTDIFF_HD void store(BFloat16* to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  to->bits = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
#endif
}

FASTDIFF_HD void store(Float16* to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFF;
  // Below 2^-14 adding 1/2 aligns the significand with half's subnormals and rounds to nearest even.
  const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (magnitude + 0xC8000FFFu + (magnitude >> 13 & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? tiny : normal;
  const uint32_t infinite = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  const uint32_t half = magnitude >= 0x477FF000 ? infinite : finite;
  to->bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
#endif
}

}  // namespace fastdiff
