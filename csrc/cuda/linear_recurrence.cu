// Elementwise linear recurrence, real or complex, by a block-wide scan over time.
//
//   h[t] = a[t] h[t-1] + x[t];    g[t] = dh[t] + conj(a[t+1]) g[t+1],  dx = g,  da[t] = g[t] conj(h[t-1])
//
// A block owns kChannels channels of one row of the grid and walks time in tiles of kWarps x kTokens. A
// warp's lanes are channels, so that every access is one run of memory; a thread runs through kTokens
// tokens in registers and leaves its affine map (product of decays, end state) in shared memory. Each
// warp composes the maps of the warps before it with the state before the tile, and adds decays times that
// state to its tokens. Device memory sees every value once.
//
// Where rows and channels are too few blocks for the device, time is cut into segments, each a block of its own. A
// first pass leaves every segment's map h -> P h + E, the product of its decays and its last state from zero; the
// caller runs the recurrence over segments, itself one of these; and every segment starts from the state before it.
//
// Documents are flags: on a first token the carried state's decay is 0 and decay times initial state is
// added; padding has decay 0 and x 0; tokens behind the end are the identity map. The backward is the same
// walk from the end. Sums over time of the gradient of a constant decay stay in registers and are
// added over warps in a fixed order: no atomics, the same bits every time.
#include <cuda_runtime.h>

#include "linear_recurrence.h"

namespace seqmodels {
namespace {

constexpr int kChannels = 32, kWarps = 16, kTokens = 4, kTile = kWarps * kTokens;

struct Real {
  float value;
  static __device__ Real zero() { return {0.0f}; }
  static __device__ Real one() { return {1.0f}; }
  __device__ Real conj() const { return *this; }
  __device__ Real operator+(Real other) const { return {value + other.value}; }
  __device__ Real operator*(Real other) const { return {value * other.value}; }
};

struct alignas(8) Complex {
  float real, imaginary;
  static __device__ Complex zero() { return {0.0f, 0.0f}; }
  static __device__ Complex one() { return {1.0f, 0.0f}; }
  __device__ Complex conj() const { return {real, -imaginary}; }
  __device__ Complex operator+(Complex other) const { return {real + other.real, imaginary + other.imaginary}; }
  __device__ Complex operator*(Complex other) const {
    return {real * other.real - imaginary * other.imaginary, real * other.imaginary + imaginary * other.real};
  }
};

template <class T>
struct Grid {
  const T *decay, *initial_state;
  const int64_t* document;
  const unsigned char* flags;
  const T* carry;
  T *products, *ends;
  int64_t length, channels, segment;

  // This block's row and segment of (batch, segments, channels), and its tokens [first, last).
  __device__ int64_t part() const { return static_cast<int64_t>(blockIdx.y) * gridDim.z + blockIdx.z; }
  __device__ int64_t first() const { return blockIdx.z * segment; }
  __device__ int64_t last() const { return first() + segment < length ? first() + segment : length; }
};

constexpr unsigned kInside = 1, kFirst = 2, kLast = 4;

template <class T>
__device__ unsigned flags_of(const Grid<T>& grid, int64_t row, int64_t t) {
  if (t < 0 || t >= grid.length) return 0;
  if (grid.flags) return grid.flags[row * grid.length + t];
  return kInside | (t == 0 ? kFirst : 0u) | (t == grid.length - 1 ? kLast : 0u);
}

template <class T>
__device__ int64_t slot_of(const Grid<T>& grid, int64_t row, int64_t t) {
  return grid.document ? grid.document[row * grid.length + t] : row;
}

// The product of the tile's decays, for all. One barrier, behind which `products` is free again after the next.
template <class T>
__device__ T tile_product(T product, T (&products)[kWarps][kChannels]) {
  products[threadIdx.y][threadIdx.x] = product;
  __syncthreads();
  T all = T::one();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) all = products[warp][threadIdx.x] * all;
  __syncthreads();
  return all;
}

// The state before this warp's tokens: `carry`, the state before the tile, through the maps of the warps before.
// Also leaves the state behind the tile in `carry` for all. Two barriers.
template <class T>
__device__ T exchange(T product, T end, T& carry, T (&products)[kWarps][kChannels], T (&ends)[kWarps][kChannels]) {
  const int lane = threadIdx.x, warp = threadIdx.y;
  products[warp][lane] = product;
  ends[warp][lane] = end;
  __syncthreads();
  T before = carry, state = carry;
#pragma unroll
  for (int other = 0; other < kWarps; ++other) {
    if (other == warp) before = state;
    state = products[other][lane] * state + ends[other][lane];
  }
  carry = state;
  __syncthreads();
  return before;
}

// Ends: only the segment's map, no states.
template <class T, bool Varying, bool Ends>
__global__ void __launch_bounds__(kChannels* kWarps, 1) forward_kernel(Grid<T> grid, const T* x, T* h) {
  __shared__ T products[kWarps][kChannels], ends[kWarps][kChannels];
  const int64_t row = blockIdx.y, c = blockIdx.x * static_cast<int64_t>(kChannels) + threadIdx.x;
  const bool used = c < grid.channels;
  const T constant = !Varying && used ? grid.decay[c] : T::zero();
  const int64_t first = grid.first(), last = grid.last(), part = grid.part() * grid.channels + c;
  T carry = grid.carry && used && first > 0 ? grid.carry[part - grid.channels] : T::zero(), whole = T::one();
  for (int64_t begin = first; begin < last; begin += kTile) {
    T decay[kTokens], state[kTokens], product = T::one(), end = T::zero();
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int64_t t = begin + threadIdx.y * kTokens + i, at = (row * grid.length + t) * grid.channels + c;
      const unsigned flags = t < last ? flags_of(grid, row, t) : 0;
      const bool inside = used && (flags & kInside);
      decay[i] = t < last ? T::zero() : T::one();
      state[i] = T::zero();
      if (inside) {
        decay[i] = Varying ? grid.decay[at] : constant;
        state[i] = x[at];
        if (flags & kFirst) {
          if (grid.initial_state) {
            state[i] = decay[i] * grid.initial_state[slot_of(grid, row, t) * grid.channels + c] + state[i];
          }
          decay[i] = T::zero();
        }
      }
      end = decay[i] * end + state[i];
      product = decay[i] * product;
    }
    if (Ends) whole = tile_product(product, products) * whole;
    T before = exchange(product, end, carry, products, ends);
    if (Ends) continue;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int64_t t = begin + threadIdx.y * kTokens + i;
      before = decay[i] * before + state[i];
      if (used && t < last) h[(row * grid.length + t) * grid.channels + c] = before;
    }
  }
  if (Ends && used && threadIdx.y == 0) grid.products[part] = whole, grid.ends[part] = carry;
}

template <class T, bool Varying, bool Ends>
__global__ void __launch_bounds__(kChannels* kWarps, 1)
    backward_kernel(Grid<T> grid, const T* h, const T* grad_h, const T* grad_final_state, T* grad_x, T* grad_decay) {
  __shared__ T products[kWarps][kChannels], ends[kWarps][kChannels];
  const int64_t row = blockIdx.y, c = blockIdx.x * static_cast<int64_t>(kChannels) + threadIdx.x;
  const bool used = c < grid.channels;
  const T constant = !Varying && used ? grid.decay[c] : T::zero();
  const int64_t first = grid.first(), last = grid.last(), part = grid.part() * grid.channels + c;
  const bool behind_used = grid.carry && used && last < grid.length;
  T carry = behind_used ? grid.carry[part + grid.channels] : T::zero(), total = T::zero(), whole = T::one();
  for (int64_t done = 0; done < last - first; done += kTile) {
    T decay[kTokens], state[kTokens], product = T::one(), end = T::zero();
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {  // from the last token backwards
      const int64_t t = last - 1 - done - threadIdx.y * kTokens - i;
      const int64_t at = (row * grid.length + t) * grid.channels + c;
      const unsigned flags = t >= first ? flags_of(grid, row, t) : 0;
      const bool inside = used && (flags & kInside);
      decay[i] = t >= first ? T::zero() : T::one();
      state[i] = T::zero();
      if (inside) {
        state[i] = grad_h[at];
        if (flags & kLast) {
          state[i] = state[i] + grad_final_state[slot_of(grid, row, t) * grid.channels + c];
        } else {
          decay[i] = (Varying ? grid.decay[at + grid.channels] : constant).conj();
        }
      }
      end = decay[i] * end + state[i];
      product = decay[i] * product;
    }
    if (Ends) whole = tile_product(product, products) * whole;
    T behind = exchange(product, end, carry, products, ends);
    if (Ends) continue;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int64_t t = last - 1 - done - threadIdx.y * kTokens - i;
      const int64_t at = (row * grid.length + t) * grid.channels + c;
      behind = decay[i] * behind + state[i];
      if (!used || t < first) continue;
      grad_x[at] = behind;
      const unsigned flags = flags_of(grid, row, t);
      T before = T::zero();
      if (flags & kFirst) {
        if (grid.initial_state) before = grid.initial_state[slot_of(grid, row, t) * grid.channels + c];
      } else if (flags & kInside) {
        before = h[at - grid.channels];
      }
      const T share = behind * before.conj();
      if (Varying) {
        grad_decay[at] = share;
      } else {
        total = total + share;
      }
    }
  }
  if (Ends && used && threadIdx.y == 0) grid.products[part] = whole, grid.ends[part] = carry;
  if (Varying || Ends) return;
  ends[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || !used) return;
  T sum = ends[0][threadIdx.x];
  for (int warp = 1; warp < kWarps; ++warp) sum = sum + ends[warp][threadIdx.x];
  grad_decay[part] = sum;
}

template <class T>
Grid<T> typed(const RecurrenceGrid& grid) {
  return {reinterpret_cast<const T*>(grid.decay), reinterpret_cast<const T*>(grid.initial_state), grid.document,
          grid.flags, reinterpret_cast<const T*>(grid.carry), reinterpret_cast<T*>(grid.products),
          reinterpret_cast<T*>(grid.ends), grid.length, grid.channels, grid.segment};
}

dim3 blocks(const RecurrenceGrid& grid) {
  return dim3(static_cast<unsigned>((grid.channels + kChannels - 1) / kChannels), static_cast<unsigned>(grid.batch),
              static_cast<unsigned>((grid.length + grid.segment - 1) / grid.segment));
}

template <class T, bool Varying>
void forward(const RecurrenceGrid& grid, const float* x, float* h, cudaStream_t stream) {
  const dim3 threads(kChannels, kWarps);
  const auto kernel = grid.products ? forward_kernel<T, Varying, true> : forward_kernel<T, Varying, false>;
  kernel<<<blocks(grid), threads, 0, stream>>>(typed<T>(grid), reinterpret_cast<const T*>(x), reinterpret_cast<T*>(h));
}

template <class T, bool Varying>
void backward(const RecurrenceGrid& grid, const float* h, const float* grad_h, const float* grad_final_state,
              float* grad_x, float* grad_decay, cudaStream_t stream) {
  const dim3 threads(kChannels, kWarps);
  const auto kernel = grid.products ? backward_kernel<T, Varying, true> : backward_kernel<T, Varying, false>;
  kernel<<<blocks(grid), threads, 0, stream>>>(
      typed<T>(grid), reinterpret_cast<const T*>(h), reinterpret_cast<const T*>(grad_h),
      reinterpret_cast<const T*>(grad_final_state), reinterpret_cast<T*>(grad_x), reinterpret_cast<T*>(grad_decay));
}

}  // namespace

int linear_recurrence_forward(const RecurrenceGrid& grid, const float* x, float* h, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (grid.complex) {
    grid.varying ? forward<Complex, true>(grid, x, h, queue) : forward<Complex, false>(grid, x, h, queue);
  } else {
    grid.varying ? forward<Real, true>(grid, x, h, queue) : forward<Real, false>(grid, x, h, queue);
  }
  return static_cast<int>(cudaGetLastError());
}

int linear_recurrence_backward(const RecurrenceGrid& grid, const float* h, const float* grad_h,
                               const float* grad_final_state, float* grad_x, float* grad_decay, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto run = grid.complex ? (grid.varying ? backward<Complex, true> : backward<Complex, false>)
                                : (grid.varying ? backward<Real, true> : backward<Real, false>);
  run(grid, h, grad_h, grad_final_state, grad_x, grad_decay, queue);
  return static_cast<int>(cudaGetLastError());
}

const char* linear_recurrence_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace seqmodels
