// What each token is and weighs before any logit is seen, on a GPU. No torch and no CUDA headers.
#pragma once

#include "token_loss.h"

namespace gac::cuda {

// schemas.DEAD, ROLLOUT, DEMONSTRATION
enum TokenKind : uint8_t { kDead, kRollout, kDemonstration };

// All memory is the device's; advantages is null, one a sequence (S,), or with token_advantages one a token (N,).
template <class T>
struct TokenWeightsCall {
    TokenSequences batch;
    const T* advantages;
    bool token_advantages;
    Mixing<T> mixing;
    BranchRule<T> policy, supervised;
    uint8_t* kind;  // (N,) TokenKind
    T *weight, *advantages_out;  // (N,)
    SequenceCount* counts;       // workspace: max(S, 1)
};

// One launch, asynchronous on `stream` of the current device; throws std::runtime_error where it cannot start.
void launch_token_weights(const TokenWeightsCall<float>&, void* stream);
void launch_token_weights(const TokenWeightsCall<double>&, void* stream);

}  // namespace gac::cuda
