// Group-relative advantages as their kernels see them: plain arrays, on the CPU or a GPU. No torch and no CUDA headers.
#pragma once

#include <stdint.h>

namespace gac {

// One call of the operator. Groups are ids in any order, ids of which equal ones stand side by side (`adjacent`),
// or `group_size` consecutive sequences where groups is null.
template <class T>
struct AdvantagesCall {
    int64_t sequences;
    const T* rewards;  // (S,)
    const int64_t* groups;
    int64_t group_size;
    bool adjacent;
    int baseline, scale;  // csrc/math/advantages.h
    double eps;
    T* advantages;  // (S,)
};

namespace cuda {

// One launch, asynchronous on `stream` of the current device; throws std::runtime_error where it cannot start.
void launch_group_advantages(const AdvantagesCall<float>&, void* stream);
void launch_group_advantages(const AdvantagesCall<double>&, void* stream);

}  // namespace cuda
}  // namespace gac
