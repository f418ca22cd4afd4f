// The token-level loss for AVX2 with FMA. Compiled with flags of its own (setup.py); entered only where the CPU has them.
#if defined(__x86_64__)

#define GAC_NAMESPACE gac::avx2
#include "vec_avx2.h"

#include "vec_math.h"

#include "token_loss_stages.h"

namespace gac {
using Stages = avx2::Stages<avx2::Vec>;
extern const TokenLossStages<float> token_loss_avx2;
const TokenLossStages<float> token_loss_avx2 = {Stages::count, Stages::couple, Stages::evaluate};
}  // namespace gac

#endif
