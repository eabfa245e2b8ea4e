// Causal softmax attention over few tokens, and its backward: every score of a head fits in a core's cache, so that
// nothing is streamed and the sums need no rescaling.
//
//     p_ij = e^{scale q_i . k_j - l_i} for j <= i,   y_i = sum_j p_ij v_j,   l_i = log sum_{j <= i} e^{scale q_i . k_j}
//
//     dv_j = sum_i p_ij dy_i,   g_ij = scale p_ij (dy_i . v_j - sum_m p_im dy_i . v_m)
//     dq_i = sum_j g_ij k_j,    dk_j = sum_i g_ij q_i
//
// A task is one key head of one row of the batch, with the query heads that read it. Products are computed in the tiles
// of linear_attention_tile.h; a tile of scores above the diagonal is left out, and so are the depths that meet zeros.
#include <cmath>

#include "linear_attention_tile.h"

namespace seqmodels {

// (batch, length, heads, head_dim) with gaps anywhere but in the last dimension; strides in floats.
struct ShortOperand {
  const float* data;
  int64_t row, token, head;

  const float* at(int64_t b, int64_t h) const { return data + b * row + h * head; }
};

struct ShortAttention {
  int64_t length, heads, key_heads, head_dim;
  float scale;
  ShortOperand q, k, v, grad;  // grad: of y, in the backward
  const float* log_sum;        // (batch, length, heads), in the backward

  int64_t group() const { return heads / key_heads; }
  int64_t tokens() const { return round_up(length, 16); }  // in scratch: whole tiles, whole vectors
  int64_t width() const { return padded(head_dim); }
};

// Outputs, contiguous: (batch, length, heads, head_dim), with key_heads for grad_k and grad_v.
struct ShortOutputs {
  float *y, *log_sum, *grad_q, *grad_k, *grad_v;
};

static inline int64_t short_forward_scratch(const ShortAttention& a) {
  return a.tokens() * (a.tokens() + 4 * a.width());
}
static inline int64_t short_backward_scratch(const ShortAttention& a) {
  return a.tokens() * (2 * a.tokens() + 8 * a.width());
}

// Tasks [begin, end) of batch * key_heads.
using ShortKernel = void(const ShortAttention& a, const ShortOutputs& out, float* scratch, int64_t begin, int64_t end);
SEQMODELS_DECLARE_KERNEL(ShortKernel, short_attention_forward)
SEQMODELS_DECLARE_KERNEL(ShortKernel, short_attention_backward)

namespace SEQMODELS_LEVEL {

SEQMODELS_INLINE float largest(Vec value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] = std::max(lanes[lane], lanes[lane + width]);
  }
  return lanes[0];
}

// to[i][j] = factor x_i . y_j for all tiles that touch j <= i; yt is y transposed, width x tokens.
static void lower_products(const ShortAttention& a, const float* x, const float* yt, float factor, float* to) {
  const int64_t tokens = a.tokens(), width = a.width();
  for_tiles(a.length, tokens, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    if (column >= row + kTileRows) return;
    tile.template add_product<Order::rows>(x + row * width, width, yt + column, tokens, 0, a.head_dim);
    for_vectors(tile, row, column, [&](int64_t r, int64_t c, Vec value) { store(to + r * tokens + c, value * factor); });
  });
}

// What a tile of a result keeps: rows below `rows` and columns below head_dim.
template <class Tile, class Use>
SEQMODELS_INLINE void for_kept(const Tile& tile, int64_t row, int64_t column, int64_t rows, int64_t columns, Use use) {
  for_vectors(tile, row, column, [&](int64_t r, int64_t c, Vec value) __attribute__((always_inline)) {
    if (r < rows && c < columns) use(r, c, value, std::min<int64_t>(kLanes, columns - c));
  });
}

SEQMODELS_INLINE void put(float* to, Vec value, int64_t count) {
  count == kLanes ? store(to, value) : store(to, value, count);
}

// y_i = sum over j <= i of x_ij z_j, to rows that are `stride` floats apart.
static void add_past(const ShortAttention& a, const float* x, const float* z, float* y, int64_t stride) {
  const int64_t tokens = a.tokens(), width = a.width();
  for_tiles(a.length, width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    tile.template add_product<Order::rows>(x + row * tokens, tokens, z + column, width, 0,
                                           std::min(a.length, row + kTileRows));
    for_kept(tile, row, column, a.length, a.head_dim, [&](int64_t r, int64_t c, Vec value, int64_t count) {
      put(y + r * stride + c, value, count);
    });
  });
}

// to_j += sum over i >= j of x_ij z_i, in scratch.
static void add_future(const ShortAttention& a, const float* x, const float* z, float* to) {
  const int64_t tokens = a.tokens(), width = a.width();
  for_tiles(a.length, width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    tile.template add_product<Order::columns>(x + row, tokens, z + column, width, row, a.length);
    for_vectors(tile, row, column, [&](int64_t r, int64_t c, Vec value) {
      store(to + r * width + c, load(to + r * width + c) + value);
    });
  });
}

static void copy_out(const ShortAttention& a, const float* from, float* to, int64_t stride) {
  for (int64_t row = 0; row < a.length; ++row) {
    std::memcpy(to + row * stride, from + row * a.width(), a.head_dim * sizeof(float));
  }
}

// One operand of one head to scratch, tokens x width, padded with zeros.
static void pack(const ShortAttention& a, const ShortOperand& from, int64_t b, int64_t h, float* to) {
  copy_rows(from.at(b, h), from.token, a.length, a.head_dim, to, a.width(), 16);
}

// Scores to weights, in place: zeros above the diagonal, to the end of its vector.
static void softmax_rows(const ShortAttention& a, float* scores, float* log_sum) {
  const Vec nothing = broadcast(-__builtin_inff());
  for (int64_t i = 0; i < a.length; ++i) {
    float* row = scores + i * a.tokens();
    const int64_t last = i / kLanes * kLanes;  // the vector that holds the diagonal
    const VecInt seen = iota() <= static_cast<int32_t>(i - last);
    const Vec diagonal = seen ? load(row + last) : nothing;
    Vec most = diagonal;
    for (int64_t j = 0; j < last; j += kLanes) most = maximum(most, load(row + j));
    const float high = largest(most);
    const Vec weight = exp(diagonal - high);
    Vec total = weight;
    store(row + last, weight);
    for (int64_t j = 0; j < last; j += kLanes) {
      const Vec one = exp(load(row + j) - high);
      store(row + j, one);
      total += one;
    }
    const float all = sum(total), inverse = 1.0f / all;
    for (int64_t j = 0; j <= last; j += kLanes) store(row + j, load(row + j) * inverse);
    log_sum[i * a.heads] = high + std::log(all);
  }
}

void short_attention_forward(const ShortAttention& a, const ShortOutputs& out, float* scratch, int64_t begin,
                             int64_t end) {
  const int64_t tokens = a.tokens(), width = a.width(), stride = a.heads * a.head_dim;
  Arena arena(scratch);
  float* x = arena.take(tokens * width);  // k, then q of each head
  float* kt = arena.take(tokens * width);
  float* v = arena.take(tokens * width);
  float* p = arena.take(tokens * tokens);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.key_heads, g = task % a.key_heads;
    pack(a, a.k, b, g, x);
    transpose(x, width, tokens, width, kt, tokens);
    pack(a, a.v, b, g, v);
    for (int64_t h = g * a.group(); h < (g + 1) * a.group(); ++h) {
      pack(a, a.q, b, h, x);
      lower_products(a, x, kt, a.scale, p);
      softmax_rows(a, p, out.log_sum + b * a.length * a.heads + h);
      add_past(a, p, v, out.y + b * a.length * stride + h * a.head_dim, stride);
    }
  }
}

// Scores to weights p, and products dy . v to the gradients of q . k, both in place.
static void score_gradients(const ShortAttention& a, const float* log_sum, float* p, float* g) {
  for (int64_t i = 0; i < a.length; ++i) {
    float *weights = p + i * a.tokens(), *gradients = g + i * a.tokens();
    const int64_t last = i / kLanes * kLanes;
    const VecInt seen = iota() <= static_cast<int32_t>(i - last);
    const float shift = log_sum[i * a.heads];
    Vec total = Vec{};
    for (int64_t j = 0; j <= last; j += kLanes) {
      Vec weight = exp(load(weights + j) - shift);
      if (j == last) weight = seen ? weight : Vec{};
      store(weights + j, weight);
      total += weight * load(gradients + j);
    }
    const float mean = sum(total);
    for (int64_t j = 0; j <= last; j += kLanes) {
      store(gradients + j, a.scale * load(weights + j) * (load(gradients + j) - mean));
    }
  }
}

void short_attention_backward(const ShortAttention& a, const ShortOutputs& out, float* scratch, int64_t begin,
                              int64_t end) {
  const int64_t tokens = a.tokens(), width = a.width();
  const int64_t stride = a.heads * a.head_dim, key_stride = a.key_heads * a.head_dim;
  Arena arena(scratch);
  float* q = arena.take(tokens * width);
  float* k = arena.take(tokens * width);
  float* kt = arena.take(tokens * width);
  float* vt = arena.take(tokens * width);
  float* grad = arena.take(tokens * width);
  float* grad_k = arena.take(2 * tokens * width);
  float* grad_v = grad_k + tokens * width;
  float* p = arena.take(tokens * tokens);
  float* g = arena.take(tokens * tokens);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.key_heads, key_head = task % a.key_heads;
    pack(a, a.v, b, key_head, k);
    transpose(k, width, tokens, width, vt, tokens);
    pack(a, a.k, b, key_head, k);
    transpose(k, width, tokens, width, kt, tokens);
    std::fill(grad_k, grad_k + 2 * tokens * width, 0.0f);
    for (int64_t h = key_head * a.group(); h < (key_head + 1) * a.group(); ++h) {
      pack(a, a.q, b, h, q);
      pack(a, a.grad, b, h, grad);
      lower_products(a, q, kt, a.scale, p);
      lower_products(a, grad, vt, 1.0f, g);
      score_gradients(a, a.log_sum + b * a.length * a.heads + h, p, g);
      add_past(a, g, k, out.grad_q + b * a.length * stride + h * a.head_dim, stride);
      add_future(a, g, q, grad_k);
      add_future(a, p, grad, grad_v);
    }
    const int64_t at = b * a.length * key_stride + key_head * a.head_dim;
    copy_out(a, grad_k, out.grad_k + at, key_stride);
    copy_out(a, grad_v, out.grad_v + at, key_stride);
  }
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS

#include "linear_attention_launch.h"

namespace seqmodels {
namespace {

ShortOperand operand(const Tensor& x, const char* name, int64_t batch, int64_t length, int64_t heads, int64_t width) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float, name, " must be float32 on the CPU");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == batch && x.size(1) == length && x.size(2) == heads && x.size(3) == width,
                  name, " does not fit q and k");
  STD_TORCH_CHECK(x.stride(3) == 1 || width == 1, name, " must have a last dimension without gaps");
  return {static_cast<const float*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

ShortAttention arguments(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must be (batch, length, heads, head_dim)");
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), key_heads = k.size(2), width = q.size(3);
  STD_TORCH_CHECK(length > 0 && width > 0 && key_heads > 0 && heads % key_heads == 0,
                  "expected tokens, a head width, and key heads that divide the query heads");
  ShortAttention a{};
  a.length = length, a.heads = heads, a.key_heads = key_heads, a.head_dim = width, a.scale = static_cast<float>(scale);
  a.q = operand(q, "q", batch, length, heads, width);
  a.k = operand(k, "k", batch, length, key_heads, width);
  a.v = operand(v, "v", batch, length, key_heads, width);
  return a;
}

void run(const ShortAttention& a, const ShortOutputs& out, int64_t batch, int64_t scratch_size, ShortKernel* kernel) {
  // A thread is worth waking for about a million products.
  const int64_t work = a.length * a.length * a.head_dim * a.group();
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 20) / work);
  torch::stable::parallel_for(0, batch * a.key_heads, grain, [&](int64_t begin, int64_t end) {
    Buffer scratch(scratch_size);
    kernel(a, out, scratch.data(), begin, end);
  });
}

float* data(Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

std::tuple<Tensor, Tensor> short_attention_cpu(Tensor q, Tensor k, Tensor v, double scale) {
  const ShortAttention a = arguments(q, k, v, scale);
  Tensor y = torch::stable::new_empty(q, {q.size(0), a.length, a.heads, a.head_dim});
  Tensor log_sum = torch::stable::new_empty(q, {q.size(0), a.length, a.heads});
  ShortOutputs out{};
  out.y = data(y), out.log_sum = data(log_sum);
  run(a, out, q.size(0), short_forward_scratch(a), choose_short_attention_forward());
  return {y, log_sum};
}

std::tuple<Tensor, Tensor, Tensor> short_attention_backward_cpu(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                                Tensor log_sum, double scale) {
  ShortAttention a = arguments(q, k, v, scale);
  a.grad = operand(grad, "grad", q.size(0), a.length, a.heads, a.head_dim);
  check_tensor(log_sum, "log_sum", ScalarType::Float);
  STD_TORCH_CHECK(log_sum.numel() == q.size(0) * a.length * a.heads, "log_sum must be (batch, length, heads)");
  a.log_sum = static_cast<const float*>(log_sum.data_ptr());
  Tensor grad_q = torch::stable::new_empty(q, {q.size(0), a.length, a.heads, a.head_dim});
  Tensor grad_k = torch::stable::new_empty(k, {q.size(0), a.length, a.key_heads, a.head_dim});
  Tensor grad_v = torch::stable::new_empty(v, {q.size(0), a.length, a.key_heads, a.head_dim});
  ShortOutputs out{};
  out.grad_q = data(grad_q), out.grad_k = data(grad_k), out.grad_v = data(grad_v);
  run(a, out, q.size(0), short_backward_scratch(a), choose_short_attention_backward());
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def("short_attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)");
  m.def(
      "short_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor log_sum, float scale) "
      "-> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("short_attention", TORCH_BOX(&seqmodels::short_attention_cpu));
  m.impl("short_attention_backward", TORCH_BOX(&seqmodels::short_attention_backward_cpu));
}

#endif
