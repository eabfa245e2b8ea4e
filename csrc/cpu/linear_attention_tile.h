// Pieces of the linear attention kernels: products of small matrices in registers, copies,
// transposition, and the decays of one chunk. Included by kernels only, once per level.
#pragma once

#include "linear_attention.h"

namespace seqmodels {
namespace SEQMODELS_LEVEL {

// A product is computed in tiles of kTileRows x (1 or 2 vectors): 16 accumulators of 32 registers
// with AVX-512, 8 of 16 below; each loaded vector of y serves all rows, each scalar of x all columns.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

enum class Order { rows, columns };  // how x lies in memory: x[row][depth] or x[depth][row]

template <int Vectors>
struct Tile {
  static constexpr int vectors = Vectors;
  Vec value[kTileRows][Vectors];

  // += sum over depth in [begin, end) of x(row, depth) y[depth][columns]; x and y point at the
  // tile's first row and column.
  template <Order order>
  __attribute__((always_inline)) inline void add_product(const float* x, int64_t x_stride, const float* y,
                                                         int64_t y_stride, int64_t begin, int64_t end) {
    for (int64_t depth = begin; depth < end; ++depth) {
      Vec right[Vectors];
#pragma GCC unroll 8
      for (int vector = 0; vector < Vectors; ++vector) right[vector] = load(y + depth * y_stride + vector * kLanes);
#pragma GCC unroll 8
      for (int row = 0; row < kTileRows; ++row) {
        const Vec left = broadcast(order == Order::rows ? x[row * x_stride + depth] : x[depth * x_stride + row]);
#pragma GCC unroll 8
        for (int vector = 0; vector < Vectors; ++vector) value[row][vector] += left * right[vector];
      }
    }
  }
};

// Calls body(tile, row, column) with a zero tile for every tile of a rows x columns result. Rows
// are rounded up to whole tiles: scratch matrices have that many.
template <class Body>
SEQMODELS_INLINE void for_tiles(int64_t rows, int64_t columns, Body body) {
  int64_t column = 0;
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
    for (int64_t row = 0; row < rows; row += kTileRows) body(Tile<2>{}, row, column);
  }
  for (; column < columns; column += kLanes) {
    for (int64_t row = 0; row < rows; row += kTileRows) body(Tile<1>{}, row, column);
  }
}

template <class Tile, class Use>
SEQMODELS_INLINE void for_vectors(const Tile& tile, int64_t row, int64_t column, Use use) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int vector = 0; vector < Tile::vectors; ++vector) {
      use(row + r, column + vector * kLanes, tile.value[r][vector]);
    }
  }
}

// Columns that a tile of score rows can see: up to the last rank of its last row's token.
SEQMODELS_INLINE int64_t visible_end(int64_t row, int64_t rows, int64_t ranks) {
  return std::min(rows, ((row + kTileRows - 1) / ranks + 1) * ranks);
}

// 0, 1, 2, ... by lane.
SEQMODELS_INLINE VecInt iota() {
  VecInt lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

// Rows of another dtype to float, zeros up to `width` columns and `unit` rows (a whole tile).
template <class T>
static void copy_rows(const T* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t width,
                      int64_t unit = 8) {
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t row = 0; row < rows; ++row) {
    const T* source = from + row * from_stride;
    float* target = to + row * width;
    for (int64_t column = 0; column < whole; column += kLanes) store(target + column, load(source + column));
    if (whole < columns) store(target + whole, load(source + whole, columns - whole));
    for (int64_t column = round_up(columns, kLanes); column < width; column += kLanes) store(target + column, Vec{});
  }
  std::fill(to + rows * width, to + round_up(rows, unit) * width, 0.0f);
}

typedef float Vec8 __attribute__((vector_size(32)));

// to[column][row] = from[row][column], in blocks of 8 x 8; both sizes are multiples of 8.
[[maybe_unused]] static void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                                       float* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += 8) {
    for (int64_t column = 0; column < columns; column += 8) {
      Vec8 a[8], b[8];
      for (int i = 0; i < 8; ++i) std::memcpy(&a[i], from + (row + i) * from_stride + column, sizeof(Vec8));
      for (int i = 0; i < 8; i += 2) {  // pairs of rows, then pairs of pairs, then halves
        b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
      }
      for (int i = 0; i < 8; i += 4) {
        for (int j = i; j < i + 2; ++j) {
          a[j] = __builtin_shufflevector(b[j], b[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
          a[j + 2] = __builtin_shufflevector(b[j], b[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
      }
      for (int i = 0; i < 4; ++i) {
        b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        b[i + 4] = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
      }
      for (int i = 0; i < 8; ++i) std::memcpy(to + (column + i) * to_stride + row, &b[i], sizeof(Vec8));
    }
  }
}

// Decays and weights of one head in one chunk. With c the inclusive sum of log decays inside the
// chunk and c_T its last value; entries behind the chunk's end are zero.
struct ChunkWeights {
  float high[kChunkRows], low[kChunkRows];  // c in two floats, for each row
  float past[kChunkRows];                   // past weight, for each row
  float from_start[kChunkRows];             // e^{c}, for each row
  float to_end[kChunkRows];                 // e^{c_T - c}, for each row
  float stored[kChunkRows];                 // to_end * past: the row's weight in the state
  float diagonal[kChunkRows];               // for each token
  float carry;                              // e^{c_T}
  int64_t tokens, rows, ranks;
  bool decays;
};

template <class T>
static void chunk_weights(const LinearAttentionInputs<T>& in, int64_t token, int64_t tokens, int64_t head,
                          ChunkWeights& w) {
  const int64_t heads = in.shape.heads, ranks = in.shape.ranks;
  w.tokens = tokens, w.ranks = ranks, w.rows = tokens * ranks, w.decays = in.log_decay != nullptr;
  double sums[kChunkRows], sum = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = (token + t) * heads + head;
    // e^-1000 is zero; a finite bound keeps the differences of c finite and precise.
    if (w.decays) sum += std::max(in.log_decay[at], -1000.0f);
    sums[t] = sum;
    w.diagonal[t] = in.diagonal ? in.diagonal[at] : 1.0f;
    for (int64_t r = t * ranks; r < (t + 1) * ranks; ++r) w.past[r] = in.past ? in.past[at] : 1.0f;
  }
  for (int64_t row = 0; row < w.rows; ++row) {
    const double c = sums[row / ranks];
    w.high[row] = static_cast<float>(c);
    w.low[row] = static_cast<float>(c - w.high[row]);
    w.from_start[row] = w.high[row];
    w.to_end[row] = static_cast<float>(sum - c);
  }
  for (float* entries : {w.high, w.low, w.past, w.from_start, w.to_end}) {
    std::fill(entries + w.rows, entries + kChunkRows, 0.0f);
  }
  for (int64_t row = 0; row < kChunkRows; row += kLanes) {
    const Vec real = iota() + static_cast<int32_t>(row) < static_cast<int32_t>(w.rows) ? broadcast(1.0f) : Vec{};
    store(w.from_start + row, exp(load(w.from_start + row)) * real);
    const Vec to_end = exp(load(w.to_end + row)) * real;
    store(w.to_end + row, to_end);
    store(w.stored + row, to_end * load(w.past + row));
  }
  w.carry = tokens ? w.from_start[w.rows - 1] : 1.0f;
}

// e^{c_i - c_j} of token i for columns [column, column + kLanes); meaningless for j > i.
SEQMODELS_INLINE Vec decay_row(const ChunkWeights& w, int64_t row, int64_t column) {
  if (!w.decays) return broadcast(1.0f);
  return exp((w.high[row] - load(w.high + column)) + (w.low[row] - load(w.low + column)));
}

// Scores c[i][j] = q_i . k_j for all tiles that touch j <= i; kt is k transposed, N x kChunkRows.
[[maybe_unused]] static void lower_scores(const float* q, const float* kt, int64_t rows, int64_t ranks, int64_t key_dim,
                         int64_t key_width, float* c) {
  for_tiles(rows, round_up(rows, kLanes), [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    if (column >= visible_end(row, rows, ranks)) return;
    tile.template add_product<Order::rows>(q + row * key_width, key_width, kt + column, kChunkRows, 0, key_dim);
    for_vectors(tile, row, column, [&](int64_t r, int64_t col, Vec value) { store(c + r * kChunkRows + col, value); });
  });
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels
