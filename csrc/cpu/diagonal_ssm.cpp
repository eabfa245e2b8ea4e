// A diagonal SSM as a scan: one read of u, one write of y, no kernel, no transform.
//
//   x[t, n] = e^{z[n]} x[t-1, n] + b[n] u[t],   y[t] = sum_n Re(c[n] x[t, n]) + skip u[t]
//
// Lanes are heads, so that u is read as it lies and no lane waits for another. Time is cut into chunks of
// kTokens; for a chunk the modes are taken a few at a time, whose states, decays and sums stay in registers, while
// the chunk's y stays in the first-level cache. That is 8 multiplications and additions a mode and token,
// less than the transforms and the kernel of a convolution up to about 100 modes.
//
// Precision: a step multiplies by e^z rounded to float, whose phase would drift with every step. States behind a whole
// chunk are corrected by (e^{kTokens z} - float(e^z)^kTokens) times the state before it, from double: what is left is
// the drift inside one chunk, whatever the length.
//
// Backward: a walk forward with the state x and its derivative x' = dx/dz,
//   x'[t] = e^z (x'[t-1] + x[t-1]),   dc = sum gy conj(x),   dz = conj(c sum gy x') + conj(x'[end]) g[end]
// and one from the end with the adjoint
//   g[t] = conj(e^z) g[t+1] + conj(c) gy[t],   du[t] = sum_n Re(conj(b) g[t]),   db = sum g[t] u[t].
// Nothing is kept from the forward and no tensor of tokens x modes exists.
#include "diagonal_ssm.h"

#include <algorithm>
#include <type_traits>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "complex.h"
#include "dispatch.h"
#include "vec.h"

namespace seqmodels {

SEQMODELS_DECLARE_KERNEL(DiagonalKernel, diagonal_ssm_forward)
SEQMODELS_DECLARE_KERNEL(DiagonalKernel, diagonal_ssm_backward)
SEQMODELS_DECLARE_KERNEL(DiagonalStepKernel, diagonal_ssm_step)

namespace SEQMODELS_LEVEL {

constexpr int kModesForward = kLanes == 16 ? 4 : 2;
constexpr int kModesBackward = kLanes == 16 ? 2 : 1;

// While one lives, numbers below float's normal range count as zero where the machine can: a state that decays over
// silence would otherwise spend a hundred cycles a step on them.
struct NoSubnormals {
#if defined(__SSE__)
  unsigned before = _mm_getcsr();
  NoSubnormals() { _mm_setcsr(before | 0x8040); }
  ~NoSubnormals() { _mm_setcsr(before); }
#endif
};

// Real and imaginary parts of one array of `at`, which points at (mode, part 0, lane).
struct Pair {
  Vec real, imaginary;
};
SEQMODELS_INLINE Pair pair(const float* at) { return {load(at), load(at + kHeads)}; }
SEQMODELS_INLINE void put_pair(float* at, Pair value) {
  store(at, value.real);
  store(at + kHeads, value.imaginary);
}
SEQMODELS_INLINE void add_pair(float* at, Pair value) {
  store(at, load(at) + value.real);
  store(at + kHeads, load(at + kHeads) + value.imaginary);
}

// State behind a whole chunk, less the drift of the decay's rounding.
SEQMODELS_INLINE Pair corrected(Pair value, Pair correction, Pair before) {
  return {value.real + correction.real * before.real - correction.imaginary * before.imaginary,
          value.imaginary + correction.real * before.imaginary + correction.imaginary * before.real};
}

// Tokens of one chunk through Modes modes; y collects.
template <int Modes>
SEQMODELS_INLINE void forward_modes(const DiagonalRun& r, const float* u, int64_t tokens, int64_t mode, int64_t lane,
                                    Vec* y) {
  const float* constants = r.constants + mode * kConstants * kHeads + lane;
  float* state = r.state + mode * 2 * kHeads + lane;
  Pair a[Modes], b[Modes], c[Modes], x[Modes];
#pragma GCC unroll 4
  for (int m = 0; m < Modes; ++m) {
    const float* at = constants + m * kConstants * kHeads;
    a[m] = pair(at + kDecay * kHeads);
    b[m] = pair(at + kInput * kHeads);
    c[m] = pair(at + kOutput * kHeads);
    x[m] = pair(state + m * 2 * kHeads);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const Vec value = load(u + t * kLanes);
    Vec sum = y[t];
#pragma GCC unroll 4
    for (int m = 0; m < Modes; ++m) {
      const Vec real = b[m].real * value - a[m].imaginary * x[m].imaginary + a[m].real * x[m].real;
      const Vec imaginary = b[m].imaginary * value + a[m].imaginary * x[m].real + a[m].real * x[m].imaginary;
      x[m] = {real, imaginary};
      sum = sum + c[m].real * real - c[m].imaginary * imaginary;
    }
    y[t] = sum;
  }
#pragma GCC unroll 4
  for (int m = 0; m < Modes; ++m) {
    float* at = state + m * 2 * kHeads;
    if (tokens == kTokens) {
      x[m] = corrected(x[m], pair(constants + (m * kConstants + kCorrection) * kHeads), pair(at));
    }
    put_pair(at, x[m]);
  }
}

// Copies a chunk's tokens to (tokens, kLanes).
SEQMODELS_INLINE void gather(const float* from, int64_t stride, int64_t tokens, int64_t n, float* to) {
  for (int64_t t = 0; t < tokens; ++t) store(to + t * kLanes, get(from + t * stride, n));
}

void diagonal_ssm_forward(const DiagonalRun& r) {
  [[maybe_unused]] const NoSubnormals guard;
  alignas(64) float u[kTokens * kLanes];
  alignas(64) Vec y[kTokens];
  for (int64_t lane = 0; lane < r.heads; lane += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, r.heads - lane);
    const Vec skip = load(r.skip + lane);
    for (int64_t begin = 0; begin < r.length; begin += kTokens) {
      const int64_t tokens = std::min(kTokens, r.length - begin);
      gather(r.u + begin * r.stride + lane, r.stride, tokens, n, u);
      for (int64_t t = 0; t < tokens; ++t) y[t] = skip * load(u + t * kLanes);
      int64_t mode = 0;
      for (; mode + kModesForward <= r.modes; mode += kModesForward) {
        forward_modes<kModesForward>(r, u, tokens, mode, lane, y);
      }
      for (; mode < r.modes; ++mode) forward_modes<1>(r, u, tokens, mode, lane, y);
      for (int64_t t = 0; t < tokens; ++t) put(r.y + (begin + t) * r.stride + lane, y[t], n);
    }
  }
}

// States, their derivatives and the sums with gy over one chunk.
template <int Modes>
SEQMODELS_INLINE void derivative_modes(const DiagonalRun& r, const float* u, const float* gy, int64_t tokens,
                                       int64_t mode, int64_t lane) {
  const float* constants = r.constants + mode * kConstants * kHeads + lane;
  const int64_t offset = mode * 2 * kHeads + lane;
  Pair a[Modes], b[Modes], x[Modes], dx[Modes], sum[Modes] = {}, sum_dx[Modes] = {};
#pragma GCC unroll 4
  for (int m = 0; m < Modes; ++m) {
    const float* at = constants + m * kConstants * kHeads;
    a[m] = pair(at + kDecay * kHeads);
    b[m] = pair(at + kInput * kHeads);
    x[m] = pair(r.state + offset + m * 2 * kHeads);
    dx[m] = pair(r.derivative + offset + m * 2 * kHeads);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const Vec value = load(u + t * kLanes), grad = load(gy + t * kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < Modes; ++m) {
      const Vec p = dx[m].real + x[m].real, q = dx[m].imaginary + x[m].imaginary;
      dx[m] = {a[m].real * p - a[m].imaginary * q, a[m].real * q + a[m].imaginary * p};
      const Vec real = b[m].real * value - a[m].imaginary * x[m].imaginary + a[m].real * x[m].real;
      const Vec imaginary = b[m].imaginary * value + a[m].imaginary * x[m].real + a[m].real * x[m].imaginary;
      x[m] = {real, imaginary};
      sum[m].real += grad * real;
      sum[m].imaginary += grad * imaginary;
      sum_dx[m].real += grad * dx[m].real;
      sum_dx[m].imaginary += grad * dx[m].imaginary;
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < Modes; ++m) {
    const float* at = constants + m * kConstants * kHeads;
    float *state = r.state + offset + m * 2 * kHeads, *derivative = r.derivative + offset + m * 2 * kHeads;
    if (tokens == kTokens) {
      const Pair correction = pair(at + kCorrection * kHeads), before = pair(state), d = pair(derivative);
      constexpr float size = static_cast<float>(kTokens);
      x[m] = corrected(x[m], correction, before);
      dx[m] = corrected(dx[m], correction, {d.real + size * before.real, d.imaginary + size * before.imaginary});
    }
    put_pair(state, x[m]);
    put_pair(derivative, dx[m]);
    const Pair c = pair(at + kOutput * kHeads);
    add_pair(r.grad_c + offset + m * 2 * kHeads, {sum[m].real, -sum[m].imaginary});
    add_pair(r.grad_z + offset + m * 2 * kHeads,
             {c.real * sum_dx[m].real - c.imaginary * sum_dx[m].imaginary,
              -(c.real * sum_dx[m].imaginary + c.imaginary * sum_dx[m].real)});
  }
}

// The adjoint over one chunk, from its end; gu collects.
template <int Modes>
SEQMODELS_INLINE void adjoint_modes(const DiagonalRun& r, const float* u, const float* gy, int64_t tokens,
                                    int64_t mode, int64_t lane, Vec* gu) {
  const float* constants = r.constants + mode * kConstants * kHeads + lane;
  const int64_t offset = mode * 2 * kHeads + lane;
  Pair a[Modes], b[Modes], c[Modes], g[Modes], sum[Modes] = {};
#pragma GCC unroll 4
  for (int m = 0; m < Modes; ++m) {
    const float* at = constants + m * kConstants * kHeads;
    a[m] = pair(at + kDecay * kHeads);
    b[m] = pair(at + kInput * kHeads);
    c[m] = pair(at + kOutput * kHeads);
    g[m] = pair(r.adjoint + offset + m * 2 * kHeads);
  }
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const Vec value = load(u + t * kLanes), grad = load(gy + t * kLanes);
    Vec total = gu[t];
#pragma GCC unroll 4
    for (int m = 0; m < Modes; ++m) {
      const Vec real = g[m].real + c[m].real * grad, imaginary = g[m].imaginary - c[m].imaginary * grad;
      total = total + b[m].real * real + b[m].imaginary * imaginary;
      sum[m].real += real * value;
      sum[m].imaginary += imaginary * value;
      g[m] = {a[m].real * real + a[m].imaginary * imaginary, a[m].real * imaginary - a[m].imaginary * real};
    }
    gu[t] = total;
  }
#pragma GCC unroll 4
  for (int m = 0; m < Modes; ++m) {
    float* adjoint = r.adjoint + offset + m * 2 * kHeads;
    if (tokens == kTokens) {
      Pair correction = pair(constants + (m * kConstants + kCorrection) * kHeads);
      correction.imaginary = -correction.imaginary;
      g[m] = corrected(g[m], correction, pair(adjoint));
    }
    put_pair(adjoint, g[m]);
    add_pair(r.grad_b + offset + m * 2 * kHeads, sum[m]);
  }
}

void diagonal_ssm_backward(const DiagonalRun& r) {
  [[maybe_unused]] const NoSubnormals guard;
  alignas(64) float u[kTokens * kLanes], gy[kTokens * kLanes];
  alignas(64) Vec gu[kTokens];
  const int64_t chunks = (r.length + kTokens - 1) / kTokens;
  for (int64_t lane = 0; lane < r.heads; lane += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, r.heads - lane);
    const auto take = [&](int64_t chunk) __attribute__((always_inline)) {
      const int64_t begin = chunk * kTokens, tokens = std::min(kTokens, r.length - begin);
      gather(r.u + begin * r.stride + lane, r.stride, tokens, n, u);
      gather(r.grad_y + begin * r.stride + lane, r.stride, tokens, n, gy);
      return tokens;
    };
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t tokens = take(chunk);
      int64_t mode = 0;
      for (; mode + kModesBackward <= r.modes; mode += kModesBackward) {
        derivative_modes<kModesBackward>(r, u, gy, tokens, mode, lane);
      }
      for (; mode < r.modes; ++mode) derivative_modes<1>(r, u, gy, tokens, mode, lane);
    }
    for (int64_t mode = 0; mode < r.modes; ++mode) {  // through the final state
      const int64_t at = mode * 2 * kHeads + lane;
      const Pair dx = pair(r.derivative + at), g = pair(r.grad_final + at);
      add_pair(r.grad_z + at, {g.real * dx.real + g.imaginary * dx.imaginary,
                               g.imaginary * dx.real - g.real * dx.imaginary});
    }
    const Vec skip = load(r.skip + lane);
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t tokens = take(chunk);
      Vec total{};
      for (int64_t t = 0; t < tokens; ++t) {
        const Vec grad = load(gy + t * kLanes);
        gu[t] = skip * grad;
        total += grad * load(u + t * kLanes);
      }
      store(r.grad_skip + lane, load(r.grad_skip + lane) + total);
      int64_t mode = 0;
      for (; mode + kModesForward <= r.modes; mode += kModesForward) {
        adjoint_modes<kModesForward>(r, u, gy, tokens, mode, lane, gu);
      }
      for (; mode < r.modes; ++mode) adjoint_modes<1>(r, u, gy, tokens, mode, lane, gu);
      for (int64_t t = 0; t < tokens; ++t) put(r.grad_u + (chunk * kTokens + t) * r.stride + lane, gu[t], n);
    }
  }
}

// Vectors run along the modes here: a step has one token, and its tables and state are read once. Heads are taken
// kLanes at a time, so that one tree adds up the lanes of all their sums.
void diagonal_ssm_step(const DiagonalStep& s, int64_t first, int64_t last) {
  const int64_t whole = s.width / kLanes * kLanes, rest = s.width - whole;
  for (int64_t begin = first; begin < last; begin += kLanes) {
    const int64_t heads = std::min<int64_t>(kLanes, last - begin);
    for (int64_t row = 0; row < s.batch; ++row) {
      const float* u = s.u + row * s.heads + begin;
      for (int64_t output = 0; output < s.rows; ++output) {
        Vec totals[kLanes] = {};
        for (int64_t head = 0; head < heads; ++head) {
          const int64_t at = (begin + head) * s.width;
          float* state = s.state + row * s.heads * s.width + at;
          const float *decay = s.decay + at, *b = s.b + at, *c = s.c + output * s.heads * s.width + at;
          const Vec value = broadcast(u[head]);
          Vec total{};
          const auto part = [&](int64_t i, auto full) __attribute__((always_inline)) {
            Vec x = get(state + i, full, rest);
            if (output == 0) {
              x = product(factor<true, false>(get(decay + i, full, rest)), x) + value * get(b + i, full, rest);
              put(state + i, x, full, rest);
            }
            total += x * get(c + i, full, rest);
          };
          for (int64_t i = 0; i < whole; i += kLanes) part(i, std::true_type{});
          if (rest) part(whole, std::false_type{});
          totals[head] = total;
        }
        const Vec direct = get(s.skip + output * s.heads + begin, heads) * get(u, heads);
        put(s.y + (row * s.rows + output) * s.heads + begin, sum_each<kLanes>(totals) + direct, heads);
      }
    }
  }
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS
#include "diagonal_ssm_launch.h"
#endif
