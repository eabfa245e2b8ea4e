// The feature maps of linear attention on one tile of rows: u = x W, phi(u), and the gradient of u.
// Their definitions stand in ops/feature_attention/maps.py. Included by kernels only, once per level.
//
// Rows of u are padded(f) wide and rows of phi padded(F); what lies between F and there is zero, and so are
// rows up to a whole tile. Vectors are stored from left to right and may reach up to kLanes behind a row's
// end, where the next row is written later: buffers of phi have 16 floats more than their rows.
#pragma once

#include <cmath>

#include "linear_attention_tile.h"

namespace seqmodels {
namespace SEQMODELS_LEVEL {

constexpr float kHalfRoot = 0.70710678f;  // sqrt(1/2)

SEQMODELS_INLINE Vec first_lanes(Vec value, int64_t count) {
  return iota() < static_cast<int32_t>(std::min<int64_t>(count, kLanes)) ? value : Vec{};
}

// One number of all lanes: halves meet while they are vectors, which `sum` (through memory) leaves to the compiler.
template <class Meet>
SEQMODELS_INLINE float reduce(Vec value, Meet meet) {
  float lanes[8];
#if defined(__AVX512F__)
  const Vec8 low = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7);
  const Vec8 high = __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
  const Vec8 half = meet(low, high);
  std::memcpy(lanes, &half, sizeof(half));
  constexpr int kLeft = 8;
#else
  std::memcpy(lanes, &value, sizeof(value));
  constexpr int kLeft = kLanes;
#endif
  for (int width = kLeft / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] = meet(lanes[lane], lanes[lane + width]);
  }
  return lanes[0];
}

SEQMODELS_INLINE float highest(Vec value) {
  return reduce(value, [](auto a, auto b) { return a > b ? a : b; });
}

SEQMODELS_INLINE float total_of(Vec value) {
  return reduce(value, [](auto a, auto b) { return a + b; });
}

// u of `rows` rows: x W, or x itself where weight is null. x and W have zeros behind their columns.
template <class T>
static void project(const T* x, int64_t stride, int64_t rows, int64_t depth, const float* weight, int64_t width,
                    float* wide, float* u) {
  const int64_t u_width = padded(width);
  if (!weight) return copy_rows(x, stride, rows, width, u, u_width);
  const int64_t x_width = padded(depth);
  copy_rows(x, stride, rows, depth, wide, x_width);
  for_tiles(rows, u_width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    tile.template add_product<Order::rows>(wide + row * x_width, x_width, weight + column, u_width, 0, depth);
    for_vectors(tile, row, column, [&](int64_t r, int64_t n, Vec value) { store(u + r * u_width + n, value); });
  });
}

// u of one row. `wide` is scratch of padded(D) floats.
template <class T>
static void project_row(const T* x, int64_t depth, const float* weight, int64_t width, float* wide, float* u) {
  if (!weight) return copy_rows(x, 0, 1, width, u, padded(width), 1);
  copy_rows(x, 0, 1, depth, wide, padded(depth), 1);
  const int64_t u_width = padded(width);
  int64_t column = 0;
  for (; column + 2 * kLanes <= u_width; column += 2 * kLanes) {
    Vec left{}, right{};
    for (int64_t d = 0; d < depth; ++d) {
      left += wide[d] * load(weight + d * u_width + column);
      right += wide[d] * load(weight + d * u_width + column + kLanes);
    }
    store(u + column, left);
    store(u + column + kLanes, right);
  }
  for (; column < u_width; column += kLanes) {
    Vec total{};
    for (int64_t d = 0; d < depth; ++d) total += wide[d] * load(weight + d * u_width + column);
    store(u + column, total);
  }
}

template <class Function>
SEQMODELS_INLINE void map_elements(const float* u, int64_t width, float* phi, Function function) {
  for (int64_t column = 0; column < padded(width); column += kLanes) {
    store(phi + column, first_lanes(function(load(u + column)), std::max<int64_t>(0, width - column)));
  }
}

// Lane i of a vector, or nothing behind the last of `count`.
SEQMODELS_INLINE VecInt lanes_below(int64_t count) {
  return iota() < static_cast<int32_t>(std::min<int64_t>(count, kLanes));
}

// [softmax(u), softmax(-u)], or with `joint` one softmax over both. Where the entries lie within e^+-80 of one
// another, e^-u comes from 1 / e^u: a division costs less than half of an exponential.
static void map_softmax(const float* u, int64_t width, bool joint, float* phi) {
  const Vec outside = broadcast(-__builtin_inff());
  Vec high = outside, low = outside;
  for (int64_t column = 0; column < width; column += kLanes) {
    const Vec value = load(u + column);
    const VecInt inside = lanes_below(width - column);
    high = maximum(high, inside ? value : outside);
    low = maximum(low, inside ? -value : outside);
  }
  float top = highest(high), bottom = highest(low);
  if (joint) top = bottom = std::max(top, bottom);
  const bool divides = top + bottom < 80.0f;
  const Vec product = exp(broadcast(-top - bottom));  // of e^{u - top} and e^{-u - bottom}
  float* down = phi + width;
  Vec up_total{}, down_total{};
  for (int64_t column = 0; column < width; column += kLanes) {
    const Vec value = load(u + column), rise = exp(value - top);
    const Vec fall = divides ? product / rise : exp(-value - bottom);
    const VecInt inside = lanes_below(width - column);
    up_total += inside ? rise : Vec{};
    down_total += inside ? fall : Vec{};
    // The second half is written where the first one ends: whole vectors of the first only while they fit.
    column + kLanes <= width ? store(phi + column, rise) : store(phi + column, rise, width - column);
    store(down + column, inside ? fall : Vec{});
  }
  float up = total_of(up_total), below = total_of(down_total);
  if (joint) up = below = up + below;
  const float up_factor = 1.0f / up, down_factor = 1.0f / below;
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) store(phi + column, load(phi + column) * up_factor);
  for (; column < width; ++column) phi[column] *= up_factor;
  for (column = 0; column < width; column += kLanes) store(down + column, load(down + column) * down_factor);
}

// [1, u f^{-1/4}, u_a u_b / sqrt(f)], squares times sqrt(1/2). `row` has zeros behind u.
[[maybe_unused]] static void map_taylor(const float* row, int64_t width, float* phi) {
  const float linear = std::pow(static_cast<float>(width), -0.25f), square = linear * linear;
  phi[0] = 1.0f;
  for (int64_t a = 0; a < width; a += kLanes) store(phi + 1 + a, load(row + a) * linear);
  const Vec first = iota() == 0 ? broadcast(kHalfRoot) : broadcast(1.0f);
  float* to = phi + 1 + width;
  for (int64_t a = 0; a < width; to += width - a, ++a) {
    const float left = row[a] * square;
    store(to, load(row + a) * left * first);
    for (int64_t b = kLanes; b < width - a; b += kLanes) store(to + b, load(row + a + b) * left);
  }
}

// phi(u) of one row, all maps but hedgehog_exp. `row` is scratch of padded(f) + 32 floats.
[[maybe_unused]] static void map_row(FeatureMap map, const float* u, int64_t width, float* phi, int64_t features,
                                     float* row) {
  switch (map) {
    case FeatureMap::hedgehog_split:
    case FeatureMap::hedgehog_joint:
      map_softmax(u, width, map == FeatureMap::hedgehog_joint, phi);
      break;
    case FeatureMap::taylor:
      std::fill(std::copy(u, u + width, row), row + padded(width) + 16, 0.0f);
      map_taylor(row, width, phi);
      break;
    case FeatureMap::elu:
      map_elements(u, width, phi, [](Vec x) { return x > 0.0f ? x + 1.0f : exp(minimum(x, Vec{})); });
      break;
    case FeatureMap::relu:
      map_elements(u, width, phi, [](Vec x) { return maximum(x, Vec{}); });
      break;
    default:
      map_elements(u, width, phi, [](Vec x) { return x; });
  }
  std::fill(phi + features, phi + padded(features), 0.0f);
}

[[maybe_unused]] static void map_rows(FeatureMap map, const float* u, int64_t width, int64_t rows, float* phi,
                                      int64_t features, float* row) {
  const int64_t u_width = padded(width), phi_width = padded(features);
  for (int64_t i = 0; i < rows; ++i) map_row(map, u + i * u_width, width, phi + i * phi_width, features, row);
  std::fill(phi + rows * phi_width, phi + round_up(rows, 8) * phi_width, 0.0f);
}

[[maybe_unused]] static void softmax_gradient(const float* phi, const float* dphi, int64_t width, bool joint,
                                              float* du) {
  Vec up{}, down{};
  for (int64_t column = 0; column < width; column += kLanes) {
    const int64_t n = width - column;
    up += first_lanes(load(phi + column) * load(dphi + column), n);
    down += first_lanes(load(phi + width + column) * load(dphi + width + column), n);
  }
  float above = total_of(up), below = total_of(down);
  if (joint) above = below = above + below;
  for (int64_t column = 0; column < width; column += kLanes) {
    const Vec rise = load(phi + column) * (load(dphi + column) - above);
    const Vec fall = load(phi + width + column) * (load(dphi + width + column) - below);
    store(du + column, load(du + column) + first_lanes(rise - fall, width - column));
  }
}

[[maybe_unused]] static void taylor_gradient(const float* row, const float* dphi, int64_t width, float* du) {
  const float linear = std::pow(static_cast<float>(width), -0.25f), square = linear * linear;
  for (int64_t a = 0; a < width; a += kLanes) {
    store(du + a, load(du + a) + first_lanes(load(dphi + 1 + a) * linear, width - a));
  }
  const Vec first = iota() == 0 ? broadcast(kHalfRoot) : broadcast(1.0f);
  const float* from = dphi + 1 + width;
  for (int64_t a = 0; a < width; from += width - a, ++a) {
    const float left = row[a] * square;
    Vec total{};
    for (int64_t b = 0; b < width - a; b += kLanes) {
      Vec gradient = first_lanes(load(from + b), width - a - b);
      if (b == 0) gradient *= first;
      total += gradient * load(row + a + b);
      store(du + a + b, load(du + a + b) + gradient * left);
    }
    du[a] += total_of(total) * square;
  }
}

// du += the gradient of u for that of phi, in `rows` rows. With hedgehog_exp dphi is that of log phi. Rows of
// du are padded(f) wide, with 16 floats behind the last.
[[maybe_unused]] static void map_gradient(FeatureMap map, const float* u, int64_t width, int64_t rows, const float* phi,
                                          const float* dphi, int64_t features, float* row, float* du) {
  const int64_t u_width = padded(width), phi_width = padded(features);
  for (int64_t i = 0; i < rows; ++i, u += u_width, phi += phi_width, dphi += phi_width, du += u_width) {
    switch (map) {
      case FeatureMap::hedgehog_split:
      case FeatureMap::hedgehog_joint:
        softmax_gradient(phi, dphi, width, map == FeatureMap::hedgehog_joint, du);
        break;
      case FeatureMap::hedgehog_exp:
        for (int64_t column = 0; column < width; column += kLanes) {
          const Vec both = load(dphi + column) - load(dphi + width + column);
          store(du + column, load(du + column) + first_lanes(both, width - column));
        }
        break;
      case FeatureMap::taylor:
        std::copy(u, u + width, row);
        std::fill(row + width, row + u_width + 16, 0.0f);
        taylor_gradient(row, dphi, width, du);
        break;
      default:
        for (int64_t column = 0; column < u_width; column += kLanes) {
          Vec gradient = load(dphi + column);
          if (map == FeatureMap::elu) gradient *= load(u + column) > 0.0f ? broadcast(1.0f) : load(phi + column);
          if (map == FeatureMap::relu) gradient = load(u + column) > 0.0f ? gradient : Vec{};
          store(du + column, load(du + column) + gradient);
        }
    }
  }
}

// ---- hedgehog_exp: phi = e^{[u, -u]} relative to a maximum of each feature (the scale of the state).

// [u, -u] of `rows` rows, -infinity behind: log phi.
[[maybe_unused]] static void exponents(const float* u, int64_t width, int64_t rows, float* log_phi) {
  const int64_t u_width = padded(width), phi_width = padded(2 * width);
  for (int64_t i = 0; i < rows; ++i, u += u_width, log_phi += phi_width) {
    std::copy(u, u + width, log_phi);
    for (int64_t column = 0; column < width; ++column) log_phi[width + column] = -u[column];
    std::fill(log_phi + 2 * width, log_phi + phi_width, -__builtin_inff());
  }
}

// to = max(scale, log phi of all rows).
[[maybe_unused]] static void raise_scale(const float* log_phi, int64_t rows, int64_t phi_width, const float* scale,
                                         float* to) {
  for (int64_t n = 0; n < phi_width; n += kLanes) {
    Vec top = load(scale + n);
    for (int64_t i = 0; i < rows; ++i) top = maximum(top, load(log_phi + i * phi_width + n));
    store(to + n, top);
  }
}

// max over features of log phi + scale, for one row.
SEQMODELS_INLINE float largest(const float* log_phi, const float* scale, int64_t phi_width) {
  Vec top = broadcast(-__builtin_inff());
  for (int64_t n = 0; n < phi_width; n += kLanes) top = maximum(top, load(log_phi + n) + load(scale + n));
  return highest(top);
}

// e^{log phi + sign * scale - shift} of one row.
SEQMODELS_INLINE void relative(const float* log_phi, const float* scale, float sign, float shift, int64_t phi_width,
                               float* phi) {
  for (int64_t n = 0; n < phi_width; n += kLanes) {
    store(phi + n, exp(load(log_phi + n) + load(scale + n) * sign - shift));
  }
}

// sum over features of e^{a + b - shift}: one score without a scale between.
SEQMODELS_INLINE float direct_score(const float* a, const float* b, float shift, int64_t phi_width) {
  Vec total{};
  for (int64_t n = 0; n < phi_width; n += kLanes) total += exp(load(a + n) + load(b + n) - shift);
  return total_of(total);
}

// A query whose keys all lie this far below a later key of the chunk (natural logarithm) is scored directly:
// e^-40 against what float32 holds, e^-87.
constexpr float kTooFarBelow = 40.0f;

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels
