// One decode token of softmax attention over a key-value cache, alone or joined to a linear past.
//
//     y_h = sum_j softmax_j(scale q_h . k_j) v_j    over the filled slots of the row's cache
//     y_h = (f_h sum_j e^{s_hj - c_h} v_j + n_h) / (f_h sum_j e^{s_hj - c_h} + z_h + tiny)
//
// with s_hj = scale q_h . k_j, c_h the largest of them, and past_h = [n_h, z_h].
//
// A unit of work is a run of kRun slots of one row and key head: its keys and values are read
// once, for all the query heads that share them, and stay in a near cache for the
// second use. A unit leaves the maximum, the sum of exponentials and the weighted values of its
// run for each query head; the launcher joins the runs. Only filled slots are touched.
#include "dispatch.h"
#include "vec.h"

namespace seqmodels {

inline constexpr int64_t kRun = 256;

struct AttentionRun {
  const float* q;       // (heads, width), already multiplied by the scale, zero from head_dim on
  const void* keys;     // (count, head_dim)
  const void* values;   // (count, head_dim)
  float* result;        // (heads, 2 + width): maximum, sum, weighted values
  float* scores;        // (heads, kRun), scratch
  float* wide;          // (kRun, head_dim), scratch of the bfloat16 kernel
  int64_t count, heads, head_dim, width;
};

using AttentionRunKernel = void(const AttentionRun& run);
SEQMODELS_DECLARE_KERNEL(AttentionRunKernel, attention_run_float)
SEQMODELS_DECLARE_KERNEL(AttentionRunKernel, attention_run_bfloat16)

namespace SEQMODELS_LEVEL {
namespace {

// A row's last, partial vector is loaded lane by lane.
template <class T>
SEQMODELS_INLINE Vec load_part(const T* from, int64_t left) {
  return left >= kLanes ? load(from) : load(from, left);
}

template <class T>
SEQMODELS_INLINE void score_all(const AttentionRun& run, const T* keys) {
  const int64_t head_dim = run.head_dim, whole = head_dim / kLanes * kLanes;
  int64_t j = 0;
  for (; j + kLanes <= run.count; j += kLanes) {  // one key a lane
    const T* key = keys + j * head_dim;
    for (int64_t h = 0; h < run.heads; ++h) {
      const float* q = run.q + h * run.width;
      Vec totals[kLanes] = {};
      for (int64_t d = 0; d < whole; d += kLanes) {
        const Vec query = load(q + d);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) totals[i] += query * load(key + i * head_dim + d);
      }
      if (whole < head_dim) {
        const Vec query = load(q + whole);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) totals[i] += query * load(key + i * head_dim + whole, head_dim - whole);
      }
      store(run.scores + h * kRun + j, sum_each<kLanes>(totals));
    }
  }
  for (; j < run.count; ++j) {
    for (int64_t h = 0; h < run.heads; ++h) {
      Vec total{};
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        total += load(run.q + h * run.width + d) * load_part(keys + j * head_dim + d, head_dim - d);
      }
      run.scores[h * kRun + j] = sum(total);
    }
  }
}

// Scores become exponentials relative to their maximum.
SEQMODELS_INLINE void exponentiate(const AttentionRun& run) {
  for (int64_t h = 0; h < run.heads; ++h) {
    float* scores = run.scores + h * kRun;
    // The last vector is filled up with the first score, which moves no maximum.
    for (int64_t j = run.count; j % kLanes; ++j) scores[j] = scores[0];
    Vec high = load(scores);
    for (int64_t j = kLanes; j < run.count; j += kLanes) high = maximum(high, load(scores + j));
    float lanes[kLanes], largest;
    store(lanes, high);
    largest = lanes[0];
    for (int lane = 1; lane < kLanes; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
    Vec total{};
    for (int64_t j = 0; j < run.count; j += kLanes) {
      store(scores + j, exp(load(scores + j) - broadcast(largest)));
      if (j + kLanes <= run.count) total += load(scores + j);
      else total += load(scores + j, run.count - j);
    }
    float* result = run.result + h * (2 + run.width);
    result[0] = largest;
    result[1] = sum(total);
  }
}

// Weighted sums of values for `heads` query heads from h on; each value is loaded once for all.
template <int heads, class T>
SEQMODELS_INLINE void weigh_heads(const AttentionRun& run, const T* values, int64_t h) {
  const int64_t head_dim = run.head_dim, stride = 2 + run.width;
  const float* weights = run.scores + h * kRun;
  float* out = run.result + h * stride + 2;
  int64_t d = 0;
  for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) {
    Vec total[heads][4] = {};
    for (int64_t j = 0; j < run.count; ++j) {
      const T* value = values + j * head_dim + d;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec part = load(value + i * kLanes);
#pragma GCC unroll 2
        for (int head = 0; head < heads; ++head) total[head][i] += broadcast(weights[head * kRun + j]) * part;
      }
    }
    for (int head = 0; head < heads; ++head) {
      for (int i = 0; i < 4; ++i) store(out + head * stride + d + i * kLanes, total[head][i]);
    }
  }
  for (; d < head_dim; d += kLanes) {
    Vec total[heads] = {};
    for (int64_t j = 0; j < run.count; ++j) {
      const Vec part = load_part(values + j * head_dim + d, head_dim - d);
      for (int head = 0; head < heads; ++head) total[head] += broadcast(weights[head * kRun + j]) * part;
    }
    for (int head = 0; head < heads; ++head) store(out + head * stride + d, total[head]);
  }
}

template <class T>
SEQMODELS_INLINE void weigh_values(const AttentionRun& run, const T* values) {
  int64_t h = 0;
  for (; h + 2 <= run.heads; h += 2) weigh_heads<2>(run, values, h);
  if (h < run.heads) weigh_heads<1>(run, values, h);
}

SEQMODELS_INLINE void widen_all(const void* from, float* to, int64_t count) {
  const bfloat16* values = static_cast<const bfloat16*>(from);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(values + i));
  if (i < count) store(to + i, load(values + i, count - i), count - i);
}

}  // namespace

void attention_run_float(const AttentionRun& run) {
  score_all(run, static_cast<const float*>(run.keys));
  exponentiate(run);
  weigh_values(run, static_cast<const float*>(run.values));
}

void attention_run_bfloat16(const AttentionRun& run) {
  if (run.heads == 1) {
    score_all(run, static_cast<const bfloat16*>(run.keys));
    exponentiate(run);
    weigh_values(run, static_cast<const bfloat16*>(run.values));
    return;
  }
  // Heads that share keys and values share their conversion too.
  widen_all(run.keys, run.wide, run.count * run.head_dim);
  score_all(run, static_cast<const float*>(run.wide));
  exponentiate(run);
  widen_all(run.values, run.wide, run.count * run.head_dim);
  weigh_values(run, static_cast<const float*>(run.wide));
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "stable.h"

namespace seqmodels {
namespace {

constexpr int64_t kWidestVector = 16;  // lanes of the widest level: rows of scratch are padded to it

float read(const void* data, int64_t index, bool narrow) {
  if (!narrow) return static_cast<const float*>(data)[index];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void write(void* data, int64_t index, float value, bool narrow) {
  if (!narrow) {
    static_cast<float*>(data)[index] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const bool nan = value != value;
  const uint32_t rounded = (bits + (((bits >> 16) & 1u) + 0x7FFFu)) >> 16;
  static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(nan ? 0x7FC0u : rounded);
}

constexpr float kTiny = 1e-30f;  // a window and a past of weight zero give zero

// What a linear attention adds to numerator and divisor: n and z (batch, heads, head_dim + 1), and f (heads).
struct LinearPast {
  const float* sums;
  const float* factor;
};

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& key_cache, Tensor& value_cache,
              const Tensor& position, double scale, int64_t pinned, const LinearPast* past) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || is_bfloat16(q), "q must be float32 or bfloat16");
  check_tensor(q, "q", dtype);
  check_tensor(k, "k", dtype);
  check_tensor(v, "v", dtype);
  check_tensor(key_cache, "key_cache", dtype);
  check_tensor(value_cache, "value_cache", dtype);
  check_tensor(position, "position", ScalarType::Long);
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && key_cache.dim() == 4, "q and k must be (batch, heads, head_dim)");
  const int64_t batch = q.size(0), heads = q.size(1), head_dim = q.size(2), groups = k.size(1);
  const int64_t capacity = key_cache.size(2);
  STD_TORCH_CHECK(groups >= 1 && heads % groups == 0 && k.size(0) == batch && k.size(2) == head_dim &&
                      v.numel() == k.numel() && position.numel() == batch,
                  "q, k, v and position do not fit together");
  STD_TORCH_CHECK(capacity >= 1 && key_cache.numel() == batch * groups * capacity * head_dim &&
                      value_cache.numel() == key_cache.numel(),
                  "the caches must be (batch, key heads, capacity, head_dim)");
  STD_TORCH_CHECK(pinned >= 0, "pinned is ", pinned, "; expected at least 0");
  const bool narrow = is_bfloat16(q);
  const int64_t size = narrow ? 2 : 4, row_bytes = head_dim * size, shared = heads / groups;
  const int64_t width = (head_dim + kWidestVector - 1) / kWidestVector * kWidestVector;
  const auto* seen = static_cast<const int64_t*>(position.data_ptr());
  char* keys = static_cast<char*>(key_cache.data_ptr());
  char* values = static_cast<char*>(value_cache.data_ptr());

  std::vector<int64_t> first_unit(batch + 1, 0);  // units of work are numbered row by row
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(seen[b] >= 0, "position ", b, " is ", seen[b], "; expected at least 0");
    // The first `pinned` slots are never overwritten; the others are a ring.
    STD_TORCH_CHECK(seen[b] < capacity || pinned < capacity, "row ", b, " has seen ", seen[b],
                    " tokens and all of its ", capacity, " slots are pinned");
    const int64_t filled = std::min(seen[b] + 1, capacity);
    const int64_t slot = seen[b] < capacity ? seen[b] : pinned + (seen[b] - pinned) % (capacity - pinned);
    first_unit[b + 1] = first_unit[b] + groups * ((filled + kRun - 1) / kRun);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = (b * groups + g) * row_bytes, to = ((b * groups + g) * capacity + slot) * row_bytes;
      std::memcpy(keys + to, static_cast<const char*>(k.data_ptr()) + from, row_bytes);
      std::memcpy(values + to, static_cast<const char*>(v.data_ptr()) + from, row_bytes);
    }
  }
  std::vector<float> queries(batch * heads * width, 0.0f);
  for (int64_t row = 0; row < batch * heads; ++row) {
    for (int64_t d = 0; d < head_dim; ++d) {
      queries[row * width + d] = read(q.data_ptr(), row * head_dim + d, narrow) * static_cast<float>(scale);
    }
  }
  const int64_t stride = 2 + width, units = first_unit[batch];
  std::vector<float> results(units * shared * stride);
  AttentionRunKernel* kernel = narrow ? choose_attention_run_bfloat16() : choose_attention_run_float();
  torch::stable::parallel_for(0, units, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(shared * kRun), wide(narrow && shared > 1 ? kRun * head_dim : 0);
    int64_t b = std::upper_bound(first_unit.begin(), first_unit.end(), begin) - first_unit.begin() - 1;
    for (int64_t unit = begin; unit < end; ++unit) {
      while (unit >= first_unit[b + 1]) ++b;
      const int64_t runs = (first_unit[b + 1] - first_unit[b]) / groups;
      const int64_t g = (unit - first_unit[b]) / runs, start = (unit - first_unit[b]) % runs * kRun;
      const int64_t offset = ((b * groups + g) * capacity + start) * row_bytes;
      AttentionRun run{};
      run.q = queries.data() + (b * heads + g * shared) * width;
      run.keys = keys + offset;
      run.values = values + offset;
      run.result = results.data() + unit * shared * stride;
      run.scores = scores.data();
      run.wide = wide.data();
      run.count = std::min(kRun, std::min(seen[b] + 1, capacity) - start);
      run.heads = shared;
      run.head_dim = head_dim;
      run.width = width;
      kernel(run);
    }
  });

  Tensor y = torch::stable::empty_like(q);
  std::vector<float> total(head_dim);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t runs = (first_unit[b + 1] - first_unit[b]) / groups;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t unit = first_unit[b] + h / shared * runs;
      const float* parts = results.data() + (unit * shared + h % shared) * stride;
      float largest = parts[0], sum = 0.0f;
      for (int64_t i = 1; i < runs; ++i) largest = std::max(largest, parts[i * shared * stride]);
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t i = 0; i < runs; ++i) {
        const float* part = parts + i * shared * stride;
        const float factor = std::exp(part[0] - largest);
        sum += factor * part[1];
        for (int64_t d = 0; d < head_dim; ++d) total[d] += factor * part[2 + d];
      }
      if (past != nullptr) {
        const float* sums = past->sums + (b * heads + h) * (head_dim + 1);
        const float factor = past->factor[h];
        for (int64_t d = 0; d < head_dim; ++d) total[d] = factor * total[d] + sums[d];
        sum = factor * sum + sums[head_dim] + kTiny;
      }
      for (int64_t d = 0; d < head_dim; ++d) {
        write(y.data_ptr(), (b * heads + h) * head_dim + d, total[d] / sum, narrow);
      }
    }
  }
  return y;
}

Tensor attention_step_cpu(Tensor q, Tensor k, Tensor v, Tensor key_cache, Tensor value_cache, Tensor position,
                          double scale, int64_t pinned) {
  return attend(q, k, v, key_cache, value_cache, position, scale, pinned, nullptr);
}

Tensor window_linear_attention_step_cpu(Tensor q, Tensor k, Tensor v, Tensor past, Tensor factor, Tensor key_cache,
                                        Tensor value_cache, Tensor position, double scale) {
  check_tensor(past, "past", ScalarType::Float);
  check_tensor(factor, "factor", ScalarType::Float);
  STD_TORCH_CHECK(q.dim() == 3 && past.numel() == q.size(0) * q.size(1) * (q.size(2) + 1),
                  "past must be (batch, heads, head_dim + 1)");
  STD_TORCH_CHECK(factor.numel() == q.size(1), "factor must be (heads)");
  const LinearPast linear{static_cast<const float*>(past.data_ptr()), static_cast<const float*>(factor.data_ptr())};
  return attend(q, k, v, key_cache, value_cache, position, scale, 0, &linear);
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def(
      "attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor position, "
      "float scale, int pinned=0) -> Tensor");
  m.def(
      "window_linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor past, Tensor factor, Tensor(a!) key_cache, "
      "Tensor(b!) value_cache, Tensor position, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("attention_step", TORCH_BOX(&seqmodels::attention_step_cpu));
  m.impl("window_linear_attention_step", TORCH_BOX(&seqmodels::window_linear_attention_step_cpu));
}

#endif  // SEQMODELS_LAUNCHERS
