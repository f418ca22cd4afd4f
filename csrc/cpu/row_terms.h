// The slope of a row's token, in one lane of a vector.
#pragma once

#include "row_passes.h"

#include "../math/row_slope.h"

namespace GAC_NAMESPACE {

template <class V>
__attribute__((noinline)) Slopes token_slopes(
    const gac::RowsCall<typename V::Scalar>& c, int64_t n, typename V::Scalar logp) {
    return row_slopes<V>(c.term, row_token(c, n), logp);
}

}  // namespace GAC_NAMESPACE
