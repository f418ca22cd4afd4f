#include "../advantages.h"

#include "advantages.cuh"
#include "launch.cuh"

namespace gac::cuda {
namespace {

template <class T>
void launch_any(const AdvantagesCall<T>& call, void* stream) {
    const int64_t blocks = (call.sequences + kAdvantageThreads - 1) / kAdvantageThreads;
    const Grid1 grid{blocks, kAdvantageThreads, sums_bytes(kAdvantageThreads)};
    launch("group_advantages", group_advantages_kernel<T>, grid, stream, call);
}

}  // namespace

void launch_group_advantages(const AdvantagesCall<float>& call, void* stream) { launch_any(call, stream); }
void launch_group_advantages(const AdvantagesCall<double>& call, void* stream) { launch_any(call, stream); }

}  // namespace gac::cuda
