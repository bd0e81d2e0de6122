// Squared norm on the CPU, and the number of partial sums of either implementation.

#include "clones.h"
#include "grad_norm.h"

namespace megaflow {
namespace {

template <class T>
MEGAFLOW_CLONES double chunk_sum(const T* data, std::int32_t length) {
    constexpr int kLanes = 16;  // sums side by side
    double sums[kLanes] = {};
    std::int32_t i = 0;
    for (; i + 4 * kLanes <= length; i += 4 * kLanes) {
        const T* x = data + i;
        for (int lane = 0; lane < kLanes; ++lane) {
            sums[lane] += double(sum_of_squares(x[lane], x[kLanes + lane], x[2 * kLanes + lane], x[3 * kLanes + lane]));
        }
    }
    for (; i < length; ++i) {
        const float x = to_float(data[i]);
        sums[0] += double(x * x);
    }
    double total = 0.0;
    for (const double sum : sums) total += sum;
    return total;
}

struct Work {
    const NormBatch* batch;
    double* partials;
};

template <class T>
void sum_chunks(void* context, std::int64_t first, std::int64_t last) {
    const Work& work = *static_cast<const Work*>(context);
    for (std::int64_t i = first; i < last; ++i) {
        const Chunk chunk = locate(*work.batch, std::int32_t(i), kNormChunk);
        const T* data = static_cast<const T*>(work.batch->tensors[chunk.tensor].data) + chunk.begin;
        work.partials[i] = chunk_sum(data, chunk.length);
    }
}

}  // namespace
}  // namespace megaflow

using namespace megaflow;

extern "C" std::int64_t megaflow_norm_chunks(const NormTensor* tensors, std::int64_t count) {
    std::int64_t chunks = 0;
    for (std::int64_t i = 0; i < count; ++i) chunks += chunks_of(tensors[i].numel, kNormChunk);
    return chunks;
}

extern "C" void megaflow_squared_norm_cpu(const NormCall* call, ParallelFor parallel_for) {
    const ParallelBody body = call->storage == Storage::fp32 ? sum_chunks<float> : sum_chunks<bf16>;
    std::int64_t chunks = 0;
    for_each_batch<NormBatch>(call->tensors, call->count, kNormChunk, [&](const NormBatch& batch) {
        Work work{&batch, call->partials + chunks};
        chunks += batch.chunks();
        parallel_for(batch.chunks(), body, &work);
        return 0;
    });
    *call->result = 0.0;
    for (std::int64_t i = 0; i < chunks; ++i) *call->result += call->partials[i];
}
