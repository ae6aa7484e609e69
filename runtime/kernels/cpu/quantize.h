// How a row of x becomes 8 bits when accuracy_level is 4.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace zs {

// x = scale * (q - zero_point) with q in 0..255, as ONNX DynamicQuantizeLinear, but for one row.
// A row that is not finite has a scale of NaN and q = 0: its outputs are NaN.
struct RowScale {
  float scale;
  int32_t zero_point;
};

inline RowScale row_scale(float low, float high) {
  low = std::min(low, 0.0f);
  high = std::max(high, 0.0f);
  // In double: high - low may overflow float32.
  const double step = ((double)high - (double)low) / 255.0;
  if (!std::isfinite(step)) return {std::numeric_limits<float>::quiet_NaN(), 0};
  const float scale = (float)step;
  if (!(scale > 0)) return {1.0f, 0};
  const float zero = std::nearbyint(-low / scale);
  return {scale, (int32_t)std::min(255.0f, std::max(0.0f, zero))};
}

inline uint8_t quantize(float x, const RowScale& row) {
  const float q = std::nearbyint(x / row.scale) + (float)row.zero_point;
  return (uint8_t)std::min(255.0f, std::max(0.0f, q));
}

inline RowScale row_scale(const float* x, int64_t columns) {
  float low = 0, high = 0;
  bool finite = true;
  for (int64_t k = 0; k < columns; k++) {
    low = std::min(low, x[k]);
    high = std::max(high, x[k]);
    finite &= std::isfinite(x[k]);
  }
  return finite ? row_scale(low, high) : RowScale{std::numeric_limits<float>::quiet_NaN(), 0};
}

inline RowScale quantize_row(const float* x, int64_t columns, uint8_t* q) {
  const RowScale row = row_scale(x, columns);
  for (int64_t k = 0; k < columns; k++) q[k] = std::isnan(row.scale) ? 0 : quantize(x[k], row);
  return row;
}

}  // namespace zs
