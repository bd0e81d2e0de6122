// Packing, the chunks' places and the number formats of csrc/optimizer, against plain definitions.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "batch.h"

using namespace megaflow;
using i64 = std::int64_t;

namespace {

void check(bool condition, const char* what, i64 a = 0, i64 b = 0) {
    if (condition) return;
    std::printf("%s (%lld, %lld)\n", what, static_cast<long long>(a), static_cast<long long>(b));
    std::exit(1);
}

struct Tensor {
    i64 id, numel;
};

// Every element of every tensor is in one chunk, in order, and no batch could have held another tensor.
void check_batches(const std::vector<i64>& lengths, std::int32_t chunk_size) {
    std::vector<Tensor> tensors;
    std::vector<i64> left = lengths;  // elements not seen yet
    i64 full = 0;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        tensors.push_back({i64(i), lengths[i]});
        full += lengths[i] > 0;
    }
    using Three = Batch<Tensor, 3>;
    i64 batches = 0, seen = 0;
    for_each_batch<Three>(tensors.data(), i64(tensors.size()), chunk_size, [&](const Three& batch) {
        ++batches;
        seen += batch.count;
        for (std::int32_t i = 0; i < batch.chunks(); ++i) {
            const Chunk chunk = locate(batch, i, chunk_size);
            check(chunk.tensor >= 0 && chunk.tensor < batch.count, "tensor", chunk.tensor);
            const i64 id = batch.tensors[chunk.tensor].id;
            check(chunk.begin == lengths[id] - left[id], "begin", chunk.begin, id);
            check(chunk.length == std::min<i64>(chunk_size, left[id]), "length", chunk.length, id);
            left[id] -= chunk.length;
        }
        return 0;
    });
    check(seen == full && batches == (full + 2) / 3, "batches", batches, full);
    check(std::all_of(left.begin(), left.end(), [](i64 n) { return n == 0; }), "elements left");
}

void check_packing() {
    std::mt19937_64 generator(0);
    for (int round = 0; round < 2000; ++round) {
        std::vector<i64> lengths(generator() % 12);
        for (i64& n : lengths) n = generator() % (round % 2 ? 5 : 100);
        check_batches(lengths, 1 + generator() % 20);
    }
    // beyond 2^31 elements, and beyond 2^31 chunks in all
    Batch<Tensor, 4> batch;
    const std::vector<Tensor> large{{0, (i64(1) << 40) + 5}, {1, i64(1) << 45}, {2, i64(1) << 45}, {3, 7}};
    check(pack(batch, large.data(), 0, 4, 16384) == 1, "two chunk counts that overflow");
    check(batch.chunks() == (1 << 26) + 1, "chunks", batch.chunks());
    const Chunk last = locate(batch, 1 << 26, 16384);
    check(last.begin == i64(1) << 40 && last.length == 5, "last chunk", last.begin, last.length);
    int error = for_each_batch<Batch<Tensor, 1>>(large.data(), 4, 16384, [](const auto& b) { return int(b.count + 6); });
    check(error == 7, "error", error);
}

// The nearest bf16, ties to even, by way of fp64.
float nearest(float x) {
    if (std::isnan(x) || std::isinf(x)) return x;
    int exponent;
    std::frexp(x, &exponent);
    const double step = std::ldexp(1.0, std::max(exponent - 8, -133));
    const double rounded = std::nearbyint(x / step) * step;
    return std::abs(rounded) > 3.39e38 ? std::copysign(std::numeric_limits<float>::infinity(), x) : float(rounded);
}

void check_numbers() {
    for (std::uint32_t high = 0; high < 65536; ++high) {
        for (const std::uint32_t low : {0x0000, 0x0001, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xABCD, 0xFFFE, 0xFFFF}) {
            const std::uint32_t bits = high << 16 | low;
            const float x = float_of(bits);
            bf16 rounded, upper;
            std::int16_t remainder;
            from_float(x, rounded);
            split(x, upper, remainder);
            const float back = join(upper, remainder);
            if (std::isnan(x)) {
                check(std::isnan(to_float(rounded)) && std::isnan(to_float(upper)) && std::isnan(back), "NaN", bits);
                continue;
            }
            check(bits_of(to_float(rounded)) == bits_of(nearest(x)), "rounding", bits);
            check(bits_of(back) == bits, "remainder", bits, bits_of(back));
            const bool tie_to_even = low == 0x8000 && high % 2 == 0;  // the only ones that go elsewhere
            check(upper.bits == rounded.bits + tie_to_even, "half up", bits, upper.bits);
        }
    }
}

}  // namespace

int main() {
    check_packing();
    check_numbers();
    std::printf("passed\n");
}
