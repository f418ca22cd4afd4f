// The token-level loss in one launch: a block works through one sequence after another, in two rounds.
//
//   look      live tokens of each sequence; for GSPO and DFPO its ratio too. Until this is known of the whole batch no
//             token can be weighed: the weight of a term holds the branch's number of tokens or sequences.
//   evaluate  everything that is one a token or one a sequence
//   finish    block 0 adds up what the sequences have left, in their order
//
// Between the rounds the blocks wait for one another. So the launch is cooperative and its grid no larger than what the
// device holds at once, which the launch bounds settle. Against one launch for each round this saves the launches and
// keeps the masks in cache; against a recount of all masks by every block it stays linear in S. The first wait is left
// out where both denominators are given and the objective couples no sequences.
//
// Formulas are those of csrc/math/terms.h, one token a lane. A thread adds up the tokens of a pack in the data's dtype
// and all else in float64. Which thread sees which token depends on nothing but the token's place in its sequence; no
// sum is atomic: the same sequence gives the same bits wherever it lies.
#pragma once

#include "token_loss_sequences.cuh"

#include "../math/terms.h"

namespace gac::cuda {

// Sums over the tokens of a sequence; the first ten are the columns from kColNll on.
enum Total {
    kNll, kAdvantage, kDisagreement, kCs, kCr, kCs2, kCr2, kCsCr, kOwnNorm, kDiffNorm,
    kLoss, kKlOf, kEntropyOf, kRatioMinusOne, kApproximateKl,
    kUpdateOrClip,  // f'(r) of a gate, else 1 where a clip acts: no objective has both
    kTotals
};
static_assert(kTotals == kMostSums && kLoss == int{kColumns} - int{kColNll});

template <class T>
GAC_DEVICE double sequence_advantage(const TokenLossCall<T>& c, int64_t s) {
    return c.advantages ? static_cast<double>(c.advantages[s]) : nan("");  // a demonstration-only batch has none
}

// Whether the packs of a sequence that begins here may be read and written as a whole.
template <class T>
GAC_DEVICE bool aligned_from(const TokenLossCall<T>& c, int64_t begin) {
    const Streams<T>& at = c.streams;
    return aligned(c.batch.mask, begin) && aligned(at.logp, begin) && aligned(at.old, begin) &&
           aligned(at.reference, begin) && aligned(at.rollout, begin) && aligned(at.entropy, begin) &&
           aligned(at.sum_sq, begin) && aligned(at.supervised, begin) && aligned(at.advantage, begin) &&
           aligned(at.logp_out, begin) && aligned(at.slope, begin) && aligned(at.entropy_slope, begin);
}

// function(i, whole) for this thread's packs of a sequence.
template <class T, class F>
GAC_DEVICE void over_packs(const TokenLossCall<T>& c, Span own, const F& function) {
    constexpr int Size = Pack<T>::Size;
    const bool aligned = aligned_from(c, own.begin);
    for (int64_t i = own.begin + Size * thread(); i < own.end; i += Size * threads())
        function(i, aligned && i + Size <= own.end);
}

// Look ---------------------------------------------------------------------------------------------------------------

// Sums that make a sequence's ratio, its mean advantage (DFPO) and the slope of each of its tokens (GSPO). Where GSPO
// clips depends on the ratio and the sign of the advantage alone, so upstream weights are summed by sign and one look
// is enough.
enum Look { kLive, kLogRatio, kPositive, kNegative, kNeither, kLooks = 8 };

template <class T, class Policy>
GAC_DEVICE void look_at_tokens(const TokenLossCall<T>& c, Span own, double advantage_s, double (&sum)[kLooks]) {
    const Streams<T>& at = c.streams;
    const bool penalty = c.parameters.kl_coef != 0;
    over_packs(c, own, [&](int64_t i, bool whole) {
        const uint32_t bits = live_bits<Pack<T>::Size>(c.batch.mask, i, own.end, whole);
        const auto read = [&](const T* stream) { return load_pack(stream, i, own.end, whole); };
        const Pack<T> logps = read(at.logp), olds = read(at.old);
        const Pack<T> advantages = read(at.advantage), rollouts = read(at.rollout);
        const Pack<T> references = read(penalty ? at.reference : nullptr);
        const auto finite = [](T x) { return x - x == 0; };
#pragma unroll
        for (int k = 0; k < Pack<T>::Size; ++k) {
            if (!(bits >> k & 1)) continue;
            const VecDouble logp(logps.at[k]), old = at.old ? VecDouble(olds.at[k]) : on_policy_old(logp);
            const double advantage = at.advantage ? static_cast<double>(advantages.at[k]) : advantage_s;
            // What is absent reads 0, which is finite.
            const bool known = finite(olds.at[k]) && finite(rollouts.at[k]) && finite(references.at[k]);
            const double weight = !known ? 0 : at.rollout ? static_cast<double>(rollouts.at[k]) : 1;
            const double force = Policy::SlopeOfSequence ? (known ? advantage * weight : 0) : advantage;
            sum[kLive] += 1;
            if (known) sum[kLogRatio] += clamp(logp - old, VecDouble(-20), VecDouble(20)).v;
            sum[kPositive] += advantage > 0 ? force : 0;
            sum[kNegative] += advantage < 0 ? force : 0;
            sum[kNeither] += advantage > 0 || advantage < 0 ? 0 : force;
        }
    });
}

template <class T, class Policy>
GAC_DEVICE SequenceState coupled_state(const TokenLossCall<T>& c, const double (&sum)[kLooks], double advantage_s) {
    using V = typename LaneOf<T>::Type;
    const TokenLossParameters& o = c.parameters;
    const bool product = !Policy::SlopeOfSequence && o.p1 != 0;
    const double total = sum[kLogRatio], bounded = total > 20 ? 20 : total < -20 ? -20 : total;
    SequenceState state{};
    state.ratio = ::exp(product ? bounded : total / sum[kLive]);
    if constexpr (Policy::SlopeOfSequence) {
        const Policy policy({o.p0, o.p1, 0});
        const V ratio = V(state.ratio);  // as the tokens compare it
        const double up = policy.surrogate.clipped(ratio, V(1)).bits ? 0 : sum[kPositive];
        const double down = policy.surrogate.clipped(ratio, V(-1)).bits ? 0 : sum[kNegative];
        state.gain = -(up + down + sum[kNeither]) * state.ratio / sum[kLive];
    } else {
        const double all = sum[kPositive] + sum[kNegative] + sum[kNeither];
        state.advantage = c.streams.advantage ? all / sum[kLive] : advantage_s;
    }
    return state;
}

// Counts sequence s and, of a coupled objective, makes its state.
template <class T, class Policy>
GAC_DEVICE void look(const TokenLossCall<T>& c, int64_t s, Span own, double* shared, int64_t (&of_block)[4]) {
    const bool expert = c.batch.expert[s] != 0;
    int64_t live = 0;
    bool counted = false;
    if constexpr (Policy::Coupled) {
        if (thread() == 0) c.states[s] = SequenceState{};
        if (!expert) {
            const double advantage_s = c.streams.advantage ? 0 : sequence_advantage(c, s);
            double sum[kLooks] = {};
            look_at_tokens<T, Policy>(c, own, advantage_s, sum);
            block_sums(sum, shared);
            live = static_cast<int64_t>(sum[kLive]);
            if (thread() == 0 && live) c.states[s] = coupled_state<T, Policy>(c, sum, advantage_s);
            counted = true;
        }
    }
    if (!counted) live = count_sequence(c.batch, own, shared);
    if (thread() == 0) leave_sequence(c.counts[s], own, live);
    add_sequence(of_block, expert, live);
}

// DFPO's transform of the ratio of a rollout with tokens inside its group (arXiv 2604.13088v1, Eq. 17 and 18): its
// weight. Leaves the group's cancellation residual |sum A w| / sum |A w| with the first member.
template <class T>
GAC_DEVICE double transform(const TokenLossCall<T>& c, int64_t s, double* shared) {
    const bool orthogonal = c.parameters.p0 != 0;
    const auto over_group = [&](const auto& function) {
        const int64_t group = c.groups[s];
        for (int64_t j = thread(); j < c.batch.sequences; j += threads())
            if (c.groups[j] == group && !c.batch.expert[j] && c.counts[j].live) function(j, c.states[j]);
    };
    enum { Dot, Square, Before, None, Sums };
    double sum[Sums] = {}, low = HUGE_VAL, first = static_cast<double>(s);
    over_group([&](int64_t j, const SequenceState& m) {
        low = smaller(low, m.ratio);
        first = smaller(first, static_cast<double>(j));
        sum[Dot] += m.advantage * m.ratio;
        sum[Square] += m.advantage * m.advantage;
        if (orthogonal) sum[Before] += ::fabs(m.advantage * m.ratio);
    });
    block_sums(sum, shared);
    low = over_block(low, [](double a, double b) { return smaller(a, b); }, shared);
    first = over_block(first, [](double a, double b) { return smaller(a, b); }, shared);
    const double along = sum[Square] > 0 ? sum[Dot] / sum[Square] : 0;
    const auto weight = [&](const SequenceState& m) { return orthogonal ? m.ratio - along * m.advantage : low; };
    if (first == static_cast<double>(s)) {
        double force[2] = {};
        over_group([&](int64_t, const SequenceState& m) {
            const double own = m.advantage * weight(m);
            force[0] += own;
            force[1] += ::fabs(own);
        });
        block_sums(force, shared);
        // What Eq. 18 leaves of a group whose weights lie along its advantages (a group of one) is rounding, no
        // direction.
        if (thread() == 0 && force[1] > 1e-12 * sum[Before]) {
            c.states[s].residual = ::fabs(force[0]) / force[1];
            c.states[s].counted = 1;
        }
    }
    return weight(c.states[s]);
}

}  // namespace gac::cuda

#include "token_loss_evaluate.cuh"
