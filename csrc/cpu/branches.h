// The two branches of a batch: which sequences and tokens belong to which, and what a token of each weighs.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../math/codes.h"
#include "../tensors.h"

namespace gac {

// Where each sequence begins: in [0, N] and never falling, whatever cu_seqlens holds.
inline std::vector<int64_t> sequence_bounds(const int64_t* offsets, int64_t sequences, int64_t seq_len, int64_t tokens) {
    std::vector<int64_t> bounds(static_cast<size_t>(sequences) + 1);
    int64_t last = 0;
    for (int64_t s = 0; s <= sequences; ++s)
        bounds[s] = last = offsets ? std::max(last, std::min(offsets[s], tokens)) : s * seq_len;
    return bounds;
}

struct Branch {
    int64_t tokens = 0, sequences = 0;  // with at least one live token
    int aggregation;
    double norm_length;
    std::optional<double> denominator;  // where one was given

    // The weight of every token of a sequence with `count` live tokens.
    double weight(int64_t count) const {
        const double own = static_cast<double>(aggregation == kTokenMean ? tokens : sequences);
        const double length = aggregation == kSeqMeanTokenMean      ? static_cast<double>(count)
                              : aggregation == kSeqMeanTokenSumNorm ? norm_length
                                                                    : 1.0;
        return 1.0 / (length * denominator.value_or(own));
    }
};

// What each branch counts for in the loss.
struct Shares {
    double policy, supervised;
};

// mu: one number, or mu and 1 - mu, which then need not be made of what rounding has left of mu.
template <class T>
Shares shares_of(const Inputs& in, const Tensor& mu) {
    const bool both = mu.numel() == 2;
    const T* const given = in.data<T>("mu", mu, both ? 2 : 1);
    const double supervised = static_cast<double>(given[0]);
    return {both ? static_cast<double>(given[1]) : 1 - supervised, supervised};
}

// Counts the branches' tokens and sequences, then gives each sequence the weight of a token's term in the loss:
// (1 - mu) a_i or mu b_i; 0 where it has no live token.
inline std::vector<double> token_scales(
    int64_t sequences, const uint8_t* expert, const int64_t* counts, Shares share, Branch& policy,
    Branch& supervised) {
    for (int64_t s = 0; s < sequences; ++s) {
        Branch& branch = expert[s] ? supervised : policy;
        branch.tokens += counts[s];
        branch.sequences += counts[s] > 0;
    }
    std::vector<double> scale(static_cast<size_t>(sequences));
    for (int64_t s = 0; s < sequences; ++s)
        if (counts[s] > 0)
            scale[s] = expert[s] ? share.supervised * supervised.weight(counts[s]) : share.policy * policy.weight(counts[s]);
    return scale;
}

template <class T>
Branch make_branch(
    const Inputs& in, int64_t aggregation, double norm_length, const char* name, const OptionalTensor& denominator,
    const char* aggregation_name) {
    Branch out{0, 0, in.code(aggregation_name, aggregation, kTokenMean, kSeqMeanTokenSumNorm), norm_length, std::nullopt};
    if (denominator) out.denominator = static_cast<double>(*in.data<T>(name, *denominator, 1));
    return out;
}

}  // namespace gac
