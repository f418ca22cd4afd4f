// Launches of the row primitives: how many blocks share a row, and what they keep of it.
#pragma once

#include "launch.cuh"
#include "rows.cuh"

namespace gac::cuda {

constexpr size_t kSlice = 40 << 10;   // bytes of a row that a block should have: four blocks then share a multiprocessor
constexpr size_t kBudget = 100 << 10;  // of shared memory a block: two then share a multiprocessor
constexpr int64_t kMostColumns = (int64_t(1) << 31) - (1 << 16), kMostBlocks = (int64_t(1) << 31) - 1;

template <class E, RowTask Task, bool Capped>
void launch_of(const RowsCall<typename E::Sum>& call, int64_t rows, void* stream) {
    using T = typename E::Sum;
    const Machine& device = machine();
    const size_t bytes = static_cast<size_t>(call.columns) * sizeof(typename E::Stored);
    int cluster = 1;
    while (cluster < device.cluster && bytes > kSlice * cluster) cluster *= 2;
#ifdef GAC_EMULATE
    if (call.columns >= 2 * E::Width) cluster = device.cluster;
#endif
    const int64_t vectors = (call.columns - 1) / E::Width + 1, slice = (vectors - 1) / cluster + 1;
    const int threads = device.threads;
    const size_t fixed = row_shared_bytes<T>(threads, 0), budget = device.shared_bytes < kBudget ? device.shared_bytes : kBudget;
    const int64_t most = static_cast<int64_t>((budget - fixed) / (16 * static_cast<size_t>(threads)));
    int64_t held = 0;
    if (Task == RowTask::kFused || (Task == RowTask::kStatistics && call.base.data)) {
        held = (slice - 1) / threads + 1;
        if (held > most) held = most;
    }
    if (rows > kMostBlocks / cluster) throw std::runtime_error("row kernels take fewer than 2^28 rows");
    const Grid1 grid{
        rows * cluster, threads, row_shared_bytes<T>(threads, static_cast<int>(held)), cluster,
        row_shared_bytes<T>(threads, static_cast<int>(most))};
    launch("row_kernel", row_kernel<E, Task, Capped>, grid, stream, call, RowPlan{static_cast<int>(held)});
}

template <class E>
void launch_elements(RowTask task, const RowsCall<typename E::Sum>& call, int64_t rows, void* stream) {
    if (call.columns > kMostColumns) throw std::runtime_error("logits must have fewer than 2^31 - 2^16 columns");
    const bool capped = call.softcap > 0;
    if (task == RowTask::kStatistics)
        return capped ? launch_of<E, RowTask::kStatistics, true>(call, rows, stream)
                      : launch_of<E, RowTask::kStatistics, false>(call, rows, stream);
    if (task == RowTask::kGradient)
        return capped ? launch_of<E, RowTask::kGradient, true>(call, rows, stream)
                      : launch_of<E, RowTask::kGradient, false>(call, rows, stream);
    capped ? launch_of<E, RowTask::kFused, true>(call, rows, stream)
           : launch_of<E, RowTask::kFused, false>(call, rows, stream);
}

}  // namespace gac::cuda
