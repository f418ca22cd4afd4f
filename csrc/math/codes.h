// Numbers that gac_kernels/library.py and gac_kernels/signals.py share with the kernels.
#pragma once

namespace gac {

// library.POLICY_CODES
enum PolicyCode { kSigmoid = 0, kErf = 1, kArctan = 2, kSoftsign = 3, kGrpo = 4, kCispo = 5, kGspo = 6, kDfpo = 7 };

// library.encode: index + 1
enum KlEstimator { kK1 = 1, kK2 = 2, kK3 = 3 };

// objectives.AGGREGATIONS
enum Aggregation { kTokenMean = 0, kSeqMeanTokenMean = 1, kSeqMeanTokenSum = 2, kSeqMeanTokenSumNorm = 3 };

// library.SCALARS
enum Scalar {
    kPolicyLoss, kSupervisedLoss, kKl, kEntropy,
    kRatioMean, kRatioMax, kApproxKl, kUpdateRatio, kClipFraction, kResidual,
    kScalars
};

// signals.py: columns of a row
enum Column {
    kColExpert, kColTokens, kColNll, kColAdvantage, kColDisagreement, kColCs, kColCr, kColCs2, kColCr2, kColCsCr,
    kColOwnNorm, kColDiffNorm,
    kColumns
};

}  // namespace gac
