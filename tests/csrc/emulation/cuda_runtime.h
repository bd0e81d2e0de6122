// As much of CUDA as the kernels of csrc/optimizer use, on one CPU thread: the threads of a block are coroutines that
// take turns at barriers, and the blocks of a grid run one after another. In the place of the real header it lets
// sanitizers see what the kernels read and write.

#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // a block has it for itself while it runs
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) uint2 {
    std::uint32_t x, y;
};

struct alignas(16) uint4 {
    std::uint32_t x, y, z, w;
};

struct dim3 {
    unsigned x, y = 1, z = 1;
    dim3(unsigned width = 1) : x(width) {}
};

using cudaError_t = int;
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline dim3 threadIdx, blockIdx;
inline int launches = 0;  // of all kernels

// The threads of a block. `wait` returns when every thread has come to the same kind of barrier.
class Block {
public:
    enum Barrier { none, sync, shuffle };

    Block(unsigned threads, std::function<void()> body) : body_(std::move(body)), lanes(threads) {
        for (unsigned thread = 0; thread < threads; ++thread) {
            stacks_.emplace_back(new char[kStack]);
            contexts_.emplace_back();
            getcontext(&contexts_.back());
            contexts_.back().uc_stack = {stacks_.back().get(), 0, kStack};
            contexts_.back().uc_link = &scheduler_;
        }
    }

    void run() {
        running = this;
        for (auto& context : contexts_) makecontext(&context, [] { running->body_(), running->reached_ = none; }, 0);
        do {
            for (threadIdx.x = 0; threadIdx.x < contexts_.size(); ++threadIdx.x) {
                swapcontext(&scheduler_, &contexts_[threadIdx.x]);
                if (threadIdx.x == 0) expected_ = reached_;
                if (reached_ != expected_) std::printf("threads wait at different barriers\n"), std::abort();
            }
        } while (expected_ != none);
    }

    void wait(Barrier barrier) {
        reached_ = barrier;
        const unsigned thread = threadIdx.x;
        swapcontext(&contexts_[thread], &scheduler_);
    }

    static inline Block* running = nullptr;

private:
    static constexpr std::size_t kStack = 1 << 15;
    std::function<void()> body_;
    std::vector<std::unique_ptr<char[]>> stacks_;
    std::vector<ucontext_t> contexts_;
    ucontext_t scheduler_;
    Barrier reached_ = none, expected_ = none;

public:
    std::vector<double> lanes;  // what they exchange
};

inline void __syncthreads() { Block::running->wait(Block::sync); }

inline double __shfl_down_sync(unsigned, double x, int delta) {
    std::vector<double>& lanes = Block::running->lanes;
    const unsigned thread = threadIdx.x;
    lanes[thread] = x;
    Block::running->wait(Block::shuffle);
    const double other = thread % 32 + delta < 32 ? lanes[thread + delta] : x;
    Block::running->wait(Block::shuffle);
    return other;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    ++launches;
    Block block(config->blockDim.x, [&] { kernel(arguments...); });
    for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x) block.run();
    return 0;
}
