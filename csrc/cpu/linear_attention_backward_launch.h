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
  std::fill(state, state + backward_state_size(s), 0.0f);
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
               float* grad_initial, float* starts, float* ends, const Kernels<T>& kernels) {
  const LinearAttentionShape& s = in.shape;
  const int64_t block = s.head_block, size = backward_state_size(s), stride = block * size;
  const int64_t scratch_size = backward_scratch_size(s), tensor_state = s.key_dim * s.state_width();
  const int64_t height = round_up(s.state_width(), 8), walks = static_cast<int64_t>(wave.size());
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t slices = std::max<int64_t>(1, std::min(height / 8, threads / (walks * block * 2)));
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
  });
  parallel(walks * block * 2 * slices, [&](int64_t begin, int64_t end) {
    Buffer scratch(scratch_size);
    for (int64_t task = begin; task < end; ++task) {
      const Walk& walk = wave[task / (block * 2 * slices)];
      const int64_t h = task / (2 * slices) % block, row = task % slices * slice_rows;
      const int64_t row_end = std::min(height, row + slice_rows);
      if (row >= height) continue;
      const int64_t at = walk.offset + h * size;
      if (task / slices % 2 == 0) {
        kernels.start_states(in, walk.document, first + h, row, row_end, starts + at, stride, scratch.data());
      } else {
        kernels.end_gradients(in, out, walk.document, first + h, row, row_end, ends + at, stride, scratch.data());
      }
    }
  });
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
      run_block(in, out, wave, first, initial, grad_final, grad_initial, starts.data(), ends.data(), kernels);
    }
  }
}

}  // namespace
}  // namespace seqmodels
