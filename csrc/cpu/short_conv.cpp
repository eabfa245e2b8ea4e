// Causal depthwise convolution over time with carried state, forward, backward and one step.
//
//   z[t, c] = bias[c] + sum_w weight[c, w] u[t - (W - 1) + w, c],   y = z or z * sigmoid(z)
//
// where u[t] is x[t] inside the document and, for t < 0, the initial state's last -t rows.
//
// Tiling. A unit of work is up to kTileTokens tokens of one document times up to
// kTileChannels channels: rows of x are read in runs of 512 bytes, and the W rows that
// neighbouring outputs share stay in the first-level cache. Vectors run along channels.
// The backward recomputes z; a unit needs the gradient of the W - 1 tokens behind it as well,
// and computes those again instead of waiting for its neighbour. Weight gradients are summed
// per unit into a buffer and added over units in a fixed order, so that the result has the
// same bits for any number of threads.
#include <algorithm>

#include "dispatch.h"
#include "vec.h"

namespace seqmodels {

constexpr int64_t kTileTokens = 128;
constexpr int64_t kTileChannels = 128;

// One document: where its rows lie (strides in elements, channels contiguous) and its states.
template <class T>
struct ShortConvDocument {
  const T* x;
  int64_t x_stride;
  const T* grad_y;
  int64_t grad_y_stride;
  T* out;  // y or grad_x, contiguous rows of `channels`
  int64_t length;
  const float* initial_state;  // (W - 1, channels) or null: zeros
  const float* grad_final_state;
};

struct ShortConvArguments {
  const float* weight;  // (W, channels)
  const float* bias;    // (channels) or null
  int64_t width, channels;
  bool silu;
};

// Tokens [begin, end) and channels [first, last) of one document. `scratch` holds
// short_conv_scratch(width) floats.
template <class T>
using ShortConvForward = void(const ShortConvArguments&, const ShortConvDocument<T>&, int64_t begin, int64_t end,
                              int64_t first, int64_t last, float* scratch);
// Also writes this unit's weight gradients, (W + 1, channels) with the bias last, and on the
// document's first unit the gradient of the initial state, (W - 1, channels).
template <class T>
using ShortConvBackward = void(const ShortConvArguments&, const ShortConvDocument<T>&, int64_t begin, int64_t end,
                               int64_t first, int64_t last, float* grad_weight, float* grad_initial_state,
                               float* scratch);
// One token of one sequence, channels [first, last); shifts the state in place.
template <class T>
using ShortConvStep = void(const ShortConvArguments&, const T* x, float* state, T* y, int64_t first, int64_t last);

SEQMODELS_DECLARE_KERNEL(ShortConvForward<float>, short_conv_forward_float)
SEQMODELS_DECLARE_KERNEL(ShortConvForward<bfloat16>, short_conv_forward_bfloat16)
SEQMODELS_DECLARE_KERNEL(ShortConvBackward<float>, short_conv_backward_float)
SEQMODELS_DECLARE_KERNEL(ShortConvBackward<bfloat16>, short_conv_backward_bfloat16)
SEQMODELS_DECLARE_KERNEL(ShortConvStep<float>, short_conv_step_float)
SEQMODELS_DECLARE_KERNEL(ShortConvStep<bfloat16>, short_conv_step_bfloat16)

// Backward: inputs of (W - 1) + tile + (W - 1) tokens, and gradients of tile + (W - 1).
static inline int64_t short_conv_scratch(int64_t width) {
  return (2 * kTileTokens + 3 * (width - 1)) * kTileChannels;
}

namespace SEQMODELS_LEVEL {

// A whole vector, or its first n lanes at the end of the channels (a slow path: memory is copied).
template <bool Full, class T>
SEQMODELS_INLINE Vec get(const T* from, int64_t n) {
  if constexpr (Full) return load(from);
  return load(from, n);
}

template <bool Full, class T>
SEQMODELS_INLINE void put(T* to, Vec value, int64_t n) {
  if constexpr (Full) return store(to, value);
  return store(to, value, n);
}

// Copies u[begin .. end) of the document, channels [first, last), as float rows of
// kTileChannels; rows outside the document and its state are zero.
template <class T>
static void gather_inputs(const ShortConvArguments& a, const ShortConvDocument<T>& d, int64_t begin, int64_t end,
                          int64_t first, int64_t last, float* rows) {
  for (int64_t t = begin; t < end; ++t, rows += kTileChannels) {
    const float* state = t < 0 && d.initial_state ? d.initial_state + (a.width - 1 + t) * a.channels : nullptr;
    const T* x = t >= 0 && t < d.length ? d.x + t * d.x_stride : nullptr;
    for (int64_t c = first; c < last; c += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, last - c);
      Vec value{};
      if (x) value = n == kLanes ? get<true>(x + c, n) : get<false>(x + c, n);
      if (state) value = n == kLanes ? get<true>(state + c, n) : get<false>(state + c, n);
      store(rows + (c - first), value);  // rows are kTileChannels wide, a multiple of kLanes
    }
  }
}

// y[0 .. tokens) for one vector of channels; x points at the first output's oldest input.
// Width 0 stands for a width known at run time.
template <int Width, bool Full, class X, class Y>
static void convolve(const X* x, int64_t x_stride, Y* y, int64_t y_stride, int64_t tokens, const float* weight,
                     int64_t weight_stride, int64_t width, Vec bias, bool silu, int64_t n) {
  constexpr int kRows = 4;  // outputs at a time, so that each input is loaded once for several
  auto read = [&](const X* from) __attribute__((always_inline)) { return get<Full>(from, n); };
  auto write = [&](Y* to, Vec z) __attribute__((always_inline)) { put<Full>(to, silu ? z * sigmoid(z) : z, n); };
  auto tap = [&](int64_t w) __attribute__((always_inline)) { return get<Full>(weight + w * weight_stride, n); };
  if constexpr (Width > 0) {
    Vec taps[Width];
    for (int w = 0; w < Width; ++w) taps[w] = tap(w);
    int64_t t = 0;
    for (; t + kRows <= tokens; t += kRows) {
      Vec inputs[Width - 1 + kRows];
      for (int row = 0; row < Width - 1 + kRows; ++row) inputs[row] = read(x + (t + row) * x_stride);
      for (int row = 0; row < kRows; ++row) {
        Vec z = bias;
        for (int w = 0; w < Width; ++w) z += taps[w] * inputs[row + w];
        write(y + (t + row) * y_stride, z);
      }
    }
    for (; t < tokens; ++t) {
      Vec z = bias;
      for (int w = 0; w < Width; ++w) z += taps[w] * read(x + (t + w) * x_stride);
      write(y + t * y_stride, z);
    }
  } else {
    for (int64_t t = 0; t < tokens; ++t) {
      Vec z = bias;
      for (int64_t w = 0; w < width; ++w) z += tap(w) * read(x + (t + w) * x_stride);
      write(y + t * y_stride, z);
    }
  }
}

template <bool Full, class X, class Y>
static void convolve_width(const X* x, int64_t x_stride, Y* y, int64_t y_stride, int64_t tokens, const float* weight,
                           int64_t weight_stride, int64_t width, Vec bias, bool silu, int64_t n) {
  switch (width) {
#define SEQMODELS_WIDTH(w) \
  case w: return convolve<w, Full>(x, x_stride, y, y_stride, tokens, weight, weight_stride, width, bias, silu, n);
    SEQMODELS_WIDTH(2) SEQMODELS_WIDTH(3) SEQMODELS_WIDTH(4)
#undef SEQMODELS_WIDTH
    default: return convolve<0, Full>(x, x_stride, y, y_stride, tokens, weight, weight_stride, width, bias, silu, n);
  }
}

template <class X, class Y>
static void convolve_channels(const ShortConvArguments& a, const X* x, int64_t x_stride, Y* y, int64_t y_stride,
                              int64_t tokens, int64_t first, int64_t last, bool silu) {
  for (int64_t c = first; c < last; c += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, last - c), offset = c - first;
    const Vec bias = a.bias ? load(a.bias + c, n) : Vec{};
    const auto run = n == kLanes ? convolve_width<true, X, Y> : convolve_width<false, X, Y>;
    run(x + offset, x_stride, y + offset, y_stride, tokens, a.weight + c, a.channels, a.width, bias, silu, n);
  }
}

template <class T>
static void forward(const ShortConvArguments& a, const ShortConvDocument<T>& d, int64_t begin, int64_t end,
                    int64_t first, int64_t last, float* scratch) {
  // The first W - 1 tokens of a document see its state: their inputs are gathered.
  const int64_t head_end = std::min(end, std::max(begin, a.width - 1));
  if (begin < head_end) {
    gather_inputs(a, d, begin - (a.width - 1), head_end, first, last, scratch);
    convolve_channels(a, scratch, kTileChannels, d.out + begin * a.channels + first, a.channels, head_end - begin,
                      first, last, a.silu);
  }
  if (head_end < end) {
    convolve_channels(a, d.x + (head_end - (a.width - 1)) * d.x_stride + first, d.x_stride,
                      d.out + head_end * a.channels + first, a.channels, end - head_end, first, last, a.silu);
  }
}

// One vector of channels of a unit: `inputs` and `grads` are the unit's rows at channel c.
template <bool Full, class T>
static void backward_channels(const ShortConvArguments& a, const ShortConvDocument<T>& d, int64_t begin, int64_t end,
                              int64_t halo, int64_t c, int64_t n, const float* inputs, float* grads,
                              float* grad_weight, float* grad_initial_state) {
  const int64_t history = a.width - 1, channels = a.channels, tokens = end - begin;
  for (int64_t t = begin; t < halo; ++t) {
    float* slot = grads + (t - begin) * kTileChannels;
    Vec grad = get<Full>(d.grad_y + t * d.grad_y_stride + c, n);
    if (a.silu) {
      const Vec z = load(slot), gate = sigmoid(z);
      grad *= gate * (1.0f + z * (1.0f - gate));
    }
    store(slot, grad);
  }
  // The weights: input w of output t is row t + w of `inputs`.
  Vec total{};
  for (int64_t t = 0; t < tokens; ++t) total += load(grads + t * kTileChannels);
  put<Full>(grad_weight + a.width * channels + c, total, n);
  for (int64_t w = 0; w < a.width; ++w) {
    total = Vec{};
    for (int64_t t = 0; t < tokens; ++t) {
      total += load(grads + t * kTileChannels) * load(inputs + (t + w) * kTileChannels);
    }
    put<Full>(grad_weight + w * channels + c, total, n);
  }
  // The inputs: token t is input w of output t + (W - 1) - w; the last W - 1 are also state.
  for (int64_t t = begin; t < end; ++t) {
    total = Vec{};
    const int64_t lags = std::min(history, halo - 1 - t);
    for (int64_t lag = 0; lag <= lags; ++lag) {
      total += get<Full>(a.weight + (history - lag) * channels + c, n) * load(grads + (t + lag - begin) * kTileChannels);
    }
    const int64_t slot = t - (d.length - history);
    if (d.grad_final_state && slot >= 0) total += get<Full>(d.grad_final_state + slot * channels + c, n);
    put<Full>(d.out + t * channels + c, total, n);
  }
  if (begin > 0 || !grad_initial_state) return;
  // The initial state: row j is input w of output j - w, and row j - length of the final state.
  for (int64_t j = 0; j < history; ++j) {
    total = Vec{};
    for (int64_t t = 0; t <= std::min(j, halo - 1); ++t) {
      total += get<Full>(a.weight + (j - t) * channels + c, n) * load(grads + t * kTileChannels);
    }
    if (d.grad_final_state && j >= d.length) {
      total += get<Full>(d.grad_final_state + (j - d.length) * channels + c, n);
    }
    put<Full>(grad_initial_state + j * channels + c, total, n);
  }
}

template <class T>
static void backward(const ShortConvArguments& a, const ShortConvDocument<T>& d, int64_t begin, int64_t end,
                     int64_t first, int64_t last, float* grad_weight, float* grad_initial_state, float* scratch) {
  const int64_t history = a.width - 1;
  const int64_t halo = std::min(end + history, d.length);  // gradients of [begin, halo) reach [begin, end)
  float* inputs = scratch;                                 // u[begin - history .. halo)
  float* grads = scratch + (halo - begin + history) * kTileChannels;  // z, then dL/dz, of [begin .. halo)
  gather_inputs(a, d, begin - history, halo, first, last, inputs);
  if (a.silu) convolve_channels(a, inputs, kTileChannels, grads, kTileChannels, halo - begin, first, last, false);
  for (int64_t c = first; c < last; c += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, last - c), offset = c - first;
    const auto run = n == kLanes ? backward_channels<true, T> : backward_channels<false, T>;
    run(a, d, begin, end, halo, c, n, inputs + offset, grads + offset, grad_weight, grad_initial_state);
  }
}

template <bool Full, class T>
static void step_channels(const ShortConvArguments& a, const T* x, float* state, T* y, int64_t c, int64_t n) {
  const int64_t history = a.width - 1;
  const Vec input = get<Full>(x + c, n);
  Vec z = a.bias ? get<Full>(a.bias + c, n) : Vec{};
  for (int64_t w = 0; w < history; ++w) {
    const Vec old = get<Full>(state + w * a.channels + c, n);
    z += get<Full>(a.weight + w * a.channels + c, n) * old;
    if (w > 0) put<Full>(state + (w - 1) * a.channels + c, old, n);
  }
  z += get<Full>(a.weight + history * a.channels + c, n) * input;
  if (history > 0) put<Full>(state + (history - 1) * a.channels + c, input, n);
  put<Full>(y + c, a.silu ? z * sigmoid(z) : z, n);
}

template <class T>
static void step(const ShortConvArguments& a, const T* x, float* state, T* y, int64_t first, int64_t last) {
  int64_t c = first;
  for (; c + kLanes <= last; c += kLanes) step_channels<true>(a, x, state, y, c, kLanes);
  if (c < last) step_channels<false>(a, x, state, y, c, last - c);
}

#define SEQMODELS_DEFINE(T)                                                                                          \
  void short_conv_forward_##T(const ShortConvArguments& a, const ShortConvDocument<T>& d, int64_t begin,             \
                              int64_t end, int64_t first, int64_t last, float* scratch) {                            \
    forward(a, d, begin, end, first, last, scratch);                                                                 \
  }                                                                                                                  \
  void short_conv_backward_##T(const ShortConvArguments& a, const ShortConvDocument<T>& d, int64_t begin,            \
                               int64_t end, int64_t first, int64_t last, float* grad_weight,                         \
                               float* grad_initial_state, float* scratch) {                                          \
    backward(a, d, begin, end, first, last, grad_weight, grad_initial_state, scratch);                               \
  }                                                                                                                  \
  void short_conv_step_##T(const ShortConvArguments& a, const T* x, float* state, T* y, int64_t first,               \
                           int64_t last) {                                                                           \
    step(a, x, state, y, first, last);                                                                               \
  }
SEQMODELS_DEFINE(float)
SEQMODELS_DEFINE(bfloat16)
#undef SEQMODELS_DEFINE

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS
#include "short_conv_launch.h"
#endif
