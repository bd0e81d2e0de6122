// AdamW on the CPU: the elements of adamw.h in loops that compilers vectorise.

#include "adamw.h"
#include "clones.h"

namespace megaflow {
namespace {

template <class F>
MEGAFLOW_CLONES void update_chunk(const AdamWTensor& tensor, const Chunk& chunk, const Coefficients& c) {
    const Arrays<F> arrays(tensor, chunk.begin);
    const Coefficients coefficients = c;
#pragma GCC ivdep  // an element's arrays do not overlap another's
    for (std::int32_t i = 0; i < chunk.length; ++i) {
        Group<F, 1> element;
        element.load_from(arrays, i);
        element.update(coefficients);
        element.store_to(arrays, i);
    }
}

struct Work {
    const AdamWBatch* batch;
    Coefficients coefficients;
};

template <class F>
void update_chunks(void* context, std::int64_t first, std::int64_t last) {
    const Work& work = *static_cast<const Work*>(context);
    for (std::int64_t i = first; i < last; ++i) {
        const Chunk chunk = locate(*work.batch, std::int32_t(i), kAdamWChunk);
        update_chunk<F>(work.batch->tensors[chunk.tensor], chunk, work.coefficients);
    }
}

}  // namespace
}  // namespace megaflow

using namespace megaflow;

extern "C" void megaflow_adamw_cpu(const AdamWCall* call, ParallelFor parallel_for) {
    if (*call->scalars.skip != 0.0f) return;
    const Coefficients c = coefficients(call->scalars);
    for_each_batch<AdamWBatch>(call->tensors, call->count, kAdamWChunk, [&](const AdamWBatch& batch) {
        Work work{&batch, c};
        const ParallelBody body = visit_format(*call, [](auto format) -> ParallelBody {
            return update_chunks<decltype(format)>;
        });
        parallel_for(batch.chunks(), body, &work);
        return 0;
    });
}
