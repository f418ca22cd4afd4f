// Tensors through the stable ABI: checked arguments, new outputs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <type_traits>

namespace gac {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Dtype {
    int32_t code;
    const char* name;
};

template <class T>
inline Dtype dtype_of() {
    if constexpr (std::is_same_v<T, float>) return {aoti_torch_dtype_float32(), "float32"};
    if constexpr (std::is_same_v<T, double>) return {aoti_torch_dtype_float64(), "float64"};
    if constexpr (std::is_same_v<T, int64_t>) return {aoti_torch_dtype_int64(), "int64"};
    if constexpr (std::is_same_v<T, int32_t>) return {aoti_torch_dtype_int32(), "int32"};
    if constexpr (std::is_same_v<T, uint8_t>) return {aoti_torch_dtype_bool(), "bool"};
}

inline int32_t dtype_of(const Tensor& tensor) {
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    return dtype;
}

struct Device {
    int32_t type = aoti_torch_device_type_cpu(), index = 0;
};

inline Device device_of(const Tensor& tensor) {
    Device device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
    return device;
}

// The arguments of one operator; errors name both.
struct Inputs {
    const char* op;
    const Tensor* like = nullptr;  // whose device all must be on; null: the CPU

    void check_device(const char* name, const Tensor& tensor) const {
        if (!like) {
            STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
            return;
        }
        const Device ours = device_of(*like), theirs = device_of(tensor);
        STD_TORCH_CHECK(
            ours.type == theirs.type && (ours.index == theirs.index || tensor.is_cpu()), op, ": ", name,
            " must be on the device of the operator's first tensor");
    }

    // `reach` elements of `bytes` bytes from the tensor's first on lie inside its storage, which others may have shrunk
    // (FSDP frees parameters so): a shape alone says nothing about memory.
    void check_memory(const char* name, const Tensor& tensor, int64_t reach, int64_t bytes) const {
        if (reach <= 0) return;
        int64_t offset, held;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &held));
        STD_TORCH_CHECK(
            offset >= 0 && reach <= held / bytes - offset, op, ": ", name, " must lie inside its storage, which holds ",
            held, " bytes: its memory was freed");
    }

    // The data of a contiguous tensor of `size` elements; bool comes as bytes.
    template <class T>
    const T* data(const char* name, const Tensor& tensor, int64_t size) const {
        check_device(name, tensor);
        const Dtype expected = dtype_of<T>();
        const int32_t dtype = dtype_of(tensor);
        const bool bytes = std::is_same_v<T, uint8_t> && dtype == aoti_torch_dtype_uint8();
        STD_TORCH_CHECK(bytes || dtype == expected.code, op, ": ", name, " must have dtype ", expected.name);
        STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
        STD_TORCH_CHECK(
            tensor.numel() == size, op, ": ", name, " must have ", size, " elements, got ", tensor.numel());
        check_memory(name, tensor, size, sizeof(T));
        return static_cast<const T*>(tensor.const_data_ptr());
    }

    template <class T>
    const T* data(const char* name, const OptionalTensor& tensor, int64_t size) const {
        return tensor ? data<T>(name, *tensor, size) : nullptr;
    }

    // Of DFPO the parameters are numbers of choices.
    void check_choices(bool dfpo, double p0, double p1) const {
        STD_TORCH_CHECK(
            !dfpo || ((p0 == 0 || p0 == 1) && (p1 == 0 || p1 == 1)), op, ": p0 and p1 must be 0 or 1 for DFPO, got ", p0,
            " and ", p1);
    }

    int code(const char* name, int64_t value, int low, int high) const {
        STD_TORCH_CHECK(
            low <= value && value <= high, op, ": ", name, " must be in [", low, ", ", high, "], got ", value);
        return static_cast<int>(value);
    }
};

inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype, Device device = {}) {
    int64_t strides[3] = {1, 1, 1};  // contiguous, of at most three dimensions
    for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes.begin()[d];
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype, device.type, device.index, &handle));
    return Tensor(handle);
}

template <class T>
Tensor empty(std::initializer_list<int64_t> sizes, Device device = {}) {
    return empty(sizes, dtype_of<T>().code, device);
}

// Shaped as `like`, which is contiguous and of the same dtype.
inline Tensor empty_as(const Tensor& like) {
    int64_t dims, *sizes, *strides;
    int32_t dtype;
    AtenTensorHandle handle;
    const Device device = device_of(like);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(like.get(), &dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(like.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(like.get(), &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes, strides, dtype, device.type, device.index, &handle));
    return Tensor(handle);
}

template <class T>
T* output(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace gac
