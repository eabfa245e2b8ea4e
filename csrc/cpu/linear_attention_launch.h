// What the launchers of linear attention share: checked tensors, documents, buffers.
// Include it under `#if SEQMODELS_LAUNCHERS` only.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "linear_attention.h"
#include "stable.h"

namespace seqmodels {
namespace {

const float* float_data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const float*>(tensor->data_ptr()) : nullptr;
}

// Floats aligned to a cache line. Memory is asked for once a task, never once a chunk.
class Buffer {
 public:
  explicit Buffer(int64_t count) : bytes_(round_up(std::max<int64_t>(count, 1), 16) * sizeof(float)) {
    memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes_)));
  }
  float* data() { return memory_.get(); }
  // For large buffers, outside parallel regions (which must not throw).
  void check() const { STD_TORCH_CHECK(memory_ != nullptr, "out of memory: ", bytes_, " bytes for chunk states"); }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  int64_t bytes_;
  std::unique_ptr<float, Free> memory_;
};

// A scale of N features in padded memory; null: no key yet.
[[maybe_unused]] void read_scale(const LinearAttentionShape& s, const float* from, float* to) {
  std::fill(to, to + padded(s.key_dim), -1e30f);
  if (from) std::copy(from, from + s.key_dim, to);
}

template <class Body>
void parallel(int64_t tasks, const Body& body) {
  torch::stable::parallel_for(0, tasks, 1, body);
}

// Which tokens are whose. Padding is what no document covers.
struct Documents {
  std::vector<Document> used, unused;
  int64_t slots;
  bool padding;

  Documents(int64_t batch_size, int64_t length, const std::optional<Tensor>& starts,
            const std::optional<Tensor>& lengths)
      : slots(batch_size), padding(false) {
    if (!starts.has_value()) {
      for (int64_t row = 0; row < batch_size; ++row) used.push_back({row * length, length, row});
      return;
    }
    STD_TORCH_CHECK(lengths.has_value() && lengths->numel() == starts->numel(), "starts needs lengths, one for each");
    check_tensor(*starts, "starts", ScalarType::Long);
    check_tensor(*lengths, "lengths", ScalarType::Long);
    const int64_t* start = static_cast<const int64_t*>(starts->data_ptr());
    const int64_t* size = static_cast<const int64_t*>(lengths->data_ptr());
    slots = starts->numel();
    int64_t covered = 0;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const Document document{start[slot], size[slot], slot};
      const bool inside = start[slot] >= covered && start[slot] + size[slot] <= batch_size * length;
      STD_TORCH_CHECK(size[slot] == 0 || (size[slot] > 0 && inside), "document ", slot, " covers tokens ",
                      start[slot], " to ", start[slot] + size[slot], "; documents must ascend inside a grid of ",
                      batch_size * length, " tokens");
      (size[slot] ? used : unused).push_back(document);
      if (size[slot]) {
        padding = padding || start[slot] != covered;
        covered = start[slot] + size[slot];
      }
    }
    padding = padding || covered != batch_size * length;
  }
};

// The inputs, checked: a wrong shape must not become a wild pointer.
struct Tensors {
  Tensor q, k, v;
  std::optional<Tensor> log_decay, past, diagonal, initial_state, initial_log_scale;
  LinearAttentionShape shape;
  const float *query_weight = nullptr, *key_weight = nullptr;  // of a feature map, padded
  bool by_head = false;  // every head has features of its own, whatever the groups of q and k

  Tensors(Tensor q_, Tensor k_, Tensor v_, std::optional<Tensor> log_decay_, std::optional<Tensor> past_,
          std::optional<Tensor> diagonal_, std::optional<Tensor> initial_state_, bool normalize, double epsilon)
      : q(q_), k(k_), v(v_), log_decay(log_decay_), past(past_), diagonal(diagonal_), initial_state(initial_state_) {
    const ScalarType type = v.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "v must be float32 or bfloat16");
    check_tensor(q, "q", type);
    check_tensor(k, "k", type);
    check_tensor(v, "v", type);
    STD_TORCH_CHECK(q.dim() == 5 && k.dim() == 5 && v.dim() == 5, "q, k, v must have 5 dimensions");
    for (int axis = 0; axis < 3; ++axis) {
      STD_TORCH_CHECK(q.size(axis) == v.size(axis) && k.size(axis) == v.size(axis),
                      "q, k, v differ in dimension ", axis);
    }
    shape.heads = v.size(3), shape.query_groups = q.size(3), shape.key_groups = k.size(3);
    shape.ranks = v.size(2), shape.key_dim = q.size(4), shape.value_dim = v.size(4);
    shape.normalize = normalize, shape.epsilon = static_cast<float>(epsilon);
    STD_TORCH_CHECK(shape.query_groups > 0 && shape.heads % shape.query_groups == 0 && shape.key_groups > 0 &&
                        shape.heads % shape.key_groups == 0 && k.size(4) == shape.key_dim,
                    "groups must divide heads, and q and k must have one width");
    STD_TORCH_CHECK(shape.heads >= 1 && shape.key_dim >= 1 && shape.value_dim >= 1, "heads and widths of at least 1");
    STD_TORCH_CHECK(shape.ranks >= 1 && shape.ranks <= kChunkRows, "1 to ", kChunkRows, " ranks");
    shape.chunk_tokens = kChunkRows / shape.ranks;
    // The most heads up to kHeadBlock that split evenly.
    shape.head_block = kHeadBlock;
    while (shape.heads % shape.head_block) --shape.head_block;
    for (const auto* weight : {&log_decay, &past, &diagonal}) {
      if (!weight->has_value()) continue;
      check_tensor(**weight, "log_decay, past_weight and diagonal_weight", ScalarType::Float);
      STD_TORCH_CHECK((*weight)->numel() == v.size(0) * v.size(1) * shape.heads,
                      "a weight is not (batch, length, heads)");
    }
    if (initial_state.has_value()) check_tensor(*initial_state, "initial_state", ScalarType::Float);
  }

  // The initial state has a row for each document.
  void check_state(int64_t documents) const {
    STD_TORCH_CHECK(!initial_state.has_value() || initial_state->numel() == documents * shape.heads * shape.key_dim *
                                                                                 shape.state_width(),
                    "the state is not (documents, heads, key width, value width)");
  }

  template <class T>
  LinearAttentionInputs<T> inputs() const {
    return {shape,
            static_cast<const T*>(q.data_ptr()),
            static_cast<const T*>(k.data_ptr()),
            static_cast<const T*>(v.data_ptr()),
            float_data(log_decay),
            float_data(past),
            float_data(diagonal),
            query_weight,
            key_weight};
  }
};

}  // namespace
}  // namespace seqmodels
