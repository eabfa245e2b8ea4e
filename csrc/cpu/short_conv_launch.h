// Launchers of short_conv.cpp: checks, documents, units of work, registration.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "stable.h"

namespace seqmodels {
namespace {

using OptionalTensor = std::optional<Tensor>;

// A (channels, width) weight, float32 or bfloat16, as (width, channels) float32.
std::vector<float> transposed_weight(const Tensor& weight) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.is_contiguous() && weight.size(1) >= 1,
                  "weight must be a contiguous (channels, width) CPU tensor");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float || is_bfloat16(weight),
                  "weight must be float32 or bfloat16");
  const int64_t channels = weight.size(0), width = weight.size(1);
  const bool narrow = is_bfloat16(weight);
  const void* data = weight.data_ptr();
  std::vector<float> result(channels * width);
  for (int64_t w = 0; w < width; ++w) {
    float* to = result.data() + w * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] = read_float(data, c * width + w, narrow);
  }
  return result;
}

std::vector<float> as_float(const OptionalTensor& tensor) {
  std::vector<float> result;
  if (!tensor.has_value()) return result;
  STD_TORCH_CHECK(tensor->is_cpu() && tensor->is_contiguous() &&
                      (tensor->scalar_type() == ScalarType::Float || is_bfloat16(*tensor)),
                  "bias must be a contiguous float32 or bfloat16 CPU tensor");
  result.resize(tensor->numel());
  for (size_t i = 0; i < result.size(); ++i) result[i] = read_float(tensor->data_ptr(), i, is_bfloat16(*tensor));
  return result;
}

struct Problem {
  int64_t batch, length, channels, width, documents;
  std::vector<float> weight, bias;
  ShortConvArguments arguments;
  std::vector<int64_t> starts, lengths;
  bool covers_all;  // no padding

  Problem(const Tensor& x, const Tensor& weight_tensor, const OptionalTensor& bias_tensor,
          const OptionalTensor& initial_state, const OptionalTensor& starts_tensor,
          const OptionalTensor& lengths_tensor, bool silu)
      : batch(x.size(0)), length(x.size(1)), channels(x.size(2)), width(weight_tensor.size(1)),
        weight(transposed_weight(weight_tensor)), bias(as_float(bias_tensor)) {
    STD_TORCH_CHECK(weight_tensor.size(0) == channels, "weight must have one row a channel");
    STD_TORCH_CHECK(!bias_tensor.has_value() || bias_tensor->numel() == channels, "bias must have one entry a channel");
    arguments = {weight.data(), bias_tensor.has_value() ? bias.data() : nullptr, width, channels, silu};
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
      for (int64_t row = 0; row < batch; ++row) {
        starts.push_back(row * length);
        lengths.push_back(length);
      }
    }
    documents = static_cast<int64_t>(starts.size());
    int64_t tokens = 0;
    for (int64_t d = 0; d < documents; ++d) {
      STD_TORCH_CHECK(lengths[d] >= 0 && (lengths[d] == 0 || (starts[d] >= 0 && starts[d] < batch * length &&
                                                              starts[d] % length + lengths[d] <= length)),
                      "document ", d, " has start ", starts[d], " and length ", lengths[d],
                      ", which leaves its row of a grid of ", batch, " x ", length);
      tokens += lengths[d];
    }
    covers_all = tokens == batch * length;
    if (initial_state.has_value()) {
      check_tensor(*initial_state, "initial_state", ScalarType::Float);
      STD_TORCH_CHECK(initial_state->numel() == documents * (width - 1) * channels,
                      "initial_state must be (documents, width - 1, channels)");
    }
  }

  // A document as the kernels want it; null tensors give null pointers.
  template <class T>
  ShortConvDocument<T> document(int64_t d, const Tensor& x, const Tensor* grad_y, Tensor& out,
                                const OptionalTensor& initial_state, const Tensor* grad_final_state) const {
    const int64_t row = lengths[d] ? starts[d] / length : 0, column = lengths[d] ? starts[d] % length : 0;
    const int64_t state = d * (width - 1) * channels;
    ShortConvDocument<T> result{};
    result.x = static_cast<const T*>(x.data_ptr()) + row * x.stride(0) + column * x.stride(1);
    result.x_stride = x.stride(1);
    if (grad_y) {
      result.grad_y = static_cast<const T*>(grad_y->data_ptr()) + row * grad_y->stride(0) + column * grad_y->stride(1);
      result.grad_y_stride = grad_y->stride(1);
    }
    result.out = static_cast<T*>(out.data_ptr()) + (row * length + column) * channels;
    result.length = lengths[d];
    if (initial_state.has_value()) result.initial_state = static_cast<const float*>(initial_state->data_ptr()) + state;
    if (grad_final_state) result.grad_final_state = static_cast<const float*>(grad_final_state->data_ptr()) + state;
    return result;
  }
};

struct Unit {
  int64_t document, begin, end, index;  // index: place in the buffer of weight gradients
};

std::vector<Unit> units_of(const Problem& p) {
  std::vector<Unit> units;
  for (int64_t d = 0; d < p.documents; ++d) {
    for (int64_t begin = 0; begin < p.lengths[d]; begin += kTileTokens) {
      units.push_back({d, begin, std::min(begin + kTileTokens, p.lengths[d]), static_cast<int64_t>(units.size())});
    }
  }
  return units;
}

// Runs body(unit, first channel, last channel, scratch) for every unit and block of channels.
template <class Body>
void for_each_tile(const std::vector<Unit>& units, const Problem& p, const Body& body) {
  const int64_t blocks = (p.channels + kTileChannels - 1) / kTileChannels;
  const int64_t work = kTileTokens * std::min(p.channels, kTileChannels);  // elements of a tile
  const int64_t grain = std::max<int64_t>(1, 16384 / work);                // threads pay off from there
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()) * blocks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[short_conv_scratch(p.width)]);  // not zeroed: kernels fill it
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile % blocks * kTileChannels;
      body(units[tile / blocks], first, std::min(first + kTileChannels, p.channels), scratch.get());
    }
  });
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype, bool zeros = false) {
  const std::vector<int64_t> shape(sizes);
  return zeros ? torch::stable::new_zeros(like, shape, dtype) : torch::stable::new_empty(like, shape, dtype);
}

void check_input(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && (x.size(2) == 1 || x.stride(2) == 1), name,
                  " must be a (batch, length, channels) CPU tensor with contiguous channels");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || is_bfloat16(x), name, " must be float32 or bfloat16");
}

// The last W - 1 inputs of every document, oldest first, from x and what the state still holds.
template <class T>
void write_final_state(const Problem& p, const Tensor& x, Tensor& y, const OptionalTensor& initial_state,
                       float* final_state) {
  const int64_t history = p.width - 1;
  for (int64_t d = 0; d < p.documents; ++d) {
    const auto document = p.document<T>(d, x, nullptr, y, initial_state, nullptr);
    for (int64_t j = 0; j < history; ++j) {
      float* to = final_state + (d * history + j) * p.channels;
      const int64_t t = document.length - history + j;
      if (t >= 0) {
        const T* from = document.x + t * document.x_stride;
        for (int64_t c = 0; c < p.channels; ++c) to[c] = read_float(from, c, sizeof(T) == 2);
      } else if (document.initial_state) {
        std::memcpy(to, document.initial_state + (document.length + j) * p.channels, p.channels * sizeof(float));
      } else {
        std::memset(to, 0, p.channels * sizeof(float));
      }
    }
  }
}

template <class T>
std::tuple<Tensor, Tensor> forward_typed(const Tensor& x, const Problem& p, const OptionalTensor& initial_state,
                                         ShortConvForward<T>* kernel) {
  Tensor y = new_tensor(x, {p.batch, p.length, p.channels}, x.scalar_type(), !p.covers_all);
  Tensor final_state = new_tensor(x, {p.documents, p.width - 1, p.channels}, ScalarType::Float);
  for_each_tile(units_of(p), p, [&](const Unit& unit, int64_t first, int64_t last, float* scratch) {
    kernel(p.arguments, p.document<T>(unit.document, x, nullptr, y, initial_state, nullptr), unit.begin, unit.end,
           first, last, scratch);
  });
  write_final_state<T>(p, x, y, initial_state, static_cast<float*>(final_state.data_ptr()));
  return {y, final_state};
}

std::tuple<Tensor, Tensor> short_conv_cpu(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor initial_state,
                                          OptionalTensor starts, OptionalTensor lengths, bool silu) {
  check_input(x, "x");
  const Problem p(x, weight, bias, initial_state, starts, lengths, silu);
  return is_bfloat16(x) ? forward_typed<bfloat16>(x, p, initial_state, choose_short_conv_forward_bfloat16())
                        : forward_typed<float>(x, p, initial_state, choose_short_conv_forward_float());
}

// Gradients of x, of weight and bias together as (W + 1, channels) float32, and of the initial state.
template <class T>
std::tuple<Tensor, Tensor, Tensor> backward_typed(const Tensor& grad_y, const Tensor& grad_final_state,
                                                  const Tensor& x, const Problem& p,
                                                  const OptionalTensor& initial_state, ShortConvBackward<T>* kernel) {
  const int64_t history = p.width - 1, row = (p.width + 1) * p.channels;
  const std::vector<Unit> units = units_of(p);
  Tensor grad_x = new_tensor(x, {p.batch, p.length, p.channels}, x.scalar_type(), !p.covers_all);
  Tensor grad_initial = new_tensor(x, {initial_state.has_value() ? p.documents : 0, history, p.channels}, ScalarType::Float);
  Tensor parts = new_tensor(x, {static_cast<int64_t>(units.size()), p.width + 1, p.channels}, ScalarType::Float);
  Tensor grad_weight = new_tensor(x, {p.width + 1, p.channels}, ScalarType::Float, true);
  float* initial = initial_state.has_value() ? static_cast<float*>(grad_initial.data_ptr()) : nullptr;
  float* part = static_cast<float*>(parts.data_ptr());
  for_each_tile(units, p, [&](const Unit& unit, int64_t first, int64_t last, float* scratch) {
    kernel(p.arguments, p.document<T>(unit.document, x, &grad_y, grad_x, initial_state, &grad_final_state),
           unit.begin, unit.end, first, last, part + unit.index * row,
           initial ? initial + unit.document * history * p.channels : nullptr, scratch);
  });
  if (initial) {  // empty documents hand their state on
    const float* from = static_cast<const float*>(grad_final_state.data_ptr());
    for (int64_t d = 0; d < p.documents; ++d) {
      const int64_t size = history * p.channels;
      if (p.lengths[d] == 0 && size > 0) std::memcpy(initial + d * size, from + d * size, size * sizeof(float));
    }
  }
  float* total = static_cast<float*>(grad_weight.data_ptr());
  torch::stable::parallel_for(0, row, 4096, [&](int64_t begin, int64_t end) {
    for (size_t unit = 0; unit < units.size(); ++unit) {
      for (int64_t i = begin; i < end; ++i) total[i] += part[unit * row + i];
    }
  });
  return {grad_x, grad_weight, grad_initial};
}

std::tuple<Tensor, Tensor, Tensor> short_conv_backward_cpu(Tensor grad_y, Tensor grad_final_state, Tensor x,
                                                           Tensor weight, OptionalTensor bias,
                                                           OptionalTensor initial_state, OptionalTensor starts,
                                                           OptionalTensor lengths, bool silu) {
  check_input(x, "x");
  check_input(grad_y, "grad_y");
  STD_TORCH_CHECK(is_bfloat16(x) == is_bfloat16(grad_y), "grad_y must have the dtype of x");
  const Problem p(x, weight, bias, initial_state, starts, lengths, silu);
  check_tensor(grad_final_state, "grad_final_state", ScalarType::Float);
  STD_TORCH_CHECK(grad_final_state.numel() == p.documents * (p.width - 1) * p.channels,
                  "grad_final_state must be (documents, width - 1, channels)");
  return is_bfloat16(x) ? backward_typed<bfloat16>(grad_y, grad_final_state, x, p, initial_state,
                                                   choose_short_conv_backward_bfloat16())
                        : backward_typed<float>(grad_y, grad_final_state, x, p, initial_state,
                                                choose_short_conv_backward_float());
}

template <class T>
void step_typed(const Tensor& x, const Problem& p, Tensor& state, Tensor& y, ShortConvStep<T>* kernel) {
  const T* from = static_cast<const T*>(x.data_ptr());
  T* to = static_cast<T*>(y.data_ptr());
  float* memory = static_cast<float*>(state.data_ptr());
  const int64_t blocks = (p.channels + kTileChannels - 1) / kTileChannels;
  torch::stable::parallel_for(0, p.batch * blocks, 128, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile / blocks, first = tile % blocks * kTileChannels;
      kernel(p.arguments, from + row * p.channels, memory + row * (p.width - 1) * p.channels, to + row * p.channels,
             first, std::min(first + kTileChannels, p.channels));
    }
  });
}

// x is (batch, 1, channels), contiguous.
Tensor short_conv_step_cpu(Tensor x, Tensor weight, OptionalTensor bias, Tensor state, bool silu) {
  check_input(x, "x");
  STD_TORCH_CHECK(x.is_contiguous() && x.size(1) == 1, "x must be a contiguous (batch, 1, channels) tensor");
  const Problem p(x, weight, bias, state, std::nullopt, std::nullopt, silu);
  Tensor y = new_tensor(x, {p.batch, p.channels}, x.scalar_type());
  is_bfloat16(x) ? step_typed<bfloat16>(x, p, state, y, choose_short_conv_step_bfloat16())
                 : step_typed<float>(x, p, state, y, choose_short_conv_step_float());
  return y;
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def("short_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? starts, Tensor? lengths, "
        "bool silu) -> (Tensor, Tensor)");
  m.def("short_conv_backward(Tensor grad_y, Tensor grad_final_state, Tensor x, Tensor weight, Tensor? bias, "
        "Tensor? initial_state, Tensor? starts, Tensor? lengths, bool silu) -> (Tensor, Tensor, Tensor)");
  m.def("short_conv_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, bool silu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("short_conv", TORCH_BOX(&seqmodels::short_conv_cpu));
  m.impl("short_conv_backward", TORCH_BOX(&seqmodels::short_conv_backward_cpu));
  m.impl("short_conv_step", TORCH_BOX(&seqmodels::short_conv_step_cpu));
}
