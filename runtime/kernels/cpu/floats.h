// Half-precision values in plain C++, bits in and bits out.
#pragma once

#include <cstdint>
#include <cstring>

namespace zs {

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float bfloat16_to_float(uint16_t half) { return from_bits((uint32_t)half << 16); }

// Subnormals included; an infinity or a NaN stays one.
inline float float16_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + 0x38000000));
  const float small = (float)rest * (1.0f / 16777216.0f);  // rest * 2^-24, exact
  return sign ? -small : small;
}

}  // namespace zs
