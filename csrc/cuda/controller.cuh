// The controller's step as one block: sums over sequences, the trimmed variance by a sort, then scalars that every thread
// computes alike. Only the estimator over hidden states is wide enough for blocks of its own, launched before.
#pragma once

#include "block_sums.cuh"

#include "../math/controller.h"

namespace gac::cuda {

constexpr int kControllerThreads = 256, kHiddenThreads = 256;

// The threads of a block as a Team of csrc/math/controller.h. shared: sums_bytes(threads()).
struct BlockTeam {
    double* shared;

    // Shared memory behind the team's.
    GAC_DEVICE double* beyond() const { return shared + (threads() / kWarp + 1) * kMostSums; }

    template <int N, class F>
    GAC_DEVICE void sum(int64_t count, double (&total)[N], const F& add) const {
        constexpr int kPadded = N == 1 ? 1 : N <= 4 ? 4 : kMostSums;
        static_assert(N <= kPadded);
        for (int n = 0; n < N; ++n) total[n] = 0;
        for (int64_t i = thread(); i < count; i += threads()) add(i, total);
        double padded[kPadded];
        for (int n = 0; n < kPadded; ++n) padded[n] = n < N ? total[n] : 0;
        block_sums(padded, shared);
        for (int n = 0; n < N; ++n) total[n] = padded[n];
    }

    // Bitonic: stage by stage, each thread orders pairs that no other touches.
    GAC_DEVICE void sort(double* values, int64_t count) const {
        int64_t size = 1;
        while (size < count) size *= 2;
        for (int64_t i = count + thread(); i < size; i += threads()) values[i] = __builtin_huge_val();
        barrier();  // what fills up to the power of two is there
        for (int64_t run = 2; run <= size; run *= 2)
            for (int64_t by = run / 2; by > 0; by /= 2) {
                for (int64_t pair = thread(); pair < size / 2; pair += threads()) {
                    const int64_t low = 2 * pair - (pair & (by - 1)), high = low + by;
                    const double a = values[low], b = values[high];
                    if ((a > b) == ((low & run) == 0)) {
                        values[low] = b;
                        values[high] = a;
                    }
                }
                barrier();  // the next stage pairs them differently
            }
    }
};

// Partial sums of hidden_estimate over the 32 columns of this block, a lane each; rows are dealt out to the warps.
// Shared: the team's, then 2 x warps x 32 doubles.
template <class T, class U>
GAC_KERNEL(kHiddenThreads, 2) hidden_kernel(ControllerCall call) {
    if (!refreshes(call.config, call.state)) return;
    const BlockTeam team{reinterpret_cast<double*>(shared_memory())};
    const T* const rows = static_cast<const T*>(call.rows);
    const Branches of = count_branches(team, rows, call.sequences);
    const BranchWeights weights = branch_weights(call.config, of);

    const int warps = threads() / kWarp;
    const int64_t column = block() * kWarp + lane();
    const bool inside = column < call.width;
    const U* const hidden = static_cast<const U*>(call.hidden) + (inside ? column : 0);
    const auto each = [&](const auto& visit) {
        for (int64_t s = warp(); s < call.sequences; s += warps) {
            const SignalRow<T> row = signal_row(rows, s);
            if (row.live()) visit(row.expert(), weights(row) * row[kColTokens] * static_cast<double>(hidden[s * call.width]));
        }
    };
    double sum_s = 0, sum_r = 0;
    each([&](bool expert, double x) {
        sum_s += expert ? x : 0;
        sum_r += expert ? 0 : x;
    });
    double* const of_warps = team.beyond();
    of_warps[warp() * kWarp + lane()] = sum_s;
    of_warps[(warps + warp()) * kWarp + lane()] = sum_r;
    barrier();  // all warps' sums of the columns are there
    double mean_s = 0, mean_r = 0;
    for (int w = 0; w < warps; ++w) {
        mean_s += of_warps[w * kWarp + lane()];
        mean_r += of_warps[(warps + w) * kWarp + lane()];
    }
    mean_s /= of.experts;
    mean_r /= of.rollouts;

    double total[3] = {0, 0, 0};
    team.sum(threads(), total, [&](int64_t, double (&own)[3]) {
        if (!inside) return;
        each([&](bool expert, double x) {
            const double off = x - (expert ? mean_s : mean_r);
            own[0] += expert ? off * off : 0;
            own[1] += expert ? 0 : off * off;
        });
        if (warp() == 0) own[2] += (mean_s - mean_r) * (mean_s - mean_r);
    });
    if (thread() != 0) return;
    for (int n = 0; n < 3; ++n) call.scratch[3 * block() + n] = total[n];
}

// shared_places: how many values the block can sort in shared memory, behind the team's doubles; else in scratch.
template <class T>
GAC_KERNEL(kControllerThreads, 1) controller_kernel(ControllerCall call, int64_t shared_places, int64_t partials) {
    const BlockTeam team{reinterpret_cast<double*>(shared_memory())};
    const ControllerConfig& c = call.config;
    const T* const rows = static_cast<const T*>(call.rows);
    const bool takes_in = (call.rows || call.estimate) && refreshes(c, call.state);
    Estimate seen{};
    if (takes_in) {
        if (call.estimate) {
            for (int i = 0; i < 3; ++i) {
                seen.value[i] = call.estimate[i];
                seen.present[i] = call.estimate[3 + i] != 0;
            }
        } else if (c.estimator == kHidden) {
            seen = hidden_estimate(team, call.scratch, partials, count_branches(team, rows, call.sequences));
        } else if (c.estimator == kLogit) {
            seen = logit_estimate(team, rows, call.sequences, c);
        } else {
            double* const values = shared_places > 0 ? team.beyond() : call.scratch;
            seen = coefficient_estimate(team, rows, call.sequences, c.trim, c.znorm, values);
        }
    }
    double state[kStateNumbers];
    controller_step(c, call.state, takes_in, seen, call.kl, call.kl_numbers, state);
    if (thread() != 0) return;
    for (int i = 0; i < kStateNumbers; ++i) call.new_state[i] = state[i];
    *call.mu = narrowed_mu(c, state[kMu]);
}

}  // namespace gac::cuda
