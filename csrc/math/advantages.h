// Group-relative advantages, A = (R - baseline) / scale (GRPO, arXiv 2402.03300), from the statistics of a group.
#pragma once

#include <math.h>

#include "config.h"

namespace GAC_NAMESPACE {

// advantages.BASELINES and SCALES
enum Baseline { kMeanBaseline, kLeaveOneOut };
enum AdvantageScale { kGroupScale, kBatchScale, kNoScale };

// A reward that is nan or infinite is a sequence without a score.
GAC_INLINE bool scored(double reward) { return ::fabs(reward) < HUGE_VAL; }

// Of the scored rewards of a group or of the batch: first all are added, then the squares of their deviations.
struct RewardStatistics {
    double count = 0, sum = 0, squares = 0, low = HUGE_VAL, high = -HUGE_VAL;

    GAC_INLINE void add(double reward) {
        count += 1;
        sum += reward;
        low = reward < low ? reward : low;
        high = reward > high ? reward : high;
    }
    GAC_INLINE void add_square(double reward) {
        const double deviation = reward - sum / count;
        squares += deviation * deviation;
    }
    GAC_INLINE double others() const { return count > 2 ? count - 1 : 1; }
    GAC_INLINE double standard_deviation() const { return ::sqrt(squares / others()); }
};

// The advantage of one member; exactly 0 where the group's rewards do not differ. `batch_deviation`: for kBatchScale.
GAC_INLINE double group_advantage(
    double reward, const RewardStatistics& group, int baseline, int scale, double batch_deviation, double eps) {
    if (!scored(reward) || !(group.high > group.low)) return 0;
    const double deviation = reward - group.sum / group.count;
    // R_i - (sum - R_i) / (n - 1) = (R_i - mean) n / (n - 1)
    const double advantage = baseline == kLeaveOneOut ? deviation * (group.count / group.others()) : deviation;
    if (scale == kNoScale) return advantage;
    return advantage / ((scale == kBatchScale ? batch_deviation : group.standard_deviation()) + eps);
}

}  // namespace GAC_NAMESPACE
