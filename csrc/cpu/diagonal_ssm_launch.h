// Launchers of diagonal_ssm.cpp: constants in double, documents, blocks of heads, registration.
#pragma once

#include <cmath>
#include <memory>

#include "documents.h"

namespace seqmodels {
namespace {

using OptionalTensor = std::optional<Tensor>;

const float* floats(const Tensor& tensor, const char* name, int64_t numel) {
  check_tensor(tensor, name, ScalarType::Float);
  STD_TORCH_CHECK(tensor.numel() == numel, name, " has ", tensor.numel(), " entries; expected ", numel);
  return static_cast<const float*>(tensor.data_ptr());
}

// u is (batch, length, heads), z (heads, modes, 2) in double, b and c the same in float, skip (heads).
struct DiagonalProblem {
  int64_t batch, length, heads, modes, blocks;
  bool reverse;
  Documents documents;
  const float *u, *b, *c, *skip, *initial;
  const double* z;
  std::unique_ptr<float[]> constants;  // (blocks, modes, kConstants, kHeads)

  DiagonalProblem(const Tensor& u_tensor, const Tensor& z_tensor, const Tensor& b_tensor, const Tensor& c_tensor,
                  const Tensor& skip_tensor, const OptionalTensor& initial_state, const OptionalTensor& starts,
                  const OptionalTensor& lengths, bool backwards)
      : batch(u_tensor.size(0)), length(u_tensor.size(1)), heads(u_tensor.size(2)), modes(z_tensor.size(1)),
        blocks((heads + kHeads - 1) / kHeads), reverse(backwards), documents(batch, length, starts, lengths) {
    STD_TORCH_CHECK(u_tensor.dim() == 3 && z_tensor.dim() == 3, "u must be (batch, length, heads), z (heads, modes, 2)");
    const int64_t numel = heads * modes * 2;
    check_tensor(z_tensor, "z", ScalarType::Double);
    STD_TORCH_CHECK(z_tensor.numel() == numel, "z must have a row for each head");
    z = static_cast<const double*>(z_tensor.data_ptr());
    u = floats(u_tensor, "u", batch * length * heads);
    b = floats(b_tensor, "b", numel);
    c = floats(c_tensor, "c", numel);
    skip = floats(skip_tensor, "skip", heads);
    initial = initial_state.has_value() ? floats(*initial_state, "initial_state", documents.count() * numel) : nullptr;
    STD_TORCH_CHECK(!(reverse && initial), "a walk from the end has no initial state");
    constants.reset(new float[blocks * modes * kConstants * kHeads]);
    torch::stable::parallel_for(0, heads, std::max<int64_t>(1, 1024 / std::max<int64_t>(1, modes)),
                                [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) fill_constants(head);
    });
    for (int64_t lane = heads; lane < blocks * kHeads; ++lane) {  // lanes of no head
      for (int64_t i = 0; i < modes * kConstants; ++i) {
        constants[((blocks - 1) * modes * kConstants + i) * kHeads + lane % kHeads] = 0.0f;
      }
    }
  }

  void fill_constants(int64_t head) {
    for (int64_t mode = 0; mode < modes; ++mode) {
      const int64_t from = (head * modes + mode) * 2;
      const double size = std::exp(z[from]);
      const double decay[2] = {size * std::cos(z[from + 1]), size * std::sin(z[from + 1])};
      const float rounded[2] = {static_cast<float>(decay[0]), static_cast<float>(decay[1])};
      double exact[2] = {decay[0], decay[1]}, drifting[2] = {rounded[0], rounded[1]};
      static_assert((kTokens & (kTokens - 1)) == 0, "powers by squaring");
      for (int64_t power = 1; power < kTokens; power *= 2) {
        square(exact);
        square(drifting);
      }
      float* to = constants.get() + ((head / kHeads * modes + mode) * kConstants) * kHeads + head % kHeads;
      for (int part = 0; part < 2; ++part) {
        // Nothing below 1e-30 can be seen beside the state itself; as subnormal numbers they would cost time.
        const double correction = exact[part] - drifting[part];
        to[(kDecay + part) * kHeads] = rounded[part];
        to[(kInput + part) * kHeads] = b[from + part];
        to[(kOutput + part) * kHeads] = c[from + part];
        to[(kCorrection + part) * kHeads] = std::fabs(correction) < 1e-30 ? 0.0f : static_cast<float>(correction);
      }
    }
  }

  static void square(double (&value)[2]) {
    const double real = value[0] * value[0] - value[1] * value[1];
    value[1] *= 2 * value[0];
    value[0] = real;
  }

  int64_t state_size() const { return modes * 2 * kHeads; }

  // Arrays (modes, 2, kHeads) of a block from and to (heads, modes, 2); zeros on lanes of no head and for null.
  void take(const float* from, int64_t block, float* to) const {
    std::fill(to, to + state_size(), 0.0f);
    if (!from) return;
    for_entries(block, [&](int64_t at, int64_t lane_at) { to[lane_at] = from[at]; });
  }
  void give(const float* from, int64_t block, float* to) const {
    for_entries(block, [&](int64_t at, int64_t lane_at) { to[at] = from[lane_at]; });
  }
  template <class Body>
  void for_entries(int64_t block, const Body& body) const {
    for (int64_t lane = 0; lane < used(block); ++lane) {
      for (int64_t i = 0; i < modes * 2; ++i) body((block * kHeads + lane) * modes * 2 + i, i * kHeads + lane);
    }
  }
  int64_t used(int64_t block) const { return std::min(kHeads, heads - block * kHeads); }

  // A document's run over one block of heads. Backwards in time, an output belongs to the token behind in the walk:
  // inputs are the tokens from the end to the second one, outputs those from the last but one to the first.
  struct Place {
    int64_t input, output, length, stride;
  };
  Place place(int64_t d, int64_t block) const {
    const int64_t size = documents.lengths[d], first = documents.starts[d] * heads + block * kHeads;
    if (!reverse || size == 0) return {size ? first : 0, size ? first : 0, size, heads};
    const int64_t last = first + (size - 1) * heads;
    return {last, last - heads, size - 1, -heads};
  }

  DiagonalRun run(const Place& at, int64_t block, const float* block_skip, float* state) const {
    DiagonalRun r{};
    r.u = u + at.input;
    r.constants = constants.get() + block * modes * kConstants * kHeads;
    r.skip = block_skip;
    r.state = state;
    r.length = at.length, r.stride = at.stride, r.modes = modes, r.heads = used(block);
    return r;
  }
  void take_skip(int64_t block, float* to) const {
    std::fill(to, to + kHeads, 0.0f);
    std::copy(skip + block * kHeads, skip + block * kHeads + used(block), to);
  }
  // What the walk leaves out: backwards, the last token's output (or the first one's input gradient) is zero.
  void clear_end(float* to, int64_t d, int64_t block, bool output) const {
    if (!reverse || documents.lengths[d] == 0) return;
    const int64_t token = documents.starts[d] + (output ? documents.lengths[d] - 1 : 0);
    float* at = to + token * heads + block * kHeads;
    std::fill(at, at + used(block), 0.0f);
  }
  Tensor grid(const Tensor& like) const {
    const std::vector<int64_t> shape{batch, length, heads};
    return documents.covers_all ? torch::stable::new_empty(like, shape) : torch::stable::new_zeros(like, shape);
  }
};

std::tuple<Tensor, Tensor> diagonal_ssm_cpu(Tensor u, Tensor z, Tensor b, Tensor c, Tensor skip,
                                            OptionalTensor initial_state, OptionalTensor starts,
                                            OptionalTensor lengths, bool reverse) {
  const DiagonalProblem p(u, z, b, c, skip, initial_state, starts, lengths, reverse);
  const int64_t count = p.documents.count(), state_numel = p.heads * p.modes * 2;
  Tensor y = p.grid(u);
  Tensor final_state = torch::stable::new_empty(u, std::vector<int64_t>{count, p.heads, p.modes, 2});
  float *to = static_cast<float*>(y.data_ptr()), *last = static_cast<float*>(final_state.data_ptr());
  DiagonalKernel* kernel = choose_diagonal_ssm_forward();
  torch::stable::parallel_for(0, count * p.blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> state(new float[p.state_size()]);
    float block_skip[kHeads];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t d = unit / p.blocks, block = unit % p.blocks;
      const DiagonalProblem::Place at = p.place(d, block);
      p.take(p.initial ? p.initial + d * state_numel : nullptr, block, state.get());
      p.take_skip(block, block_skip);
      DiagonalRun r = p.run(at, block, block_skip, state.get());
      r.y = to + at.output;
      kernel(r);
      p.clear_end(to, d, block, true);
      p.give(state.get(), block, last + d * state_numel);
    }
  });
  return {y, final_state};
}

// Gradients to u, z (in float), b, c, skip and the initial state. A unit of work is a block of heads with all
// documents, so that sums over documents have one order.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> diagonal_ssm_backward_cpu(
    Tensor grad_y, Tensor grad_final, Tensor u, Tensor z, Tensor b, Tensor c, Tensor skip,
    OptionalTensor initial_state, OptionalTensor starts, OptionalTensor lengths, bool reverse) {
  const DiagonalProblem p(u, z, b, c, skip, initial_state, starts, lengths, reverse);
  const int64_t count = p.documents.count(), state_numel = p.heads * p.modes * 2, size = p.state_size();
  const float* from = floats(grad_y, "grad_y", p.batch * p.length * p.heads);
  const float* at_end = floats(grad_final, "grad_final", count * state_numel);
  Tensor grad_u = p.grid(u);
  Tensor grads[3] = {torch::stable::empty_like(b), torch::stable::empty_like(b), torch::stable::empty_like(b)};
  Tensor grad_skip = torch::stable::empty_like(skip);
  Tensor grad_initial = torch::stable::new_empty(u, std::vector<int64_t>{p.initial ? count : 0, p.heads, p.modes, 2});
  float *to = static_cast<float*>(grad_u.data_ptr()), *to_initial = static_cast<float*>(grad_initial.data_ptr());
  float* to_skip = static_cast<float*>(grad_skip.data_ptr());
  DiagonalKernel* kernel = choose_diagonal_ssm_backward();
  torch::stable::parallel_for(0, p.blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[7 * size]);
    float *state = scratch.get(), *derivative = state + size, *adjoint = derivative + size, *final = adjoint + size;
    float block_skip[kHeads], skip_sum[kHeads];
    for (int64_t block = begin; block < end; ++block) {
      float* sums = final + size;
      std::fill(sums, sums + 3 * size, 0.0f);
      std::fill(skip_sum, skip_sum + kHeads, 0.0f);
      p.take_skip(block, block_skip);
      for (int64_t d = 0; d < count; ++d) {
        const DiagonalProblem::Place at = p.place(d, block);
        p.take(p.initial ? p.initial + d * state_numel : nullptr, block, state);
        std::fill(derivative, derivative + size, 0.0f);
        p.take(at_end + d * state_numel, block, final);
        std::copy(final, final + size, adjoint);
        DiagonalRun r = p.run(at, block, block_skip, state);
        r.grad_y = from + at.output;
        r.grad_u = to + at.input;
        r.grad_final = final;
        r.derivative = derivative;
        r.adjoint = adjoint;
        r.grad_z = sums, r.grad_b = sums + size, r.grad_c = sums + 2 * size, r.grad_skip = skip_sum;
        kernel(r);
        p.clear_end(to, d, block, false);
        if (p.initial) p.give(adjoint, block, to_initial + d * state_numel);
      }
      for (int i = 0; i < 3; ++i) p.give(sums + i * size, block, static_cast<float*>(grads[i].data_ptr()));
      std::copy(skip_sum, skip_sum + p.used(block), to_skip + block * kHeads);
    }
  });
  return {grad_u, grads[0], grads[1], grads[2], grad_skip, grad_initial};
}

// u (batch, heads); decay and b (heads, modes, 2); c (rows, heads, modes, 2) as (Re c, -Im c); skip (rows, heads);
// state (batch, heads, modes, 2), written in place. Returns y (batch, rows, heads).
Tensor diagonal_ssm_step_cpu(Tensor u, Tensor decay, Tensor b, Tensor c, Tensor skip, Tensor state) {
  STD_TORCH_CHECK(u.dim() == 2 && decay.dim() == 3 && c.dim() == 4, "u must be (batch, heads), c (rows, heads, modes, 2)");
  const int64_t batch = u.size(0), heads = u.size(1), width = decay.size(1) * 2, rows = c.size(0);
  const float *from = floats(u, "u", batch * heads), *a = floats(decay, "decay", heads * width);
  const float *in = floats(b, "b", heads * width), *out = floats(c, "c", rows * heads * width);
  const float* direct = floats(skip, "skip", rows * heads);
  float* memory = const_cast<float*>(floats(state, "state", batch * heads * width));
  Tensor y = torch::stable::new_empty(u, std::vector<int64_t>{batch, rows, heads});
  float* to = static_cast<float*>(y.data_ptr());
  DiagonalStepKernel* kernel = choose_diagonal_ssm_step();
  const int64_t work = std::max<int64_t>(1, batch * width * (1 + rows));
  const DiagonalStep step{from, a, in, out, direct, memory, to, batch, heads, width, rows};
  const int64_t blocks = (heads + kHeads - 1) / kHeads;
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, 65536 / (work * kHeads)), [&](int64_t begin, int64_t end) {
    kernel(step, begin * kHeads, std::min(end * kHeads, heads));
  });
  return y;
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def("diagonal_ssm(Tensor u, Tensor z, Tensor b, Tensor c, Tensor skip, Tensor? initial_state, Tensor? starts, "
        "Tensor? lengths, bool reverse) -> (Tensor, Tensor)");
  m.def("diagonal_ssm_backward(Tensor grad_y, Tensor grad_final, Tensor u, Tensor z, Tensor b, Tensor c, Tensor skip, "
        "Tensor? initial_state, Tensor? starts, Tensor? lengths, bool reverse) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("diagonal_ssm_step(Tensor u, Tensor decay, Tensor b, Tensor c, Tensor skip, Tensor(a!) state) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("diagonal_ssm", TORCH_BOX(&seqmodels::diagonal_ssm_cpu));
  m.impl("diagonal_ssm_backward", TORCH_BOX(&seqmodels::diagonal_ssm_backward_cpu));
  m.impl("diagonal_ssm_step", TORCH_BOX(&seqmodels::diagonal_ssm_step_cpu));
}
