// Second half of token_loss.cuh: the tokens of a sequence, its row, the totals of the batch, and the kernel itself.
#pragma once

namespace gac::cuda {

// A demonstration's tokens. `scale`: mu b_i.
template <class T, class V>
GAC_DEVICE void demonstration(const TokenLossCall<T>& c, Span own, double scale, double (&sum)[kTotals]) {
    const Streams<T>& at = c.streams;
    const bool phi = c.parameters.phi;
    over_packs(c, own, [&](int64_t i, bool whole) {
        const uint32_t bits = live_bits<Pack<T>::Size>(c.batch.mask, i, own.end, whole);
        const auto read = [&](const T* stream) { return load_pack(stream, i, own.end, whole); };
        const Pack<T> logps = read(at.logp), sum_sqs = read(at.sum_sq), values = read(at.supervised);
        const Pack<T> weights = read(at.rollout);
        Pack<T> shown, slopes;
        V loss(0), nll(0), cs1(0), cs2(0), norms(0);
#pragma unroll
        for (int k = 0; k < Pack<T>::Size; ++k) {
            const MaskOf<V> live = {(bits >> k & 1) != 0};
            const V logp = select(live, V(logps.at[k]), V(0));
            const V weight = at.rollout ? V(weights.at[k]) : V(1);
            V cs = phi ? phi_slope(exp(logp)) : select(live, V(-1), V(0));  // phi is 0 where logp = 0
            if (at.rollout) cs = select(live, cs * weight, V(0));
            if (at.supervised) {
                loss = add_where(loss, live, weight * V(values.at[k]));
            } else if (phi) {
                loss = add_supervised_loss(loss, cs, logp);
            } else {
                loss = at.rollout ? add_where(loss, live & differs(weight, V(0)), cs * logp) : loss - logp;
            }
            nll = nll - logp;
            cs1 = cs1 + cs;
            cs2 = fma(cs, cs, cs2);
            if (at.sum_sq) norms = fma(select(live, squared_norm(logp, V(sum_sqs.at[k])), V(0)), cs * cs, norms);
            shown.at[k] = logp.v;
            slopes.at[k] = (V(scale) * cs).v;
        }
        store_pack(at.logp_out, i, own.end, whole, shown);
        store_pack(at.slope, i, own.end, whole, slopes);
        store_pack(at.entropy_slope, i, own.end, whole, Pack<T>{});
        sum[kLoss] += loss.v;
        sum[kNll] += nll.v;
        sum[kCs] += cs1.v;
        sum[kCs2] += cs2.v;
        sum[kOwnNorm] += norms.v;
    });
    sum[kDisagreement] = sum[kCs2];
    sum[kDiffNorm] = sum[kOwnNorm];
}

// What one token of a rollout reads, besides whether it counts.
template <class V>
struct RolloutToken {
    V logp, old, advantage, reference, rollout, sum_sq, entropy;
};

// One token of a rollout: its slope, and its part of the sums; `live` is applied everywhere.
template <class V, class Policy, class T>
GAC_DEVICE V rollout_token(
    const Policy& policy, const TokenLossParameters& o, const Streams<T>& at, MaskOf<V> live, const RolloutToken<V>& x,
    const Coupling<V>& coupling, V (&part)[kTotals], V& largest, MaskOf<V>& known) {
    known = live;  // and what the engines returned of the token is finite
    if (at.old) known = known & finite(x.old);
    if (at.rollout) known = known & finite(x.rollout);
    if (at.reference && o.kl_coef != 0) known = known & finite(x.reference);
    const Ratio<V> r = importance_ratio(x.logp, x.old, known);
    const PolicyTerm<V> term = policy(x.logp, x.advantage, r, coupling);
    V loss = term.loss, cr = term.slope;  // the slope is 0 where masked
    if (at.rollout) {
        const V weight = select(known, x.rollout, V(0));
        loss = loss * weight;
        if (!Policy::SlopeOfSequence) cr = cr * weight;
    }
    if (at.reference) {
        const KlTerm<V> kl = kl_term(o.kl_estimator, o.kl_ratio_weighted, x.logp, x.reference, r);
        if (o.kl_coef != 0) cr = add_where(cr, known, V(o.kl_coef) * kl.slope);
        part[kKlOf] = add_where(part[kKlOf], known & finite(x.reference), kl.loss);
    }
    const V cs = o.phi ? phi_slope(exp(x.logp)) : select(live, V(-1), V(0)), difference = cs - cr;
    part[kLoss] = add_where(part[kLoss], known, loss);
    part[kNll] = part[kNll] - x.logp;
    part[kCs] = part[kCs] + cs;
    part[kCr] = part[kCr] + cr;
    part[kCs2] = fma(cs, cs, part[kCs2]);
    part[kCr2] = fma(cr, cr, part[kCr2]);
    part[kCsCr] = fma(cs, cr, part[kCsCr]);
    part[kDisagreement] = fma(difference, difference, part[kDisagreement]);
    part[kRatioMinusOne] = part[kRatioMinusOne] + r.minus_one;  // 0 where masked
    part[kApproximateKl] = part[kApproximateKl] + (r.minus_one - r.log);  // k3 = r - 1 - log r
    if (!Policy::Coupled) largest = greater_where(largest, live, r.value);
    if (Policy::Updates) part[kUpdateOrClip] = add_where(part[kUpdateOrClip], live, term.update);
    if (Policy::Clips) part[kUpdateOrClip] = add_where(part[kUpdateOrClip], live, select(term.clipped, V(1), V(0)));
    if (at.entropy) part[kEntropyOf] = add_where(part[kEntropyOf], known, x.entropy);
    if (at.advantage) part[kAdvantage] = add_where(part[kAdvantage], live, x.advantage);
    if (at.sum_sq) {
        const V norm = select(live, squared_norm(x.logp, x.sum_sq), V(0));
        part[kOwnNorm] = fma(norm, cr * cr, part[kOwnNorm]);
        part[kDiffNorm] = fma(norm, difference * difference, part[kDiffNorm]);
    }
    return cr;
}

// A rollout's tokens. `scale`: (1 - mu) a_i. Returns this thread's largest ratio.
template <class T, class V, class Policy>
GAC_DEVICE double rollout(
    const TokenLossCall<T>& c, Span own, double advantage_s, double scale, const Coupling<V>& coupling,
    double (&sum)[kTotals]) {
    const Streams<T>& at = c.streams;
    const TokenLossParameters& o = c.parameters;
    const Policy policy({o.p0, o.p1, o.p2});
    V largest(0);
    over_packs(c, own, [&](int64_t i, bool whole) {
        const uint32_t bits = live_bits<Pack<T>::Size>(c.batch.mask, i, own.end, whole);
        const auto read = [&](const T* stream) { return load_pack(stream, i, own.end, whole); };
        const Pack<T> logps = read(at.logp), olds = read(at.old), advantages = read(at.advantage);
        const Pack<T> references = read(at.reference), rollouts = read(at.rollout), sum_sqs = read(at.sum_sq);
        const Pack<T> entropies = read(at.entropy);
        Pack<T> shown, slopes, entropy_slopes;
        V part[kTotals];
#pragma unroll
        for (V& each : part) each = V(0);
#pragma unroll
        for (int k = 0; k < Pack<T>::Size; ++k) {
            const MaskOf<V> live = {(bits >> k & 1) != 0};
            const V logp = select(live, V(logps.at[k]), V(0));
            const V old = at.old ? V(olds.at[k]) : on_policy_old(logp);
            const V advantage = at.advantage ? V(advantages.at[k]) : V(advantage_s);
            MaskOf<V> known = live;
            const RolloutToken<V> token{
                logp, old, advantage, V(references.at[k]), V(rollouts.at[k]), V(sum_sqs.at[k]), V(entropies.at[k])};
            const V cr = rollout_token<V, Policy>(policy, o, at, live, token, coupling, part, largest, known);
            shown.at[k] = logp.v;
            slopes.at[k] = (V(scale) * cr).v;
            entropy_slopes.at[k] = select(known, V(-scale * o.entropy_coef), V(0)).v;
        }
        store_pack(at.logp_out, i, own.end, whole, shown);
        store_pack(at.slope, i, own.end, whole, slopes);
        store_pack(at.entropy_slope, i, own.end, whole, entropy_slopes);
#pragma unroll
        for (int j = 0; j < kTotals; ++j) sum[j] += part[j].v;
    });
    return static_cast<double>(largest.v);
}

// The row of signals and the sums of a sequence, from its totals. `weight`: of each of its tokens, mu left aside.
template <class T, class Policy>
GAC_DEVICE void write_sequence(
    const TokenLossCall<T>& c, int64_t s, bool expert, int64_t live, double weight, double advantage_s,
    const double (&sum)[kTotals], double largest) {
    const double count = static_cast<double>(live), known = live ? 1 : 0;
    const double mean = c.streams.advantage ? sum[kAdvantage] / (live ? count : 1) : live ? advantage_s : 0;
    T* const row = c.rows + s * kColumns;
    row[kColExpert] = static_cast<T>(expert ? known : 0);
    row[kColTokens] = static_cast<T>(count);
#pragma unroll
    for (int j = 0; j < kLoss; ++j) row[kColNll + j] = static_cast<T>(j == kAdvantage ? (expert ? 0 : mean) : sum[j]);
    double* const out = c.states[s].sums;
    out[kSumLoss] = live ? weight * sum[kLoss] : 0;
    out[kSumKl] = weight * sum[kKlOf];
    out[kSumEntropy] = weight * sum[kEntropyOf];
    out[kSumApproxKl] = sum[kApproximateKl];
    out[kSumUpdate] = Policy::Updates ? sum[kUpdateOrClip] : Policy::Clips && !expert ? count - sum[kUpdateOrClip] : 0;
    out[kSumClipped] = Policy::Clips ? sum[kUpdateOrClip] : 0;
    if (Policy::Coupled) {
        out[kMaxRatio] = c.states[s].ratio;  // 0 of demonstrations
        out[kSumRatio] = c.states[s].ratio * count;
    } else {
        out[kSumRatio] = expert ? 0 : count + sum[kRatioMinusOne];
        out[kMaxRatio] = out[kSumRatio] == out[kSumRatio] ? largest : out[kSumRatio];  // the maximum loses a nan
    }
}

template <class T, class Policy>
GAC_DEVICE void evaluate(const TokenLossCall<T>& c, int64_t s, const BranchWeights& denominator, double* shared) {
    using V = typename LaneOf<T>::Type;
    const Span own = counted_span(c.counts[s]);
    const bool expert = c.batch.expert[s] != 0;
    const int64_t live = c.counts[s].live;
    const double weight = token_weight(c, denominator, expert, live);
    const double scale = live ? share_of(c.mixing, expert) * weight : 0;
    const double advantage_s = expert || c.streams.advantage ? 0 : sequence_advantage(c, s);
    double sum[kTotals] = {}, largest = 0;
    if (expert) {
        demonstration<T, V>(c, own, scale, sum);
    } else {
        Coupling<V> coupling{V(0), V(0)};
        if constexpr (Policy::Coupled) {
            const double gain = Policy::SlopeOfSequence || live == 0 ? c.states[s].gain : transform(c, s, shared);
            coupling = {V(c.states[s].ratio), V(gain)};
        }
        largest = rollout<T, V, Policy>(c, own, advantage_s, scale, coupling, sum);
        if (!Policy::Coupled) largest = over_block(largest, [](double a, double b) { return larger(a, b); }, shared);
    }
    block_sums(sum, shared);
    if (thread() == 0) write_sequence<T, Policy>(c, s, expert, live, weight, advantage_s, sum, largest);
}

// The scalars and the loss, by one block.
template <class T, class Policy>
GAC_DEVICE void finish(const TokenLossCall<T>& c, double* shared) {
    enum { Supervised = kScalars, Tokens, Groups, Sums };
    double sum[kMostSums] = {}, largest = 0;
    static_assert(Sums <= kMostSums);
    for (int64_t s = thread(); s < c.batch.sequences; s += threads()) {
        const SequenceState& state = c.states[s];
        if (c.batch.expert[s]) {
            sum[Supervised] += state.sums[kSumLoss];
            continue;
        }
        sum[kPolicyLoss] += state.sums[kSumLoss];
        sum[kKl] += state.sums[kSumKl];
        sum[kEntropy] += state.sums[kSumEntropy];
        sum[kRatioMean] += state.sums[kSumRatio];
        sum[kApproxKl] += state.sums[kSumApproxKl];
        sum[kUpdateRatio] += state.sums[kSumUpdate];
        sum[kClipFraction] += state.sums[kSumClipped];
        sum[Tokens] += static_cast<double>(c.counts[s].live);
        largest = larger(largest, state.sums[kMaxRatio]);
        if (Policy::Coupled && !Policy::SlopeOfSequence) {
            sum[kResidual] += state.residual;
            sum[Groups] += state.counted;
        }
    }
    block_sums(sum, shared);
    largest = over_block(largest, [](double a, double b) { return larger(a, b); }, shared);
    if (thread() != 0) return;
    const double tokens = sum[Tokens] > 1 ? sum[Tokens] : 1, groups = sum[Groups] > 1 ? sum[Groups] : 1;
    const double policy = sum[kPolicyLoss], supervised = sum[Supervised];
    const double scalars[kScalars] = {policy, supervised, sum[kKl], sum[kEntropy], sum[kRatioMean] / tokens, largest,
                                      sum[kApproxKl] / tokens, sum[kUpdateRatio] / tokens, sum[kClipFraction] / tokens,
                                      sum[kResidual] / groups};
#pragma unroll
    for (int k = 0; k < kScalars; ++k) c.scalars[k] = static_cast<T>(scalars[k]);
    const TokenLossParameters& o = c.parameters;
    const double rollouts = policy + o.kl_coef * sum[kKl] - o.entropy_coef * sum[kEntropy];
    *c.loss = static_cast<T>(share_of(c.mixing, false) * rollouts + share_of(c.mixing, true) * supervised);
}

template <class T, class Policy>
GAC_KERNEL(kSequenceThreads, kSequenceBlocks<T>) token_loss_kernel(TokenLossCall<T> c) {
    constexpr bool kGroups = Policy::Coupled && !Policy::SlopeOfSequence;
    double* const shared = reinterpret_cast<double*>(shared_memory());
    const bool wait = kGroups || !c.policy.denominator || !c.supervised.denominator;
    int64_t of_block[4] = {0, 0, 0, 0};
    RisingOffsets offsets{c.batch};
    for (int64_t s = block(); s < c.batch.sequences; s += blocks())
        look<T, Policy>(c, s, offsets.span(s), shared, of_block);
    leave_counts(c.counts, of_block, wait);
    const Span all = covered(c.batch, offsets);
    clear_uncovered(c.batch, all, c.streams.logp_out);
    clear_uncovered(c.batch, all, c.streams.slope);
    clear_uncovered(c.batch, all, c.streams.entropy_slope);
    wait_for_counts(wait);
    const BranchWeights denominator = denominators(c, wait, shared);
    for (int64_t s = block(); s < c.batch.sequences; s += blocks()) evaluate<T, Policy>(c, s, denominator, shared);
    grid_barrier();
    if (block() == 0) finish<T, Policy>(c, shared);
}

}  // namespace gac::cuda
