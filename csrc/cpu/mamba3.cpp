// Mamba-3: forward over whole sequences.
//
// The equation is in seqmodels/ops/mamba3/op.py; unrolled it is linear attention whose past and own
// tokens weigh differently (seqmodels/ops/mamba3/torch.py). The caller gives those weights and the
// initial state with the carried token in it.
//
// Tiling. A task walks one document for one head, chunk by chunk: phases, keys, queries and values
// of a chunk are made in the second-level cache, the chunk kernel of linear attention takes them
// there, and its output is gated at once. Nothing that is expanded to heads or ranks goes through
// memory. The norms of B and C, which heads share, come first: one number a token, rank and group.
#include "mamba3_chunk.h"

namespace seqmodels {

template <class T>
struct Mamba3Outputs {
  T* out;        // (tokens, H, P)
  float* angle;  // (documents, H, A)
  float* ssm;    // (documents, H, P, N)
  float* k;      // (documents, R, H, N)
};

static inline int64_t mamba3_forward_scratch(const Mamba3Shape& s, const LinearAttentionShape& head) {
  return head_weights_size(s) + run_size(s, head.chunk_tokens) + kChunkRows * s.head_dim + 2 * padded(s.head_dim) +
         padded(s.d_state + s.head_dim) + forward_state_size(head) + forward_scratch_size(head) + 2 * padded(s.angles) +
         128;
}

// One head of one document. The initial angle (A) and state (P, N) may be null: zero.
template <class T>
using Mamba3Forward = void(const Mamba3Inputs<T>&, const Mamba3Outputs<T>&, const Document&, int64_t head,
                           const float* initial_angle, const float* initial_state, float* scratch);
SEQMODELS_DECLARE_KERNEL(Mamba3Forward<float>, mamba3_forward_float)
SEQMODELS_DECLARE_KERNEL(Mamba3Forward<bfloat16>, mamba3_forward_bfloat16)

namespace SEQMODELS_LEVEL {

template <class T>
static void norms(const T* from, int64_t rows, int64_t n, float epsilon, float* to) {
  for (int64_t row = 0; row < rows; ++row) to[row] = inverse_rms(from + row * n, n, epsilon);
}

template <class T>
static void forward(const Mamba3Inputs<T>& in, const Mamba3Outputs<T>& outputs, const Document& document, int64_t head,
                    const float* initial_angle, const float* initial_state, float* scratch) {
  const Mamba3Shape& s = in.shape;
  const LinearAttentionShape shape = in.head_shape();
  const int64_t N = s.d_state, P = s.head_dim, R = s.ranks, A = s.angles, value_width = padded(P);
  Arena arena(scratch);
  double* phase = reinterpret_cast<double*>(arena.take(2 * padded(A)));
  const HeadWeights weights = take_head_weights(s, in.weights, head, arena);
  const Run run = take_run(s, shape.chunk_tokens, arena);
  float* y = arena.take(kChunkRows * P);
  float *z = arena.take(P), *gated = arena.take(P), *wide = arena.take(N + P);
  float* state = arena.take(forward_state_size(shape));
  float* inner = arena.take(forward_scratch_size(shape));

  for (int64_t i = 0; i < A; ++i) phase[i] = initial_angle ? initial_angle[i] : 0.0;
  std::fill(state, state + forward_state_size(shape), 0.0f);
  if (initial_state) {
    for_lanes(s, [=](int64_t n, int64_t lane) {
      for (int64_t p = 0; p < P; ++p) state[n * value_width + p] = initial_state[p * N + lane];
    });
  }
  const LinearAttentionInputs<float> chunk{shape, run.q, run.k, run.v, run.log_decay, run.past, run.diagonal};
  int64_t tokens = 0;
  for (int64_t begin = 0; begin < document.length; begin += tokens) {
    const int64_t token = document.start + begin;
    tokens = std::min(shape.chunk_tokens, document.length - begin);
    make_run(in, weights, head, token, tokens, true, phase, run, wide);
    prefetch_head(in.z, in.z_stride, token, tokens, head, P);
    if (begin + tokens < document.length) prefetch_head(in.x, in.x_stride, token + tokens, tokens, head, P);
    linear_attention_forward_float(chunk, {y, nullptr}, 0, tokens, 0, 1, state, true, inner);
    const float skip = in.weights.skip[head];
    for (int64_t i = 0; i < tokens * R * P; ++i) y[i] += skip * run.v[i];
    for (int64_t t = 0; t < tokens; ++t) {
      widen_values(in.z + (token + t) * in.z_stride + head * P, P, z);
      gate(s, in.weights, head, y + t * R * P, P, z, gated);
      T* to = outputs.out + ((token + t) * s.heads + head) * P;
      for (int64_t p = 0; p < P; p += kLanes) store_some(to + p, load_some(gated + p, P - p), P - p);
    }
  }

  float* angle = outputs.angle + (document.slot * s.heads + head) * A;
  for (int64_t i = 0; i < A; ++i) angle[i] = static_cast<float>(phase[i]);
  float* ssm = outputs.ssm + (document.slot * s.heads + head) * P * N;
  for_lanes(s, [=](int64_t n, int64_t lane) {
    for (int64_t p = 0; p < P; ++p) ssm[p * N + lane] = state[n * value_width + p];
  });
  for (int64_t r = 0; r < R; ++r) {
    const float* from = run.k + ((tokens - 1) * R + r) * N;
    float* to = outputs.k + ((document.slot * R + r) * s.heads + head) * N;
    for_lanes(s, [=](int64_t n, int64_t lane) { to[lane] = from[n]; });
  }
}

#define SEQMODELS_INSTANTIATE(T)                                                                                   \
  void mamba3_norms_##T(const T* from, int64_t rows, int64_t n, float epsilon, float* to) {                        \
    norms(from, rows, n, epsilon, to);                                                                             \
  }                                                                                                                \
  void mamba3_forward_##T(const Mamba3Inputs<T>& in, const Mamba3Outputs<T>& out, const Document& document,        \
                          int64_t head, const float* initial_angle, const float* initial_state, float* scratch) {  \
    forward<T>(in, out, document, head, initial_angle, initial_state, scratch);                                    \
  }
SEQMODELS_INSTANTIATE(float)
SEQMODELS_INSTANTIATE(bfloat16)
#undef SEQMODELS_INSTANTIATE

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS

#include "mamba3_chunk_launch.h"

namespace seqmodels {
namespace {

template <class T>
void run_forward(const Mamba3Tensors& tensors, const Documents& documents, const Mamba3Outputs<T>& out,
                 const float* initial_angle, const float* initial_state, Mamba3Norms<T>* norms,
                 Mamba3Forward<T>* kernel) {
  const Mamba3Shape& s = tensors.shape;
  InverseNorms inverse(tensors, norms);
  const Mamba3Inputs<T> in = tensors.inputs<T>(inverse.b(), inverse.c());
  const int64_t state_size = s.head_dim * s.d_state, scratch_size = mamba3_forward_scratch(s, in.head_shape());
  parallel(static_cast<int64_t>(documents.used.size()) * s.heads, [&](int64_t begin, int64_t end) {
    Buffer scratch(scratch_size);
    for (int64_t task = begin; task < end; ++task) {
      const Document& document = documents.used[task / s.heads];
      const int64_t head = task % s.heads, at = document.slot * s.heads + head;
      kernel(in, out, document, head, initial_angle ? initial_angle + at * s.angles : nullptr,
             initial_state ? initial_state + at * state_size : nullptr, scratch.data());
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mamba3_cpu(
    Tensor x, Tensor b, Tensor c, Tensor z, Tensor log_decay, Tensor past, Tensor diagonal, Tensor phase_step,
    Tensor rate, Tensor b_weight, Tensor c_weight, Tensor b_bias, Tensor c_bias, Tensor skip,
    std::optional<Tensor> mimo_x, std::optional<Tensor> mimo_z, std::optional<Tensor> mimo_o,
    std::optional<Tensor> norm_weight, std::optional<Tensor> initial_angle, std::optional<Tensor> initial_state,
    std::optional<Tensor> starts, std::optional<Tensor> lengths, bool half, double epsilon) {
  const Mamba3Tensors tensors(x, b, c, z, log_decay, past, diagonal, phase_step, rate, b_weight, c_weight, b_bias,
                              c_bias, skip, mimo_x, mimo_z, mimo_o, norm_weight, half, epsilon);
  const Mamba3Shape& s = tensors.shape;
  const Documents documents(x.size(0), x.size(1), starts, lengths);
  const float* angle_data = check_floats(initial_angle, "initial_angle", documents.slots * s.heads * s.angles);
  const float* state_data =
      check_floats(initial_state, "initial_state", documents.slots * s.heads * s.head_dim * s.d_state);
  const ScalarType wide = ScalarType::Float;
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), s.heads, s.head_dim});
  Tensor angle = torch::stable::new_empty(x, {documents.slots, s.heads, s.angles}, wide);
  Tensor ssm = torch::stable::new_empty(x, {documents.slots, s.heads, s.head_dim, s.d_state}, wide);
  Tensor k = torch::stable::new_empty(x, {documents.slots, s.ranks, s.heads, s.d_state}, wide);
  if (documents.padding) torch::stable::zero_(out);
  // An unused slot's rows are the caller's to fill.
  if (!documents.unused.empty()) {
    for (Tensor* tensor : {&angle, &ssm, &k}) torch::stable::zero_(*tensor);
  }
  const auto run = [&](auto zero, auto* norms, auto* kernel) {
    using T = decltype(zero);
    const Mamba3Outputs<T> outputs{static_cast<T*>(out.data_ptr()), static_cast<float*>(angle.data_ptr()),
                                   static_cast<float*>(ssm.data_ptr()), static_cast<float*>(k.data_ptr())};
    run_forward<T>(tensors, documents, outputs, angle_data, state_data, norms, kernel);
  };
  if (is_bfloat16(x)) {
    run(bfloat16{}, choose_mamba3_norms_bfloat16(), choose_mamba3_forward_bfloat16());
  } else {
    run(0.0f, choose_mamba3_norms_float(), choose_mamba3_forward_float());
  }
  return {out, angle, ssm, k};
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def(
      "mamba3(Tensor x, Tensor b, Tensor c, Tensor z, Tensor log_decay, Tensor past_weight, Tensor diagonal_weight, "
      "Tensor phase_step, Tensor rate, Tensor b_weight, Tensor c_weight, Tensor b_bias, Tensor c_bias, Tensor skip, "
      "Tensor? mimo_x, Tensor? mimo_z, Tensor? mimo_o, Tensor? norm_weight, Tensor? initial_angle, "
      "Tensor? initial_state, Tensor? starts, Tensor? lengths, bool half, float epsilon) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) { m.impl("mamba3", TORCH_BOX(&seqmodels::mamba3_cpu)); }

#endif
