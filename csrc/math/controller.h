// The controller's step: signals -> EMAs -> mu* -> mu, in float64. The same text serves the CPU and CUDA C++; the formulas
// and their sources stand in gac_kernels/signals.py and gac_kernels/controller.py.
//
// A Team is who computes: all its members run this code and come to the same numbers. It has
//   sum(count, total, add)   total[n] += add(i, total) over 0 <= i < count, in an order that depends on nothing but count
//                            and the team's size; what add wrote elsewhere is seen by all members afterwards
//   sort(values, count)      ascending, no nan; may write behind values, up to the next power of two
#pragma once

#include "../controller.h"
#include "config.h"

namespace GAC_NAMESPACE {

constexpr double kVarianceFloor = 1e-8, kNormFloor = 1e-30;  // signals.VARIANCE_FLOOR, NORM_FLOOR
constexpr double kTrimFrom = 4;                              // signals.TRIM_FROM
constexpr double kLargestSignal = 1e300;                     // controller_schema.LARGEST_SIGNAL
constexpr double kNormRounding = 0x1p-7;                     // signals.NORM_ROUNDING
constexpr double kPi = 3.141592653589793;

// sigma_s^2, sigma_r^2, Delta^2, and which of them the batch could tell; the others have no meaning.
struct Estimate {
    double value[3];
    bool present[3];
};

// Of x that is nan: nan.
GAC_INLINE double at_least(double low, double x) { return x < low ? low : x; }
GAC_INLINE bool finite(double x) { return x - x == 0; }
// What is 0 or more but for rounding. -inf is none: nan, as of nan.
GAC_INLINE double not_negative(double x) { return x < 0 ? (finite(x) ? 0 : __builtin_nan("")) : x; }
GAC_INLINE double within(double low, double x, double high) { return x < low ? low : x > high ? high : x; }

// torch.lerp.
GAC_INLINE double lerp(double start, double end, double weight) {
    const double apart = end - start;
    return weight < 0.5 ? start + weight * apart : end - apart * (1.0 - weight);
}

// One row of Signals.rows. A row without live tokens counts nowhere, whatever else it holds.
template <class T>
struct SignalRow {
    const T* at;

    GAC_INLINE double operator[](int column) const { return static_cast<double>(at[column]); }
    GAC_INLINE bool live() const { return at[kColTokens] > T(0); }
    GAC_INLINE bool expert() const { return at[kColExpert] > T(0); }

    // Whether the row says how many tokens it is of, and of what.
    GAC_INLINE bool counts() const {
        const double tokens = at[kColTokens], expert = at[kColExpert];
        return tokens >= 0 && finite(tokens) && expert >= 0 && finite(expert);
    }
    // A column that sums squares: what is below 0 is none, and nan.
    GAC_INLINE double squares(int column) const {
        const double sum = at[column];
        return sum >= 0 ? sum : __builtin_nan("");
    }
    // kColOwnNorm or kColDiffNorm, sums of c^2 n, 0 <= n <= 2. Where sum c^2 is `of`, n made of 16-bit numbers rounds
    // below 0 by less than kNormRounding: that much counts as 0, and what is farther below is none, and nan.
    GAC_INLINE double norm(int column, double of) const {
        const double sum = at[column];
        return sum < 0 && finite(sum) && -sum <= kNormRounding * of ? 0 : squares(column);
    }
    GAC_INLINE double own_norm() const { return norm(kColOwnNorm, at[expert() ? kColCs2 : kColCr2]); }
    GAC_INLINE double diff_norm() const { return norm(kColDiffNorm, at[kColDisagreement]); }
};
// What signals from rows are, of which one does not say what it is.
GAC_INLINE Estimate no_estimate() {
    const double nan = __builtin_nan("");
    return {{nan, nan, nan}, {true, true, true}};
}
template <class T>
GAC_INLINE SignalRow<T> signal_row(const T* rows, int64_t s) {
    return {rows + s * kColumns};
}

// Sequences and live tokens of either branch; `bad`: rows that do not say what they are, which spoil all of it.
struct Branches {
    double experts, rollouts, expert_tokens, rollout_tokens, bad;
};
template <class T, class Team>
GAC_INLINE Branches count_branches(const Team& team, const T* rows, int64_t sequences) {
    double total[5];
    team.sum(sequences, total, [&](int64_t s, double (&own)[5]) {
        const SignalRow<T> row = signal_row(rows, s);
        own[4] += row.counts() ? 0 : 1;
        if (!row.live()) return;
        const double expert = row.expert() ? 1 : 0;  // not an index: that would put `own` into memory on a GPU
        own[0] += expert;
        own[1] += 1 - expert;
        own[2] += row.expert() ? row[kColTokens] : 0;
        own[3] += row.expert() ? 0 : row[kColTokens];
    });
    return {total[0], total[1], total[2], total[3], total[4]};
}

// Weight of a token of each sequence, relative to its branch's mean over sequences (signals._token_weight).
struct TokenWeight {
    bool by_sequence;
    double same;

    GAC_INLINE double operator()(double tokens) const { return by_sequence ? 1.0 / at_least(1, tokens) : same; }
};
GAC_INLINE TokenWeight token_weight(int aggregation, double members, double tokens, double norm_length) {
    const double same = aggregation == kTokenMean             ? members / tokens
                        : aggregation == kSeqMeanTokenSumNorm ? 1.0 / norm_length
                                                              : 1.0;
    return {aggregation == kSeqMeanTokenMean, same};
}
struct BranchWeights {
    TokenWeight supervised, policy;

    template <class T>
    GAC_INLINE double operator()(const SignalRow<T>& row) const {
        return row.expert() ? supervised(row[kColTokens]) : policy(row[kColTokens]);
    }
};
GAC_INLINE BranchWeights branch_weights(const ControllerConfig& c, const Branches& b) {
    return {
        token_weight(c.supervised_aggregation, b.experts, b.expert_tokens, c.norm_length),
        token_weight(c.policy_aggregation, b.rollouts, b.rollout_tokens, c.norm_length)};
}

// A coefficient z-normalised over all live tokens: scale * (c - mean).
struct Normal {
    double scale, mean;
};
GAC_INLINE Normal normal(double sum, double squares, double tokens, double eps) {
    const double mean = sum / tokens, mean_square = squares / tokens, variance = mean_square - mean * mean;
    if (variance <= 64 * eps * mean_square) return {1, 0};  // does not vary, as far as the sums can tell
    return {1 / ::sqrt(variance), mean};
}

// Sum over a row's tokens of (z_s - z_r)^2, multiplied out.
template <class T>
GAC_INLINE double normalised_disagreement(const SignalRow<T>& row, Normal s, Normal r) {
    const double a = s.scale, b = r.scale, shift = a * s.mean - b * r.mean;
    const double total = a * a * row.squares(kColCs2) + b * b * row.squares(kColCr2) - 2 * a * b * row[kColCsCr] +
                         shift * (shift * row[kColTokens] - 2 * a * row[kColCs] + 2 * b * row[kColCr]);
    return not_negative(total);
}

// signals.coefficient_estimate. values: room for sort().
template <class T, class Team>
GAC_INLINE Estimate coefficient_estimate(
    const Team& team, const T* rows, int64_t sequences, double trim, bool znorm, double* values) {
    enum { kBad, kExperts, kRollouts, kUnordered, kAdvantage, kTokens, kCs, kCs2, kCr, kCr2, kSums };
    double total[kSums];
    team.sum(sequences, total, [&](int64_t s, double (&own)[kSums]) {
        const SignalRow<T> row = signal_row(rows, s);
        values[s] = __builtin_huge_val();  // behind the experts, after the sort
        own[kBad] += row.counts() ? 0 : 1;
        if (!row.live()) return;
        if (row.expert()) {
            const double nll = row[kColNll] / at_least(1, row[kColTokens]);
            const bool ordered = nll == nll;  // nan has no place in the order
            if (ordered) values[s] = nll;
            own[kUnordered] += ordered ? 0 : 1;
            own[kExperts] += 1;
        } else {
            own[kRollouts] += 1;
            own[kAdvantage] += row[kColAdvantage];
        }
        if (!znorm) return;
        own[kTokens] += row[kColTokens];
        own[kCs] += row[kColCs];
        own[kCs2] += row.squares(kColCs2);
        own[kCr] += row[kColCr];
        own[kCr2] += row.squares(kColCr2);
    });
    if (total[kBad] > 0) return no_estimate();
    const double experts = total[kExperts], rollouts = total[kRollouts], live = experts + rollouts;
    team.sort(values, sequences);
    const int64_t cut = experts < kTrimFrom ? 0 : static_cast<int64_t>(trim * experts);
    const int64_t kept = static_cast<int64_t>(experts) - 2 * cut;
    const double eps = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52, mean_advantage = total[kAdvantage] / rollouts;
    const Normal s_normal = normal(total[kCs], total[kCs2], total[kTokens], eps);
    const Normal r_normal = normal(total[kCr], total[kCr2], total[kTokens], eps);

    double spread[3];  // of the advantages, the distances, the kept values' sum
    team.sum(sequences, spread, [&](int64_t s, double (&own)[3]) {
        if (s < kept) own[2] += values[cut + s];
        const SignalRow<T> row = signal_row(rows, s);
        if (!row.live()) return;
        const double off = row[kColAdvantage] - mean_advantage;
        if (!row.expert()) own[0] += off * off;
        own[1] += (znorm ? normalised_disagreement(row, s_normal, r_normal) : row.squares(kColDisagreement)) /
                  at_least(1, row[kColTokens]);
    });
    const double mean_nll = spread[2] / static_cast<double>(kept);
    double squares[1];
    team.sum(kept, squares, [&](int64_t s, double (&own)[1]) {
        const double off = values[cut + s] - mean_nll;
        own[0] += off * off;
    });
    const double variance = total[kUnordered] > 0 ? __builtin_nan("") : squares[0] / static_cast<double>(kept);
    return {
        {at_least(kVarianceFloor, variance), at_least(kVarianceFloor, spread[0] / rollouts), spread[1] / live},
        {experts > 0, rollouts > 0, live > 0}};
}

// signals.logit_estimate.
template <class T, class Team>
GAC_INLINE Estimate logit_estimate(const Team& team, const T* rows, int64_t sequences, const ControllerConfig& c) {
    const Branches of = count_branches(team, rows, sequences);
    if (of.bad > 0) return no_estimate();
    const BranchWeights weights = branch_weights(c, of);
    double total[3];
    team.sum(sequences, total, [&](int64_t s, double (&own)[3]) {
        const SignalRow<T> row = signal_row(rows, s);
        if (!row.live()) return;
        const double weight = weights(row), square = weight * weight, norm = square * row.own_norm();
        own[0] += row.expert() ? norm : 0;
        own[1] += row.expert() ? 0 : norm;
        own[2] += square * row.diff_norm();
    });
    const double noise_s = total[0] / of.experts / of.experts, noise_r = total[1] / of.rollouts / of.rollouts;
    const double live = of.experts + of.rollouts;
    return {
        {at_least(kNormFloor, noise_s), at_least(kNormFloor, noise_r), total[2] / live},
        {of.experts > 0, of.rollouts > 0, live > 0}};
}

// signals.hidden_estimate, from partial sums over columns: squared deviations of demonstrations, of rollouts, and squared
// distances of the two means; `partials` of three each.
template <class Team>
GAC_INLINE Estimate hidden_estimate(const Team& team, const double* sums, int64_t partials, const Branches& of) {
    double total[3];
    team.sum(partials, total, [&](int64_t i, double (&own)[3]) {
        for (int n = 0; n < 3; ++n) own[n] += sums[3 * i + n];
    });
    if (of.bad > 0) return no_estimate();
    const double noise_s = at_least(kNormFloor, total[0] / (of.experts * (of.experts - 1)));
    const double noise_r = at_least(kNormFloor, total[1] / (of.rollouts * (of.rollouts - 1)));
    const bool s = of.experts >= 2, r = of.rollouts >= 2;
    return {{noise_s, noise_r, not_negative(total[2] - noise_s - noise_r)}, {s, r, s && r}};
}

// cos(pi x), 0 <= x <= 1.
GAC_INLINE double cos_pi(double x) {
#ifdef __CUDA_ARCH__
    return ::cospi(x);  // without the path for large arguments that cos has
#else
    return ::cos(kPi * x);
#endif
}

GAC_INLINE double prior_value(const ControllerConfig& c, double step) {
    if (c.prior == kConstantPrior) return c.valley;
    if (step < c.warmup) return c.peak * step / c.warmup;
    const double decayed = step - c.warmup;
    if (decayed >= c.decay) return c.valley;
    return c.valley + (c.peak - c.valley) * 0.5 * (1.0 + cos_pi(decayed / c.decay));
}

// Whether the step that begins takes its signals in.
GAC_INLINE bool refreshes(const ControllerConfig& c, const double* state) {
    return ::fmod(state[kSteps], static_cast<double>(c.update_every)) == 0;
}

// mu in float32, to the nearest number that is not outside of the bounds; where no float32 lies inside, the nearest.
GAC_INLINE float narrowed_mu(const ControllerConfig& c, double mu) {
    const float near = static_cast<float>(mu);
    const float inside = near > c.mu_max   ? GAC_LIBM(nextafterf)(near, -1.0f)
                         : near < c.mu_min ? GAC_LIBM(nextafterf)(near, 2.0f)
                                           : near;
    return inside >= c.mu_min && inside <= c.mu_max ? inside : near;
}

// One step of the KL rule; a KL that is not finite is counted and moves nothing. One below 0, which sampled log-ratios
// (k1) can be, moves alpha as 0 does.
GAC_INLINE void move_alpha(const ControllerConfig& c, const double* kl, int64_t kl_numbers, double* state) {
    const double mean = kl[0];
    const bool usable = finite(mean) && (kl_numbers != 3 || kl[1] != 0);
    state[kSkipped] += kl_numbers == 3 ? kl[2] : usable ? 0 : 1;
    if (!usable) return;
    const double factor = ::exp(within(-1, mean / c.kl_target - 1, 1) * c.kl_gain);
    state[kAlpha] = within(c.kl_low, state[kAlpha] * factor, c.kl_high);
}

// EMAs of the signals that are present, finite and not negative; a first value is taken as it is.
GAC_INLINE void take_in(const ControllerConfig& c, const Estimate& seen, double* state) {
    for (int i = 0; i < 3; ++i) {
        if (!seen.present[i]) continue;
        if (!(seen.value[i] >= 0 && seen.value[i] < kLargestSignal)) {  // nan too
            state[kSkipped] += 1;
            continue;
        }
        state[kSignals + i] = lerp(seen.value[i], state[kSignals + i], state[kMeasured + i] * c.ema_beta);
        state[kMeasured + i] = 1;
    }
}

// The state after a step; takes_in: the step refreshes and something was observed; kl is null without a KL target.
GAC_INLINE void controller_step(
    const ControllerConfig& c, const double* from, bool takes_in, const Estimate& seen, const double* kl,
    int64_t kl_numbers, double* to) {
    for (int i = 0; i < kStateNumbers; ++i) to[i] = from[i];
    const auto ready = [&] { return to[kMeasured] != 0 && to[kMeasured + 1] != 0 && to[kMeasured + 2] != 0; };
    const bool was_ready = ready();
    if (kl) move_alpha(c, kl, kl_numbers, to);
    if (takes_in) take_in(c, seen, to);

    const double mu = from[kMu], noise = to[kSignals] + to[kSignals + 1];
    double distance = to[kSignals + 2];
    if (c.disagreement_cap > 0 && noise * c.disagreement_cap < distance) distance = noise * c.disagreement_cap;
    double mu_star = ready() ? to[kMuStar] : mu;
    if (ready() && (kl || takes_in)) mu_star = (to[kAlpha] * distance + to[kSignals + 1]) / (distance + noise);
    to[kMuStar] = mu_star;
    // Without an estimate to smooth the first mu* is taken as it is.
    to[kEstimate] = c.smooth_mu ? within(c.mu_min, lerp(mu_star, mu, c.ema_beta), c.mu_max)
                    : was_ready ? lerp(mu_star, from[kEstimate], c.ema_beta)
                                : mu_star;
    double target = to[kEstimate];
    to[kPrior] = target;
    if (c.prior != kNoPrior) {
        to[kPrior] = prior_value(c, from[kSteps]);
        target = target * c.blend + (1 - c.blend) * to[kPrior];
    }
    to[kMu] = within(c.mu_min, mu + within(-c.change_cap, target - mu, c.change_cap), c.mu_max);
    to[kSteps] = from[kSteps] + 1;
}

}  // namespace GAC_NAMESPACE
