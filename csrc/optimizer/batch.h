// Tensors of one kernel launch, cut into chunks: how they are packed, and how a block finds its own.

#pragma once

#include <cstddef>

#include "numbers.h"

namespace megaflow {

constexpr std::int64_t kMaxChunks = 0x7FFFFFFF;  // blocks of a grid
constexpr std::size_t kParameterBytes = 4096;    // of a kernel, on every GPU

// The tensors of one launch, passed as a kernel parameter. `Tensor` has a member `numel`.
template <class Tensor, int Capacity>
struct Batch {
    Tensor tensors[Capacity];
    std::int32_t first_chunk[Capacity + 1];  // of every tensor; one more is the number of chunks
    std::int32_t count;

    MEGAFLOW_INLINE std::int32_t chunks() const { return first_chunk[count]; }
};

// Consecutive elements of one tensor.
struct Chunk {
    std::int32_t tensor;
    std::int32_t length;
    std::int64_t begin;
};

MEGAFLOW_INLINE std::int64_t chunks_of(std::int64_t numel, std::int32_t size) { return (numel + size - 1) / size; }

// Packs tensors from `first` on, leaving out empty ones, and returns the first that did not fit.
template <class Tensor, int Capacity>
std::int64_t pack(Batch<Tensor, Capacity>& batch, const Tensor* tensors, std::int64_t first, std::int64_t count,
                  std::int32_t chunk_size) {
    batch.count = 0;
    batch.first_chunk[0] = 0;
    for (; first < count && batch.count < Capacity; ++first) {
        if (tensors[first].numel == 0) continue;
        const std::int64_t end = batch.chunks() + chunks_of(tensors[first].numel, chunk_size);
        if (end > kMaxChunks) break;
        batch.tensors[batch.count] = tensors[first];
        batch.first_chunk[++batch.count] = std::int32_t(end);
    }
    return first;
}

// Calls `visit(batch)` for as few batches as hold all tensors; stops at the first result that is not 0 and returns it.
template <class Batch, class Tensor, class Visit>
int for_each_batch(const Tensor* tensors, std::int64_t count, std::int32_t chunk_size, Visit visit) {
    Batch batch;
    for (std::int64_t first = 0; first < count;) {
        first = pack(batch, tensors, first, count, chunk_size);
        if (batch.count == 0) break;  // only empty tensors were left
        if (const int error = visit(batch)) return error;
    }
    return 0;
}

// The tensor and the elements of a chunk, by bisection of the chunk counts' prefix sums.
template <class Tensor, int Capacity>
MEGAFLOW_INLINE Chunk locate(const Batch<Tensor, Capacity>& batch, std::int32_t chunk, std::int32_t chunk_size) {
    std::int32_t low = 0, high = batch.count;  // first_chunk[low] <= chunk < first_chunk[high]
    while (high - low > 1) {
        const std::int32_t middle = (low + high) / 2;
        if (batch.first_chunk[middle] <= chunk) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const std::int64_t begin = std::int64_t(chunk - batch.first_chunk[low]) * chunk_size;
    const std::int64_t left = batch.tensors[low].numel - begin;
    return {low, left < chunk_size ? std::int32_t(left) : chunk_size, begin};
}

// Runs `body(context, first, last)` over parts of the range [0, items), maybe on several threads.
using ParallelBody = void (*)(void* context, std::int64_t first, std::int64_t last);
using ParallelFor = void (*)(std::int64_t items, ParallelBody body, void* context);

}  // namespace megaflow
