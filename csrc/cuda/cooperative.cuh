// Kernels whose blocks wait for one another: launched so that all of them are resident at once.
#pragma once

#include "launch.cuh"

#ifndef GAC_EMULATE
#include <cooperative_groups.h>
#endif

namespace gac::cuda {

// Every thread of the grid; what was written before it is seen by all behind it. Only under launch_together().
GAC_DEVICE void grid_barrier() {
#ifdef GAC_EMULATE
    emulation::here.cluster->barrier.arrive_and_wait();
#else
    cooperative_groups::this_grid().sync();
#endif
}

// Blocks for `work` pieces: one each, as far as all find a place with `per_multiprocessor`, which the kernel's launch
// bounds promise, and at least one.
inline int64_t resident_blocks(int64_t work, int per_multiprocessor) {
    const int64_t places = static_cast<int64_t>(machine().multiprocessors) * per_multiprocessor;
    return work < 1 ? 1 : work < places ? work : places;
}

#ifdef GAC_EMULATE

// The grid as a single cluster, whose blocks the emulation runs at the same time.
template <class... P, class... A>
void launch_together(const char*, void (*kernel)(P...), Grid1 grid, void*, const A&... arguments) {
    emulation::launch(
        grid.blocks, static_cast<int>(grid.blocks), grid.threads, grid.shared_bytes, [&] { kernel(arguments...); });
}

#else

// launch() of blocks that the device holds all at once, or an error where it cannot.
template <class... P, class... A>
void launch_together(const char* name, void (*kernel)(P...), Grid1 grid, void* stream, const A&... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(name, cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
}

#endif

}  // namespace gac::cuda
