// Documents of a (batch, length) grid as launchers read them: the given ones, or one a row.
#pragma once

#include <vector>

#include "stable.h"

namespace seqmodels {

struct Documents {
  std::vector<int64_t> starts, lengths;
  bool covers_all;  // no token lies outside

  Documents(int64_t batch, int64_t length, const std::optional<Tensor>& starts_tensor,
            const std::optional<Tensor>& lengths_tensor) {
    if (starts_tensor.has_value()) {
      STD_TORCH_CHECK(lengths_tensor.has_value() && starts_tensor->numel() == lengths_tensor->numel(),
                      "starts and lengths must have one entry a document");
      check_tensor(*starts_tensor, "starts", ScalarType::Long);
      check_tensor(*lengths_tensor, "lengths", ScalarType::Long);
      const auto* from = static_cast<const int64_t*>(starts_tensor->data_ptr());
      const auto* size = static_cast<const int64_t*>(lengths_tensor->data_ptr());
      starts.assign(from, from + starts_tensor->numel());
      lengths.assign(size, size + lengths_tensor->numel());
    } else {
      for (int64_t b = 0; b < batch; ++b) starts.push_back(b * length);
      lengths.assign(batch, length);
    }
    int64_t tokens = 0;
    for (size_t d = 0; d < starts.size(); ++d) {
      STD_TORCH_CHECK(lengths[d] >= 0 && (lengths[d] == 0 || (starts[d] >= 0 && starts[d] < batch * length &&
                                                              starts[d] % length + lengths[d] <= length)),
                      "document ", d, " has start ", starts[d], " and length ", lengths[d],
                      ", which leaves its row of a grid of ", batch, " x ", length);
      tokens += lengths[d];
    }
    covers_all = tokens == batch * length;
  }

  int64_t count() const { return static_cast<int64_t>(starts.size()); }
};

inline float* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<float*>(tensor->data_ptr()) : nullptr;
}

}  // namespace seqmodels
