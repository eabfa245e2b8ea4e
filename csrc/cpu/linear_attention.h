// What the forward, backward and step of linear attention share: sizes, arguments, and the
// division of work. The mathematics is in linear_attention.cpp and linear_attention_backward.cpp.
//
// Names: N key width, P value width, R ranks, H heads, T tokens of a chunk. A "row" is a
// (token, rank) pair; rows of a chunk are consecutive in memory, so ranks need no further axis.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dispatch.h"
#include "vec.h"

namespace seqmodels {

constexpr int64_t kChunkRows = 64;  // rows of a score tile: 64 / R tokens
constexpr int64_t kHeadBlock = 8;   // heads that one task walks, so that they share one q k^T

static inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Widths in scratch memory: whole vectors of every instruction set, whole tiles of 8 rows.
static inline int64_t padded(int64_t width) { return round_up(width, 16); }

// What stands between the tensors and q and k: nothing, or a feature map of u = x W (feature_maps.h).
enum class FeatureMap : int { none, identity, elu, relu, taylor, hedgehog_joint, hedgehog_split, hedgehog_exp };

struct LinearAttentionShape {
  int64_t heads, query_groups, key_groups, ranks, key_dim, value_dim, chunk_tokens, head_block;
  bool normalize;
  float epsilon;
  // With a map, key_dim and the groups are those of its features, and the tensors' and u's sizes are these.
  FeatureMap map = FeatureMap::none;
  int64_t query_tensor_groups = 0, key_tensor_groups = 0, depth = 0, map_width = 0;

  // hedgehog_exp: states carry a maximum for each feature, and are relative to its exponential.
  bool scaled() const { return map == FeatureMap::hedgehog_exp; }
  // Columns of the gradients of q and k that the backward writes: of u with a map.
  int64_t gradient_width() const { return map == FeatureMap::none ? key_dim : map_width; }

  int64_t query_group(int64_t head) const { return head * query_groups / heads; }
  int64_t key_group(int64_t head) const { return head * key_groups / heads; }
  int64_t state_width() const { return value_dim + (normalize ? 1 : 0); }  // in tensors: (N, P + 1)
  int64_t chunks(int64_t tokens) const { return (tokens + chunk_tokens - 1) / chunk_tokens; }
};

// All tokens of the batch; row i of q starts at q + i * query_groups * key_dim.
template <class T>
struct LinearAttentionInputs {
  LinearAttentionShape shape;
  const T* q;
  const T* k;
  const T* v;
  const float* log_decay;  // (tokens, H), like the two below; or null
  const float* past;
  const float* diagonal;
  const float* query_weight = nullptr;  // (H, depth, padded map_width), with a map; or null
  const float* key_weight = nullptr;
};

// A document: tokens [start, start + length) of the flattened batch.
struct Document {
  int64_t start, length, slot;
};

// Scratch memory, handed out in aligned pieces.
class Arena {
 public:
  explicit Arena(float* memory) : next_(memory) {}
  float* take(int64_t count) {
    float* piece = next_;
    next_ += round_up(count, 16);
    return piece;
  }

 private:
  float* next_;
};

}  // namespace seqmodels
