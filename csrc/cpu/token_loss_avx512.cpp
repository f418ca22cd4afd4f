// The token-level loss for AVX-512 (F, BW, DQ, VL). Compiled with flags of its own (setup.py); entered only where the CPU has them.
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own AVX-512 header (GCC PR 105593)
#endif

#define GAC_NAMESPACE gac::avx512
#include "vec_avx512.h"

#include "vec_math.h"

#include "token_loss_stages.h"

namespace gac {
using Stages = avx512::Stages<avx512::Vec>;
extern const TokenLossStages<float> token_loss_avx512;
const TokenLossStages<float> token_loss_avx512 = {Stages::count, Stages::couple, Stages::evaluate};
}  // namespace gac

#endif
