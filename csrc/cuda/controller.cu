#include "controller.cuh"

#include "controller_kernels.h"
#include "launch.cuh"

namespace gac::cuda {
namespace {

constexpr int64_t kSharedPlaces = 4096;  // values that are sorted in shared memory, 32 KiB

int64_t power_of_two_from(int64_t count) {
    int64_t size = 1;
    while (size < count) size *= 2;
    return size;
}

// Places that the coefficient estimator sorts, if it does.
int64_t sorted_places(const ControllerCall& call) {
    return call.rows && call.config.estimator == kCoefficient ? power_of_two_from(call.sequences) : 0;
}
int64_t hidden_blocks(const ControllerCall& call) {
    return call.rows && call.config.estimator == kHidden ? (call.width + kWarp - 1) / kWarp : 0;
}
int64_t shared_limit() {
    const int64_t fits = static_cast<int64_t>((machine().shared_bytes - sums_bytes(kControllerThreads)) / sizeof(double));
    return fits < kSharedPlaces ? fits : kSharedPlaces;
}

template <class T, class U>
void launch_hidden(const ControllerCall& call, void* stream) {
    const int threads = machine().threads < kHiddenThreads ? machine().threads : kHiddenThreads;
    const size_t shared = sums_bytes(threads) + static_cast<size_t>(2 * threads) * sizeof(double);
    launch("controller's hidden states", hidden_kernel<T, U>, Grid1{hidden_blocks(call), threads, shared}, stream, call);
}

template <class T>
void launch_as(const ControllerCall& call, void* stream) {
    if (hidden_blocks(call) > 0) {
        if (call.wide_hidden) launch_hidden<T, double>(call, stream);
        else launch_hidden<T, float>(call, stream);
    }
    const int threads = machine().threads < kControllerThreads ? machine().threads : kControllerThreads;
    const int64_t places = sorted_places(call) <= shared_limit() ? sorted_places(call) : 0;
    const size_t shared = sums_bytes(threads) + static_cast<size_t>(places) * sizeof(double);
    launch("controller", controller_kernel<T>, Grid1{1, threads, shared}, stream, call, places, hidden_blocks(call));
}

}  // namespace

int64_t controller_scratch(const ControllerCall& call) {
    if (hidden_blocks(call) > 0) return 3 * hidden_blocks(call);
    return sorted_places(call) <= shared_limit() ? 0 : sorted_places(call);
}

void launch_controller(const ControllerCall& call, void* stream) {
    if (call.wide_rows) launch_as<double>(call, stream);
    else launch_as<float>(call, stream);
}

}  // namespace gac::cuda
