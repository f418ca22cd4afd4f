// The token-level loss as its kernels see it: plain arrays, the same for every instruction set. No std templates here,
// because the units of all instruction sets include this file.
#pragma once

#include <stdint.h>

#include "math/codes.h"

namespace gac {

// Flat arrays over the N tokens; an absent input or output is null.
template <class T>
struct Streams {
    const uint8_t* mask;
    const T *logp, *old, *reference, *rollout, *entropy, *sum_sq;
    const T* supervised;  // values of the supervised term of demonstrations, where they are no multiple of logp
    const T* advantage;
    T *logp_out, *slope, *entropy_slope;
};

struct TokenLossParameters {
    int policy;  // PolicyCode
    double p0, p1, p2;
    bool phi;
    double kl_coef;
    int kl_estimator;
    bool kl_ratio_weighted;
    double entropy_coef;
};

// Sums over one sequence that the batch totals need, in float64.
enum SequenceSum {
    kSumLoss,  // of the sequence's own branch: policy or supervised
    kSumKl, kSumEntropy, kSumRatio, kSumApproxKl, kSumUpdate, kSumClipped,
    kMaxRatio,
    kSequenceSums
};

// What the sequence-coupled terms need to know of a sequence (csrc/math/terms.h, Coupling), and for DFPO's groups the
// mean advantage.
struct SequenceCoupling {
    double weight, gain, advantage;
};

// One call of the operator. Sequence s owns [bounds[s], bounds[s + 1]), which lies in [0, N] and never falls.
template <class T>
struct TokenLoss {
    int64_t sequences;
    const int64_t* bounds;
    const uint8_t* expert;
    const T* advantages;   // (S,) or null; one a token stands in streams.advantage
    Streams<T> streams;
    TokenLossParameters parameters;
    int64_t* counts;       // (S,) live tokens
    double* scale;         // (S,) weight of a token's term in the loss: (1 - mu) a_i or mu b_i
    SequenceCoupling* coupling;  // (S,) or null
    T* rows;               // (S, kColumns)
    double (*sums)[kSequenceSums];  // (S,)
};

// Stages, each over the sequences [begin, end): count; couple (GSPO, DFPO); then, with scale and coupling known, evaluate,
// which writes rows, sums and every per-token output of its sequences.
template <class T>
struct TokenLossStages {
    void (*count)(const TokenLoss<T>&, int64_t begin, int64_t end);
    void (*couple)(const TokenLoss<T>&, int64_t begin, int64_t end);
    void (*evaluate)(const TokenLoss<T>&, int64_t begin, int64_t end);
};

#if defined(__x86_64__)
extern const TokenLossStages<float> token_loss_avx512, token_loss_avx2;
#endif
extern const TokenLossStages<float> token_loss_portable;
extern const TokenLossStages<double> token_loss_double;

// Those of this CPU.
template <class T>
const TokenLossStages<T>& token_loss_stages();

}  // namespace gac
