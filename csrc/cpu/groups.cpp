#include "groups.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace gac {

namespace {

// nan wins, as in torch.amin.
double smallest(double a, double b) { return std::isnan(a) || a < b ? a : b; }

// Transforms one group and returns its residual; nan where it is not defined.
double transform_group(const int64_t* first, const int64_t* last, bool orthogonal, SequenceCoupling* coupling) {
    double low = coupling[*first].weight, dot = 0, square = 0, before = 0;
    for (const int64_t* s = first; s != last; ++s) {
        const SequenceCoupling& c = coupling[*s];
        low = smallest(low, c.weight);
        dot += c.advantage * c.weight;
        square += c.advantage * c.advantage;
        if (orthogonal) before += std::abs(c.advantage * c.weight);
    }
    const double along = square > 0 ? dot / square : 0;
    double force = 0, total = 0;
    for (const int64_t* s = first; s != last; ++s) {
        SequenceCoupling& c = coupling[*s];
        c.gain = orthogonal ? c.weight - along * c.advantage : low;
        force += c.advantage * c.gain;
        total += std::abs(c.advantage * c.gain);
    }
    // What Eq. 18 leaves of a group whose weights lie along its advantages (a group of one) is rounding, no direction.
    return total > 1e-12 * before ? std::abs(force) / total : std::nan("");
}

}  // namespace

double transform_groups(
    const int64_t* groups, const uint8_t* expert, const int64_t* counts, int64_t sequences, bool orthogonal,
    SequenceCoupling* coupling) {
    std::vector<int64_t> order;
    order.reserve(static_cast<size_t>(sequences));
    for (int64_t s = 0; s < sequences; ++s)
        if (!expert[s] && counts[s] > 0) order.push_back(s);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return groups[a] < groups[b]; });

    double residuals = 0, counted = 0;
    for (size_t first = 0, last; first < order.size(); first = last) {
        for (last = first + 1; last < order.size() && groups[order[last]] == groups[order[first]];) ++last;
        const double residual = transform_group(&order[first], order.data() + last, orthogonal, coupling);
        if (!std::isnan(residual)) {
            residuals += residual;
            counted += 1;
        }
    }
    return counted > 0 ? residuals / counted : 0;
}

}  // namespace gac
