// The gradients of a state alone: the kernel's arguments. The mathematics is in linear_attention_state.cpp.
#pragma once

#include "linear_attention_kernels.h"

namespace seqmodels {

static inline int64_t state_gradients_scratch_size(const LinearAttentionShape& s) {
  return backward_scratch_size(s) + kChunkRows * padded(s.map_width) + 64;
}

// One chunk of one group of keys, for D of its heads at the document's end (one of backward_state_size each).
// behind: for each head, the sum of the log decays behind the chunk, which moves to the chunk's start. The
// gradient of log_decay gets each token's share of <S, D>, to be summed over earlier tokens.
template <class T>
using LinearAttentionStateGradients = void(const LinearAttentionInputs<T>&, const LinearAttentionGradients<T>&,
                                           int64_t token, int64_t tokens, int64_t group, const float* grad_states,
                                           double* behind, float* scratch);

SEQMODELS_DECLARE_KERNEL(LinearAttentionStateGradients<float>, linear_attention_state_gradients_float)
SEQMODELS_DECLARE_KERNEL(LinearAttentionStateGradients<bfloat16>, linear_attention_state_gradients_bfloat16)

}  // namespace seqmodels
