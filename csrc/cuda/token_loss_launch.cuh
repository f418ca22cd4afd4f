// The launch of the token-level loss, for the two units that compile it side by side.
#pragma once

#include "token_loss.cuh"

namespace gac::cuda {

template <class T>
void launch_any(const TokenLossCall<T>& call, void* stream) {
    using V = typename LaneOf<T>::Type;
    const auto with = [&](auto kernel) {
        const Grid1 grid = sequence_grid(call.batch.sequences, kSequenceBlocks<T>);
        launch_together("token_loss", kernel, grid, stream, call);
    };
    switch (call.parameters.policy) {
        case kSigmoid: return with(token_loss_kernel<T, SapoTerm<V, SigmoidGate>>);
        case kErf: return with(token_loss_kernel<T, SapoTerm<V, ErfGate>>);
        case kArctan: return with(token_loss_kernel<T, SapoTerm<V, ArctanGate>>);
        case kSoftsign: return with(token_loss_kernel<T, SapoTerm<V, SoftsignGate>>);
        case kGrpo: return with(token_loss_kernel<T, GrpoTerm<V>>);
        case kCispo: return with(token_loss_kernel<T, CispoTerm<V>>);
        case kGspo: return with(token_loss_kernel<T, GspoTerm<V>>);
        default: return with(token_loss_kernel<T, DfpoTerm<V>>);
    }
}

}  // namespace gac::cuda
