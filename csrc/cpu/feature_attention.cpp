// Linear attention with the feature map inside: registration. The kernels are those of linear attention
// (linear_attention.cpp, linear_attention_backward.cpp), which make the features of a chunk in scratch memory
// (linear_attention_operands.h) with the maps of feature_maps.h.
#include "dispatch.h"

#if SEQMODELS_LAUNCHERS

#include "feature_attention_launch.h"
#include "linear_attention_backward_launch.h"
#include "linear_attention_forward_launch.h"
#include "linear_attention_step_launch.h"

namespace seqmodels {
namespace {

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FourTensors feature_attention_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> query_weight,
                                  std::optional<Tensor> key_weight, std::optional<Tensor> log_decay,
                                  std::optional<Tensor> initial_state, std::optional<Tensor> initial_log_scale,
                                  std::optional<Tensor> starts, std::optional<Tensor> lengths, std::string feature_map,
                                  bool normalize, double epsilon) {
  const FeatureTensors given(q, k, v, query_weight, key_weight, log_decay, initial_state, initial_log_scale,
                             feature_map, normalize, epsilon);
  return run(given.tensors, Documents(v.size(0), v.size(1), starts, lengths));
}

// Gradients of q, k (of u by head, float32, with weights or hedgehog_exp), v, log_decay and the initial state.
FiveTensors feature_attention_backward_cpu(Tensor grad_y, Tensor grad_final_state, Tensor q, Tensor k, Tensor v,
                                           std::optional<Tensor> query_weight, std::optional<Tensor> key_weight,
                                           std::optional<Tensor> log_decay, std::optional<Tensor> initial_state,
                                           std::optional<Tensor> initial_log_scale, std::optional<Tensor> starts,
                                           std::optional<Tensor> lengths, std::string feature_map, bool normalize,
                                           double epsilon, Tensor y, Tensor denominator) {
  const FeatureTensors given(q, k, v, query_weight, key_weight, log_decay, initial_state, initial_log_scale,
                             feature_map, normalize, epsilon);
  const Documents documents(v.size(0), v.size(1), starts, lengths);
  Gradients grad = differentiate(given.tensors, documents, grad_y, grad_final_state, y, denominator);
  return {grad.q, grad.k, grad.v, grad.log_decay, grad.initial};
}

// q, k, v are (batch, 1, 1, groups, width): a sequence of one token.
Tensor feature_attention_step_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> query_weight,
                                  std::optional<Tensor> key_weight, std::optional<Tensor> log_decay, Tensor state,
                                  std::optional<Tensor> log_scale, std::string feature_map, bool normalize,
                                  double epsilon) {
  const FeatureTensors given(q, k, v, query_weight, key_weight, log_decay, state, log_scale, feature_map, normalize,
                             epsilon);
  return step_in_place(given.tensors);
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def(
      "feature_attention(Tensor q, Tensor k, Tensor v, Tensor? query_weight, Tensor? key_weight, Tensor? log_decay, "
      "Tensor? initial_state, Tensor? initial_log_scale, Tensor? starts, Tensor? lengths, str feature_map, "
      "bool normalize, float epsilon) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "feature_attention_backward(Tensor grad_y, Tensor grad_final_state, Tensor q, Tensor k, Tensor v, "
      "Tensor? query_weight, Tensor? key_weight, Tensor? log_decay, Tensor? initial_state, "
      "Tensor? initial_log_scale, Tensor? starts, Tensor? lengths, str feature_map, bool normalize, float epsilon, "
      "Tensor y, Tensor denominator) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "feature_attention_step(Tensor q, Tensor k, Tensor v, Tensor? query_weight, Tensor? key_weight, "
      "Tensor? log_decay, Tensor(a!) state, Tensor(b!)? log_scale, str feature_map, bool normalize, float epsilon) -> "
      "Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("feature_attention", TORCH_BOX(&seqmodels::feature_attention_cpu));
  m.impl("feature_attention_backward", TORCH_BOX(&seqmodels::feature_attention_backward_cpu));
  m.impl("feature_attention_step", TORCH_BOX(&seqmodels::feature_attention_step_cpu));
}

#endif
