// Number formats of the optimizer, bit by bit, so that the host and the device compute the same.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MEGAFLOW_INLINE __host__ __device__ __forceinline__
#else
#define MEGAFLOW_INLINE inline __attribute__((always_inline))
#endif

namespace megaflow {

// How a list of tensors is stored.
enum class Storage : std::int32_t { fp32, bf16 };

struct bf16 {
    std::uint16_t bits;
};

MEGAFLOW_INLINE std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

MEGAFLOW_INLINE float float_of(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The bits of a float with every NaN made the canonical one: rounding would carry 0x7FFFFFFF, which is what CUDA's
// arithmetic gives, into the sign bit and make it -0.
MEGAFLOW_INLINE std::uint32_t roundable_bits_of(float x) {
    const std::uint32_t bits = bits_of(x);
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : bits;
}

MEGAFLOW_INLINE float to_float(float x) { return x; }
MEGAFLOW_INLINE float to_float(bf16 x) { return float_of(std::uint32_t(x.bits) << 16); }

MEGAFLOW_INLINE void from_float(float x, float& out) { out = x; }

// Round to nearest, ties to even.
MEGAFLOW_INLINE void from_float(float x, bf16& out) {
    const std::uint32_t bits = roundable_bits_of(x);
    out.bits = std::uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// A master weight as the bf16 parameter and an int16 remainder: its bits are (high bits << 16) + remainder.
//
// Any float but a NaN comes back exactly. The remainder is signed, so `high` is the master rounded half up in the bit
// pattern: to nearest, with ties away from zero. Rounding to nearest even differs at ties only, where the lower 16 bits
// are 0x8000 and the upper ones even.
MEGAFLOW_INLINE void split(float master, bf16& high, std::int16_t& remainder) {
    const std::uint32_t bits = roundable_bits_of(master);
    high.bits = std::uint16_t((bits + 0x8000u) >> 16);
    remainder = std::int16_t(std::uint16_t(bits));
}

MEGAFLOW_INLINE float join(bf16 high, std::int16_t remainder) {
    return float_of((std::uint32_t(high.bits) << 16) + std::uint32_t(std::int32_t(remainder)));
}

}  // namespace megaflow
