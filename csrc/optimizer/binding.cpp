// Registers the optimizer's operations with torch, on its stable ABI: one library serves every torch that the
// package takes and every Python. All arguments are checked here, each error is one line.

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "adamw.h"
#include "grad_norm.h"

namespace {

using megaflow::Master;
using megaflow::Storage;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream line;
    line << "megaflow::";
    (line << ... << parts);
    throw std::runtime_error(line.str());
}

const char* name_of(ScalarType type) {
    switch (type) {
        case ScalarType::Float: return "float32";
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Half: return "float16";
        case ScalarType::Double: return "float64";
        case ScalarType::Short: return "int16";
        default: return "another dtype";
    }
}

std::string name_of(const torch::stable::Device& device) {
    const bool cuda = device.type() == torch::headeronly::DeviceType::CUDA;
    return cuda ? "cuda:" + std::to_string(device.index()) : device.is_cpu() ? "cpu" : "another device";
}

// A list of tensors with its name, for checks.
struct Named {
    const char* op;
    const char* name;
    const TensorList& tensors;

    ScalarType dtype() const { return tensors.at(0).scalar_type(); }

    // Every tensor is contiguous, of the first one's dtype and on the device.
    void check(const torch::stable::Device& device) const {
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            const Tensor& tensor = tensors[i];
            require(tensor.device() == device, op, ": ", name, "[", i, "] is on ", name_of(tensor.device()),
                    " and other tensors are on ", name_of(device));
            require(tensor.scalar_type() == dtype(), op, ": ", name, "[", i, "] is ", name_of(tensor.scalar_type()),
                    " and ", name, "[0] is ", name_of(dtype()));
            require(tensor.is_contiguous(), op, ": ", name, "[", i, "] is not contiguous");
        }
    }

    // It has the same number of tensors as `other`, of the same sizes.
    void check_sizes(const Named& other) const {
        require(tensors.size() == other.tensors.size(), op, ": there are ", tensors.size(), " ", name, " and ",
                other.tensors.size(), " ", other.name);
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            require(tensors[i].numel() == other.tensors[i].numel(), op, ": ", name, "[", i, "] has ",
                    tensors[i].numel(), " elements and ", other.name, "[", i, "] has ", other.tensors[i].numel());
        }
    }

    Storage storage() const {
        const ScalarType type = dtype();
        require(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": ", name,
                " must be float32 or bfloat16, not ", name_of(type));
        return type == ScalarType::Float ? Storage::fp32 : Storage::bf16;
    }
};

const float* scalar(const char* name, const Tensor& tensor, const torch::stable::Device& device) {
    require(tensor.device() == device, "adamw: ", name, " is on ", name_of(tensor.device()), " and params are on ",
            name_of(device));
    require(tensor.scalar_type() == ScalarType::Float && tensor.numel() == 1, "adamw: ", name,
            " must be one float32, not ", tensor.numel(), " of ", name_of(tensor.scalar_type()));
    return static_cast<const float*>(tensor.data_ptr());
}

Master master_of(const Named& params, const Named& masters) {
    const Storage storage = params.storage();
    if (storage == Storage::fp32) {
        for (std::size_t i = 0; i < params.tensors.size(); ++i) {
            require(params.tensors[i].data_ptr() == masters.tensors[i].data_ptr() &&
                        masters.dtype() == ScalarType::Float,
                    "adamw: params[", i, "] is float32, so masters[", i, "] must be the same tensor");
        }
        return Master::param;
    }
    const ScalarType type = masters.dtype();
    require(type == ScalarType::Float || type == ScalarType::Short,
            "adamw: masters of bfloat16 params must be float32, or int16 remainders, not ", name_of(type));
    return type == ScalarType::Float ? Master::fp32 : Master::remainder;
}

// A call whose arguments are checked.
struct CheckedAdamW {
    std::vector<megaflow::AdamWTensor> tensors;
    megaflow::AdamWCall call;
};

CheckedAdamW check_adamw(const TensorList& params, const TensorList& masters, const TensorList& grads,
                         const TensorList& exp_avg, const TensorList& exp_avg_sq, const Tensor& steps,
                         const Tensor& grad_scale, const Tensor& skip, double lr, double beta1, double beta2,
                         double eps, double weight_decay) {
    const Named p{"adamw", "params", params}, w{"adamw", "masters", masters}, g{"adamw", "grads", grads},
        m{"adamw", "exp_avg", exp_avg}, v{"adamw", "exp_avg_sq", exp_avg_sq};
    for (const Named& list : {w, g, m, v}) list.check_sizes(p);
    if (params.empty()) return {};
    for (const Named& list : {p, w, g, m, v}) list.check(params[0].device());
    require(m.dtype() == v.dtype(), "adamw: exp_avg is ", name_of(m.dtype()), " and exp_avg_sq is ",
            name_of(v.dtype()));
    require(0.0 <= beta1 && beta1 < 1.0, "adamw: beta1 must be in [0, 1), not ", beta1);
    require(0.0 <= beta2 && beta2 < 1.0, "adamw: beta2 must be in [0, 1), not ", beta2);

    CheckedAdamW checked;
    for (std::size_t i = 0; i < params.size(); ++i) {
        checked.tensors.push_back({grads[i].data_ptr(), params[i].data_ptr(), masters[i].data_ptr(),
                                   exp_avg[i].data_ptr(), exp_avg_sq[i].data_ptr(), params[i].numel()});
    }
    const auto device = params[0].device();
    checked.call = {checked.tensors.data(),
                    std::int64_t(checked.tensors.size()),
                    g.storage(),
                    master_of(p, w),
                    m.storage(),
                    {scalar("steps", steps, device), scalar("grad_scale", grad_scale, device),
                     scalar("skip", skip, device), lr, beta1, beta2, eps, weight_decay}};
    return checked;
}

// A squared norm whose arguments are checked, with its result and its partial sums.
struct CheckedNorm {
    std::vector<megaflow::NormTensor> tensors;
    Tensor result, partials;
    megaflow::NormCall call;
};

Tensor new_doubles(const Tensor& like, std::vector<std::int64_t> size) {
    return torch::stable::new_empty(like, {size.data(), size.size()}, ScalarType::Double);
}

CheckedNorm check_norm(const TensorList& list) {
    const Named named{"squared_norm", "tensors", list};
    require(!list.empty(), "squared_norm: tensors is empty");
    named.check(list[0].device());
    CheckedNorm checked;
    for (const Tensor& tensor : list) checked.tensors.push_back({tensor.data_ptr(), tensor.numel()});
    const std::int64_t count = std::int64_t(list.size());
    checked.result = new_doubles(list[0], {});
    checked.partials = new_doubles(list[0], {megaflow_norm_chunks(checked.tensors.data(), count)});
    checked.call = {checked.tensors.data(), count, named.storage(),
                    static_cast<double*>(checked.partials.data_ptr()),
                    static_cast<double*>(checked.result.data_ptr())};
    return checked;
}

void parallel_for(std::int64_t items, megaflow::ParallelBody body, void* context) {
    torch::stable::parallel_for(0, items, 1,
                                [=](std::int64_t first, std::int64_t last) { body(context, first, last); });
}

void adamw_cpu(TensorList params, TensorList masters, TensorList grads, TensorList exp_avg, TensorList exp_avg_sq,
               Tensor steps, Tensor grad_scale, Tensor skip, double lr, double beta1, double beta2, double eps,
               double weight_decay) {
    const CheckedAdamW checked = check_adamw(params, masters, grads, exp_avg, exp_avg_sq, steps, grad_scale, skip, lr,
                                             beta1, beta2, eps, weight_decay);
    if (!params.empty()) megaflow_adamw_cpu(&checked.call, parallel_for);
}

Tensor squared_norm_cpu(TensorList tensors) {
    const CheckedNorm checked = check_norm(tensors);
    megaflow_squared_norm_cpu(&checked.call, parallel_for);
    return checked.result;
}

#ifdef MEGAFLOW_CUDA

// The current stream of a device. torch's function for it is in libtorch_cuda, to which this library is not linked: the
// stable ABI has no header for it. It is loaded already, but its names are not found by default.
void* current_stream(int device) {
    using Function = AOTITorchError (*)(std::int32_t, void**);
    static const auto function = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
        return reinterpret_cast<Function>(
            dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
    }();
    void* stream = nullptr;
    require(function && function(device, &stream) == 0, "this torch does not tell the current stream of cuda:", device);
    return stream;
}

void require_launched(const char* op, int error) {
    require(error == 0, op, ": ", megaflow_cuda_error(error), " (CUDA error ", error, ")");
}

void adamw_cuda(TensorList params, TensorList masters, TensorList grads, TensorList exp_avg, TensorList exp_avg_sq,
                Tensor steps, Tensor grad_scale, Tensor skip, double lr, double beta1, double beta2, double eps,
                double weight_decay) {
    const CheckedAdamW checked = check_adamw(params, masters, grads, exp_avg, exp_avg_sq, steps, grad_scale, skip, lr,
                                             beta1, beta2, eps, weight_decay);
    if (params.empty()) return;
    const int device = params[0].get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    require_launched("adamw", megaflow_adamw_cuda(&checked.call, current_stream(device)));
}

Tensor squared_norm_cuda(TensorList tensors) {
    const CheckedNorm checked = check_norm(tensors);
    const int device = tensors[0].get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    require_launched("squared_norm", megaflow_squared_norm_cuda(&checked.call, current_stream(device)));
    return checked.result;
}

#endif  // MEGAFLOW_CUDA

}  // namespace

// A fragment, so that other libraries may define operations of the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(megaflow, library) {
    library.def(
        "adamw(Tensor(a!)[] params, Tensor(b!)[] masters, Tensor[] grads, Tensor(c!)[] exp_avg, "
        "Tensor(d!)[] exp_avg_sq, Tensor steps, Tensor grad_scale, Tensor skip, *, float lr, float beta1, "
        "float beta2, float eps, float weight_decay) -> ()");
    library.def("squared_norm(Tensor[] tensors) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megaflow, CPU, library) {
    library.impl("adamw", TORCH_BOX(&adamw_cpu));
    library.impl("squared_norm", TORCH_BOX(&squared_norm_cpu));
}

#ifdef MEGAFLOW_CUDA
STABLE_TORCH_LIBRARY_IMPL(megaflow, CUDA, library) {
    library.impl("adamw", TORCH_BOX(&adamw_cuda));
    library.impl("squared_norm", TORCH_BOX(&squared_norm_cuda));
}
#endif
