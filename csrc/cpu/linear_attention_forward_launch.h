// How the forward of linear attention is divided into tasks (see linear_attention.cpp).
// Include it under `#if SEQMODELS_LAUNCHERS` only.
#pragma once

#include "linear_attention_kernels.h"
#include "linear_attention_launch.h"

namespace seqmodels {
namespace {

// (N, W) of a tensor to S (N x padded P) and z, and the scale; a null source is the zero state.
void read_state(const LinearAttentionShape& s, const float* from, const float* scale, float* state) {
  const int64_t value_width = padded(s.value_dim), width = s.state_width();
  std::fill(state, state + forward_scale(s), 0.0f);
  if (s.scaled()) read_scale(s, scale, state + forward_scale(s));
  if (!from) return;
  for (int64_t n = 0; n < s.key_dim; ++n) {
    std::copy(from + n * width, from + n * width + s.value_dim, state + n * value_width);
    if (s.normalize) state[padded(s.key_dim) * value_width + n] = from[n * width + s.value_dim];
  }
}

void write_state(const LinearAttentionShape& s, const float* state, float* to, float* scale) {
  const int64_t value_width = padded(s.value_dim), width = s.state_width();
  for (int64_t n = 0; n < s.key_dim; ++n) {
    std::copy(state + n * value_width, state + n * value_width + s.value_dim, to + n * width);
    if (s.normalize) to[n * width + s.value_dim] = state[padded(s.key_dim) * value_width + n];
  }
  if (s.scaled()) std::copy(state + forward_scale(s), state + forward_scale(s) + s.key_dim, scale);
}

template <class T>
void run_forward(const Tensors& tensors, const Documents& documents, T* y, float* denominator, float* final_state,
                 float* final_scale, LinearAttentionForward<T>* chunk, LinearAttentionStates<T>* chunk_states) {
  const LinearAttentionInputs<T> in = tensors.inputs<T>();
  const LinearAttentionOutputs<T> out{y, denominator};
  const LinearAttentionShape& s = in.shape;
  const float* initial = float_data(tensors.initial_state);
  const int64_t state_size = forward_state_size(s), scratch_size = forward_scratch_size(s);
  const int64_t tensor_state = s.key_dim * s.state_width(), block = s.head_block, blocks = s.heads / block;
  const float* initial_scale = float_data(tensors.initial_log_scale);
  const auto of = [&](auto* base, int64_t size, int64_t slot, int64_t head) {
    return base ? base + (slot * s.heads + head) * size : nullptr;
  };
  const auto read_block = [&](const Document& document, int64_t first, float* states) {
    for (int64_t h = 0; h < block; ++h) {
      read_state(s, of(initial, tensor_state, document.slot, first + h),
                 of(initial_scale, s.key_dim, document.slot, first + h), states + h * state_size);
    }
  };
  const auto write_block = [&](const Document& document, int64_t first, const float* states) {
    for (int64_t h = 0; h < block; ++h) {
      write_state(s, states + h * state_size, of(final_state, tensor_state, document.slot, first + h),
                  of(final_scale, s.key_dim, document.slot, first + h));
    }
  };

  if (!documents.unused.empty()) {  // their final state is the initial one
    Buffer state(state_size);
    for (const Document& document : documents.unused) {
      for (int64_t head = 0; head < s.heads; ++head) {
        read_state(s, of(initial, tensor_state, document.slot, head), of(initial_scale, s.key_dim, document.slot, head),
                   state.data());
        write_state(s, state.data(), of(final_state, tensor_state, document.slot, head),
                    of(final_scale, s.key_dim, document.slot, head));
      }
    }
  }

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks = static_cast<int64_t>(documents.used.size()) * blocks;
  // Tasks that threads cannot share evenly: the busiest thread has a sixth more than its share.
  const bool by_chunk = threads > 1 && 6 * round_up(tasks, threads) > 7 * tasks;
  if (!by_chunk) {
    parallel(tasks, [&](int64_t begin, int64_t end) {
      Buffer scratch(scratch_size + block * state_size);
      float* states = scratch.data() + scratch_size;
      for (int64_t task = begin; task < end; ++task) {
        const Document& document = documents.used[task / blocks];
        const int64_t first = task % blocks * block;
        read_block(document, first, states);
        for (int64_t at = 0; at < document.length; at += s.chunk_tokens) {
          chunk(in, out, document.start + at, std::min(s.chunk_tokens, document.length - at), first, first + block,
                states, true, scratch.data());
        }
        write_block(document, first, states);
      }
    });
    return;
  }

  // All chunk states of one (document, head block) at a time, then all its chunks.
  // Slices of N would each make all features again.
  const int64_t widest = s.map == FeatureMap::none ? padded(s.key_dim) / 16 : 1;
  const int64_t slices = std::max<int64_t>(1, std::min(widest, threads / block));
  const int64_t slice_rows = round_up((padded(s.key_dim) + slices - 1) / slices, 16);
  for (const Document& document : documents.used) {
    const int64_t chunks = s.chunks(document.length), stride = block * state_size;
    Buffer states((chunks + 1) * stride);  // [chunk][head of the block][state]
    states.check();
    for (int64_t first = 0; first < s.heads; first += block) {
      read_block(document, first, states.data());
      parallel(block * slices, [&](int64_t begin, int64_t end) {
        Buffer scratch(scratch_size);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t h = task / slices, row = task % slices * slice_rows;
          if (row >= padded(s.key_dim)) continue;
          chunk_states(in, document, first + h, row, std::min(padded(s.key_dim), row + slice_rows),
                       states.data() + h * state_size, stride, scratch.data());
        }
      });
      parallel(chunks, [&](int64_t begin, int64_t end) {
        Buffer scratch(scratch_size);
        for (int64_t index = begin; index < end; ++index) {
          const int64_t at = index * s.chunk_tokens;
          chunk(in, out, document.start + at, std::min(s.chunk_tokens, document.length - at), first, first + block,
                states.data() + index * stride, false, scratch.data());
        }
      });
      write_block(document, first, states.data() + chunks * stride);
    }
  }
}

// y, the final state, its scale (empty without one), and the divisors (empty without a normaliser).
[[maybe_unused]] std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Tensors& tensors, const Documents& documents) {
  const LinearAttentionShape& s = tensors.shape;
  const Tensor& v = tensors.v;
  tensors.check_state(documents.slots);
  const ScalarType state_type = ScalarType::Float;
  Tensor y = torch::stable::empty_like(v);
  std::vector<int64_t> divisors{0}, scales{0};
  if (s.normalize) divisors = {v.size(0), v.size(1), s.ranks, s.heads};
  if (s.scaled()) scales = {documents.slots, s.heads, s.key_dim};
  Tensor denominator = torch::stable::new_empty(v, divisors, state_type);
  Tensor scale = torch::stable::new_empty(v, scales, state_type);
  Tensor final_state = torch::stable::new_empty(v, {documents.slots, s.heads, s.key_dim, s.state_width()}, state_type);
  if (documents.padding) {
    torch::stable::zero_(y);
    torch::stable::fill_(denominator, 1.0);
  }
  float* divisor = static_cast<float*>(denominator.data_ptr());
  float* final_data = static_cast<float*>(final_state.data_ptr());
  float* scale_data = s.scaled() ? static_cast<float*>(scale.data_ptr()) : nullptr;
  if (is_bfloat16(v)) {
    run_forward<bfloat16>(tensors, documents, static_cast<bfloat16*>(y.data_ptr()), divisor, final_data, scale_data,
                          choose_linear_attention_forward_bfloat16(), choose_linear_attention_states_bfloat16());
  } else {
    run_forward<float>(tensors, documents, static_cast<float*>(y.data_ptr()), divisor, final_data, scale_data,
                       choose_linear_attention_forward_float(), choose_linear_attention_states_float());
  }
  return {y, final_state, scale, denominator};
}

}  // namespace
}  // namespace seqmodels
