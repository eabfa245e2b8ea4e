// One token of linear attention: the arguments of its kernel. The mathematics is in linear_attention_step.cpp.
#pragma once

#include "linear_attention.h"

namespace seqmodels {

template <class T>
struct LinearAttentionToken {
  const T* q;  // rank r at q + r * query_stride
  const T* k;
  const T* v;
  T* y;
  int64_t query_stride, key_stride, value_stride;
  float decay, past, diagonal;
  float* state;
  const float* query_weight;  // of a feature map, one head's; or null
  const float* key_weight;
  float* scale;  // of hedgehog_exp: moves with the state
};

static inline int64_t step_scratch_size(const LinearAttentionShape& s) {
  const int64_t features = padded(s.key_dim), width = padded(s.map_width);
  const int64_t maps = s.map == FeatureMap::none ? 0 : padded(s.depth) + 2 * width + 3 * features + 128;
  return s.ranks * (2 * features + 3 * round_up(s.state_width(), 16)) + 128 + maps;
}

// One (sequence, head).
template <class T>
using LinearAttentionStep = void(const LinearAttentionShape&, const LinearAttentionToken<T>&, float* scratch);

SEQMODELS_DECLARE_KERNEL(LinearAttentionStep<float>, linear_attention_step_float)
SEQMODELS_DECLARE_KERNEL(LinearAttentionStep<bfloat16>, linear_attention_step_bfloat16)

}  // namespace seqmodels
