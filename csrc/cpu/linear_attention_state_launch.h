// How a state alone and its gradients are divided into tasks (see linear_attention_state.cpp).
// Include it under `#if SEQMODELS_LAUNCHERS` only.
#pragma once

#include <cmath>

#include "linear_attention_backward_launch.h"
#include "linear_attention_forward_launch.h"
#include "linear_attention_state.h"

namespace seqmodels {
namespace {

// The final state, and its scale (empty without one). A task is one head of one document.
std::tuple<Tensor, Tensor> run_state(const Tensors& tensors, const Documents& documents) {
  const LinearAttentionShape& s = tensors.shape;
  const Tensor& v = tensors.v;
  tensors.check_state(documents.slots);
  std::vector<int64_t> scales{0};
  if (s.scaled()) scales = {documents.slots, s.heads, s.key_dim};
  Tensor scale = torch::stable::new_empty(v, scales, ScalarType::Float);
  Tensor final_state =
      torch::stable::new_empty(v, {documents.slots, s.heads, s.key_dim, s.state_width()}, ScalarType::Float);
  float* to = static_cast<float*>(final_state.data_ptr());
  float* scale_to = s.scaled() ? static_cast<float*>(scale.data_ptr()) : nullptr;
  const float *initial = float_data(tensors.initial_state), *initial_scale = float_data(tensors.initial_log_scale);
  const int64_t tensor_state = s.key_dim * s.state_width();
  const auto run = [&](const auto& in, auto* states) {
    const auto one = [&](const Document& document, int64_t head, float* state, float* scratch) {
      const int64_t index = document.slot * s.heads + head;
      read_state(s, initial ? initial + index * tensor_state : nullptr,
                 initial_scale ? initial_scale + index * s.key_dim : nullptr, state);
      // In place: a stride of zero. An unused slot has no chunk.
      states(in, document, head, 0, padded(s.key_dim), state, 0, scratch);
      write_state(s, state, to + index * tensor_state, scale_to ? scale_to + index * s.key_dim : nullptr);
    };
    const int64_t used = static_cast<int64_t>(documents.used.size()) * s.heads;
    const int64_t unused = static_cast<int64_t>(documents.unused.size()) * s.heads;
    parallel(used + unused, [&](int64_t begin, int64_t end) {
      Buffer memory(forward_scratch_size(s) + forward_state_size(s));
      float* scratch = memory.data() + forward_state_size(s);
      for (int64_t task = begin; task < end; ++task) {
        const auto& slots = task < used ? documents.used : documents.unused;
        const int64_t index = task < used ? task : task - used;
        one(slots[index / s.heads], index % s.heads, memory.data(), scratch);
      }
    });
  };
  if (is_bfloat16(v)) {
    run(tensors.inputs<bfloat16>(), choose_linear_attention_states_bfloat16());
  } else {
    run(tensors.inputs<float>(), choose_linear_attention_states_float());
  }
  return {final_state, scale};
}

// Gradients of all but q.
Gradients differentiate_state(const Tensors& tensors, const Documents& documents, const Tensor& grad,
                              const float* final_scale) {
  const LinearAttentionShape& s = tensors.shape;
  const Tensor& v = tensors.v;
  const int64_t tensor_state = s.key_dim * s.state_width(), heads = s.heads / s.key_groups;
  tensors.check_state(documents.slots);
  check_tensor(grad, "grad", ScalarType::Float);
  STD_TORCH_CHECK(grad.numel() == documents.slots * s.heads * tensor_state, "grad is not of the state's shape");
  Gradients made(tensors, documents);
  const float *given = static_cast<const float*>(grad.data_ptr()), *initial = float_data(tensors.initial_state);
  const float* initial_scale = float_data(tensors.initial_log_scale);
  float* grad_initial = Gradients::data(made.initial);
  float* grad_decay = Gradients::data(made.log_decay);

  if (grad_initial) {
    for (const Document& document : documents.unused) {
      const int64_t at = document.slot * s.heads * tensor_state;
      std::copy(given + at, given + at + s.heads * tensor_state, grad_initial + at);
    }
  }
  // What a document's chunks leave to do for one head: sums over earlier tokens, and the initial state.
  const auto finish = [&](const Document& document, int64_t head, double behind) {
    const int64_t index = document.slot * s.heads + head;
    const float* D = given + index * tensor_state;
    const double carry = std::exp(behind);
    if (grad_decay) {
      double earlier = 0;
      for (int64_t i = 0; initial && i < tensor_state; ++i) earlier += double{D[i]} * initial[index * tensor_state + i];
      earlier *= carry;
      for (int64_t t = 0; t < document.length; ++t) {
        float& gradient = grad_decay[(document.start + t) * s.heads + head];
        const double own = gradient;
        gradient = static_cast<float>(earlier);
        earlier += own;
      }
    }
    if (!grad_initial) return;
    for (int64_t n = 0; n < s.key_dim; ++n) {
      const int64_t at = index * s.key_dim + n;
      const float kept = s.scaled() ? std::exp((initial_scale ? initial_scale[at] : -1e30f) - final_scale[at])
                                    : static_cast<float>(carry);
      for (int64_t p = 0; p < s.state_width(); ++p) {
        grad_initial[at * s.state_width() + p] = kept * given[at * s.state_width() + p];
      }
    }
  };
  const auto run = [&](const auto& in, const auto& out, auto* kernel) {
    parallel(static_cast<int64_t>(documents.used.size()) * s.key_groups, [&](int64_t begin, int64_t end) {
      const int64_t size = backward_state_size(s);
      Buffer memory(heads * size + state_gradients_scratch_size(s));
      for (int64_t task = begin; task < end; ++task) {
        const Document& document = documents.used[task / s.key_groups];
        const int64_t group = task % s.key_groups;
        std::vector<double> behind(heads, 0.0);
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t index = document.slot * s.heads + group * heads + h;
          float* D = memory.data() + h * size;
          read_transposed(s, given + index * tensor_state, D);
          if (s.scaled()) read_scale(s, final_scale + index * s.key_dim, D + backward_scale(s));
        }
        for (int64_t chunk = s.chunks(document.length) - 1; chunk >= 0; --chunk) {
          const int64_t at = chunk * s.chunk_tokens;
          kernel(in, out, document.start + at, std::min(s.chunk_tokens, document.length - at), group, memory.data(),
                 behind.data(), memory.data() + heads * size);
        }
        for (int64_t h = 0; h < heads; ++h) finish(document, group * heads + h, behind[h]);
      }
    });
  };
  if (is_bfloat16(v)) {
    run(tensors.inputs<bfloat16>(), made.pointers<bfloat16>(), choose_linear_attention_state_gradients_bfloat16());
  } else {
    run(tensors.inputs<float>(), made.pointers<float>(), choose_linear_attention_state_gradients_float());
  }
  made.round();
  return made;
}

}  // namespace
}  // namespace seqmodels
