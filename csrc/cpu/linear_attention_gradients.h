// What the gradients of linear attention and of its state alone share. Included by kernels only, once per level.
#pragma once

#include "linear_attention_operands.h"

namespace seqmodels {
namespace SEQMODELS_LEVEL {

// V with a column of ones for the normaliser.
template <class T>
static void load_values(const LinearAttentionInputs<T>& in, int64_t row0, int64_t rows, int64_t head, float* v) {
  const LinearAttentionShape& s = in.shape;
  const int64_t stride = s.heads * s.value_dim, width = padded(s.state_width());
  copy_rows(in.v + row0 * stride + head * s.value_dim, stride, rows, s.value_dim, v, width);
  if (!s.normalize) return;
  for (int64_t row = 0; row < rows; ++row) v[row * width + s.value_dim] = 1.0f;
}

// Rows of a gradient to memory: added to `sums` unless this is the group's first block of heads,
// or, where one block is all there is, straight to the tensor.
template <class T>
static void write_rows(const float* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, float* sums,
                       int64_t stride, bool add) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, columns - column), at = row * stride + column;
      Vec value = load(from + row * from_stride + column);
      if (sums) {
        if (add) value += n == kLanes ? load(sums + at) : load(sums + at, n);
        n == kLanes ? store(sums + at, value) : store(sums + at, value, n);
      } else {
        n == kLanes ? store(to + at, value) : store(to + at, value, n);
      }
    }
  }
}

// What was gathered of one group, by way of its map, to memory.
template <class T>
static void finish_group(const LinearAttentionShape& s, int64_t rows, const float* u, const float* phi,
                         const float* dphi, float* du, float* row, T* to, float* sums, int64_t stride, bool add) {
  const int64_t width = s.gradient_width();
  if (s.map == FeatureMap::none) {
    return write_rows<T>(dphi, padded(s.key_dim), rows, width, to, sums, stride, add);
  }
  map_gradient(s.map, u, width, rows, phi, dphi, s.key_dim, row, du);
  write_rows<T>(du, padded(width), rows, width, to, sums, stride, add);
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels
