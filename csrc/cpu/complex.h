// Products of complex numbers that lie in memory as pairs: a vector holds kLanes / 2 of them.
#pragma once

#include "vec.h"

namespace seqmodels {

#if defined(__AVX512F__)
#define SEQMODELS_SHUFFLE(v, a, b)                                                                            \
  __builtin_shufflevector(v, v, a, b, 2 + a, 2 + b, 4 + a, 4 + b, 6 + a, 6 + b, 8 + a, 8 + b, 10 + a, 10 + b, \
                          12 + a, 12 + b, 14 + a, 14 + b)
#elif defined(__AVX2__)
#define SEQMODELS_SHUFFLE(v, a, b) __builtin_shufflevector(v, v, a, b, 2 + a, 2 + b, 4 + a, 4 + b, 6 + a, 6 + b)
#else
#define SEQMODELS_SHUFFLE(v, a, b) __builtin_shufflevector(v, v, a, b, 2 + a, 2 + b)
#endif

SEQMODELS_INLINE Vec alternating(float even, float odd) {
  Vec value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = lane % 2 ? odd : even;
  return value;
}

// A factor as a product needs it: its real parts twice, and its imaginary parts with signs.
template <bool Complex>
struct Factor {
  Vec real, imaginary;
};

template <bool Complex, bool Conjugate>
SEQMODELS_INLINE Factor<Complex> factor(Vec value) {
  if constexpr (!Complex) return {value, Vec{}};
  const Vec signs = Conjugate ? alternating(1.0f, -1.0f) : alternating(-1.0f, 1.0f);
  return {SEQMODELS_SHUFFLE(value, 0, 0), SEQMODELS_SHUFFLE(value, 1, 1) * signs};
}

template <bool Complex>
SEQMODELS_INLINE Vec product(const Factor<Complex>& a, Vec value) {
  if constexpr (!Complex) return a.real * value;
  return a.real * value + a.imaginary * SEQMODELS_SHUFFLE(value, 1, 0);
}

// Memory by whole vectors where Full is std::true_type, by n lanes otherwise.
template <class Full>
SEQMODELS_INLINE Vec get(const float* from, Full, int64_t n) {
  if constexpr (Full::value) return load(from);
  return load(from, n);
}

template <class Full>
SEQMODELS_INLINE void put(float* to, Vec value, Full, int64_t n) {
  if constexpr (Full::value) return store(to, value);
  store(to, value, n);
}

// The same where only n says whether the vector is whole.
SEQMODELS_INLINE Vec get(const float* from, int64_t n) { return n == kLanes ? load(from) : load(from, n); }
SEQMODELS_INLINE void put(float* to, Vec value, int64_t n) { n == kLanes ? store(to, value) : store(to, value, n); }

}  // namespace seqmodels
