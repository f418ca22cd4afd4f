#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace gac {

// body(begin, end) for ranges that cover the sequences. Threads take the next range when they have done one: sequences
// differ in length, and a demonstration costs a third of a rollout. What a sequence yields depends on no other.
template <class F>
void parallel(int64_t sequences, int64_t tokens, const F& body) {
    constexpr int64_t kTokensOfRange = 4096, kTokensWorthAThread = 16384;  // the latter take some ten microseconds
    const int64_t threads =
        std::min<int64_t>({torch::stable::get_num_threads(), sequences, tokens / kTokensWorthAThread});
    if (threads <= 1) return body(0, sequences);
    const int64_t range = std::max<int64_t>(1, sequences * kTokensOfRange / tokens);
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int64_t begin; (begin = next.fetch_add(range)) < sequences;)
            body(begin, std::min(begin + range, sequences));
    });
}

}  // namespace gac
