// AdamW (Loshchilov and Hutter, arXiv 1711.05101) of one element, shared by the CPU and the CUDA implementation, and
// what both are called with.

#pragma once

#include <cmath>
#include <type_traits>

#include "batch.h"

namespace megaflow {

// Where the fp32 master weights are.
enum class Master : std::int32_t {
    param,      // the parameters are fp32 and their own masters
    fp32,       // beside bf16 parameters, which are the masters rounded to nearest even
    remainder,  // bf16 parameters and int16 remainders (see `split`)
};

struct AdamWTensor {
    const void* grad;
    void* param;
    void* master;
    void* exp_avg;
    void* exp_avg_sq;
    std::int64_t numel;
};

// Pointers are to one fp32 each, on the device of the tensors.
struct AdamWScalars {
    const float* steps;       // already taken
    const float* grad_scale;  // multiplies the gradients
    const float* skip;        // not 0: change nothing
    double lr, beta1, beta2, eps, weight_decay;
};

struct AdamWCall {
    const AdamWTensor* tensors;
    std::int64_t count;
    Storage grads;
    Master master;
    Storage moments;  // of both
    AdamWScalars scalars;
};

constexpr int kAdamWChunk = 16384;  // enough to make a block's fp64 coefficients worth while
using AdamWBatch = Batch<AdamWTensor, 72>;
static_assert(sizeof(AdamWBatch) + sizeof(AdamWScalars) <= kParameterBytes);

// What an element's update needs, in fp32 but computed in fp64.
struct Coefficients {
    float grad_scale, beta1, beta2, one_minus_beta1, one_minus_beta2, eps;
    float step_size;         // lr / (1 - beta1^t)
    float inv_bias2_sqrt;    // 1 / sqrt(1 - beta2^t)
    float lr_weight_decay;
};

MEGAFLOW_INLINE double bias_correction(double beta, double steps) { return 1.0 - pow(beta, steps); }

MEGAFLOW_INLINE Coefficients coefficients(const AdamWScalars& s) {
    const double t = double(*s.steps) + 1.0;
    Coefficients c;
    c.grad_scale = *s.grad_scale;
    c.beta1 = float(s.beta1);
    c.beta2 = float(s.beta2);
    c.one_minus_beta1 = float(1.0 - s.beta1);
    c.one_minus_beta2 = float(1.0 - s.beta2);
    c.eps = float(s.eps);
    c.step_size = float(s.lr / bias_correction(s.beta1, t));
    c.inv_bias2_sqrt = float(1.0 / sqrt(bias_correction(s.beta2, t)));
    c.lr_weight_decay = float(s.lr * s.weight_decay);
    return c;
}

// On the device the hardware's square root and division, of 2 units in the last place: the exact ones have a branch for
// each element, behind which loads do not start, and their error would be invisible in an update of about lr.
MEGAFLOW_INLINE float square_root(float x) {
#ifdef __CUDA_ARCH__
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
#else
    return sqrtf(x);
#endif
}

MEGAFLOW_INLINE float quotient(float numerator, float denominator) {
#ifdef __CUDA_ARCH__
    return __fdividef(numerator, denominator);
#else
    return numerator / denominator;
#endif
}

// The decay is subtracted: a factor 1 - lr * weight_decay, usually about 1 - 1e-6, has an error of percents in fp32.
MEGAFLOW_INLINE void update_element(const Coefficients& c, float grad, float& master, float& exp_avg,
                                    float& exp_avg_sq) {
    const float g = grad * c.grad_scale;
    exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * g;
    exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * g * g;
    const float denominator = square_root(exp_avg_sq) * c.inv_bias2_sqrt + c.eps;
    master -= c.step_size * quotient(exp_avg, denominator) + c.lr_weight_decay * master;
}

// The types of a call's tensors.
template <class GradType, Master master_kind, class MomentType>
struct Format {
    static constexpr Master master = master_kind;
    using Grad = GradType;
    using Moment = MomentType;
    using Param = std::conditional_t<master == Master::param, float, bf16>;
    using Stored = std::conditional_t<master == Master::remainder, std::int16_t, float>;  // in the masters' tensor
};

// Calls `visit(Format<...>{})` with the types that a call names.
template <class Visit>
auto visit_format(const AdamWCall& call, Visit visit) {
    const auto with_moment = [&](auto grad, auto master) {
        using Grad = decltype(grad);
        if (call.moments == Storage::fp32) return visit(Format<Grad, decltype(master)::value, float>{});
        return visit(Format<Grad, decltype(master)::value, bf16>{});
    };
    const auto with_master = [&](auto grad) {
        if (call.master == Master::param) return with_moment(grad, std::integral_constant<Master, Master::param>{});
        if (call.master == Master::fp32) return with_moment(grad, std::integral_constant<Master, Master::fp32>{});
        return with_moment(grad, std::integral_constant<Master, Master::remainder>{});
    };
    return call.grads == Storage::fp32 ? with_master(float{}) : with_master(bf16{});
}

// Where a chunk's elements are.
template <class F>
struct Arrays {
    const typename F::Grad* grad;
    typename F::Param* param;
    typename F::Stored* master;
    typename F::Moment* exp_avg;
    typename F::Moment* exp_avg_sq;

    MEGAFLOW_INLINE Arrays(const AdamWTensor& tensor, std::int64_t begin)
        : grad(static_cast<const typename F::Grad*>(tensor.grad) + begin),
          param(static_cast<typename F::Param*>(tensor.param) + begin),
          master(static_cast<typename F::Stored*>(tensor.master) + begin),
          exp_avg(static_cast<typename F::Moment*>(tensor.exp_avg) + begin),
          exp_avg_sq(static_cast<typename F::Moment*>(tensor.exp_avg_sq) + begin) {}
};

// The type in which `Bytes` bytes are moved at once; the CUDA implementation defines it.
template <int Bytes>
struct Words;

template <int Width, class T>
MEGAFLOW_INLINE void load(const T* from, T (&to)[Width]) {
    if constexpr (Width == 1) {
        to[0] = *from;
    } else {
        const auto words = *reinterpret_cast<const typename Words<Width * sizeof(T)>::type*>(from);
        std::memcpy(to, &words, sizeof words);
    }
}

template <int Width, class T>
MEGAFLOW_INLINE void store(T* to, const T (&from)[Width]) {
    if constexpr (Width == 1) {
        *to = from[0];
    } else {
        typename Words<Width * sizeof(T)>::type words;
        std::memcpy(&words, from, sizeof words);
        *reinterpret_cast<decltype(words)*>(to) = words;
    }
}

// `Width` consecutive elements of a chunk, in registers.
template <class F, int Width>
struct Group {
    typename F::Grad grad[Width];
    typename F::Param param[Width];
    typename F::Stored master[Width];
    typename F::Moment exp_avg[Width];
    typename F::Moment exp_avg_sq[Width];

    MEGAFLOW_INLINE void load_from(const Arrays<F>& arrays, std::int32_t i) {
        load<Width>(arrays.grad + i, grad);
        if constexpr (F::master != Master::fp32) load<Width>(arrays.param + i, param);
        if constexpr (F::master != Master::param) load<Width>(arrays.master + i, master);
        load<Width>(arrays.exp_avg + i, exp_avg);
        load<Width>(arrays.exp_avg_sq + i, exp_avg_sq);
    }

    MEGAFLOW_INLINE void update(const Coefficients& c) {
        for (int k = 0; k < Width; ++k) {
            float weight, m = to_float(exp_avg[k]), v = to_float(exp_avg_sq[k]);
            if constexpr (F::master == Master::param) weight = param[k];
            if constexpr (F::master == Master::fp32) weight = master[k];
            if constexpr (F::master == Master::remainder) weight = join(param[k], master[k]);
            update_element(c, to_float(grad[k]), weight, m, v);
            if constexpr (F::master == Master::param) param[k] = weight;
            if constexpr (F::master == Master::fp32) {
                master[k] = weight;
                from_float(weight, param[k]);
            }
            if constexpr (F::master == Master::remainder) split(weight, param[k], master[k]);
            from_float(m, exp_avg[k]);
            from_float(v, exp_avg_sq[k]);
        }
    }

    MEGAFLOW_INLINE void store_to(const Arrays<F>& arrays, std::int32_t i) const {
        store<Width>(arrays.param + i, param);
        if constexpr (F::master != Master::param) store<Width>(arrays.master + i, master);
        store<Width>(arrays.exp_avg + i, exp_avg);
        store<Width>(arrays.exp_avg_sq + i, exp_avg_sq);
    }
};

}  // namespace megaflow

// The CUDA functions enqueue on a `cudaStream_t` of the current device and return its error, 0 for none.
extern "C" {
void megaflow_adamw_cpu(const megaflow::AdamWCall* call, megaflow::ParallelFor parallel_for);
int megaflow_adamw_cuda(const megaflow::AdamWCall* call, void* stream);
const char* megaflow_cuda_error(int error);
}
