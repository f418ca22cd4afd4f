// Which instruction set's stages serve this CPU.
#include "isa.h"
#include "../token_loss.h"

namespace gac {

template <>
const TokenLossStages<float>& token_loss_stages<float>() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return token_loss_avx512;
    if (isa() == Isa::kAvx2) return token_loss_avx2;
#endif
    return token_loss_portable;
}

template <>
const TokenLossStages<double>& token_loss_stages<double>() {
    return token_loss_double;
}

}  // namespace gac
