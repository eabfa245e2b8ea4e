// One document of a diagonal SSM, for a block of kHeads heads; see diagonal_ssm.cpp.
#pragma once

#include <cstdint>

namespace seqmodels {

constexpr int64_t kHeads = 16;   // of a block: one vector at the widest level
constexpr int64_t kTokens = 64;  // of a chunk

// Numbers of one mode for a block of heads, each with kHeads entries: e^z, b and c, and e^{kTokens z} less the
// same power of e^z in float.
enum Constant : int { kDecay = 0, kInput = 2, kOutput = 4, kCorrection = 6, kConstants = 8 };

// Arrays over modes and heads are (modes, 2, kHeads): real parts, then imaginary ones. Pointers to tokens stand at
// the block's first head; `stride` leads from one token to the next and is negative when time runs backwards.
struct DiagonalRun {
  const float* u;
  float* y;
  const float* constants;  // (modes, kConstants, kHeads)
  const float* skip;       // (kHeads)
  float* state;            // before the document, then behind it
  int64_t length, stride, modes, heads;  // heads: of the block in use, at most kHeads
  // backward from here on
  const float* grad_y;
  float* grad_u;
  const float* grad_final;  // (modes, 2, kHeads)
  float* derivative;        // scratch: d state / d z
  float* adjoint;           // grad_final, then the gradient to the state before the document
  float *grad_z, *grad_b, *grad_c, *grad_skip;  // sums over documents
};

using DiagonalKernel = void(const DiagonalRun&);

// One token: u (batch, heads), state (batch, heads, width), y (batch, rows, heads), decay and b (heads, width), c (rows,
// heads, width) as pairs (Re c, -Im c), skip (rows, heads). `width` is twice the modes.
struct DiagonalStep {
  const float *u, *decay, *b, *c, *skip;
  float *state, *y;
  int64_t batch, heads, width, rows;
};

using DiagonalStepKernel = void(const DiagonalStep&, int64_t first_head, int64_t last_head);

}  // namespace seqmodels
