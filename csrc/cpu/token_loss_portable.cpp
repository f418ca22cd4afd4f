// The token-level loss for any CPU, and in float64.
#define GAC_NAMESPACE gac::portable
#include "vec_double.h"
#include "vec_portable.h"

#include "vec_math.h"

#include "token_loss_stages.h"

namespace gac {
using Floats = portable::Stages<portable::Vec>;
using Doubles = portable::Stages<portable::VecDouble>;
const TokenLossStages<float> token_loss_portable = {Floats::count, Floats::couple, Floats::evaluate};
const TokenLossStages<double> token_loss_double = {Doubles::count, Doubles::couple, Doubles::evaluate};
}  // namespace gac
