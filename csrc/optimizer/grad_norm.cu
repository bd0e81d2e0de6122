// Squared norm on CUDA: one block for every chunk, then one block for all partial sums.

#include <cuda_runtime.h>

#include "grad_norm.h"

namespace megaflow {
namespace {

constexpr int kThreads = 512;
constexpr int kLoads = 4;  // 16-byte loads that a thread has in flight

// The sum over all threads of a block, in thread 0.
__device__ __forceinline__ double block_sum(double x) {
    constexpr int kWarps = kThreads / 32;
    __shared__ double sums[kWarps];
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_down_sync(0xFFFFFFFFu, x, lanes);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0;
    if (threadIdx.x == 0) {
        for (int warp = 0; warp < kWarps; ++warp) x += sums[warp];
    }
    return x;
}

template <class T>
__device__ __forceinline__ double sum_of_words(uint4 words) {
    constexpr int kWidth = 16 / sizeof(T);
    T x[kWidth];
    std::memcpy(x, &words, sizeof words);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kWidth; k += 4) sum += sum_of_squares(x[k], x[k + 1], x[k + 2], x[k + 3]);
    return double(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) chunk_kernel(const __grid_constant__ NormBatch batch, double* partials) {
    const Chunk chunk = locate(batch, std::int32_t(blockIdx.x), kNormChunk);
    const T* data = static_cast<const T*>(batch.tensors[chunk.tensor].data) + chunk.begin;
    constexpr int kTile = kThreads * kLoads * 16 / int(sizeof(T));
    const int thread = int(threadIdx.x);
    double sum = 0.0;
    int done = 0;
    if (reinterpret_cast<std::uintptr_t>(data) % 16 == 0) {
        for (; done + kTile <= chunk.length; done += kTile) {
            const uint4* from = reinterpret_cast<const uint4*>(data + done) + thread;
            uint4 words[kLoads];
#pragma unroll
            for (int k = 0; k < kLoads; ++k) words[k] = from[k * kThreads];
#pragma unroll
            for (int k = 0; k < kLoads; ++k) sum += sum_of_words<T>(words[k]);
        }
    }
    for (int i = done + thread; i < chunk.length; i += kThreads) {
        const float x = to_float(data[i]);
        sum += double(x * x);
    }
    sum = block_sum(sum);
    if (thread == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) total_kernel(const double* partials, std::int64_t count, double* result) {
    double sum = 0.0;
    for (std::int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *result = sum;
}

cudaLaunchConfig_t launch(int blocks, void* stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    return config;
}

}  // namespace
}  // namespace megaflow

using namespace megaflow;

extern "C" int megaflow_squared_norm_cuda(const NormCall* call, void* stream) {
    std::int64_t chunks = 0;
    const auto visit = [&](const NormBatch& batch) {
        const cudaLaunchConfig_t config = launch(batch.chunks(), stream);
        const auto kernel = call->storage == Storage::fp32 ? chunk_kernel<float> : chunk_kernel<bf16>;
        double* partials = call->partials + chunks;
        chunks += batch.chunks();
        return int(cudaLaunchKernelEx(&config, kernel, batch, partials));
    };
    if (const int error = for_each_batch<NormBatch>(call->tensors, call->count, kNormChunk, visit)) return error;
    const cudaLaunchConfig_t config = launch(1, stream);
    return int(cudaLaunchKernelEx(&config, total_kernel, call->partials, chunks, call->result));
}
