// Vandermonde products: sums of weighted exponentials over states, and sums over time.
//
//   kernel[r, h, l] = scale Re sum_n weight[r, h, n] e^{l z[h, n]}
//   moments:  S0[r, h, n] = sum_l g[r, h, l] e^{l z[h, n]},   S1 the same with a factor l
//
// With l = a M + b the power splits into e^{a M z} e^{b z}: for each head two tables, of A and of M powers,
// and a matrix product over states (kernel) or over b (moments), computed in registers. Tables come
// from repeated products in double, one exponential a state and table: their error after M or A steps
// is M or A roundings of double, so phases need no reduction. All of a head's scratch fits the
// second-level cache; nothing of heads x states x length exists. A head is the unit of work.
#include <cmath>

#include "dispatch.h"
#include "linear_attention_tile.h"
#include "vec.h"

namespace seqmodels {

// z is (heads, states, 2). `width` is states rounded up to kMaxLanes, `size` M (a multiple of it), `count` A.
struct VandermondeShape {
  const double* z;
  int64_t rows, heads, states, length, width, size, count;
};
constexpr int64_t kMaxLanes = 16;

// One head; weight (rows, heads, states, 2), out (rows, heads, length).
using VandermondeKernel = void(const VandermondeShape&, const float* weight, float scale, float* out, int64_t head,
                               float* scratch);
// One head; g (rows, heads, length), zeroth and first (rows, heads, states, 2), first null when not wanted.
using VandermondeMoments = void(const VandermondeShape&, const float* g, float* zeroth, float* first, int64_t head,
                                float* scratch);

SEQMODELS_DECLARE_KERNEL(VandermondeKernel, vandermonde_kernel)
SEQMODELS_DECLARE_KERNEL(VandermondeMoments, vandermonde_moments)

// Floats of scratch: the outer table, the inner one (with moments up to 4 planes), the matrix of one row
// of g or weights, and its product.
static inline int64_t vandermonde_scratch(const VandermondeShape& s) {
  const int64_t count = (s.count + 7) / 8 * 8;
  return 2 * count * s.width + 4 * s.size * s.width + count * std::max(s.size, 2 * s.width) + 4 * count * s.width;
}

namespace SEQMODELS_LEVEL {

// Rows k < steps of e^{k stride z[n]}, a plane of real and one of imaginary parts, each of `width` columns
// (those from `states` on zero); row k starts at table + k * row. Values below float's range become 0:
// arithmetic on subnormal numbers is slow.
static void fill_table(const double* z, int64_t states, int64_t width, int64_t steps, double stride, float* table,
                       int64_t row) {
  constexpr int64_t kStates = 64;  // states at a time, so that the running powers stay in the cache
  double real[kStates], imaginary[kStates], factor_real[kStates], factor_imaginary[kStates];
  for (int64_t first = 0; first < width; first += kStates) {
    const int64_t n_end = std::min(kStates, width - first);
    for (int64_t n = 0; n < n_end; ++n) {
      const bool used = first + n < states;
      real[n] = used ? 1.0 : 0.0;
      imaginary[n] = factor_real[n] = factor_imaginary[n] = 0.0;
      if (!used) continue;
      const double size = std::exp(stride * z[2 * (first + n)]), phase = stride * z[2 * (first + n) + 1];
      factor_real[n] = size * std::cos(phase);
      factor_imaginary[n] = size * std::sin(phase);
    }
    for (int64_t k = 0; k < steps; ++k) {
      float* to = table + k * row + first;
      for (int64_t n = 0; n < n_end; ++n) {
        to[n] = std::fabs(real[n]) < 1.2e-38 ? 0.0f : static_cast<float>(real[n]);
        to[n + width] = std::fabs(imaginary[n]) < 1.2e-38 ? 0.0f : static_cast<float>(imaginary[n]);
        const double next = real[n] * factor_real[n] - imaginary[n] * factor_imaginary[n];
        const double other = real[n] * factor_imaginary[n] + imaginary[n] * factor_real[n];
        real[n] = std::fabs(next) < 1e-290 ? 0.0 : next;
        imaginary[n] = std::fabs(other) < 1e-290 ? 0.0 : other;
      }
    }
  }
}

void vandermonde_kernel(const VandermondeShape& s, const float* weight, float scale, float* out, int64_t head,
                        float* scratch) {
  const int64_t depth = 2 * s.width, count = round_up(s.count, 8);
  const double* z = s.z + head * s.states * 2;
  float* outer = scratch;                    // (A, 2 width)
  float* left = outer + count * depth;       // (A, 2 width): conj(weight e^{a M z})
  float* right = left + count * depth;       // (2 width, M)
  float* inner = right + s.size * depth;     // (M, 2 width), then transposed
  fill_table(z, s.states, s.width, s.count, static_cast<double>(s.size), outer, depth);
  fill_table(z, s.states, s.width, s.size, 1.0, inner, depth);
  transpose(inner, depth, s.size, depth, right, s.size);
  std::fill(left, left + count * depth, 0.0f);
  for (int64_t row = 0; row < s.rows; ++row) {
    const float* w = weight + (row * s.heads + head) * s.states * 2;
    for (int64_t a = 0; a < s.count; ++a) {
      const float *real = outer + a * depth, *imaginary = real + s.width;
      float* to = left + a * depth;
      for (int64_t n = 0; n < s.states; ++n) {
        to[n] = scale * (w[2 * n] * real[n] - w[2 * n + 1] * imaginary[n]);
        to[n + s.width] = -scale * (w[2 * n] * imaginary[n] + w[2 * n + 1] * real[n]);
      }
    }
    float* to = out + (row * s.heads + head) * s.length;
    for_tiles(count, s.size, [&](auto tile, int64_t a, int64_t b) __attribute__((always_inline)) {
      tile.template add_product<Order::rows>(left + a * depth, depth, right + b, s.size, 0, depth);
      for_vectors(tile, a, b, [&](int64_t r, int64_t column, Vec value) __attribute__((always_inline)) {
        const int64_t at = r * s.size + column, rest = s.length - at;
        if (rest >= kLanes) {
          store(to + at, value);
        } else if (rest > 0) {
          store(to + at, value, rest);
        }
      });
    });
  }
}

void vandermonde_moments(const VandermondeShape& s, const float* g, float* zeroth, float* first, int64_t head,
                         float* scratch) {
  const int64_t depth = 2 * s.width, columns = first ? 2 * depth : depth, count = round_up(s.count, 8);
  const double* z = s.z + head * s.states * 2;
  float* outer = scratch;                       // (A, 2 width)
  float* inner = outer + count * depth;         // (M, columns): e^{b z}, then b e^{b z}
  float* left = inner + s.size * 2 * depth;     // (A, M): g
  float* parts = left + count * std::max(s.size, depth);  // (A, columns)
  fill_table(z, s.states, s.width, s.count, static_cast<double>(s.size), outer, depth);
  fill_table(z, s.states, s.width, s.size, 1.0, inner, columns);
  if (first) {
    for (int64_t b = 0; b < s.size; ++b) {
      float* from = inner + b * columns;
      for (int64_t c = 0; c < depth; ++c) from[depth + c] = static_cast<float>(b) * from[c];
    }
  }
  std::fill(left, left + count * s.size, 0.0f);
  for (int64_t row = 0; row < s.rows; ++row) {
    const float* from = g + (row * s.heads + head) * s.length;
    std::copy(from, from + s.length, left);
    for_tiles(count, columns, [&](auto tile, int64_t a, int64_t c) __attribute__((always_inline)) {
      tile.template add_product<Order::rows>(left + a * s.size, s.size, inner + c, columns, 0, s.size);
      for_vectors(tile, a, c, [&](int64_t r, int64_t column, Vec value) __attribute__((always_inline)) {
        store(parts + r * columns + column, value);
      });
    });
    const int64_t at = (row * s.heads + head) * s.states * 2;
    for (int64_t n = 0; n < s.states; n += kLanes) {
      Vec sums[4] = {};
      for (int64_t a = 0; a < s.count; ++a) {
        const Vec real = load(outer + a * depth + n), imaginary = load(outer + a * depth + s.width + n);
        const float* part = parts + a * columns + n;
        const Vec p = load(part), q = load(part + s.width);
        sums[0] += real * p - imaginary * q;
        sums[1] += real * q + imaginary * p;
        if (first) {
          const float begin = static_cast<float>(a * s.size);
          const Vec u = begin * p + load(part + depth), v = begin * q + load(part + depth + s.width);
          sums[2] += real * u - imaginary * v;
          sums[3] += real * v + imaginary * u;
        }
      }
      for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, s.states - n); ++lane) {
        for (int part = 0; part < 2; ++part) {
          zeroth[at + 2 * (n + lane) + part] = sums[part][lane];
          if (first) first[at + 2 * (n + lane) + part] = sums[2 + part][lane];
        }
      }
    }
  }
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS

#include <memory>

#include "stable.h"

namespace seqmodels {
namespace {

VandermondeShape vandermonde_shape(const Tensor& z, int64_t rows, int64_t length) {
  check_tensor(z, "z", ScalarType::Double);
  STD_TORCH_CHECK(z.dim() == 3 && z.size(2) == 2, "z must be (heads, states, 2)");
  STD_TORCH_CHECK(length >= 1, "length must be at least 1");
  VandermondeShape s{static_cast<const double*>(z.data_ptr()), rows, z.size(0), z.size(1), length, 0, 0, 0};
  s.width = (s.states + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  // Both tables meet rows * count and size times: the product of these is least work where they are equal.
  s.size = kMaxLanes;
  while (s.size < 256 && s.size < length && s.size * s.size < rows * length) s.size *= 2;
  s.count = (length + s.size - 1) / s.size;
  return s;
}

template <class Body>
void for_heads(const VandermondeShape& s, const Body& body) {
  const int64_t work = std::max<int64_t>(1, s.rows * s.length * s.states);
  torch::stable::parallel_for(0, s.heads, std::max<int64_t>(1, 65536 / work), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[vandermonde_scratch(s)]);
    for (int64_t head = begin; head < end; ++head) body(head, scratch.get());
  });
}

Tensor vandermonde_cpu(Tensor z, Tensor weight, int64_t length, double scale) {
  check_tensor(weight, "weight", ScalarType::Float);
  const VandermondeShape s = vandermonde_shape(z, weight.size(0), length);
  STD_TORCH_CHECK(weight.numel() == s.rows * s.heads * s.states * 2, "weight must be (rows, heads, states, 2)");
  Tensor out = torch::stable::new_empty(weight, std::vector<int64_t>{s.rows, s.heads, length});
  const float* from = static_cast<const float*>(weight.data_ptr());
  float* to = static_cast<float*>(out.data_ptr());
  VandermondeKernel* kernel = choose_vandermonde_kernel();
  for_heads(s, [&](int64_t head, float* scratch) { kernel(s, from, static_cast<float>(scale), to, head, scratch); });
  return out;
}

std::tuple<Tensor, Tensor> vandermonde_moments_cpu(Tensor z, Tensor g, bool want_first) {
  check_tensor(g, "g", ScalarType::Float);
  STD_TORCH_CHECK(g.dim() == 3 && g.size(1) == z.size(0), "g must be (rows, heads, length)");
  const VandermondeShape s = vandermonde_shape(z, g.size(0), g.size(2));
  std::vector<int64_t> shape{s.rows, s.heads, s.states, 2};
  Tensor zeroth = torch::stable::new_empty(g, shape);
  if (!want_first) shape[0] = 0;
  Tensor first = torch::stable::new_empty(g, shape);
  const float* from = static_cast<const float*>(g.data_ptr());
  float *to = static_cast<float*>(zeroth.data_ptr()), *other = static_cast<float*>(first.data_ptr());
  VandermondeMoments* kernel = choose_vandermonde_moments();
  for_heads(s, [&](int64_t head, float* scratch) { kernel(s, from, to, want_first ? other : nullptr, head, scratch); });
  return {zeroth, first};
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def("vandermonde(Tensor z, Tensor weight, int length, float scale) -> Tensor");
  m.def("vandermonde_moments(Tensor z, Tensor g, bool want_first) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("vandermonde", TORCH_BOX(&seqmodels::vandermonde_cpu));
  m.impl("vandermonde_moments", TORCH_BOX(&seqmodels::vandermonde_moments_cpu));
}

#endif
