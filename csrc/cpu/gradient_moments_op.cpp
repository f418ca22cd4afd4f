// Sums over lists of gradients: chunks are spread over threads, their partial sums added up in the chunks' order.
#include "gradient_moments_op.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../gradient_moments_ops.h"
#include "gradient_moments.h"
#include "isa.h"

namespace gac {
namespace {

const MomentKernels& kernels() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return moment_kernels_avx512;
    if (isa() == Isa::kAvx2) return moment_kernels_avx2;
#endif
    return moment_kernels_portable;
}

void sum_chunks(const MomentsCall& call) {
    const auto kernel = call.accumulate ? kernels().accumulate : kernels().compare;
    const int sums = call.sums();
    torch::stable::parallel_for(0, call.chunks, 1, [&](int64_t begin, int64_t end) {
        const auto later = [](int64_t chunk, const GradientPair& pair) { return chunk < pair.first; };
        const GradientPair* pair = std::upper_bound(call.pairs, call.pairs + call.count, begin, later) - 1;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            if (pair + 1 < call.pairs + call.count && chunk >= pair[1].first) ++pair;
            const int64_t offset = (chunk - pair->first) * kMomentsChunk;
            kernel(*pair, offset, std::min(kMomentsChunk, pair->size - offset), call.partials + chunk * sums);
        }
    });
    std::fill(call.out, call.out + sums, 0.0);
    for (int64_t i = 0; i < call.chunks * sums; ++i) call.out[i % sums] += call.partials[i];
}

}  // namespace

Tensor gradient_moments(std::vector<Tensor> supervised, std::vector<Tensor> policy) {
    return sum_moments(
        Inputs{"gradient_moments"}, "supervised", supervised, "policy", policy, false,
        [](const MomentsCall& call, Device) { sum_chunks(call); });
}

Tensor accumulate_moments_(std::vector<Tensor> sums, std::vector<Tensor> gradients) {
    return sum_moments(
        Inputs{"accumulate_moments_"}, "gradients", gradients, "sums", sums, true,
        [](const MomentsCall& call, Device) { sum_chunks(call); });
}

}  // namespace gac
