// What the forward, backward and decode step of Mamba-3 share: sizes, weights, rotation, norms and
// the gate. The mathematics is in seqmodels/ops/mamba3/op.py.
//
// Names: N state width, P head width, R ranks, G groups, H heads, A angles.
#pragma once

#include <cmath>
#include <cstdint>

#include "dispatch.h"
#include "vec.h"

namespace seqmodels {

struct Mamba3Shape {
  int64_t heads, head_dim, groups, ranks, d_state, angles;
  bool half;  // pairs (i, i + N / 2) instead of (2i, 2i + 1)
  float epsilon;

  int64_t group(int64_t head) const { return head * groups / heads; }
};

// Parameters of the layer, float32. The mimo weights are all given or all null (ones), the norm's
// weight may be null (no norm).
struct Mamba3Weights {
  const float *b_weight, *c_weight;           // (N)
  const float *b_bias, *c_bias;               // (H, R, N)
  const float* skip;                          // (H)
  const float *mimo_x, *mimo_z, *mimo_o;      // (H, R, P)
  const float* norm_weight;                   // (H, P)
};

}  // namespace seqmodels

namespace seqmodels {
namespace SEQMODELS_LEVEL {

// A row's last, partial vector is moved lane by lane.
template <class T>
SEQMODELS_INLINE Vec load_some(const T* from, int64_t left) {
  return left >= kLanes ? load(from) : load(from, left);
}
template <class T>
SEQMODELS_INLINE void store_some(T* to, Vec value, int64_t left) {
  left >= kLanes ? store(to, value) : store(to, value, left);
}

// phase <- phase + step * rate mod 2 pi, in double: nothing of a long sum is lost.
SEQMODELS_INLINE void advance_phase(double* phase, float step, const float* rate, int64_t angles) {
  constexpr double kTurn = 6.283185307179586476925, kMagic = 6755399441055744.0;  // 1.5 * 2^52
  for (int64_t i = 0; i < angles; ++i) {
    const double sum = phase[i] + static_cast<double>(step) * static_cast<double>(rate[i]);
    const double turns = (sum * (1.0 / kTurn) + kMagic) - kMagic;  // rounded to an integer
    phase[i] = sum - turns * kTurn;
  }
}

// Sine and cosine within 2 units in the last place of 1, for |x| <= 8.
SEQMODELS_INLINE void sine_cosine(Vec x, Vec* sine, Vec* cosine) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * 0.636619772f + magic) - magic;
  const VecInt quadrant = __builtin_convertvector(n, VecInt);
  // pi / 2 in three parts.
  const Vec r = ((x - n * 1.5703125f) - n * 4.837512969970703125e-4f) - n * 7.54978995489188216e-8f;
  const Vec s = r * r;
  const Vec low = r + r * s * ((s * -1.9515295891e-4f + 8.3321608736e-3f) * s - 1.6666654611e-1f);
  const Vec high =
      1.0f - 0.5f * s + s * s * ((s * 2.443315711809948e-5f - 1.388731625493765e-3f) * s + 4.166664568298827e-2f);
  const VecInt odd = (quadrant & 1) != 0;
  const Vec a = odd ? high : low, b = odd ? low : high;
  *sine = (quadrant & 2) != 0 ? -a : a;
  *cosine = ((quadrant + 1) & 2) != 0 ? -b : b;
}

// cosine and sine have room for whole vectors.
static inline void sines_of_phases(const double* phase, int64_t angles, float* cosine, float* sine) {
  for (int64_t i = 0; i < angles; i += kLanes) {
    float lanes[kLanes] = {};
    for (int64_t j = i; j < angles && j < i + kLanes; ++j) lanes[j - i] = static_cast<float>(phase[j]);
    Vec s, c;
    sine_cosine(load(lanes), &s, &c);
    store(cosine + i, c);
    store(sine + i, s);
  }
}

// 1 / root mean square of n values.
template <class T>
static inline float inverse_rms(const T* values, int64_t n, float epsilon) {
  Vec total{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec value = load_some(values + i, n - i);
    total += value * value;
  }
  return 1.0f / std::sqrt(sum(total) / static_cast<float>(n) + epsilon);
}

// One token and head: y (R rows, the skip term in it) to sum_r mimo_o_r [norm](y_r) silu(mimo_z_r z).
static inline void gate(const Mamba3Shape& s, const Mamba3Weights& w, int64_t head, const float* y, int64_t y_stride,
                        const float* z, float* out) {
  const int64_t P = s.head_dim;
  for (int64_t r = 0; r < s.ranks; ++r, y += y_stride) {
    const int64_t mix = (head * s.ranks + r) * P;
    const float scale = w.norm_weight ? inverse_rms(y, P, s.epsilon) : 1.0f;
    for (int64_t p = 0; p < P; p += kLanes) {
      const int64_t left = P - p;
      Vec value = load_some(y + p, left) * scale, g = load_some(z + p, left);
      if (w.norm_weight) value *= load_some(w.norm_weight + head * P + p, left);
      if (w.mimo_z) g *= load_some(w.mimo_z + mix + p, left);
      value *= g * sigmoid(g);
      if (w.mimo_o) value *= load_some(w.mimo_o + mix + p, left);
      if (r > 0) value += load_some(out + p, left);
      store_some(out + p, value, left);
    }
  }
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels
