// Launchers of linear_recurrence.cpp: checks, documents, units of work, registration.
#pragma once

#include "documents.h"

namespace seqmodels {
namespace {

using OptionalTensor = std::optional<Tensor>;

// x is (batch, length, channels) or (batch, length, channels, 2), contiguous.
struct RecurrenceProblem {
  int64_t batch, length, row, documents;
  bool complex, varying, covers_all;
  std::vector<int64_t> starts, lengths, state_shape;

  RecurrenceProblem(const Tensor& decay, const Tensor& x, const OptionalTensor& initial_state,
                    const OptionalTensor& starts_tensor, const OptionalTensor& lengths_tensor) {
    check_tensor(x, "x", ScalarType::Float);
    check_tensor(decay, "decay", ScalarType::Float);
    STD_TORCH_CHECK(x.dim() == 3 || (x.dim() == 4 && x.size(3) == 2), "x must be (batch, length, channels[, 2])");
    batch = x.size(0), length = x.size(1);
    complex = x.dim() == 4;
    row = x.size(2) * (complex ? 2 : 1);
    varying = decay.dim() == x.dim();
    STD_TORCH_CHECK(decay.numel() == (varying ? batch * length * row : row), "decay must have x's shape or one row of it");
    const Documents found(batch, length, starts_tensor, lengths_tensor);
    starts = found.starts, lengths = found.lengths, documents = found.count(), covers_all = found.covers_all;
    state_shape = {documents, x.size(2)};
    if (complex) state_shape.push_back(2);
    if (initial_state.has_value()) {
      check_tensor(*initial_state, "initial_state", ScalarType::Float);
      STD_TORCH_CHECK(initial_state->numel() == documents * row, "initial_state must have one row a document");
    }
  }

  Tensor like_x(const Tensor& x) const {
    std::vector<int64_t> shape{batch, length, x.size(2)};
    if (complex) shape.push_back(2);
    return covers_all ? torch::stable::new_empty(x, shape) : torch::stable::new_zeros(x, shape);
  }

  // Runs kernel(document, first, last) for all documents and blocks of components.
  template <class Fill>
  void run(RecurrenceKernel* kernel, const Fill& fill) const {
    const int64_t blocks = (row + kBlock - 1) / kBlock;
    const int64_t work = std::max<int64_t>(1, batch * length / std::max<int64_t>(1, documents) * std::min(row, kBlock));
    torch::stable::parallel_for(0, documents * blocks, std::max<int64_t>(1, 32768 / work),
                                [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t d = unit / blocks, first = unit % blocks * kBlock;
        kernel(fill(d, lengths[d] ? starts[d] * row : 0), first, std::min(first + kBlock, row));
      }
    });
  }
};

std::tuple<Tensor, Tensor> linear_recurrence_cpu(Tensor decay, Tensor x, OptionalTensor initial_state,
                                                 OptionalTensor starts, OptionalTensor lengths) {
  const RecurrenceProblem p(decay, x, initial_state, starts, lengths);
  Tensor h = p.like_x(x), final_state = torch::stable::new_empty(x, p.state_shape);
  const float *a = static_cast<const float*>(decay.data_ptr()), *from = static_cast<const float*>(x.data_ptr());
  float *to = static_cast<float*>(h.data_ptr()), *last = static_cast<float*>(final_state.data_ptr());
  const float* initial = data_of(initial_state);
  p.run(p.complex ? choose_recurrence_forward_complex() : choose_recurrence_forward_real(), [&](int64_t d, int64_t at) {
    Recurrence r{};
    r.decay = p.varying ? a + at : a;
    r.x = from + at;
    r.h = to + at;
    r.initial_state = initial ? initial + d * p.row : nullptr;
    r.final_state = last + d * p.row;
    r.row = p.row, r.length = p.lengths[d], r.varying = p.varying;
    return r;
  });
  return {h, final_state};
}

// Gradients of decay (one row a document where decay is constant), x and the initial state.
std::tuple<Tensor, Tensor, Tensor> linear_recurrence_backward_cpu(Tensor grad_h, Tensor grad_final_state, Tensor decay,
                                                                  Tensor states, OptionalTensor initial_state,
                                                                  OptionalTensor starts, OptionalTensor lengths) {
  const RecurrenceProblem p(decay, states, initial_state, starts, lengths);
  check_tensor(grad_h, "grad_h", ScalarType::Float);
  check_tensor(grad_final_state, "grad_final_state", ScalarType::Float);
  STD_TORCH_CHECK(grad_h.numel() == states.numel() && grad_final_state.numel() == p.documents * p.row,
                  "grad_h must have the states' shape and grad_final_state one row a document");
  Tensor grad_x = p.like_x(states);
  Tensor grad_decay = p.varying ? p.like_x(states) : torch::stable::new_empty(states, p.state_shape);
  std::vector<int64_t> state_shape = p.state_shape;
  if (!initial_state.has_value()) state_shape[0] = 0;
  Tensor grad_initial = torch::stable::new_empty(states, state_shape);
  const float *a = static_cast<const float*>(decay.data_ptr()), *from = static_cast<const float*>(grad_h.data_ptr());
  const float* at_end = static_cast<const float*>(grad_final_state.data_ptr());
  float *h = static_cast<float*>(states.data_ptr()), *to = static_cast<float*>(grad_x.data_ptr());
  float *to_decay = static_cast<float*>(grad_decay.data_ptr()), *to_initial = static_cast<float*>(grad_initial.data_ptr());
  const float* initial = data_of(initial_state);
  p.run(p.complex ? choose_recurrence_backward_complex() : choose_recurrence_backward_real(), [&](int64_t d, int64_t at) {
    Recurrence r{};
    r.decay = p.varying ? a + at : a;
    r.h = h + at;
    r.initial_state = initial ? initial + d * p.row : nullptr;
    r.grad_h = from + at;
    r.grad_final_state = at_end + d * p.row;
    r.grad_x = to + at;
    r.grad_decay = to_decay + (p.varying ? at : d * p.row);
    r.grad_initial_state = initial ? to_initial + d * p.row : nullptr;
    r.row = p.row, r.length = p.lengths[d], r.varying = p.varying;
    return r;
  });
  return {grad_decay, grad_x, grad_initial};
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def("linear_recurrence(Tensor decay, Tensor x, Tensor? initial_state, Tensor? starts, Tensor? lengths) "
        "-> (Tensor, Tensor)");
  m.def("linear_recurrence_backward(Tensor grad_h, Tensor grad_final_state, Tensor decay, Tensor states, "
        "Tensor? initial_state, Tensor? starts, Tensor? lengths) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("linear_recurrence", TORCH_BOX(&seqmodels::linear_recurrence_cpu));
  m.impl("linear_recurrence_backward", TORCH_BOX(&seqmodels::linear_recurrence_backward_cpu));
}
