// DFPO's algebra inside the groups of a batch (arXiv 2604.13088v1).
#pragma once

#include <stdint.h>

#include "../token_loss.h"

namespace gac {

// Replaces the gain of every member sequence (a rollout with live tokens) by its transformed weight: the smallest of its
// group (Eq. 17), or with `orthogonal` its weight without the group's part along the advantages (Eq. 18). Returns the
// cancellation residual |sum A w| / sum |A w|, averaged over the groups where it is defined; 0 without one.
// O(S log S), in float64, summed in the order of the sequences.
double transform_groups(
    const int64_t* groups, const uint8_t* expert, const int64_t* counts, int64_t sequences, bool orthogonal,
    SequenceCoupling* coupling);

}  // namespace gac
