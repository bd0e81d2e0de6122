// AdamW on CUDA: every byte is read and written once.

#include <cuda_runtime.h>

#include <algorithm>

#include "adamw.h"

namespace megaflow {

template <>
struct Words<8> {
    using type = uint2;
};
template <>
struct Words<16> {
    using type = uint4;
};

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;  // elements that a thread has in flight
constexpr int kTile = kThreads * kPerThread;
static_assert(kAdamWChunk % kTile == 0);

// Consecutive elements that a thread takes at once: 16 bytes of the widest array, so that a warp's access to any array
// is without gaps. Accesses of 16 bytes to 2-byte arrays too would have each access to a 4-byte one leave half sectors.
template <class F>
constexpr int kWidth = 16 / std::max({sizeof(typename F::Grad), sizeof(typename F::Param), sizeof(typename F::Stored),
                                      sizeof(typename F::Moment)});

template <class F>
__device__ __forceinline__ bool aligned(const Arrays<F>& arrays) {
    std::uintptr_t addresses = reinterpret_cast<std::uintptr_t>(arrays.grad) |
                               reinterpret_cast<std::uintptr_t>(arrays.param) |
                               reinterpret_cast<std::uintptr_t>(arrays.exp_avg) |
                               reinterpret_cast<std::uintptr_t>(arrays.exp_avg_sq);
    if constexpr (F::master != Master::param) addresses |= reinterpret_cast<std::uintptr_t>(arrays.master);
    return addresses % 16 == 0;
}

template <class F>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ AdamWBatch batch, const __grid_constant__ AdamWScalars scalars) {
    if (*scalars.skip != 0.0f) return;
    __shared__ Coefficients shared;
    if (threadIdx.x == 0) shared = coefficients(scalars);
    __syncthreads();
    const Coefficients c = shared;

    const Chunk chunk = locate(batch, std::int32_t(blockIdx.x), kAdamWChunk);
    const Arrays<F> arrays(batch.tensors[chunk.tensor], chunk.begin);
    const int thread = int(threadIdx.x);
    int done = 0;
    if (aligned(arrays)) {
        constexpr int kGroups = kPerThread / kWidth<F>;
        for (; done + kTile <= chunk.length; done += kTile) {
            Group<F, kWidth<F>> groups[kGroups];
#pragma unroll
            for (int k = 0; k < kGroups; ++k) {
                groups[k].load_from(arrays, done + (k * kThreads + thread) * kWidth<F>);
            }
#pragma unroll
            for (int k = 0; k < kGroups; ++k) {
                groups[k].update(c);
                groups[k].store_to(arrays, done + (k * kThreads + thread) * kWidth<F>);
            }
        }
    }
    for (int i = done + thread; i < chunk.length; i += kThreads) {
        Group<F, 1> element;
        element.load_from(arrays, i);
        element.update(c);
        element.store_to(arrays, i);
    }
}

}  // namespace
}  // namespace megaflow

using namespace megaflow;

extern "C" int megaflow_adamw_cuda(const AdamWCall* call, void* stream) {
    return for_each_batch<AdamWBatch>(call->tensors, call->count, kAdamWChunk, [&](const AdamWBatch& batch) {
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(unsigned(batch.chunks()));
        config.blockDim = dim3(kThreads);
        config.stream = static_cast<cudaStream_t>(stream);
        return visit_format(*call, [&](auto format) {
            return int(cudaLaunchKernelEx(&config, adamw_kernel<decltype(format)>, batch, call->scalars));
        });
    });
}

extern "C" const char* megaflow_cuda_error(int error) { return cudaGetErrorString(cudaError_t(error)); }
