// The inputs of feature attention: those of linear attention, with a feature map between the tensors and q, k.
// Include it under `#if SEQMODELS_LAUNCHERS` only.
#pragma once

#include "linear_attention_launch.h"

namespace seqmodels {
namespace {

inline FeatureMap map_by_name(const std::string& name) {
  if (name == "identity") return FeatureMap::identity;
  if (name == "elu") return FeatureMap::elu;
  if (name == "relu" || name == "t2r") return FeatureMap::relu;
  if (name == "taylor") return FeatureMap::taylor;
  if (name == "hedgehog_joint") return FeatureMap::hedgehog_joint;
  if (name == "hedgehog_split") return FeatureMap::hedgehog_split;
  STD_TORCH_CHECK(name == "hedgehog_exp", "unknown feature map ", name);
  return FeatureMap::hedgehog_exp;
}

inline int64_t features_of(FeatureMap map, int64_t width) {
  if (map == FeatureMap::taylor) return 1 + width + width * (width + 1) / 2;
  return map >= FeatureMap::hedgehog_joint ? 2 * width : width;
}

// A weight (H, D, f) with rows of whole vectors: the tensor itself where its rows are.
class PaddedWeight {
 public:
  PaddedWeight(const std::optional<Tensor>& weight, const char* name, int64_t heads, int64_t depth) {
    if (!weight.has_value()) return;
    check_tensor(*weight, name, ScalarType::Float);
    STD_TORCH_CHECK(weight->dim() == 3 && weight->size(0) == heads && weight->size(1) == depth, name,
                    " is not (heads, width, f)");
    const int64_t rows = heads * depth, width = weight->size(2), stride = padded(width);
    const float* from = static_cast<const float*>(weight->data_ptr());
    data_ = from;
    if (width == stride) return;
    copy_.emplace(rows * stride);
    for (int64_t row = 0; row < rows; ++row) {
      float* to = copy_->data() + row * stride;
      std::fill(std::copy(from + row * width, from + (row + 1) * width, to), to + stride, 0.0f);
    }
    data_ = copy_->data();
  }
  const float* data() const { return data_; }

 private:
  std::optional<Buffer> copy_;
  const float* data_ = nullptr;
};

// q and k are (batch, length, 1, groups, D).
struct FeatureTensors {
  Tensors tensors;
  PaddedWeight query_weight, key_weight;

  FeatureTensors(Tensor q, Tensor k, Tensor v, std::optional<Tensor> query_weight_, std::optional<Tensor> key_weight_,
                 std::optional<Tensor> log_decay, std::optional<Tensor> initial_state,
                 std::optional<Tensor> initial_log_scale, const std::string& feature_map, bool normalize,
                 double epsilon)
      : tensors(q, k, v, log_decay, std::nullopt, std::nullopt, initial_state, normalize, epsilon),
        query_weight(query_weight_, "query_weight", v.size(3), q.size(4)),
        key_weight(key_weight_, "key_weight", v.size(3), k.size(4)) {
    LinearAttentionShape& s = tensors.shape;
    s.map = map_by_name(feature_map);
    s.depth = s.key_dim;
    s.map_width = query_weight_.has_value() ? query_weight_->size(2) : s.depth;
    STD_TORCH_CHECK((key_weight_.has_value() ? key_weight_->size(2) : s.depth) == s.map_width,
                    "q and k are mapped to different widths");
    STD_TORCH_CHECK(s.map_width >= 1, "a map to a width of at least 1");
    STD_TORCH_CHECK(s.ranks == 1, "feature maps take one rank");
    STD_TORCH_CHECK(!s.scaled() || (normalize && !log_decay.has_value()),
                    "hedgehog_exp has the normaliser and no decay");
    s.key_dim = features_of(s.map, s.map_width);
    s.query_tensor_groups = s.query_groups, s.key_tensor_groups = s.key_groups;
    tensors.by_head = s.scaled() || query_weight_.has_value() || key_weight_.has_value();
    if (tensors.by_head) s.query_groups = s.key_groups = s.heads;
    tensors.query_weight = query_weight.data(), tensors.key_weight = key_weight.data();
    tensors.initial_log_scale = initial_log_scale;
    STD_TORCH_CHECK(initial_log_scale.has_value() == (s.scaled() && initial_state.has_value()),
                    "a state of hedgehog_exp has a scale, others have none");
    if (initial_log_scale.has_value()) {
      check_tensor(*initial_log_scale, "initial_log_scale", ScalarType::Float);
      STD_TORCH_CHECK(initial_log_scale->numel() * s.state_width() == initial_state->numel(),
                      "the scale is not (documents, heads, features)");
    }
  }
};

}  // namespace
}  // namespace seqmodels
