// Group-relative advantages on the CPU: group by group, O(S log S) where ids stand in any order.
#include "advantages_op.h"

#define GAC_NAMESPACE gac::portable
#include "../advantages_ops.h"
#include "../math/advantages.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace gac {
namespace {

using portable::RewardStatistics;
using portable::scored;

// Of the rewards at these places, in their order.
template <class T>
RewardStatistics statistics(const T* rewards, const int64_t* first, const int64_t* last) {
    RewardStatistics out;
    for (const int64_t* i = first; i != last; ++i)
        if (scored(rewards[*i])) out.add(rewards[*i]);
    for (const int64_t* i = first; i != last; ++i)
        if (scored(rewards[*i])) out.add_square(rewards[*i]);
    return out;
}

template <class T>
void advantages(const AdvantagesCall<T>& c) {
    std::vector<int64_t> order(static_cast<size_t>(c.sequences));
    std::iota(order.begin(), order.end(), int64_t(0));
    const int64_t *const begin = order.data(), *const end = begin + c.sequences;
    const double of_batch =
        c.scale == portable::kBatchScale ? statistics(c.rewards, begin, end).standard_deviation() : 0;
    if (c.groups && !c.adjacent)
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return c.groups[a] < c.groups[b]; });
    for (const int64_t *first = begin, *last; first != end; first = last) {
        last = first + (c.groups ? 1 : c.group_size);
        while (c.groups && last != end && c.groups[*last] == c.groups[*first]) ++last;
        const RewardStatistics group = statistics(c.rewards, first, last);
        for (const int64_t* i = first; i != last; ++i)
            c.advantages[*i] = static_cast<T>(
                portable::group_advantage(c.rewards[*i], group, c.baseline, c.scale, of_batch, c.eps));
    }
}

}  // namespace

Tensor group_advantages(
    Tensor rewards, OptionalTensor groups, int64_t group_size, bool adjacent, int64_t baseline, int64_t scale,
    double eps) {
    return group_advantages(
        Inputs{"group_advantages"}, rewards, groups, group_size, adjacent, baseline, scale, eps,
        [](const auto& call) { advantages(call); });
}

}  // namespace gac
