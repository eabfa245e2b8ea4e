// How the backward of linear attention is divided into tasks (see linear_attention_backward.cpp).
// Include it under `#if SEQMODELS_LAUNCHERS` only.
#pragma once

#include "linear_attention_kernels.h"
#include "linear_attention_launch.h"

namespace seqmodels {
namespace {

constexpr int64_t kWaveFloats = int64_t{8} << 20;  // chunk states held at a time, unless one document needs more

// (N, W) of a tensor to a transposed state; a null source is zero.
void read_transposed(const LinearAttentionShape& s, const float* from, float* state) {
  std::fill(state, state + backward_scale(s), 0.0f);
  if (!from) return;
  for (int64_t n = 0; n < s.key_dim; ++n) {
    for (int64_t p = 0; p < s.state_width(); ++p) state[p * padded(s.key_dim) + n] = from[n * s.state_width() + p];
  }
}

void write_transposed(const LinearAttentionShape& s, const float* state, float* to) {
  for (int64_t n = 0; n < s.key_dim; ++n) {
    for (int64_t p = 0; p < s.state_width(); ++p) to[n * s.state_width() + p] = state[p * padded(s.key_dim) + n];
  }
}

template <class T>
struct Kernels {
  LinearAttentionStartStates<T>* start_states;
  LinearAttentionEndGradients<T>* end_gradients;
  LinearAttentionBackward<T>* backward;
};

// One document in a wave: its states lie at `offset`, as [chunk][head of the block][state].
struct Walk {
  Document document;
  int64_t chunks, offset;
};

struct ChunkTask {
  int64_t walk, chunk;
};

template <class T>
void run_block(const LinearAttentionInputs<T>& in, const LinearAttentionGradients<T>& out,
               const std::vector<Walk>& wave, int64_t first, const float* initial, const float* grad_final,
               const float* initial_scale, float* grad_initial, float* starts, float* ends, const Kernels<T>& kernels) {
  const LinearAttentionShape& s = in.shape;
  const int64_t block = s.head_block, size = backward_state_size(s), stride = block * size;
  const int64_t scratch_size = backward_scratch_size(s), tensor_state = s.key_dim * s.state_width();
  const int64_t height = round_up(s.state_width(), 8), walks = static_cast<int64_t>(wave.size());
  const int64_t threads = torch::stable::get_num_threads();
  // Slices of P would each make all features again.
  const int64_t widest = s.map == FeatureMap::none ? height / 8 : 1;
  const int64_t slices = std::max<int64_t>(1, std::min(widest, threads / (walks * block * 2)));
  const int64_t slice_rows = round_up((height + slices - 1) / slices, 8);

  const auto each_head = [&](auto body) {
    parallel(walks * block, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(wave[task / block], task % block);
    });
  };
  each_head([&](const Walk& walk, int64_t h) {
    const int64_t at = (walk.document.slot * s.heads + first + h) * tensor_state;
    read_transposed(s, initial ? initial + at : nullptr, starts + walk.offset + h * size);
    read_transposed(s, grad_final + at, ends + walk.offset + walk.chunks * stride + h * size);
    if (!s.scaled()) return;
    const int64_t scale_at = (walk.document.slot * s.heads + first + h) * s.key_dim;
    read_scale(s, initial_scale ? initial_scale + scale_at : nullptr,
               starts + walk.offset + h * size + backward_scale(s));
  });
  // S forwards and D backwards, at once; D needs the scales of all chunks where there are any.
  const auto walk_states = [&](bool forwards, bool backwards) {
    const int64_t passes = (forwards ? 1 : 0) + (backwards ? 1 : 0);
    parallel(walks * block * passes * slices, [&](int64_t begin, int64_t end) {
      Buffer scratch(scratch_size);
      for (int64_t task = begin; task < end; ++task) {
        const Walk& walk = wave[task / (block * passes * slices)];
        const int64_t h = task / (passes * slices) % block, row = task % slices * slice_rows;
        const int64_t row_end = std::min(height, row + slice_rows);
        if (row >= height) continue;
        const int64_t at = walk.offset + h * size;
        if (forwards && task / slices % passes == 0) {
          kernels.start_states(in, walk.document, first + h, row, row_end, starts + at, stride, scratch.data());
        } else {
          kernels.end_gradients(in, out, walk.document, first + h, row, row_end, ends + at, stride, scratch.data());
        }
      }
    });
  };
  if (s.scaled()) {
    walk_states(true, false);
    each_head([&](const Walk& walk, int64_t h) {
      for (int64_t chunk = 0; chunk <= walk.chunks; ++chunk) {
        const int64_t at = walk.offset + chunk * stride + h * size + backward_scale(s);
        std::copy(starts + at, starts + at + padded(s.key_dim), ends + at);
      }
    });
    walk_states(false, true);
  } else {
    walk_states(true, true);
  }
  std::vector<ChunkTask> tasks;
  for (int64_t walk = 0; walk < walks; ++walk) {
    for (int64_t chunk = 0; chunk < wave[walk].chunks; ++chunk) tasks.push_back({walk, chunk});
  }
  parallel(static_cast<int64_t>(tasks.size()), [&](int64_t begin, int64_t end) {
    Buffer scratch(scratch_size);
    for (int64_t task = begin; task < end; ++task) {
      const Walk& walk = wave[tasks[task].walk];
      const int64_t at = tasks[task].chunk * s.chunk_tokens, offset = walk.offset + tasks[task].chunk * stride;
      kernels.backward(in, out, walk.document.start + at, std::min(s.chunk_tokens, walk.document.length - at), first,
                       first + block, starts + offset, ends + offset + stride, scratch.data());
    }
  });
  if (!grad_initial) return;
  each_head([&](const Walk& walk, int64_t h) {
    write_transposed(s, ends + walk.offset + h * size,
                     grad_initial + (walk.document.slot * s.heads + first + h) * tensor_state);
  });
}

template <class T>
void run_backward(const Tensors& tensors, const Documents& documents, const LinearAttentionGradients<T>& out,
                  const float* grad_final, float* grad_initial, const Kernels<T>& kernels) {
  const LinearAttentionInputs<T> in = tensors.inputs<T>();
  const LinearAttentionShape& s = in.shape;
  const int64_t tensor_state = s.heads * s.key_dim * s.state_width(), stride = s.head_block * backward_state_size(s);
  const float* initial = float_data(tensors.initial_state);
  if (grad_initial) {  // an unused slot's final state is its initial state
    for (const Document& document : documents.unused) {
      const float* from = grad_final + document.slot * tensor_state;
      std::copy(from, from + tensor_state, grad_initial + document.slot * tensor_state);
    }
  }
  for (size_t index = 0; index < documents.used.size();) {
    std::vector<Walk> wave;
    int64_t size = 0;
    for (; index < documents.used.size(); ++index) {
      const Document& document = documents.used[index];
      const int64_t chunks = s.chunks(document.length), need = (chunks + 1) * stride;
      if (!wave.empty() && size + need > kWaveFloats) break;
      wave.push_back({document, chunks, size});
      size += need;
    }
    Buffer starts(size), ends(size);
    starts.check(), ends.check();
    for (int64_t first = 0; first < s.heads; first += s.head_block) {
      run_block(in, out, wave, first, initial, grad_final, float_data(tensors.initial_log_scale), grad_initial,
                starts.data(), ends.data(), kernels);
    }
  }
}

// Gradients of the inputs, allocated: empty where there is no such input. Every element of a document is written;
// padding, if there is any, is zero. Where every head has features of its own, those of q and k are float32
// gradients of u, (batch, length, 1, H, map_width).
struct Gradients {
  Tensor q, k, v, log_decay, past, diagonal, initial;

  Gradients(const Tensors& tensors, const Documents& documents)
      : q(mapped(tensors, documents, tensors.q)), k(mapped(tensors, documents, tensors.k)),
        v(clean(documents, torch::stable::empty_like(tensors.v))),
        log_decay(optional(tensors, documents, tensors.log_decay)), past(optional(tensors, documents, tensors.past)),
        diagonal(optional(tensors, documents, tensors.diagonal)),
        initial(tensors.initial_state.has_value() ? torch::stable::empty_like(*tensors.initial_state) : none(tensors)),
        sum_q_(q), sum_k_(k), shape_(tensors.shape), by_head_(tensors.by_head) {}

  static float* data(const Tensor& tensor) {
    return tensor.numel() ? static_cast<float*>(tensor.data_ptr()) : nullptr;
  }

  // Pointers for the kernels. A group that several blocks of heads share is summed in float32.
  template <class T>
  LinearAttentionGradients<T> pointers() {
    LinearAttentionGradients<T> out{};
    out.grad_v = static_cast<T*>(v.data_ptr());
    out.grad_q = static_cast<T*>(q.data_ptr()), out.grad_k = static_cast<T*>(k.data_ptr());
    out.sum_q = sums(sum_q_, q, shape_.query_groups), out.sum_k = sums(sum_k_, k, shape_.key_groups);
    out.grad_log_decay = data(log_decay), out.grad_past = data(past), out.grad_diagonal = data(diagonal);
    return out;
  }

  // Rounds such sums once.
  void round() {
    if (is_bfloat16(q) && sum_q_.data_ptr() != q.data_ptr()) copy(q, sum_q_);
    if (is_bfloat16(k) && sum_k_.data_ptr() != k.data_ptr()) copy(k, sum_k_);
  }

 private:
  Tensor sum_q_, sum_k_;
  LinearAttentionShape shape_;
  bool by_head_;

  static Tensor none(const Tensors& tensors) { return torch::stable::new_empty(tensors.v, {0}, ScalarType::Float); }
  static Tensor clean(const Documents& documents, Tensor tensor) {
    if (documents.padding) torch::stable::zero_(tensor);
    return tensor;
  }
  static Tensor optional(const Tensors& tensors, const Documents& documents, const std::optional<Tensor>& like) {
    return like.has_value() ? clean(documents, torch::stable::empty_like(*like)) : none(tensors);
  }
  static Tensor mapped(const Tensors& tensors, const Documents& documents, const Tensor& like) {
    if (!tensors.by_head) return clean(documents, torch::stable::empty_like(like));
    const LinearAttentionShape& s = tensors.shape;
    const std::vector<int64_t> sizes{like.size(0), like.size(1), 1, s.heads, s.map_width};
    return clean(documents, torch::stable::new_empty(like, sizes, ScalarType::Float));
  }
  float* sums(Tensor& sum, const Tensor& grad, int64_t groups) const {
    const bool shared_by_blocks = shape_.head_block % (shape_.heads / groups) != 0;
    if (!shared_by_blocks && !by_head_) return nullptr;
    if (is_bfloat16(grad)) sum = torch::stable::new_zeros(grad, {grad.numel()}, ScalarType::Float);
    return static_cast<float*>(sum.data_ptr());
  }
  static void copy(Tensor& grad, const Tensor& sum) {
    torch::stable::copy_(grad, torch::stable::view(sum, grad.sizes()));
  }
};

[[maybe_unused]] Gradients differentiate(const Tensors& tensors, const Documents& documents, const Tensor& grad_y,
                                         const Tensor& grad_final_state, const Tensor& y,
                                         const Tensor& denominator) {
  const LinearAttentionShape& s = tensors.shape;
  const Tensor& v = tensors.v;
  tensors.check_state(documents.slots);
  check_tensor(grad_y, "grad_y", v.scalar_type());
  check_tensor(grad_final_state, "grad_final_state", ScalarType::Float);
  check_tensor(y, "y", v.scalar_type());
  check_tensor(denominator, "denominator", ScalarType::Float);
  STD_TORCH_CHECK(grad_y.numel() == v.numel() && y.numel() == v.numel() &&
                      (!s.normalize || denominator.numel() * s.value_dim == v.numel()) &&
                      grad_final_state.numel() == documents.slots * s.heads * s.key_dim * s.state_width(),
                  "gradients do not have the shapes of the outputs");
  Gradients made(tensors, documents);
  const auto run = [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    LinearAttentionGradients<T> out = made.pointers<T>();
    out.grad_y = static_cast<const T*>(grad_y.data_ptr()), out.y = static_cast<const T*>(y.data_ptr());
    out.denominator = static_cast<const float*>(denominator.data_ptr());
    run_backward(tensors, documents, out, static_cast<const float*>(grad_final_state.data_ptr()),
                 Gradients::data(made.initial), kernels);
  };
  if (is_bfloat16(v)) {
    run(bfloat16{}, Kernels<bfloat16>{choose_linear_attention_start_states_bfloat16(),
                                      choose_linear_attention_end_gradients_bfloat16(),
                                      choose_linear_attention_backward_bfloat16()});
  } else {
    run(0.0f, Kernels<float>{choose_linear_attention_start_states_float(),
                             choose_linear_attention_end_gradients_float(), choose_linear_attention_backward_float()});
  }
  made.round();
  return made;
}

}  // namespace
}  // namespace seqmodels
