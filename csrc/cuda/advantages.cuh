// Group-relative advantages in one launch, one thread a sequence.
//
// A thread goes through the members of its group itself, in their order: twice, for the mean and for the deviations
// from it. So nothing is shared, no sum depends on how groups are interleaved, and every member finds the same bits.
// Members of groups by size, or of ids that stand side by side, are its neighbours; those of ids in any order are
// looked for among all S, which is S^2 comparisons in all: 2^28 for the 16384 sequences up to which
// gac_kernels/advantages.py does not sort.
#pragma once

#include "../advantages.h"
#include "block_sums.cuh"

#include "../math/advantages.h"

namespace gac::cuda {

constexpr int kAdvantageThreads = 64;  // few, so that a few hundred sequences reach several multiprocessors

// Where the members of a group lie: all of [first, last), or with `look` those of them that bear its id.
struct Members {
    int64_t first, last, group;
    bool look;
};

template <class T>
GAC_DEVICE Members members_around(const AdvantagesCall<T>& c, int64_t i) {
    if (!c.groups) {
        const int64_t first = i / c.group_size * c.group_size;
        return {first, first + c.group_size, 0, false};
    }
    Members m{0, c.sequences, c.groups[i], !c.adjacent};
    if (c.adjacent) {
        for (m.first = i; m.first > 0 && c.groups[m.first - 1] == m.group;) --m.first;
        for (m.last = i + 1; m.last < c.sequences && c.groups[m.last] == m.group;) ++m.last;
    }
    return m;
}

// function(j, reward) for the scored members, in their order.
template <class T, class F>
GAC_DEVICE void over_members(const AdvantagesCall<T>& c, const Members& m, const F& function) {
#pragma unroll 8
    for (int64_t j = m.first; j < m.last; ++j) {
        if (m.look && c.groups[j] != m.group) continue;
        const double reward = static_cast<double>(c.rewards[j]);
        if (scored(reward)) function(j, reward);
    }
}

// The standard deviation of all scored rewards; every block finds it for itself.
template <class T>
GAC_DEVICE double batch_deviation(const AdvantagesCall<T>& c, double* shared) {
    const auto over_all = [&](const auto& function) {
        for (int64_t j = thread(); j < c.sequences; j += threads()) {
            const double reward = static_cast<double>(c.rewards[j]);
            if (scored(reward)) function(reward);
        }
    };
    RewardStatistics all;
    double sum[2] = {0, 0}, squares[1] = {0};
    over_all([&](double reward) {
        sum[0] += 1;
        sum[1] += reward;
    });
    block_sums(sum, shared);
    all.count = sum[0];
    all.sum = sum[1];
    over_all([&](double reward) { all.add_square(reward); });
    squares[0] = all.squares;
    block_sums(squares, shared);
    all.squares = squares[0];
    return all.standard_deviation();
}

template <class T>
GAC_KERNEL(kAdvantageThreads, 8) group_advantages_kernel(AdvantagesCall<T> c) {
    const double of_batch =
        c.scale == kBatchScale ? batch_deviation(c, reinterpret_cast<double*>(shared_memory())) : 0;
    const int64_t i = block() * threads() + thread();
    if (i >= c.sequences) return;
    Members members = members_around(c, i);
    RewardStatistics group;
    int64_t first = i, last = i;
    over_members(c, members, [&](int64_t j, double reward) {
        group.add(reward);
        first = j < first ? j : first;
        last = j > last ? j : last;
    });
    members.first = first;
    members.last = last + 1;
    if (c.scale == kGroupScale) over_members(c, members, [&](int64_t, double reward) { group.add_square(reward); });
    const double reward = static_cast<double>(c.rewards[i]);
    c.advantages[i] = static_cast<T>(group_advantage(reward, group, c.baseline, c.scale, of_batch, c.eps));
}

}  // namespace gac::cuda
