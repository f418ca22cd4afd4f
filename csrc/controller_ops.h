// gac_kernels::controller_step on any device: arguments are checked and outputs made here; an Executor does the rest:
//   static int64_t scratch_numbers(const ControllerCall&)
//   static void run(const ControllerCall&, Device)
// Schema and shapes stand in gac_kernels/controller_schema.py.
#pragma once

#include <tuple>

#include "controller.h"
#include "tensors.h"

namespace gac {

// Data of (sequences, width) float32 or float64, or null. sequences < 0: any number, which it becomes.
struct SignalMatrix {
    const void* data = nullptr;
    bool wide = false;
    int64_t sequences = 0, width = 0;
};
inline SignalMatrix signal_matrix(const Inputs& in, const char* name, const OptionalTensor& tensor) {
    if (!tensor) return {};
    STD_TORCH_CHECK(
        tensor->dim() == 2, in.op, ": ", name, " must have 2 dimensions, got ", tensor->dim());
    SignalMatrix matrix;
    matrix.wide = dtype_of(*tensor) == aoti_torch_dtype_float64();
    matrix.sequences = tensor->size(0);
    matrix.width = tensor->size(1);
    const int64_t size = matrix.sequences * matrix.width;
    matrix.data = matrix.wide ? static_cast<const void*>(in.data<double>(name, *tensor, size))
                              : static_cast<const void*>(in.data<float>(name, *tensor, size));
    return matrix;
}

template <class Executor>
std::tuple<Tensor, Tensor> controller_step(
    Tensor state, OptionalTensor rows, OptionalTensor hidden, OptionalTensor estimate, OptionalTensor kl,
    int64_t estimator, double trim, bool znorm, bool smooth_mu, double ema_beta, int64_t update_every, double blend,
    double change_cap, double mu_min, double mu_max, double disagreement_cap, int64_t prior, double warmup, double decay,
    double peak, double valley, double kl_target, double kl_low, double kl_high, double kl_gain,
    int64_t policy_aggregation, int64_t supervised_aggregation, double norm_length) {
    const Inputs in{"controller_step", Executor::on_cpu ? nullptr : &state};
    const Device device = device_of(state);
    ControllerCall call{};
    call.config = {
        in.code("estimator", estimator, kCoefficient, kHidden), trim, znorm,
        in.code("policy_aggregation", policy_aggregation, kTokenMean, kSeqMeanTokenSumNorm),
        in.code("supervised_aggregation", supervised_aggregation, kTokenMean, kSeqMeanTokenSumNorm), norm_length,
        smooth_mu, ema_beta, update_every, blend, change_cap, mu_min, mu_max, disagreement_cap,
        in.code("prior", prior, kNoPrior, kCosinePrior), warmup, decay, peak, valley, kl_target, kl_low, kl_high, kl_gain};
    STD_TORCH_CHECK(update_every >= 1, in.op, ": update_every must be at least 1, got ", update_every);
    // Places in the sorted rows are counted from it.
    STD_TORCH_CHECK(trim >= 0 && trim < 0.5, in.op, ": trim must be in [0, 0.5), got ", trim);
    STD_TORCH_CHECK(!rows || !estimate, in.op, ": rows and estimate exclude each other");

    call.state = in.data<double>("state", state, kStateNumbers);
    const SignalMatrix of_rows = signal_matrix(in, "rows", rows), of_hidden = signal_matrix(in, "hidden", hidden);
    if (rows) {
        STD_TORCH_CHECK(of_rows.width == kColumns, in.op, ": rows must have ", int(kColumns), " columns, got ", of_rows.width);
        const bool needs_hidden = estimator == kHidden;
        STD_TORCH_CHECK(!needs_hidden || hidden, in.op, ": hidden must be given for this estimator");
        STD_TORCH_CHECK(
            !needs_hidden || of_hidden.sequences == of_rows.sequences, in.op, ": hidden must have ", of_rows.sequences,
            " rows, got ", of_hidden.sequences);
    }
    call.rows = rows ? of_rows.data : nullptr;
    call.wide_rows = of_rows.wide;
    call.sequences = of_rows.sequences;
    call.hidden = of_hidden.data;
    call.wide_hidden = of_hidden.wide;
    call.width = of_hidden.width;
    call.estimate = in.data<double>("estimate", estimate, 6);
    if (kl_target > 0) {
        STD_TORCH_CHECK(kl.has_value(), in.op, ": kl must be given with kl_target");
        call.kl_numbers = kl->numel() == 3 ? 3 : 1;
        call.kl = in.data<double>("kl", *kl, call.kl_numbers);
    }

    const Tensor scratch = empty<double>({Executor::scratch_numbers(call)}, device);
    const Tensor new_state = empty<double>({kStateNumbers}, device), mu = empty<float>({}, device);
    call.scratch = output<double>(scratch);
    call.new_state = output<double>(new_state);
    call.mu = output<float>(mu);
    Executor::run(call, device);
    return {new_state, mu};
}

}  // namespace gac
