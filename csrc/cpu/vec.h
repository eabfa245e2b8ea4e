// Vectors of float at the width of the level being compiled: 16 (avx512), 8 (avx2), 4 (plain).
//
// These are the compiler's own vector types (GCC, Clang): + - * / and comparisons work lane by
// lane, `mask ? a : b` selects, a * b + c becomes one FMA where the level has it
// (-ffp-contract=fast). No other header of a library is needed in a kernel. Everything is
// static and always inlined, so each level has its own code.
#pragma once

#include <cstdint>
#include <cstring>

namespace seqmodels {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

#define SEQMODELS_INLINE __attribute__((always_inline)) static inline

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecInt __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecBits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kLanes)));

// bfloat16 in memory. Arithmetic is always float32.
struct bfloat16 {
  uint16_t bits;
};

SEQMODELS_INLINE Vec broadcast(float value) { return value - Vec{}; }

// ---- memory: n lanes, the others zero; n defaults to all of them.

SEQMODELS_INLINE Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

SEQMODELS_INLINE Vec load(const float* from, int64_t n) {
  Vec value{};
  std::memcpy(&value, from, n * sizeof(float));
  return value;
}

SEQMODELS_INLINE void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }
SEQMODELS_INLINE void store(float* to, Vec value, int64_t n) { std::memcpy(to, &value, n * sizeof(float)); }

SEQMODELS_INLINE Vec widen(VecHalf half) {
  const VecBits bits = __builtin_convertvector(half, VecBits) << 16;
  Vec value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Round to nearest even; NaN stays NaN.
SEQMODELS_INLINE VecHalf narrow(Vec value) {
  VecBits bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const VecBits rounded = (bits + (((bits >> 16) & 1u) + 0x7FFFu)) >> 16;
  const VecBits is_nan = reinterpret_cast<VecBits>(value != value);
  return __builtin_convertvector((is_nan & 0x7FC0u) | (~is_nan & rounded), VecHalf);
}

SEQMODELS_INLINE Vec load(const bfloat16* from) {
  VecHalf half;
  std::memcpy(&half, from, sizeof(half));
  return widen(half);
}

SEQMODELS_INLINE Vec load(const bfloat16* from, int64_t n) {
  VecHalf half{};
  std::memcpy(&half, from, n * sizeof(uint16_t));
  return widen(half);
}

SEQMODELS_INLINE void store(bfloat16* to, Vec value) {
  const VecHalf half = narrow(value);
  std::memcpy(to, &half, sizeof(half));
}

SEQMODELS_INLINE void store(bfloat16* to, Vec value, int64_t n) {
  const VecHalf half = narrow(value);
  std::memcpy(to, &half, n * sizeof(uint16_t));
}

// ---- arithmetic

SEQMODELS_INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
SEQMODELS_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

SEQMODELS_INLINE float sum(Vec value) {
  float lanes[kLanes];
  std::memcpy(lanes, &value, sizeof(value));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// Sums of neighbouring lanes: those of a in the first half, those of b in the second.
SEQMODELS_INLINE Vec add_pairs(Vec a, Vec b) {
#if !defined(__has_builtin) || !__has_builtin(__builtin_shufflevector)
  float from[2 * kLanes], to[kLanes];
  std::memcpy(from, &a, sizeof(a));
  std::memcpy(from + kLanes, &b, sizeof(b));
  for (int i = 0; i < kLanes; ++i) to[i] = from[2 * i] + from[2 * i + 1];
  return load(to);
#elif defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// Lane i of the result is the sum of totals[i]: a tree, with about two shuffles for each sum.
template <int count>
SEQMODELS_INLINE Vec sum_each(const Vec* totals) {
  if constexpr (count == 1) {
    return totals[0];
  } else {
    return add_pairs(sum_each<count / 2>(totals), sum_each<count / 2>(totals + count / 2));
  }
}

// e^x, within 2 units in the last place; 0 below -87.3 (no subnormal results), infinity above
// 88.7, NaN for NaN. e^x = 2^n e^r with |r| <= ln(2)/2 and a degree-6 polynomial for e^r.
SEQMODELS_INLINE Vec exp(Vec x) {
  const Vec high = broadcast(88.72284f), low = broadcast(-87.33655f);
  const Vec bounded = minimum(maximum(x, low), high);
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = bounded * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  Vec p = r * 1.3981999507e-3f + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, so that n = 128 (x near 88.7) does not overflow the exponent field.
  const VecInt exponent = __builtin_convertvector(n, VecInt);
  const VecInt half = exponent >> 1;
  const VecInt first_bits = (half + 127) << 23, second_bits = (exponent - half + 127) << 23;
  Vec first, second;
  std::memcpy(&first, &first_bits, sizeof(first));
  std::memcpy(&second, &second_bits, sizeof(second));
  Vec result = p * first * second;
  result = x < low ? Vec{} : result;
  result = x > high ? broadcast(__builtin_inff()) : result;
  return x != x ? x : result;
}

SEQMODELS_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace seqmodels
