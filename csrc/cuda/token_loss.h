// The token-level loss and the token weights on a GPU: plain structs of device pointers. No torch and no CUDA headers.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../token_loss.h"

namespace gac::cuda {

// Who owns which token. Sequence s owns [offsets[s], offsets[s + 1]), or where offsets is null
// [s seq_len, (s + 1) seq_len). Each offset is clamped to [0, N], and one that falls raised to the largest before it: no
// token is in two sequences.
struct TokenSequences {
    int64_t tokens, sequences, seq_len;
    const int64_t* offsets;  // (S + 1,) or null
    const uint8_t* mask;     // (N,)
    const uint8_t* expert;   // (S,)
};

// How a branch of the batch is aggregated (csrc/cpu/branches.h); denominator is one number, or null for its own count.
template <class T>
struct BranchRule {
    int aggregation;
    double norm_length;
    const T* denominator;
};

// mu, or with `both` mu and 1 - mu, which then need not be made of what rounding has left of mu.
template <class T>
struct Mixing {
    const T* mu;
    bool both;
};

// What the counting leaves of sequence s: its first token, the one behind its last, and how many of them are live; and
// of block s of the grid, which never has more blocks than there are sequences: tokens and non-empty sequences of the
// policy's branch, then of the supervised one.
struct SequenceCount {
    int64_t begin, end, live;
    int64_t of_block[4];
};

// Sequence s before its tokens are evaluated (csrc/math/terms.h, Coupling), and what the evaluation leaves of it. A
// group's cancellation residual stands with its first member, where `counted` is 1.
struct SequenceState {
    double ratio, gain, advantage, residual, counted;
    double sums[kSequenceSums];  // SequenceSum; loss, KL and entropy times the weight of a token
};

// One call; what is null or absent is as in csrc/token_loss.h. All memory is the device's.
template <class T>
struct TokenLossCall {
    TokenSequences batch;
    Streams<T> streams;   // of N; its mask is not read, the batch's is
    const T* advantages;  // (S,) or null; one a token stands in streams.advantage
    const int64_t* groups;  // (S,), for DFPO
    Mixing<T> mixing;
    BranchRule<T> policy, supervised;
    TokenLossParameters parameters;
    T *loss, *scalars, *rows;  // (), (kScalars,), (S, kColumns)
    SequenceCount* counts;     // workspace: max(S, 1)
    SequenceState* states;     // workspace: max(S, 1)
};

// One launch, asynchronous on `stream` of the current device; throws std::runtime_error where it cannot start.
void launch_token_loss(const TokenLossCall<float>&, void* stream);
void launch_token_loss(const TokenLossCall<double>&, void* stream);

}  // namespace gac::cuda
