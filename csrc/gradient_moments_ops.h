// gac_kernels::gradient_moments and accumulate_moments_ on any device: arguments are checked and outputs made here, and
// `run(call, device)` does the rest. Schemas and shapes stand in gac_kernels/schemas.py.
#pragma once

#include <string>
#include <vector>

#include "gradient_moments.h"
#include "rows_ops.h"

namespace gac {

// A contiguous tensor of a list; errors name its place.
inline Element gradient_element(const Inputs& in, const char* list, size_t place, const Tensor& tensor) {
    const std::string name = std::string(list) + "[" + std::to_string(place) + "]";
    in.check_device(name.c_str(), tensor);
    STD_TORCH_CHECK(tensor.is_contiguous(), in.op, ": ", name, " must be contiguous");
    const Element element = element_of(in, name.c_str(), tensor);
    in.check_memory(name.c_str(), tensor, tensor.numel(), bytes_of(element));
    return element;
}

template <class Run>
Tensor sum_moments(
    const Inputs& in, const char* first_list, const std::vector<Tensor>& first, const char* second_list,
    const std::vector<Tensor>& second, bool accumulate, const Run& run) {
    STD_TORCH_CHECK(
        first.size() == second.size(), in.op, ": ", first_list, " and ", second_list, " must be of one length, got ",
        first.size(), " and ", second.size());
    MomentsCall call{};
    std::vector<GradientPair> pairs;
    for (size_t i = 0; i < first.size(); ++i) {
        const Element element = gradient_element(in, first_list, i, first[i]);
        const Element other = gradient_element(in, second_list, i, second[i]);
        const bool wide = other == Element::kDouble;
        STD_TORCH_CHECK(
            first[i].numel() == second[i].numel(), in.op, ": ", first_list, "[", i, "] and ", second_list, "[", i,
            "] must be of one size, got ", first[i].numel(), " and ", second[i].numel(), " elements");
        STD_TORCH_CHECK(
            accumulate || element == other, in.op, ": ", first_list, "[", i, "] and ", second_list, "[", i,
            "] must be of one dtype");
        STD_TORCH_CHECK(
            !accumulate || wide || (other == Element::kFloat && element != Element::kDouble), in.op, ": ", second_list,
            "[", i, "] must have dtype float64, or float32 for a gradient of no more than float32");
        if (first[i].numel() == 0) continue;
        pairs.push_back(
            {first[i].const_data_ptr(), accumulate ? second[i].mutable_data_ptr() : const_cast<void*>(second[i].const_data_ptr()),
             first[i].numel(), call.chunks, element, wide});
        call.chunks += moments_chunks(first[i].numel());
    }
    const Device device = first.empty() ? Device{} : device_of(first[0]);
    call.pairs = pairs.data();
    call.count = static_cast<int64_t>(pairs.size());
    call.accumulate = accumulate;
    const Tensor partials = empty<double>({call.chunks * call.sums()}, device);
    const Tensor out = accumulate ? empty<double>({}, device) : empty<double>({3}, device);
    call.partials = output<double>(partials);
    call.out = output<double>(out);
    run(call, device);
    return out;
}

}  // namespace gac
