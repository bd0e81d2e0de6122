// Integer work of the data path on the host: permutations of window ids, counts per step, packing of examples.
// Plain extern "C" over arrays that the caller owns; megaflow/data/native.py loads it. Every function has a Python twin
// with identical results. Callers check ranges: nothing here can fail on checked input.

#include <algorithm>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

namespace {

using i64 = std::int64_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i128 = __int128;

constexpr i64 kOne = i64{1} << 32;  // the weight 1 and the residual of one sequence

// ---------------------------------------------------------------- permutations

u64 mix64(u64 x) {
    x ^= x >> 30;
    x *= 0xBF58476D1CE4E5B9ULL;
    x ^= x >> 27;
    x *= 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
}

u64 hash_pair(u64 first, u64 second) {
    constexpr u64 step = 0x9E3779B97F4A7C15ULL;
    return mix64(mix64(step + first) + step + second);
}

u32 round_function(u32 value, u32 key) {
    u32 z = value ^ key;
    z ^= z >> 16;
    z *= 0x21F0AAADU;
    z ^= z >> 15;
    z *= 0x735A2D97U;
    return z ^ (z >> 15);
}

// A keyed bijection of [0, size): a Feistel network on the next power of two, walked until it falls below size.
class Permutation {
  public:
    Permutation(u64 key, u64 size) : size_(size), rounds_(size < (u64{1} << 16) ? 6 : 4) {
        int bits = 2;
        while (bits < 64 && ((size - 1) >> bits) != 0) ++bits;
        low_bits_ = bits / 2;
        low_mask_ = static_cast<u32>((u64{1} << low_bits_) - 1);
        high_mask_ = static_cast<u32>((u64{1} << (bits - low_bits_)) - 1);
        for (int r = 0; r < rounds_; ++r) keys_[r] = static_cast<u32>(hash_pair(key, static_cast<u64>(r)));
    }

    u64 operator()(u64 x) const {
        if (size_ == 1) return 0;
        do {
            u32 high = static_cast<u32>(x >> low_bits_);
            u32 low = static_cast<u32>(x) & low_mask_;
            for (int r = 0; r < rounds_; r += 2) {
                high ^= round_function(low, keys_[r]) & high_mask_;
                low ^= round_function(high, keys_[r + 1]) & low_mask_;
            }
            x = (static_cast<u64>(high) << low_bits_) | low;
        } while (x >= size_);
        return x;
    }

  private:
    u64 size_;
    int rounds_, low_bits_;
    u32 low_mask_, high_mask_;
    u32 keys_[6];
};

// ---------------------------------------------------------------- counts

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
        if (receiver < 0 || giver < 0) return corrections;
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

int megaflow_abi_version() { return 2; }

// Permutes indices in place: the next lengths[r] of them lie in [0, sizes[r]) and use the permutation of keys[r].
void megaflow_permute(i64 runs, const u64* keys, const u64* sizes, const i64* lengths, i64* indices) {
    for (i64 r = 0; r < runs; ++r) {
        const Permutation permutation(keys[r], sizes[r]);
        for (i64 i = 0; i < lengths[r]; ++i) indices[i] = static_cast<i64>(permutation(static_cast<u64>(indices[i])));
        indices += lengths[r];
    }
}

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

// Best-fit packing in the order given: the open bin with the least room that holds the example, the oldest on ties.
void megaflow_best_fit(i64 examples, const std::int32_t* lengths, i64 capacity, i64* bins) {
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
