// Which windows a step takes: permutations of window ids and the cards of a step (twins in megaflow/data/sampler/order.py).

#include "host.h"

#include <algorithm>

namespace {

u64 mix64(u64 x) {
    x ^= x >> 30;
    x *= 0xBF58476D1CE4E5B9ULL;
    x ^= x >> 27;
    x *= 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
}

// One more number into a hash that began with 0.
u64 hash_on(u64 state, u64 value) { return mix64(state + 0x9E3779B97F4A7C15ULL + value); }

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
        for (int r = 0; r < rounds_; ++r) keys_[r] = static_cast<u32>(hash_on(hash_on(0, key), static_cast<u64>(r)));
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

}  // namespace

extern "C" {

// Permutes indices in place: the next lengths[r] of them lie in [0, sizes[r]) and use the permutation of keys[r].
void megaflow_permute(i64 runs, const u64* keys, const u64* sizes, const i64* lengths, i64* indices) {
    for (i64 r = 0; r < runs; ++r) {
        const Permutation permutation(keys[r], sizes[r]);
        for (i64 i = 0; i < lengths[r]; ++i) indices[i] = static_cast<i64>(permutation(static_cast<u64>(indices[i])));
        indices += lengths[r];
    }
}

// The cards of a step: counts[k] sequences of source k from its first[k]-th on, epoch by epoch, source after source.
void megaflow_draw(u64 seed, i64 sources, const u64* keys, const i64* windows, const i64* first, const i64* counts,
                   i64* epoch, i64* window) {
    for (i64 k = 0; k < sources; ++k) {
        const i64 end = first[k] + counts[k];
        for (i64 taken = first[k]; taken < end;) {
            const i64 now = taken / windows[k], start = now * windows[k];
            const u64 key = hash_on(hash_on(hash_on(0, seed), keys[k]), static_cast<u64>(now));
            const Permutation permutation(key, static_cast<u64>(windows[k]));
            for (const i64 stop = std::min(end, start + windows[k]); taken < stop; ++taken) {
                *epoch++ = now;
                *window++ = static_cast<i64>(permutation(static_cast<u64>(taken - start)));
            }
        }
    }
}

}  // extern "C"
