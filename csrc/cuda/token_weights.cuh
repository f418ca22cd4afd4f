// The token weights in one launch: the counting round of token_loss.cuh, then the weights spread over the tokens.
// Between the rounds the blocks wait for one another, except where both denominators are given.
#pragma once

#include "token_loss_sequences.cuh"
#include "token_weights.h"

namespace gac::cuda {

template <class T>
GAC_DEVICE void spread(const TokenWeightsCall<T>& c, int64_t s, const BranchWeights& denominator) {
    constexpr int Size = Pack<T>::Size;
    const Span own = counted_span(c.counts[s]);
    const bool expert = c.batch.expert[s] != 0;
    const int64_t live = c.counts[s].live;
    const T weight = static_cast<T>(share_of(c.mixing, expert) * token_weight(c, denominator, expert, live));
    const T* const by_token = expert || !c.token_advantages ? nullptr : c.advantages;
    // Demonstrations have no advantage; a rollout without one must not pass for a zero.
    const T of_sequence = expert ? T(0) : c.advantages ? (by_token ? T(0) : c.advantages[s]) : static_cast<T>(nan(""));
    const bool aligned_here = aligned(c.batch.mask, own.begin) && aligned(c.kind, own.begin) &&
                              aligned(by_token, own.begin) && aligned(c.weight, own.begin) &&
                              aligned(c.advantages_out, own.begin);
    for (int64_t i = own.begin + Size * thread(); i < own.end; i += Size * threads()) {
        const bool whole = aligned_here && i + Size <= own.end;
        const uint32_t bits = live_bits<Size>(c.batch.mask, i, own.end, whole);
        const Pack<T> given = load_pack(by_token, i, own.end, whole);
        Pack<T> weights, advantages;
        uint32_t kinds = 0;
#pragma unroll
        for (int k = 0; k < Size; ++k) {
            const bool here = bits >> k & 1;
            weights.at[k] = here ? weight : T(0);
            advantages.at[k] = here ? (by_token ? given.at[k] : of_sequence) : T(0);
            kinds |= static_cast<uint32_t>(here ? (expert ? kDemonstration : kRollout) : kDead) << 8 * k;
        }
        store_pack(c.weight, i, own.end, whole, weights);
        store_pack(c.advantages_out, i, own.end, whole, advantages);
        if (whole && Size == 4) {
            *reinterpret_cast<uint32_t*>(c.kind + i) = kinds;
        } else if (whole) {
            *reinterpret_cast<uint16_t*>(c.kind + i) = static_cast<uint16_t>(kinds);
        } else {
#pragma unroll
            for (int k = 0; k < Size; ++k)
                if (i + k < own.end) c.kind[i + k] = static_cast<uint8_t>(kinds >> 8 * k);
        }
    }
}

template <class T>
GAC_KERNEL(kSequenceThreads, kWeightBlocks) token_weights_kernel(TokenWeightsCall<T> c) {
    double* const shared = reinterpret_cast<double*>(shared_memory());
    const bool wait = !c.policy.denominator || !c.supervised.denominator;
    int64_t of_block[4] = {0, 0, 0, 0};
    RisingOffsets offsets{c.batch};
    for (int64_t s = block(); s < c.batch.sequences; s += blocks()) {
        const Span own = offsets.span(s);
        const int64_t live = count_sequence(c.batch, own, shared);
        if (thread() == 0) leave_sequence(c.counts[s], own, live);
        add_sequence(of_block, c.batch.expert[s] != 0, live);
    }
    leave_counts(c.counts, of_block, wait);
    const Span all = covered(c.batch, offsets);
    clear_uncovered(c.batch, all, c.kind);
    clear_uncovered(c.batch, all, c.weight);
    clear_uncovered(c.batch, all, c.advantages_out);
    wait_for_counts(wait);
    const BranchWeights denominator = denominators(c, wait, shared);
    for (int64_t s = block(); s < c.batch.sequences; s += blocks()) spread(c, s, denominator);
}

}  // namespace gac::cuda
