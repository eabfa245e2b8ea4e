// The state that linear attention ends with, without queries and outputs: forward and backward.
//
// The forward is the pass over states of linear_attention.cpp. Backward: with D = dL/dS at the document's end and
// d_j = e^{c_L - c_j} for its last token L,
//
//   dK_j = d_j W_j v_j D^T     dV_j = d_j W_j k_j D     dW_j = d_j k_j . D v_j     dS_0 = e^{c_L} D
//   d log_decay_i = sum_{j < i} d_j W_j k_j . D v_j + e^{c_L} <S_0, D>
//
// so D stays where it is, and chunks need nothing of one another but the decays behind them. With a scale, k is
// relative to that of the final state. One task walks a document's chunks for one group of keys, from the last.
#include "linear_attention_state.h"

#include "linear_attention_gradients.h"

namespace seqmodels {
namespace SEQMODELS_LEVEL {

template <class T>
static void state_gradients(const LinearAttentionInputs<T>& in, const LinearAttentionGradients<T>& out, int64_t token,
                            int64_t tokens, int64_t group, const float* grad_states, double* behind, float* scratch) {
  const LinearAttentionShape& s = in.shape;
  const int64_t key_width = padded(s.key_dim), width = padded(s.state_width()), depth = s.state_width();
  const int64_t rows = tokens * s.ranks, row0 = token * s.ranks, columns = round_up(rows, kLanes);
  const int64_t value_stride = s.heads * s.value_dim, heads = s.heads / s.key_groups;
  Arena arena(scratch);
  Operands o(arena, s);
  float* v = arena.take(kChunkRows * width);
  float* vt = arena.take(kChunkRows * width);
  float* dv = arena.take(kChunkRows * width);
  float* dvt = arena.take(kChunkRows * width);
  float* dk = arena.take(kChunkRows * key_width + 16);
  float* du = arena.take(kChunkRows * padded(s.map_width) + 16);
  float* into_state = arena.take(kChunkRows);  // k_j . D v_j
  ChunkWeights w;

  load_keys(in, group, row0, rows, o);
  if (s.scaled()) {
    for (int64_t i = 0; i < rows; ++i) {
      relative(o.log_k + i * key_width, grad_states + backward_scale(s), -1.0f, 0.0f, key_width, o.k + i * key_width);
    }
    std::fill(o.k + rows * key_width, o.k + round_up(rows, 8) * key_width, 0.0f);
  }
  transpose(o.k, key_width, round_up(rows, 8), key_width, o.kt, kChunkRows);
  std::fill(dk, dk + kChunkRows * key_width + 16, 0.0f);
  std::fill(du, du + kChunkRows * padded(s.map_width) + 16, 0.0f);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t head = group * heads + h;
    const float* D = grad_states + h * backward_state_size(s);
    load_values(in, row0, rows, head, v);
    transpose(v, width, round_up(rows, 8), width, vt, kChunkRows);
    chunk_weights(in, token, tokens, head, w);
    const float rest = static_cast<float>(std::exp(behind[h]));
    for (int64_t row = 0; row < kChunkRows; ++row) w.stored[row] *= rest, w.to_end[row] *= rest;

    std::fill(into_state, into_state + kChunkRows, 0.0f);
    for_tiles(depth, columns, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
      tile.template add_product<Order::rows>(D + row * key_width, key_width, o.kt + column, kChunkRows, 0, s.key_dim);
      for_vectors(tile, row, column, [&](int64_t p, int64_t j, Vec value) {
        store(into_state + j, load(into_state + j) + load(vt + p * kChunkRows + j) * value);
        store(dvt + p * kChunkRows + j, value * load(w.stored + j));
      });
    });
    transpose(dvt, kChunkRows, round_up(s.value_dim, 8), round_up(rows, 8), dv, width);
    write_rows<T>(dv, width, rows, s.value_dim, out.grad_v + row0 * value_stride + head * s.value_dim, nullptr,
                  value_stride, false);
    for_tiles(rows, key_width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
      tile.template add_product<Order::rows>(v + row * width, width, D + column, key_width, 0, depth);
      for_vectors(tile, row, column, [&](int64_t r, int64_t n, Vec value) {
        store(dk + r * key_width + n, load(dk + r * key_width + n) + value * w.stored[r]);
      });
    });
    for (int64_t t = 0; t < tokens; ++t) {
      double past = 0, stored = 0;
      for (int64_t row = t * s.ranks; row < (t + 1) * s.ranks; ++row) {
        past += double{w.to_end[row]} * into_state[row];
        stored += double{w.stored[row]} * into_state[row];
      }
      if (out.grad_past) out.grad_past[(token + t) * s.heads + head] = static_cast<float>(past);
      if (out.grad_log_decay) out.grad_log_decay[(token + t) * s.heads + head] = static_cast<float>(stored);
    }
    if (w.decays) behind[h] += double{w.high[rows - 1]} + w.low[rows - 1];
  }
  if (s.scaled()) {
    for (int64_t at = 0; at < rows * key_width; at += kLanes) store(dk + at, load(dk + at) * load(o.k + at));
  }
  const int64_t stride = s.key_groups * s.gradient_width(), at = row0 * stride + group * s.gradient_width();
  finish_group(s, rows, o.uk, o.k, dk, du, o.row, out.grad_k + at, out.sum_k ? out.sum_k + at : nullptr, stride, false);
}

void linear_attention_state_gradients_float(const LinearAttentionInputs<float>& in,
                                            const LinearAttentionGradients<float>& out, int64_t token, int64_t tokens,
                                            int64_t group, const float* grad_states, double* behind, float* scratch) {
  state_gradients<float>(in, out, token, tokens, group, grad_states, behind, scratch);
}
void linear_attention_state_gradients_bfloat16(const LinearAttentionInputs<bfloat16>& in,
                                               const LinearAttentionGradients<bfloat16>& out, int64_t token,
                                               int64_t tokens, int64_t group, const float* grad_states, double* behind,
                                               float* scratch) {
  state_gradients<bfloat16>(in, out, token, tokens, group, grad_states, behind, scratch);
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS

#include "feature_attention_launch.h"
#include "linear_attention_state_launch.h"

namespace seqmodels {
namespace {

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor linear_attention_state_cpu(Tensor k, Tensor v, std::optional<Tensor> log_decay, std::optional<Tensor> past,
                                  std::optional<Tensor> initial_state, std::optional<Tensor> starts,
                                  std::optional<Tensor> lengths, bool normalize) {
  const Tensors tensors(k, k, v, log_decay, past, std::nullopt, initial_state, normalize, 0.0);
  return std::get<0>(run_state(tensors, Documents(v.size(0), v.size(1), starts, lengths)));
}

FiveTensors linear_attention_state_backward_cpu(Tensor grad, Tensor k, Tensor v, std::optional<Tensor> log_decay,
                                                std::optional<Tensor> past, std::optional<Tensor> initial_state,
                                                std::optional<Tensor> starts, std::optional<Tensor> lengths,
                                                bool normalize) {
  const Tensors tensors(k, k, v, log_decay, past, std::nullopt, initial_state, normalize, 0.0);
  Gradients made = differentiate_state(tensors, Documents(v.size(0), v.size(1), starts, lengths), grad, nullptr);
  return {made.k, made.v, made.log_decay, made.past, made.initial};
}

std::tuple<Tensor, Tensor> feature_state_cpu(Tensor k, Tensor v, std::optional<Tensor> weight,
                                             std::optional<Tensor> log_decay, std::optional<Tensor> initial_state,
                                             std::optional<Tensor> initial_log_scale, std::optional<Tensor> starts,
                                             std::optional<Tensor> lengths, std::string feature_map, bool normalize) {
  const FeatureTensors given(k, k, v, weight, weight, log_decay, initial_state, initial_log_scale, feature_map,
                             normalize, 0.0);
  return run_state(given.tensors, Documents(v.size(0), v.size(1), starts, lengths));
}

// Gradients of k (of u by head, float32, with a weight or hedgehog_exp), v, log_decay and the initial state.
FourTensors feature_state_backward_cpu(Tensor grad, Tensor k, Tensor v, std::optional<Tensor> weight,
                                       std::optional<Tensor> log_decay, std::optional<Tensor> initial_state,
                                       std::optional<Tensor> initial_log_scale, std::optional<Tensor> starts,
                                       std::optional<Tensor> lengths, std::string feature_map, bool normalize,
                                       Tensor log_scale) {
  const FeatureTensors given(k, k, v, weight, weight, log_decay, initial_state, initial_log_scale, feature_map,
                             normalize, 0.0);
  check_tensor(log_scale, "log_scale", ScalarType::Float);
  const Documents documents(v.size(0), v.size(1), starts, lengths);
  const LinearAttentionShape& s = given.tensors.shape;
  STD_TORCH_CHECK(!s.scaled() || log_scale.numel() == documents.slots * s.heads * s.key_dim,
                  "the scale is not (documents, heads, features)");
  const float* scale = static_cast<const float*>(log_scale.data_ptr());
  Gradients made = differentiate_state(given.tensors, documents, grad, scale);
  return {made.k, made.v, made.log_decay, made.initial};
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def(
      "linear_attention_state(Tensor k, Tensor v, Tensor? log_decay, Tensor? past_weight, Tensor? initial_state, "
      "Tensor? starts, Tensor? lengths, bool normalize) -> Tensor");
  m.def(
      "linear_attention_state_backward(Tensor grad, Tensor k, Tensor v, Tensor? log_decay, Tensor? past_weight, "
      "Tensor? initial_state, Tensor? starts, Tensor? lengths, bool normalize) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "feature_state(Tensor k, Tensor v, Tensor? key_weight, Tensor? log_decay, Tensor? initial_state, "
      "Tensor? initial_log_scale, Tensor? starts, Tensor? lengths, str feature_map, bool normalize) -> "
      "(Tensor, Tensor)");
  m.def(
      "feature_state_backward(Tensor grad, Tensor k, Tensor v, Tensor? key_weight, Tensor? log_decay, "
      "Tensor? initial_state, Tensor? initial_log_scale, Tensor? starts, Tensor? lengths, str feature_map, "
      "bool normalize, Tensor log_scale) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("linear_attention_state", TORCH_BOX(&seqmodels::linear_attention_state_cpu));
  m.impl("linear_attention_state_backward", TORCH_BOX(&seqmodels::linear_attention_state_backward_cpu));
  m.impl("feature_state", TORCH_BOX(&seqmodels::feature_state_cpu));
  m.impl("feature_state_backward", TORCH_BOX(&seqmodels::feature_state_backward_cpu));
}

#endif
