// One step of the controller as its kernels see it. No torch here. Formulas: csrc/math/controller.h; shapes:
// gac_kernels/controller_schema.py.
#pragma once

#include <stdint.h>

#include "math/codes.h"

namespace gac {

// signals.py: ESTIMATORS of config.py
enum Estimator { kCoefficient = 0, kLogit = 1, kHidden = 2 };

// controller_schema.PRIORS
enum PriorKind { kNoPrior = 0, kConstantPrior = 1, kCosinePrior = 2 };

// controller_schema.STATE_NUMBERS
enum StateNumber {
    kMu, kMuStar, kEstimate, kAlpha, kSignals, kMeasured = kSignals + 3, kSkipped = kMeasured + 3, kSteps, kPrior,
    kStateNumbers
};

// controller_schema.encode_config, encode_signals
struct ControllerConfig {
    int estimator;
    double trim;
    bool znorm;
    int policy_aggregation, supervised_aggregation;
    double norm_length;
    bool smooth_mu;  // smoothing "reference"
    double ema_beta;
    int64_t update_every;
    double blend, change_cap, mu_min, mu_max;
    double disagreement_cap;  // 0: none
    int prior;
    double warmup, decay, peak, valley;
    double kl_target;  // 0: alpha is fixed
    double kl_low, kl_high, kl_gain;
};

// What does not apply is null.
struct ControllerCall {
    const double* state;
    const void* rows;  // (sequences, kColumns) float, or double if wide_rows
    bool wide_rows;
    int64_t sequences;
    const void* hidden;  // (sequences, width) likewise
    bool wide_hidden;
    int64_t width;
    const double* estimate;  // (6,): three values and whether they are present
    const double* kl;        // (1,) of one rank, or (3,): mean, whether it is finite, how many were not
    int64_t kl_numbers;
    double* scratch;  // as many numbers as the backend asked for
    double* new_state;
    float* mu;
    ControllerConfig config;
};

}  // namespace gac
