// Starting a kernel, on the GPU or in emulation. Host code only.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"
#include "machine.h"

namespace gac::cuda {

struct Grid1 {
    int64_t blocks;
    int threads;
    size_t shared_bytes = 0;
    int cluster = 1;
    size_t most_shared_bytes = 0;  // that any launch of this kernel asks for on this device, where they differ
};

#ifdef GAC_EMULATE

template <class... P, class... A>
void launch(const char*, void (*kernel)(P...), Grid1 grid, void*, const A&... arguments) {
    if (grid.blocks == 0) return;
    emulation::launch(grid.blocks, grid.cluster, grid.threads, grid.shared_bytes, [&] { kernel(arguments...); });
}

#else

inline void check(const char* what, cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Asynchronous on `stream`, of the current device. `name` is for errors.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), Grid1 grid, void* stream, const A&... arguments) {
    if (grid.blocks == 0) return;
    // More must be asked for: as much as any launch does, for the limit is the kernel's, and another thread of the host
    // may launch it for longer rows at the same time.
    const size_t most = grid.most_shared_bytes > grid.shared_bytes ? grid.most_shared_bytes : grid.shared_bytes;
    if (grid.shared_bytes > 48 * 1024)
        check(name, cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(most)));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attribute{};
    if (grid.cluster > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
        config.attrs = &attribute;
        config.numAttrs = 1;
    }
    check(name, cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
}

#endif

}  // namespace gac::cuda
