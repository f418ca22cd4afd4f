// The controller's step on the CPU: a few hundred rows in one thread; the width of hidden is spread over threads.
#define GAC_NAMESPACE gac::controller_cpu

#include "controller_op.h"

#include <math.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../math/controller.h"

namespace gac {
namespace controller_cpu {
namespace {

struct Alone {
    template <int N, class F>
    void sum(int64_t count, double (&total)[N], const F& add) const {
        std::fill(total, total + N, 0.0);
        for (int64_t i = 0; i < count; ++i) add(i, total);
    }
    void sort(double* values, int64_t count) const { std::sort(values, values + count); }
};

constexpr int kStrip = 256;  // columns of hidden that are summed together: a kibibyte of a row, sums that stay in cache

// The partial sums of hidden_estimate over columns [first, first + width); width <= kStrip.
template <class T, class U>
void hidden_strip(
    const T* rows, const U* hidden, int64_t sequences, int64_t stride, int width, const BranchWeights& weights,
    const Branches& of, double (&out)[3]) {
    double mean[2][kStrip] = {}, squares[2][kStrip] = {};
    const auto each = [&](const auto& visit) {
        for (int64_t s = 0; s < sequences; ++s) {
            const SignalRow<T> row = signal_row(rows, s);
            if (row.live()) visit(row.expert() ? 0 : 1, weights(row) * row[kColTokens], hidden + s * stride);
        }
    };
    each([&](int branch, double weight, const U* x) {
        double* const sum = mean[branch];
        for (int i = 0; i < width; ++i) sum[i] += weight * static_cast<double>(x[i]);
    });
    for (int i = 0; i < width; ++i) {
        mean[0][i] /= of.experts;
        mean[1][i] /= of.rollouts;
    }
    each([&](int branch, double weight, const U* x) {
        const double* const middle = mean[branch];
        double* const sum = squares[branch];
        for (int i = 0; i < width; ++i) {
            const double off = weight * static_cast<double>(x[i]) - middle[i];
            sum[i] += off * off;
        }
    });
    std::fill(out, out + 3, 0.0);
    for (int i = 0; i < width; ++i) {
        out[0] += squares[0][i];
        out[1] += squares[1][i];
        out[2] += (mean[0][i] - mean[1][i]) * (mean[0][i] - mean[1][i]);
    }
}

template <class T, class U>
Estimate estimate_hidden(const ControllerCall& call, const T* rows, const U* hidden) {
    const Alone team;
    const Branches of = count_branches(team, rows, call.sequences);
    const BranchWeights weights = branch_weights(call.config, of);
    const int64_t strips = (call.width + kStrip - 1) / kStrip;
    // Threads take whole strips: what a strip sums to does not depend on how many there are.
    torch::stable::parallel_for(0, strips, 1 + 65536 / (1 + call.sequences * kStrip), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            double sums[3];
            const int64_t first = i * kStrip;
            hidden_strip(
                rows, hidden + first, call.sequences, call.width,
                static_cast<int>(std::min<int64_t>(kStrip, call.width - first)), weights, of, sums);
            std::copy(sums, sums + 3, call.scratch + 3 * i);
        }
    });
    return hidden_estimate(team, call.scratch, strips, of);
}

template <class T>
Estimate estimate(const ControllerCall& call, const T* rows) {
    const ControllerConfig& c = call.config;
    if (c.estimator == kCoefficient)
        return coefficient_estimate(Alone{}, rows, call.sequences, c.trim, c.znorm, call.scratch);
    if (c.estimator == kLogit) return logit_estimate(Alone{}, rows, call.sequences, c);
    if (call.wide_hidden) return estimate_hidden(call, rows, static_cast<const double*>(call.hidden));
    return estimate_hidden(call, rows, static_cast<const float*>(call.hidden));
}

Estimate given(const double* e) { return {{e[0], e[1], e[2]}, {e[3] != 0, e[4] != 0, e[5] != 0}}; }

void step(const ControllerCall& call) {
    Estimate seen{};
    const bool takes_in = (call.rows || call.estimate) && refreshes(call.config, call.state);
    if (takes_in)
        seen = call.estimate    ? given(call.estimate)
               : call.wide_rows ? estimate(call, static_cast<const double*>(call.rows))
                                : estimate(call, static_cast<const float*>(call.rows));
    controller_step(call.config, call.state, takes_in, seen, call.kl, call.kl_numbers, call.new_state);
    *call.mu = narrowed_mu(call.config, call.new_state[kMu]);
}

}  // namespace
}  // namespace controller_cpu

int64_t CpuController::scratch_numbers(const ControllerCall& call) {
    return call.config.estimator == kHidden ? 3 * ((call.width + controller_cpu::kStrip - 1) / controller_cpu::kStrip)
                                            : call.sequences;
}

void CpuController::run(const ControllerCall& call, Device) { controller_cpu::step(call); }

}  // namespace gac
