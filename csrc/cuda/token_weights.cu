#include "token_weights.h"

#include "token_weights.cuh"

namespace gac::cuda {
namespace {

template <class T>
void launch_any(const TokenWeightsCall<T>& call, void* stream) {
    const Grid1 grid = sequence_grid(call.batch.sequences, kWeightBlocks);
    launch_together("token_weights", token_weights_kernel<T>, grid, stream, call);
}

}  // namespace

void launch_token_weights(const TokenWeightsCall<float>& call, void* stream) { launch_any(call, stream); }
void launch_token_weights(const TokenWeightsCall<double>& call, void* stream) { launch_any(call, stream); }

}  // namespace gac::cuda
