// Packing of whole examples into windows (twin in megaflow/data/native.py).

#include "host.h"

#include <set>
#include <utility>

extern "C" {

// Best-fit packing in the order given: the open bin with the least room that holds the example, the oldest on ties.
void megaflow_best_fit(i64 examples, const i32* lengths, i64 capacity, i64* bins) {
    std::set<std::pair<i64, i64>> open;  // (room, bin)
    i64 opened = 0;
    for (i64 e = 0; e < examples; ++e) {
        const auto found = open.lower_bound({lengths[e], 0});
        i64 room = capacity, chosen = opened;
        if (found == open.end()) {
            ++opened;
        } else {
            room = found->first;
            chosen = found->second;
            open.erase(found);
        }
        bins[e] = chosen;
        if (room > lengths[e]) open.insert({room - lengths[e], chosen});
    }
}

}  // extern "C"
