#include "machine.h"

#include "launch.cuh"

namespace gac::cuda {

#ifdef GAC_EMULATE

namespace {

int from_environment(const char* name, int otherwise) {
    const char* const text = getenv(name);
    return text ? atoi(text) : otherwise;
}

}  // namespace

const Machine& machine() {
    static const Machine emulated{
        from_environment("GAC_EMULATE_CAPABILITY", 90), 2, from_environment("GAC_EMULATE_CLUSTER", 2),
        from_environment("GAC_EMULATE_THREADS", 64), static_cast<size_t>(from_environment("GAC_EMULATE_SHARED", 12288))};
    return emulated;
}

#else

namespace {

constexpr int kDevices = 64;

Machine ask(int device) {
    const auto of = [&](cudaDeviceAttr attribute) {
        int value = 0;
        check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, attribute, device));
        return value;
    };
    const int capability = 10 * of(cudaDevAttrComputeCapabilityMajor) + of(cudaDevAttrComputeCapabilityMinor);
    return {capability, of(cudaDevAttrMultiProcessorCount), of(cudaDevAttrClusterLaunch) ? 8 : 1, 256,
            static_cast<size_t>(of(cudaDevAttrMaxSharedMemoryPerBlockOptin))};
}

}  // namespace

const Machine& machine() {
    int device = 0;
    check("cudaGetDevice", cudaGetDevice(&device));
    if (device >= kDevices) throw std::runtime_error("more than 64 CUDA devices");
    thread_local Machine known[kDevices] = {};
    if (known[device].capability == 0) known[device] = ask(device);
    return known[device];
}

#endif

}  // namespace gac::cuda
