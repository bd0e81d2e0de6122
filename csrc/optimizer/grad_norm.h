// Squared norm of a list of tensors: squares in fp32, summed by fours or eights in fp32 and from there on in fp64.
//
// Two stages in a fixed order: a partial sum for every chunk, then their sum. So the result does not depend on the
// number of threads or multiprocessors, and is the same bits in every run. An element that is not finite makes it not
// finite, since nothing is subtracted: this is the check of the gradients. So does an element beyond 1.8e19, whose
// square overflows fp32; squares of elements below 1e-23 vanish.

#pragma once

#include "batch.h"

namespace megaflow {

struct NormTensor {
    const void* data;
    std::int64_t numel;
};

struct NormCall {
    const NormTensor* tensors;
    std::int64_t count;
    Storage storage;
    double* partials;  // room for `megaflow_norm_chunks` of them
    double* result;    // both on the device of the tensors
};

constexpr int kNormChunk = 65536;
using NormBatch = Batch<NormTensor, 192>;
static_assert(sizeof(NormBatch) + sizeof(double*) <= kParameterBytes);

template <class T>
MEGAFLOW_INLINE float sum_of_squares(T a, T b, T c, T d) {
    const float w = to_float(a), x = to_float(b), y = to_float(c), z = to_float(d);
    return (w * w + x * x) + (y * y + z * z);
}

}  // namespace megaflow

// The CUDA function enqueues on a `cudaStream_t` of the current device and returns its error, 0 for none.
extern "C" {
std::int64_t megaflow_norm_chunks(const megaflow::NormTensor* tensors, std::int64_t count);
void megaflow_squared_norm_cpu(const megaflow::NormCall* call, megaflow::ParallelFor parallel_for);
int megaflow_squared_norm_cuda(const megaflow::NormCall* call, void* stream);
}
