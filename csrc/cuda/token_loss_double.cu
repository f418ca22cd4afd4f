#include "token_loss_launch.cuh"

namespace gac::cuda {

void launch_token_loss(const TokenLossCall<double>& call, void* stream) { launch_any(call, stream); }

}  // namespace gac::cuda
