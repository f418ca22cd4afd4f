// The operator group_advantages, the same on every device: arguments checked, output made. Schema in
// gac_kernels/schemas.py.
#pragma once

#include "advantages.h"
#include "tensors.h"

namespace gac {

// `run`: launch_group_advantages, or its like on the CPU.
template <class Run>
Tensor group_advantages(
    const Inputs& in, const Tensor& rewards, const OptionalTensor& groups, int64_t group_size, bool adjacent,
    int64_t baseline, int64_t scale, double eps, const Run& run) {
    const int64_t S = rewards.numel();
    STD_TORCH_CHECK(
        groups || (group_size >= 1 && S % group_size == 0), in.op, ": without groups, group_size must divide the ", S,
        " rewards, got ", group_size);
    const auto of = [&](auto zero) {
        using T = decltype(zero);
        const T* const from = in.data<T>("rewards", rewards, S);
        const int64_t* const ids = in.data<int64_t>("groups", groups, S);
        const Tensor out = empty_as(rewards);
        run(AdvantagesCall<T>{
            S, from, ids, group_size, adjacent, in.code("baseline", baseline, 0, 1), in.code("scale", scale, 0, 2), eps,
            output<T>(out)});
        return out;
    };
    const int32_t dtype = dtype_of(rewards);
    if (dtype == aoti_torch_dtype_float64()) return of(double());
    STD_TORCH_CHECK(dtype == aoti_torch_dtype_float32(), in.op, ": rewards must have dtype float32 or float64");
    return of(float());
}

}  // namespace gac
