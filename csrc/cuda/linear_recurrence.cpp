// Registers the launchers of linear_recurrence.cu as torch ops. Arguments are checked here; documents
// come as per-token tables, made by the caller on the device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "linear_recurrence.h"

// Declared by torch's shim in CUDA builds only; the library that defines it is linked there.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace seqmodels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel, const Tensor& beside) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == beside.get_device_index(), name,
                  " must be on the GPU of the other tensors");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == numel, name,
                  " must be contiguous, of ", numel, " elements and dtype code ", static_cast<int>(dtype));
}

RecurrenceGrid grid_of(const Tensor& decay, const Tensor& x, const OptionalTensor& initial_state,
                       const OptionalTensor& document, const OptionalTensor& flags, int64_t documents) {
  STD_TORCH_CHECK(x.dim() == 3 || (x.dim() == 4 && x.size(3) == 2), "x must be (batch, length, channels[, 2])");
  const int64_t tokens = x.size(0) * x.size(1), row = x.size(2) * (x.dim() == 4 ? 2 : 1);
  const bool varying = decay.dim() == x.dim();
  STD_TORCH_CHECK(x.size(0) <= 65535, "at most 65535 rows fit a launch; got ", x.size(0));
  STD_TORCH_CHECK(document.has_value() == flags.has_value(), "document and flags come together");
  check(x, "x", ScalarType::Float, tokens * row, x);
  check(decay, "decay", ScalarType::Float, varying ? tokens * row : row, x);
  RecurrenceGrid grid{};
  grid.decay = static_cast<const float*>(decay.data_ptr());
  if (initial_state.has_value()) {
    check(*initial_state, "initial_state", ScalarType::Float, documents * row, x);
    grid.initial_state = static_cast<const float*>(initial_state->data_ptr());
  }
  if (document.has_value()) {
    check(*document, "document", ScalarType::Long, tokens, x);
    check(*flags, "flags", ScalarType::Byte, tokens, x);
    grid.document = static_cast<const int64_t*>(document->data_ptr());
    grid.flags = static_cast<const unsigned char*>(flags->data_ptr());
  }
  grid.batch = x.size(0), grid.length = x.size(1), grid.channels = x.size(2);
  grid.varying = varying, grid.complex = x.dim() == 4;
  return grid;
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0, "no CUDA stream");
  return stream;
}

void check_launch(int error) { STD_TORCH_CHECK(error == 0, "CUDA launch failed: ", linear_recurrence_error(error)); }

// (batch, segments, channels[, 2]).
std::vector<int64_t> segments_shape(const RecurrenceGrid& grid) {
  std::vector<int64_t> shape{grid.batch, (grid.length + grid.segment - 1) / grid.segment, grid.channels};
  if (grid.complex) shape.push_back(2);
  return shape;
}

// A launch over segments; their states before them come from `carry`.
void cut(RecurrenceGrid& grid, int64_t segment, const OptionalTensor& carry, const Tensor& x) {
  STD_TORCH_CHECK(segment >= 1 && (grid.length + segment - 1) / segment <= 65535, "at most 65535 segments fit a launch");
  grid.segment = segment;
  if (!carry.has_value()) return;
  int64_t numel = 1;
  for (int64_t size : segments_shape(grid)) numel *= size;
  check(*carry, "carry", ScalarType::Float, numel, x);
  grid.carry = static_cast<const float*>(carry->data_ptr());
}

const float* data(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }

// Where a launch over segments leaves their maps.
std::tuple<Tensor, Tensor> maps(RecurrenceGrid& grid, const Tensor& x) {
  Tensor products = torch::stable::new_empty(x, segments_shape(grid)), ends = torch::stable::empty_like(products);
  grid.products = static_cast<float*>(products.data_ptr()), grid.ends = static_cast<float*>(ends.data_ptr());
  return {products, ends};
}

int64_t rows_of(const OptionalTensor& state) { return state.has_value() ? state->size(0) : 0; }

Tensor forward(Tensor decay, Tensor x, OptionalTensor initial_state, OptionalTensor document, OptionalTensor flags,
               OptionalTensor carry, int64_t segment) {
  RecurrenceGrid grid = grid_of(decay, x, initial_state, document, flags, rows_of(initial_state));
  cut(grid, segment, carry, x);
  Tensor h = torch::stable::empty_like(x);
  check_launch(linear_recurrence_forward(grid, data(x), static_cast<float*>(h.data_ptr()), current_stream(x)));
  return h;
}

std::tuple<Tensor, Tensor> forward_ends(Tensor decay, Tensor x, OptionalTensor initial_state, OptionalTensor document,
                                        OptionalTensor flags, int64_t segment) {
  RecurrenceGrid grid = grid_of(decay, x, initial_state, document, flags, rows_of(initial_state));
  cut(grid, segment, std::nullopt, x);
  const auto found = maps(grid, x);
  check_launch(linear_recurrence_forward(grid, data(x), nullptr, current_stream(x)));
  return found;
}

void check_gradients(const RecurrenceGrid& grid, const Tensor& grad_h, const Tensor& grad_final_state, const Tensor& x) {
  check(grad_h, "grad_h", ScalarType::Float, x.numel(), x);
  const int64_t row = x.numel() / (grid.batch * grid.length);
  check(grad_final_state, "grad_final_state", ScalarType::Float, grad_final_state.size(0) * row, x);
}

std::tuple<Tensor, Tensor> backward(Tensor grad_h, Tensor grad_final_state, Tensor decay, Tensor states,
                                    OptionalTensor initial_state, OptionalTensor document, OptionalTensor flags,
                                    OptionalTensor carry, int64_t segment) {
  RecurrenceGrid grid = grid_of(decay, states, initial_state, document, flags, grad_final_state.size(0));
  cut(grid, segment, carry, states);
  check_gradients(grid, grad_h, grad_final_state, states);
  Tensor grad_x = torch::stable::empty_like(states);
  Tensor grad_decay =
      grid.varying ? torch::stable::empty_like(states) : torch::stable::new_empty(states, segments_shape(grid));
  check_launch(linear_recurrence_backward(grid, data(states), data(grad_h), data(grad_final_state),
                                          static_cast<float*>(grad_x.data_ptr()),
                                          static_cast<float*>(grad_decay.data_ptr()), current_stream(states)));
  return {grad_decay, grad_x};
}

std::tuple<Tensor, Tensor> backward_ends(Tensor grad_h, Tensor grad_final_state, Tensor decay, OptionalTensor document,
                                         OptionalTensor flags, int64_t segment) {
  RecurrenceGrid grid = grid_of(decay, grad_h, std::nullopt, document, flags, grad_final_state.size(0));
  cut(grid, segment, std::nullopt, grad_h);
  check_gradients(grid, grad_h, grad_final_state, grad_h);
  const auto found = maps(grid, grad_h);
  check_launch(linear_recurrence_backward(grid, nullptr, data(grad_h), data(grad_final_state), nullptr, nullptr,
                                          current_stream(grad_h)));
  return found;
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cuda, m) {
  m.def("linear_recurrence(Tensor decay, Tensor x, Tensor? initial_state, Tensor? document, Tensor? flags, "
        "Tensor? carry, int segment) -> Tensor");
  m.def("linear_recurrence_ends(Tensor decay, Tensor x, Tensor? initial_state, Tensor? document, Tensor? flags, "
        "int segment) -> (Tensor, Tensor)");
  m.def("linear_recurrence_backward(Tensor grad_h, Tensor grad_final_state, Tensor decay, Tensor states, "
        "Tensor? initial_state, Tensor? document, Tensor? flags, Tensor? carry, int segment) -> (Tensor, Tensor)");
  m.def("linear_recurrence_backward_ends(Tensor grad_h, Tensor grad_final_state, Tensor decay, Tensor? document, "
        "Tensor? flags, int segment) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqmodels_cuda, CUDA, m) {
  m.impl("linear_recurrence", TORCH_BOX(&seqmodels::forward));
  m.impl("linear_recurrence_ends", TORCH_BOX(&seqmodels::forward_ends));
  m.impl("linear_recurrence_backward", TORCH_BOX(&seqmodels::backward));
  m.impl("linear_recurrence_backward_ends", TORCH_BOX(&seqmodels::backward_ends));
}
