// The launchers of linear_recurrence.cu, free of CUDA and torch headers.
#pragma once

#include <cstdint>

namespace seqmodels {

// All pointers are device memory, contiguous float32; complex channels are pairs of components.
struct RecurrenceGrid {
  const float* decay;          // (channels), or (batch, length, channels) when varying
  const float* initial_state;  // (documents, channels) or null: zeros
  const int64_t* document;     // (batch, length) slot of each token, or null: each row is one document
  const unsigned char* flags;  // (batch, length): 1 inside a document, 2 its first token, 4 its last; null as above
  const float* carry;          // (batch, segments, channels): the state behind (backward: g at the first token of) each
                               // segment, or null: zeros
  float *products, *ends;      // as carry; given, only the segments' maps are written to them, nothing else
  int64_t batch, length, channels, segment;
  bool varying, complex;
};

// h[t] = decay[t] h[t-1] + x[t]. Returns a cudaError_t; stream is a cudaStream_t.
int linear_recurrence_forward(const RecurrenceGrid& grid, const float* x, float* h, void* stream);

// grad_decay is (batch, length, channels) when varying, else (batch, segments, channels).
int linear_recurrence_backward(const RecurrenceGrid& grid, const float* h, const float* grad_h,
                               const float* grad_final_state, float* grad_x, float* grad_decay, void* stream);

const char* linear_recurrence_error(int error);

}  // namespace seqmodels
