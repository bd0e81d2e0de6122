// How many sequences each group and source gives to a step (twins in megaflow/data/sampler/counts.py and schedule.py).

#include "host.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

namespace {

constexpr i64 kOne = i64{1} << 32;  // the weight 1 and the residual of one sequence

// Shares `batch` among `size` entries by integer weights, carrying what rounding left over; returns the corrections.
i64 quota(i64 batch, i64 size, const i64* weights, i64* residuals, i64* counts, i64* fractions) {
    i64 missing = batch;
    for (i64 k = 0; k < size; ++k) {
        const i64 exact = batch * weights[k];
        counts[k] = exact >> 32;
        fractions[k] = exact & (kOne - 1);
        residuals[k] += fractions[k];
        missing -= counts[k];
    }
    for (; missing > 0; --missing) {
        i64 best = -1;
        for (i64 k = 0; k < size; ++k)
            if (fractions[k] > 0 && (best < 0 || residuals[k] > residuals[best])) best = k;
        fractions[best] = 0;  // chosen once per step
        counts[best] += 1;
        residuals[best] -= kOne;
    }
    for (i64 corrections = 0;; ++corrections) {
        i64 receiver = -1, giver = -1;
        for (i64 k = 0; k < size; ++k) {
            if (weights[k] > 0 && residuals[k] >= kOne && (receiver < 0 || residuals[k] > residuals[receiver])) receiver = k;
            if (counts[k] > 0 && residuals[k] <= 0 && (giver < 0 || residuals[k] < residuals[giver])) giver = k;
        }
        // owed a sequence exactly, from one owed nothing: they would only change places, for ever
        if (receiver < 0 || giver < 0 || residuals[receiver] - residuals[giver] == kOne) return corrections;
        counts[receiver] += 1;
        residuals[receiver] -= kOne;
        counts[giver] -= 1;
        residuals[giver] += kOne;
    }
}

i64 floor_divide(i128 numerator, i64 denominator) {  // denominator > 0
    i128 quotient = numerator / denominator;
    if (numerator % denominator < 0) quotient -= 1;
    return static_cast<i64>(quotient);
}

// Weights at x on piecewise linear knots; what flooring leaves goes to the entry with the largest sum of both ends.
void weights_at(i64 x, i64 knots, const i64* at, const i64* table, i64 size, i64* weights) {
    const i64 next = std::upper_bound(at, at + knots, x) - at;
    const i64* last = table + std::max<i64>(next - 1, 0) * size;
    if (next == 0 || next == knots) {
        std::copy(last, last + size, weights);
        return;
    }
    const i64* target = table + next * size;
    const i64 begin = at[next - 1], span = at[next] - begin;
    i64 rest = kOne, largest = 0;
    for (i64 k = 0; k < size; ++k) {
        weights[k] = last[k] + floor_divide(static_cast<i128>(target[k] - last[k]) * (x - begin), span);
        rest -= weights[k];
        if (last[k] + target[k] > last[largest] + target[largest]) largest = k;
    }
    weights[largest] += rest;
}

enum Clock : i64 { kSteps = 0, kSequences = 1, kTokens = 2, kDocuments = 3 };

}  // namespace

extern "C" {

// Advances the state (step, residuals of groups and sources, consumed sequences) by `steps` steps. Raises `worst` to the
// largest distance from 0 that each group's residual had after a step, writes the weights and counts of the last step
// and returns the number of safety-valve corrections in all of them.
i64 megaflow_advance(i64 steps, i64 batch, i64 sequence_length, i64 clock, i64 knots, const i64* knot_at,
                     const i64* knot_weights, i64 groups, const i64* group_sizes, const i64* source_weights,
                     const i64* windows, const i64* documents, i64* step, i64* group_residuals, i64* source_residuals,
                     i64* consumed, i64* worst, i64* weights, i64* group_counts, i64* counts) {
    i64 sources = 0, sequences = 0, corrections = 0;
    for (i64 g = 0; g < groups; ++g) sources += group_sizes[g];
    for (i64 k = 0; k < sources; ++k) sequences += consumed[k];
    std::vector<i64> fractions(static_cast<std::size_t>(std::max(groups, sources)));
    for (i64 s = 0; s < steps; ++s) {
        i64 x = *step;
        if (clock == kSequences) x = sequences;
        if (clock == kTokens) x = sequences * sequence_length;
        if (clock == kDocuments) {
            x = 0;
            for (i64 k = 0; k < sources; ++k)
                x += static_cast<i64>(static_cast<i128>(consumed[k]) * documents[k] / windows[k]);
        }
        weights_at(x, knots, knot_at, knot_weights, groups, weights);
        corrections += quota(batch, groups, weights, group_residuals, group_counts, fractions.data());
        for (i64 g = 0, first = 0; g < groups; first += group_sizes[g], ++g)
            corrections += quota(group_counts[g], group_sizes[g], source_weights + first, source_residuals + first,
                                 counts + first, fractions.data());
        for (i64 g = 0; g < groups; ++g) worst[g] = std::max(worst[g], std::abs(group_residuals[g]));
        for (i64 k = 0; k < sources; ++k) consumed[k] += counts[k];
        sequences += batch;
        *step += 1;
    }
    return corrections;
}

}  // extern "C"
