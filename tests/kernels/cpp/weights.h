// Random weights in arrays of exactly their size, so that a sanitizer sees every access beyond.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "floats.h"
#include "sparse_linear.h"

// Memory that is aligned to its elements and no better, and ends where its last element ends.
template <class T>
class Exact {
 public:
  explicit Exact(size_t count, unsigned char fill = 0xff)
      : bytes_(new unsigned char[(count + 1) * sizeof(T)]), count_(count) {
    memset(bytes_, fill, (count + 1) * sizeof(T));
  }
  Exact(const Exact& other) : Exact(other.count_) {
    if (count_) memcpy(data(), other.data(), count_ * sizeof(T));
  }
  Exact& operator=(const Exact&) = delete;
  ~Exact() { delete[] bytes_; }

  T* data() { return (T*)(bytes_ + sizeof(T)); }
  const T* data() const { return (const T*)(bytes_ + sizeof(T)); }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }
  size_t size() const { return count_; }

 private:
  unsigned char* bytes_;
  size_t count_;
};

struct Shape {
  int64_t rows, columns, block_size;
  zs_value_type type;
};

inline int64_t words_of(const Shape& s) { return (s.columns + 63) / 64; }
inline int64_t blocks_of(const Shape& s) {
  return s.block_size ? std::max<int64_t>(1, (s.columns + s.block_size - 1) / s.block_size) : 1;
}
inline size_t bytes_of(zs_value_type type) {
  return type == ZS_FLOAT32 ? 4 : type == ZS_INT8 ? 1 : 2;
}

// A weight, and what it means as a dense matrix in double.
struct TestWeight {
  Shape shape;
  Exact<uint64_t> bitmask;
  Exact<int64_t> row_offsets;
  Exact<float> scales;
  std::vector<double> dense;
  std::vector<unsigned char> stored;  // the values without their padding

  // `density` below 0: 2:4. Every fifth row is empty and every seventh full.
  TestWeight(const Shape& s, double density, uint32_t seed)
      : shape(s),
        bitmask((size_t)(s.rows * words_of(s)), 0),
        row_offsets((size_t)s.rows + 1),
        scales(s.type == ZS_INT8 ? (size_t)(s.rows * blocks_of(s)) : 0),
        dense((size_t)(s.rows * s.columns), 0.0) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> unit(0, 1);
    for (size_t i = 0; i < scales.size(); i++) scales[i] = 0.001f * (0.5f + unit(random));
    row_offsets[0] = 0;
    for (int64_t n = 0; n < s.rows; n++) {
      int64_t kept = 0;
      const double wanted = n % 7 == 6 ? 1.0 : n % 5 == 4 ? 0.0 : density;
      for (int64_t k = 0; k < s.columns; k++) {
        const bool keep = wanted < 0 ? (k + n) % 4 < 2 : unit(random) < wanted;
        if (!keep) continue;
        bitmask[(size_t)(n * words_of(s) + k / 64)] |= (uint64_t)1 << k % 64;
        dense[(size_t)(n * s.columns + k)] = append(random, n, k);
        kept++;
      }
      row_offsets[(size_t)n + 1] = row_offsets[(size_t)n] + kept;
    }
  }

  // The values with a padding of ones bits: NaN in every float type.
  Exact<unsigned char> values() const {
    Exact<unsigned char> all(stored.size() + (ZS_PADDING + 1) * bytes_of(shape.type));
    if (!stored.empty()) memcpy(values_in(all), stored.data(), stored.size());
    return all;
  }
  // Where they begin: aligned to an element, and no better.
  unsigned char* values_in(Exact<unsigned char>& all) const {
    const size_t size = bytes_of(shape.type);
    return (unsigned char*)(((uintptr_t)all.data() + size - 1) / size * size);
  }

  zs_weight view(unsigned char* values) const {
    zs_weight w = {};
    w.rows = shape.rows;
    w.columns = shape.columns;
    w.bitmask = bitmask.data();
    w.bitmask_count = (int64_t)bitmask.size();
    w.row_offsets = row_offsets.data();
    w.row_offsets_count = (int64_t)row_offsets.size();
    w.values = values;
    w.values_count = (int64_t)(stored.size() / bytes_of(shape.type)) + ZS_PADDING;
    w.scales = scales.size() ? scales.data() : nullptr;
    w.scales_count = (int64_t)scales.size();
    w.block_size = shape.type == ZS_INT8 ? shape.block_size : 0;
    w.value_type = shape.type;
    return w;
  }

 private:
  double append(std::mt19937& random, int64_t n, int64_t k) {
    std::uniform_real_distribution<float> unit(-1, 1);
    uint32_t bits = 0;
    double value = 0;
    if (shape.type == ZS_FLOAT32) {
      const float f = unit(random);
      memcpy(&bits, &f, 4);
      value = f;
    } else if (shape.type == ZS_FLOAT16) {
      bits = (random() & 0x8000) | (random() % 0x3c00);  // up to 1, subnormals included
      value = zs::float16_to_float((uint16_t)bits);
    } else if (shape.type == ZS_BFLOAT16) {
      const float f = unit(random);
      memcpy(&bits, &f, 4);
      bits >>= 16;
      value = zs::bfloat16_to_float((uint16_t)bits);
    } else {
      const int8_t q = (int8_t)(random() % 256);  // -128 included
      bits = (uint8_t)q;
      const int64_t block = shape.block_size ? k / shape.block_size : 0;
      value = (double)q * scales[(size_t)(n * blocks_of(shape) + block)];
    }
    const unsigned char* from = (const unsigned char*)&bits;
    stored.insert(stored.end(), from, from + bytes_of(shape.type));
    return value;
  }
};

// A row of x as accuracy_level 4 sees it: what remains of it after 8 bits.
inline void round_to_8_bits(double* x, int64_t columns) {
  double low = 0, high = 0;
  for (int64_t k = 0; k < columns; k++) {
    low = std::min(low, x[k]);
    high = std::max(high, x[k]);
  }
  const float scale = (float)((high - low) / 255.0);
  if (!(scale > 0)) return;
  const double zero = std::nearbyint((float)-low / scale);
  for (int64_t k = 0; k < columns; k++) {
    const double q = std::nearbyint((float)x[k] / scale) + zero;
    x[k] = (double)scale * (std::min(255.0, std::max(0.0, q)) - zero);
  }
}
