// Elementwise linear recurrence over time, forward and backward, real or complex.
//
//   h[t] = a[t] h[t-1] + x[t]                        a constant in time or one for each token
//   g[t] = dh[t] + conj(a[t+1]) g[t+1],  dx = g,  da[t] = g[t] conj(h[t-1])
//
// It is bound by memory: a unit of work is one document times up to kBlock components (complex
// channels are pairs of components), walked kSteps tokens at a time, so that rows are read and written
// in long runs, the state stays in a register for kSteps tokens and in the first-level cache between.
// Vectors run along components; a complex product is two products with a shuffled copy. The gradient
// of a constant decay is summed per document over kSteps tokens, then kRun, then all, then over
// documents: the bits depend on no thread.
#include <algorithm>
#include <type_traits>

#include "complex.h"
#include "dispatch.h"
#include "vec.h"

namespace seqmodels {

constexpr int64_t kBlock = 2048;  // components of a unit: 8 KiB of a row
constexpr int64_t kSteps = 4;
constexpr int64_t kRun = 64;

// One document. Rows of x, h and their gradients have `row` components; null pointers: absent.
struct Recurrence {
  const float* decay;   // (row), or (tokens, row) when varying
  const float* x;       // forward
  float* h;             // states; read only in the backward
  const float* initial_state;
  float* final_state;   // forward
  const float* grad_h;  // backward from here on
  const float* grad_final_state;
  float* grad_x;
  float* grad_decay;    // (row), or (tokens, row) when varying
  float* grad_initial_state;
  int64_t row, length;
  bool varying;
};

using RecurrenceKernel = void(const Recurrence&, int64_t first, int64_t last);

SEQMODELS_DECLARE_KERNEL(RecurrenceKernel, recurrence_forward_real)
SEQMODELS_DECLARE_KERNEL(RecurrenceKernel, recurrence_forward_complex)
SEQMODELS_DECLARE_KERNEL(RecurrenceKernel, recurrence_backward_real)
SEQMODELS_DECLARE_KERNEL(RecurrenceKernel, recurrence_backward_complex)

namespace SEQMODELS_LEVEL {

// Calls body(component, lanes) for whole vectors, then for the rest.
template <class Body>
SEQMODELS_INLINE void for_lanes(int64_t first, int64_t last, Body body) {
  int64_t c = first;
  for (; c + kLanes <= last; c += kLanes) body(c, std::integral_constant<bool, true>{}, kLanes);
  if (c < last) body(c, std::integral_constant<bool, false>{}, last - c);
}

// Tokens [t, t + Steps), Steps known to the compiler.
template <bool Complex, int Steps>
static void forward_steps(const Recurrence& r, int64_t t, int64_t first, int64_t last) {
  const float* before = t ? r.h + (t - 1) * r.row : r.initial_state;
  const float* decay = r.varying ? r.decay + t * r.row : r.decay;
  const int64_t decay_row = r.varying ? r.row : 0;
  for_lanes(first, last, [&](int64_t c, auto full, int64_t n) __attribute__((always_inline)) {
    Vec h = before ? get(before + c, full, n) : Vec{};
    const auto constant = factor<Complex, false>(get(decay + c, full, n));
#pragma GCC unroll 4
    for (int step = 0; step < Steps; ++step) {
      const int64_t at = (t + step) * r.row + c;
      const auto a = decay_row ? factor<Complex, false>(get(decay + step * decay_row + c, full, n)) : constant;
      const Vec x = get(r.x + at, full, n);
      h = step || before ? product(a, h) + x : x;
      put(r.h + at, h, full, n);
    }
  });
}

template <bool Complex>
static void forward(const Recurrence& r, int64_t first, int64_t last) {
  int64_t t = 0;
  for (; t + kSteps <= r.length; t += kSteps) forward_steps<Complex, kSteps>(r, t, first, last);
  for (; t < r.length; ++t) forward_steps<Complex, 1>(r, t, first, last);
  const float* state = r.length ? r.h + (r.length - 1) * r.row : r.initial_state;
  if (state) {
    std::copy(state + first, state + last, r.final_state + first);
  } else {
    std::fill(r.final_state + first, r.final_state + last, 0.0f);
  }
}

// Tokens t, t - 1, ..., t - Steps + 1; `run` collects the gradient of a constant decay.
template <bool Complex, int Steps>
static void backward_steps(const Recurrence& r, int64_t t, int64_t first, int64_t last, float* run) {
  const bool ends = t + 1 == r.length;
  const float* behind = ends ? r.grad_final_state : r.grad_x + (t + 1) * r.row;
  for_lanes(first, last, [&](int64_t c, auto full, int64_t n) __attribute__((always_inline)) {
    Vec g = get(behind + c, full, n), shares{};
    const auto constant = r.varying ? Factor<Complex>{} : factor<Complex, true>(get(r.decay + c, full, n));
#pragma GCC unroll 4
    for (int step = 0; step < Steps; ++step) {
      const int64_t at = (t - step) * r.row + c;
      if (step || !ends) {  // the decay of the token behind
        g = product(r.varying ? factor<Complex, true>(get(r.decay + at + r.row, full, n)) : constant, g);
      }
      g += get(r.grad_h + at, full, n);
      put(r.grad_x + at, g, full, n);
      const float* before = t - step > 0 ? r.h + at - r.row : r.initial_state ? r.initial_state + c : nullptr;
      const Vec share = before ? product(factor<Complex, true>(get(before, full, n)), g) : Vec{};
      if (r.varying) {
        put(r.grad_decay + at, share, full, n);
      } else {
        shares += share;
      }
    }
    if (!r.varying) put(run + (c - first), get(run + (c - first), full, n) + shares, full, n);
  });
}

template <bool Complex>
static void backward(const Recurrence& r, int64_t first, int64_t last) {
  float total[kBlock], run[kBlock];
  std::fill(total, total + kBlock, 0.0f);
  std::fill(run, run + kBlock, 0.0f);
  int64_t collected = 0;
  for (int64_t t = r.length - 1; t >= 0;) {
    const bool whole = t + 1 >= kSteps;
    (whole ? backward_steps<Complex, kSteps> : backward_steps<Complex, 1>)(r, t, first, last, run);
    t -= whole ? kSteps : 1;
    collected += whole ? kSteps : 1;
    if (!r.varying && (collected >= kRun || t < 0)) {
      for (int64_t c = 0; c < last - first; ++c) {
        total[c] += run[c];
        run[c] = 0.0f;
      }
      collected = 0;
    }
  }
  if (!r.varying) std::copy(total, total + (last - first), r.grad_decay + first);
  if (!r.grad_initial_state) return;
  for_lanes(first, last, [&](int64_t c, auto full, int64_t n) __attribute__((always_inline)) {
    Vec g = get((r.length ? r.grad_x : r.grad_final_state) + c, full, n);
    if (r.length) g = product(factor<Complex, true>(get(r.decay + c, full, n)), g);
    put(r.grad_initial_state + c, g, full, n);
  });
}

void recurrence_forward_real(const Recurrence& r, int64_t first, int64_t last) { forward<false>(r, first, last); }
void recurrence_forward_complex(const Recurrence& r, int64_t first, int64_t last) { forward<true>(r, first, last); }
void recurrence_backward_real(const Recurrence& r, int64_t first, int64_t last) { backward<false>(r, first, last); }
void recurrence_backward_complex(const Recurrence& r, int64_t first, int64_t last) { backward<true>(r, first, last); }

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS
#include "linear_recurrence_launch.h"
#endif
