// Run-time choice between builds of the same kernel.
//
// setup.py compiles every csrc/cpu/*.cpp once per level, with SEQMODELS_LEVEL set to the
// level's name: plain (the compiler's default target), avx2 (with FMA and F16C) and avx512
// (F, BW, DQ, VL); the last two on x86-64 only. Kernels live in `namespace SEQMODELS_LEVEL`,
// so the three builds have different symbols; launchers and registration stand under
// `#if SEQMODELS_LAUNCHERS`, which is set in the plain build only.
//
// Objects are linked in the order plain, avx2, avx512: an inline library function that
// several of them emit is then taken from the lowest level, so no machine runs
// instructions it does not have.
#pragma once

#include <cstdint>

#ifndef SEQMODELS_LEVEL
#define SEQMODELS_LEVEL plain
#define SEQMODELS_LAUNCHERS 1
#endif
#ifndef SEQMODELS_LAUNCHERS
#define SEQMODELS_LAUNCHERS 0
#endif

#if defined(__x86_64__)
#define SEQMODELS_X86 1
#else
#define SEQMODELS_X86 0
#endif

namespace seqmodels {

enum class Capability : int { plain = 0, avx2 = 1, avx512 = 2 };

// The level in force: the machine's best, unless SEQMODELS_CPU_CAPABILITY (default, avx2,
// avx512) or the op seqmodels_cpu::set_capability lowers it.
Capability capability();

}  // namespace seqmodels

// Declares `name`, of function type `type`, at every level, and `choose_<name>()`, which
// returns the build for this machine:
//
//     using ScaleKernel = void(const float* x, float* y, int64_t begin, int64_t end);
//     SEQMODELS_DECLARE_KERNEL(ScaleKernel, scale)
//     namespace SEQMODELS_LEVEL { void scale(const float* x, ...) {...} }
//     ... choose_scale()(x, y, 0, n);
#if SEQMODELS_X86
#define SEQMODELS_DECLARE_KERNEL(type, name)                   \
  namespace plain { type name; }                               \
  namespace avx2 { type name; }                                \
  namespace avx512 { type name; }                              \
  [[maybe_unused]] static inline type* choose_##name() {       \
    switch (capability()) {                                    \
      case Capability::avx512: return avx512::name;            \
      case Capability::avx2: return avx2::name;                \
      default: return plain::name;                             \
    }                                                          \
  }
#else
#define SEQMODELS_DECLARE_KERNEL(type, name)                   \
  namespace plain { type name; }                               \
  [[maybe_unused]] static inline type* choose_##name() { return plain::name; }
#endif
