// The chunk kernels of linear attention, for kernels that are built on them (Mamba-3). What they
// compute stands in linear_attention.cpp and linear_attention_backward.cpp.
#pragma once

#include "linear_attention.h"

namespace seqmodels {

template <class T>
struct LinearAttentionOutputs {
  T* y;
  float* denominator;  // (tokens * R, H), or null; of a scaled state the logarithm, scale and all
};

// S, then z for the normaliser, then the scale.
static inline int64_t forward_state_size(const LinearAttentionShape& shape) {
  return padded(shape.key_dim) * (padded(shape.value_dim) + 1 + (shape.scaled() ? 1 : 0));
}
static inline int64_t forward_scale(const LinearAttentionShape& shape) {
  return padded(shape.key_dim) * (padded(shape.value_dim) + 1);
}

// What a feature map takes besides: x, u and log phi of q and k, a transposed u, rows, scales.
static inline int64_t feature_scratch_size(const LinearAttentionShape& s) {
  if (s.map == FeatureMap::none) return 0;
  const int64_t width = padded(s.map_width), features = padded(s.key_dim);
  const int64_t exponents = s.scaled() ? 3 * features : 0;
  return kChunkRows * (padded(s.depth) + 3 * width + exponents + 2) + width + 2 * features + 256;
}

static inline int64_t forward_scratch_size(const LinearAttentionShape& shape) {
  return kChunkRows * (3 * padded(shape.key_dim) + 2 * padded(shape.value_dim) + 2 * kChunkRows + 1) + 192 +
         feature_scratch_size(shape);
}

// One chunk: outputs from the states at its start (one of forward_state_size for each head of
// [first, last)), which move to the chunk's end when `advance` is set.
template <class T>
using LinearAttentionForward = void(const LinearAttentionInputs<T>&, const LinearAttentionOutputs<T>&, int64_t token,
                                    int64_t tokens, int64_t first, int64_t last, float* states, bool advance,
                                    float* scratch);

SEQMODELS_DECLARE_KERNEL(LinearAttentionForward<float>, linear_attention_forward_float)
SEQMODELS_DECLARE_KERNEL(LinearAttentionForward<bfloat16>, linear_attention_forward_bfloat16)

// The states of one head at the start of every chunk of a document, rows [row_begin, row_end) of
// N: chunk i's at states + i * stride; behind the last chunk the final one. states[0] is given.
template <class T>
using LinearAttentionStates = void(const LinearAttentionInputs<T>&, const Document&, int64_t head, int64_t row_begin,
                                   int64_t row_end, float* states, int64_t stride, float* scratch);

SEQMODELS_DECLARE_KERNEL(LinearAttentionStates<float>, linear_attention_states_float)
SEQMODELS_DECLARE_KERNEL(LinearAttentionStates<bfloat16>, linear_attention_states_bfloat16)

template <class T>
struct LinearAttentionGradients {
  const T* grad_y;
  const T* y;                // with the normaliser
  const float* denominator;  // with the normaliser
  T* grad_v;
  T* grad_q;
  T* grad_k;
  float* sum_q;  // where several blocks add to one group's gradient: float (tokens * R, Gq, N), else null
  float* sum_k;
  float* grad_log_decay;  // (tokens, H), or null; so are the next two
  float* grad_past;
  float* grad_diagonal;
};

// S and D transposed: rows of P (and the normaliser), columns of N; then the scale.
static inline int64_t backward_state_size(const LinearAttentionShape& s) {
  return (round_up(s.state_width(), 8) + (s.scaled() ? 1 : 0)) * padded(s.key_dim);
}
static inline int64_t backward_scale(const LinearAttentionShape& s) {
  return round_up(s.state_width(), 8) * padded(s.key_dim);
}

static inline int64_t backward_scratch_size(const LinearAttentionShape& s) {
  const int64_t gradients = s.map == FeatureMap::none ? 0 : kChunkRows * (2 * padded(s.map_width) + kChunkRows);
  return kChunkRows * (5 * padded(s.key_dim) + 5 * padded(s.state_width()) + 4 * kChunkRows + 20) + 384 +
         feature_scratch_size(s) + gradients;
}

// S of one head at the start of every chunk (chunk i's at states + i * stride; states[0] is given),
// rows [row_begin, row_end) of P.
template <class T>
using LinearAttentionStartStates = void(const LinearAttentionInputs<T>&, const Document&, int64_t head,
                                        int64_t row_begin, int64_t row_end, float* states, int64_t stride,
                                        float* scratch);
// D of one head at the end of every chunk (chunk i's at states + (i + 1) * stride; the last one is
// given); states[0] gets the gradient of the initial state.
template <class T>
using LinearAttentionEndGradients = void(const LinearAttentionInputs<T>&, const LinearAttentionGradients<T>&,
                                         const Document&, int64_t head, int64_t row_begin, int64_t row_end,
                                         float* states, int64_t stride, float* scratch);
// All gradients of one chunk for heads [first, last), from S at its start and D at its end.
template <class T>
using LinearAttentionBackward = void(const LinearAttentionInputs<T>&, const LinearAttentionGradients<T>&, int64_t token,
                                     int64_t tokens, int64_t first, int64_t last, const float* states,
                                     const float* grad_states, float* scratch);

SEQMODELS_DECLARE_KERNEL(LinearAttentionStartStates<float>, linear_attention_start_states_float)
SEQMODELS_DECLARE_KERNEL(LinearAttentionStartStates<bfloat16>, linear_attention_start_states_bfloat16)
SEQMODELS_DECLARE_KERNEL(LinearAttentionEndGradients<float>, linear_attention_end_gradients_float)
SEQMODELS_DECLARE_KERNEL(LinearAttentionEndGradients<bfloat16>, linear_attention_end_gradients_bfloat16)
SEQMODELS_DECLARE_KERNEL(LinearAttentionBackward<float>, linear_attention_backward_float)
SEQMODELS_DECLARE_KERNEL(LinearAttentionBackward<bfloat16>, linear_attention_backward_bfloat16)

}  // namespace seqmodels
