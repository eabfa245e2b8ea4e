// How a step of linear attention is divided into tasks (see linear_attention_step.cpp).
// Include it under `#if SEQMODELS_LAUNCHERS` only.
#pragma once

#include <cmath>

#include "linear_attention_launch.h"
#include "linear_attention_step.h"

namespace seqmodels {
namespace {

constexpr int64_t kStepFloats = 16384;  // state elements that are worth a thread

template <class T>
void run_step(const Tensors& tensors, float* state, float* scale, T* y, LinearAttentionStep<T>* kernel) {
  const LinearAttentionInputs<T> in = tensors.inputs<T>();
  const LinearAttentionShape& s = in.shape;
  const int64_t state_size = s.key_dim * s.state_width(), tasks = tensors.v.size(0) * s.heads;
  const bool mapped = s.map != FeatureMap::none;  // then q and k are narrower than their features, and grouped apart
  const int64_t query_groups = mapped ? s.query_tensor_groups : s.query_groups;
  const int64_t key_groups = mapped ? s.key_tensor_groups : s.key_groups;
  const int64_t depth = mapped ? s.depth : s.key_dim, weight_size = s.depth * padded(s.map_width);
  const int64_t query_stride = query_groups * depth, key_stride = key_groups * depth;
  const int64_t value_stride = s.heads * s.value_dim;
  const int64_t grain = std::max<int64_t>(1, kStepFloats / state_size);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    Buffer scratch(step_scratch_size(s));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / s.heads, head = task % s.heads;
      const int64_t values = row * s.ranks * value_stride + head * s.value_dim;
      LinearAttentionToken<T> token;
      token.q = in.q + row * s.ranks * query_stride + head * query_groups / s.heads * depth;
      token.k = in.k + row * s.ranks * key_stride + head * key_groups / s.heads * depth;
      token.v = in.v + values;
      token.y = y + values;
      token.query_stride = query_stride, token.key_stride = key_stride, token.value_stride = value_stride;
      token.decay = in.log_decay ? std::exp(in.log_decay[task]) : 1.0f;
      token.past = in.past ? in.past[task] : 1.0f;
      token.diagonal = in.diagonal ? in.diagonal[task] : 1.0f;
      token.state = state + task * state_size;
      token.query_weight = in.query_weight ? in.query_weight + head * weight_size : nullptr;
      token.key_weight = in.key_weight ? in.key_weight + head * weight_size : nullptr;
      token.scale = scale ? scale + task * s.key_dim : nullptr;
      kernel(s, token, scratch.data());
    }
  });
}

// y of one token; the state (and scale) given as initial ones are updated in place.
Tensor step_in_place(const Tensors& tensors) {
  const Tensor& v = tensors.v;
  STD_TORCH_CHECK(v.size(1) == 1, "a step takes one token");
  STD_TORCH_CHECK(tensors.initial_state.has_value(), "a step needs a state");
  tensors.check_state(v.size(0));
  Tensor y = torch::stable::empty_like(v);
  float* state = static_cast<float*>(tensors.initial_state->data_ptr());
  float* scale =
      tensors.initial_log_scale.has_value() ? static_cast<float*>(tensors.initial_log_scale->data_ptr()) : nullptr;
  if (is_bfloat16(v)) {
    run_step<bfloat16>(tensors, state, scale, static_cast<bfloat16*>(y.data_ptr()),
                       choose_linear_attention_step_bfloat16());
  } else {
    run_step<float>(tensors, state, scale, static_cast<float*>(y.data_ptr()), choose_linear_attention_step_float());
  }
  return y;
}

}  // namespace
}  // namespace seqmodels
