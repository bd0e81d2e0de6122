// Runs the CUDA kernels of csrc/optimizer on the CPU (see emulation/cuda_runtime.h) for many lengths, alignments and
// formats, and compares them with the CPU implementation: AdamW bit for bit, the norm with plain fp64.

#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "adamw.h"
#include "grad_norm.h"

using namespace megaflow;
using i64 = std::int64_t;

namespace {

std::mt19937_64 generator(0);

void check(bool condition, const char* what, i64 a = 0, i64 b = 0, i64 c = 0) {
    if (condition) return;
    std::printf("%s (%lld, %lld, %lld)\n", what, static_cast<long long>(a), static_cast<long long>(b),
                static_cast<long long>(c));
    std::exit(1);
}

void serial_for(i64 items, ParallelBody body, void* context) { body(context, 0, items); }

// `numel` elements, `offset` ones behind a 16-byte border, up to the very end of an allocation.
struct Array {
    std::vector<unsigned char> bytes;
    i64 begin;

    Array(i64 numel, i64 element, i64 offset) : bytes((numel + offset) * element), begin(offset * element) {}
    void* data() { return bytes.data() + begin; }

    Array& fill(Storage storage, float low, float high) {
        std::uniform_real_distribution<float> values(low, high);
        const i64 step = storage == Storage::fp32 ? 4 : 2;
        for (i64 at = 0; at < i64(bytes.size()); at += step) {
            const float x = values(generator);
            bf16 rounded;
            from_float(x, rounded);
            std::memcpy(&bytes[at], storage == Storage::fp32 ? static_cast<const void*>(&x) : &rounded, step);
        }
        return *this;
    }
};

Array random_array(i64 numel, i64 offset, Storage storage, float low, float high) {
    Array array(numel, storage == Storage::fp32 ? 4 : 2, offset);
    array.fill(storage, low, high);
    return array;
}

// All arrays of a list of tensors.
struct State {
    std::vector<i64> lengths;
    std::vector<std::vector<Array>> arrays;  // of every tensor: grad, param, master, exp_avg, exp_avg_sq

    State(std::vector<i64> sizes, i64 offset, Storage grad, Master master, Storage moment) : lengths(sizes) {
        const Storage param = master == Master::param ? Storage::fp32 : Storage::bf16;
        const Storage stored = master == Master::remainder ? Storage::bf16 : Storage::fp32;  // any 16 bits are one
        for (const i64 n : lengths) {
            arrays.push_back({random_array(n, offset, grad, -1e-2f, 1e-2f), random_array(n, offset, param, -1, 1),
                              random_array(n, offset, stored, -1, 1), random_array(n, offset, moment, -1e-3f, 1e-3f),
                              random_array(n, offset, moment, 0, 1e-6f)});
        }
    }

    std::vector<AdamWTensor> tensors() {
        std::vector<AdamWTensor> list;
        for (std::size_t i = 0; i < arrays.size(); ++i) {
            std::vector<Array>& a = arrays[i];
            list.push_back({a[0].data(), a[1].data(), a[2].data(), a[3].data(), a[4].data(), lengths[i]});
        }
        return list;
    }
};

// One step by both implementations.
void check_adamw(const std::vector<i64>& lengths, i64 offset, Storage grad, Master master, Storage moment,
                 float skip = 0) {
    State device(lengths, offset, grad, master, moment), host = device;
    const State before = device;
    const float steps = 3, grad_scale = 0.5f;
    const auto on_device = device.tensors(), on_host = host.tensors();
    const AdamWScalars scalars{&steps, &grad_scale, &skip, 1e-2, 0.9, 0.99, 1e-8, 0.1};
    AdamWCall call{on_device.data(), i64(lengths.size()), grad, master, moment, scalars};
    check(megaflow_adamw_cuda(&call, nullptr) == 0, "launch");
    call.tensors = on_host.data();
    megaflow_adamw_cpu(&call, serial_for);
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        for (int k = 0; k < 5; ++k) {
            const auto& bytes = device.arrays[i][k].bytes;
            check(bytes == host.arrays[i][k].bytes, "adamw differs: length, offset, array", lengths[i], offset, k);
            const bool same = bytes == before.arrays[i][k].bytes;
            const bool written = skip == 0 && k > 0 && !(k == 2 && master == Master::param);
            check(same || written, "adamw wrote: length, offset, array", lengths[i], offset, k);
            check(!same || !written || lengths[i] < 100, "adamw wrote nothing: length, array", lengths[i], k);
        }
    }
}

void check_all_adamw() {
    // around a tile of 2048 elements, a chunk of 16384, and more tensors than a launch takes
    const std::vector<i64> edges{1, 7, 0, 2047, 2048, 2049, 4096 + 3, 16384, 16385, 2 * 16384 + 2048 + 5};
    for (const Storage grad : {Storage::fp32, Storage::bf16}) {
        for (const Master master : {Master::param, Master::fp32, Master::remainder}) {
            for (const Storage moment : {Storage::fp32, Storage::bf16}) {
                check_adamw(edges, 0, grad, master, moment);
                check_adamw({5000}, 8, grad, master, moment);  // aligned again
                check_adamw({1, 5000}, 1, grad, master, moment);
            }
        }
    }
    check_adamw(edges, 0, Storage::bf16, Master::fp32, Storage::fp32, 1);
    std::vector<i64> many;
    for (i64 i = 0; i < 90; ++i) many.push_back(i % 9);
    const int before = launches;
    check_adamw(many, 0, Storage::bf16, Master::fp32, Storage::fp32);
    check(launches - before == 2, "launches of 80 tensors that are not empty", launches - before);
}

double squared_norm(const NormCall& call, double* partials) {
    const i64 chunks = megaflow_norm_chunks(call.tensors, call.count);
    for (i64 i = 0; i < chunks; ++i) partials[i] = std::numeric_limits<double>::quiet_NaN();
    *call.result = std::numeric_limits<double>::quiet_NaN();
    check(megaflow_squared_norm_cuda(&call, nullptr) == 0, "launch");
    return *call.result;
}

void check_norm(const std::vector<i64>& lengths, i64 offset, Storage storage) {
    std::vector<Array> arrays;
    std::vector<NormTensor> tensors;
    double expected = 0;
    for (const i64 n : lengths) arrays.push_back(random_array(n, offset, storage, -1, 1));
    for (std::size_t i = 0; i < arrays.size(); ++i) {
        const void* data = arrays[i].data();
        tensors.push_back({data, lengths[i]});
        for (i64 k = 0; k < lengths[i]; ++k) {
            const double x = storage == Storage::fp32 ? double(static_cast<const float*>(data)[k])
                                                      : double(to_float(static_cast<const bf16*>(data)[k]));
            expected += x * x;
        }
    }
    std::vector<double> partials(megaflow_norm_chunks(tensors.data(), i64(tensors.size())));
    double result;
    const NormCall call{tensors.data(), i64(tensors.size()), storage, partials.data(), &result};
    const double first = squared_norm(call, partials.data());
    check(std::abs(first - expected) <= 1e-7 * expected, "norm is off: tensors, offset", i64(lengths.size()), offset);
    check(first == squared_norm(call, partials.data()), "norm differs between runs", i64(lengths.size()), offset);
    megaflow_squared_norm_cpu(&call, serial_for);
    check(std::abs(result - expected) <= 1e-7 * expected, "norm on the CPU is off", i64(lengths.size()), offset);
    // an element that is not finite is seen, wherever it is
    for (const i64 at : {i64(0), lengths.back() / 2, lengths.back() - 1}) {
        const i64 step = storage == Storage::fp32 ? 4 : 2;
        unsigned char* high = static_cast<unsigned char*>(arrays.back().data()) + at * step + step - 2;
        unsigned char kept[2] = {high[0], high[1]};
        high[0] = 0x80, high[1] = 0xFF;  // negative infinity, or a NaN of fp32 with lower bits
        check(!std::isfinite(squared_norm(call, partials.data())), "norm misses an element", at, offset);
        high[0] = kept[0], high[1] = kept[1];
    }
}

void check_all_norms() {
    for (const Storage storage : {Storage::fp32, Storage::bf16}) {
        // around tiles of 8192 and 16384 elements and a chunk of 65536
        check_norm({1, 0, 7, 8191, 8192, 16385, 65536, 65537 + 16384}, 0, storage);
        check_norm({20000}, 8, storage);
        check_norm({3, 20000}, 1, storage);
    }
    double result;
    const NormTensor empty{nullptr, 0};
    check(squared_norm({&empty, 1, Storage::fp32, nullptr, &result}, nullptr) == 0, "norm of nothing");
    const float two = 2;
    const std::vector<NormTensor> many(193, {&two, 1});  // one more than a launch takes
    std::vector<double> partials(many.size());
    const int before = launches;
    check(squared_norm({many.data(), 193, Storage::fp32, partials.data(), &result}, partials.data()) == 4 * 193, "many");
    check(launches - before == 3, "launches of 193 tensors", launches - before);
}

}  // namespace

int main() {
    check_all_adamw();
    check_all_norms();
    std::printf("passed\n");
}
