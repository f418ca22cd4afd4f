// What each token is and weighs before any logit is seen: the arithmetic of token_loss, spread over the tokens.
#include "token_weights_op.h"

#include <cmath>
#include <limits>

#include "branches.h"
#include "../token_loss.h"

namespace gac {
namespace {

constexpr Inputs in{"token_weights"};
constexpr uint8_t kRollout = 1, kDemonstration = 2;

template <class T>
std::tuple<Tensor, Tensor, Tensor> weigh(
    const Tensor& mask, const OptionalTensor& cu_seqlens, int64_t seq_len, const Tensor& is_expert,
    const OptionalTensor& advantages, bool token_advantages, const Tensor& mu, Branch policy, Branch supervised) {
    const int64_t N = mask.numel(), S = is_expert.numel();
    const int64_t* const offsets = in.data<int64_t>("cu_seqlens", cu_seqlens, S + 1);
    STD_TORCH_CHECK(
        offsets || (seq_len >= 0 && (seq_len == 0 ? N == 0 : N % seq_len == 0 && N / seq_len == S)),
        "token_weights: without cu_seqlens, mask must have S * seq_len elements, got ", N, " for S = ", S,
        " and seq_len = ", seq_len);
    const std::vector<int64_t> bounds = sequence_bounds(offsets, S, seq_len, N);
    const uint8_t* const live = in.data<uint8_t>("mask", mask, N);
    const uint8_t* const expert = in.data<uint8_t>("is_expert", is_expert, S);
    const T* const advantage = in.data<T>("advantages", advantages, token_advantages ? N : S);

    std::vector<int64_t> counts(static_cast<size_t>(S));
    TokenLoss<T> p{};
    p.sequences = S;
    p.bounds = bounds.data();
    p.streams.mask = live;
    p.counts = counts.data();
    token_loss_stages<T>().count(p, 0, S);
    const std::vector<double> scale =
        token_scales(S, expert, counts.data(), shares_of<T>(in, mu), policy, supervised);

    const Tensor kind = empty({N}, aoti_torch_dtype_uint8()), weight = empty<T>({N}), advantages_out = empty<T>({N});
    uint8_t* const kinds = static_cast<uint8_t*>(kind.mutable_data_ptr());
    T *const weights = output<T>(weight), *const out = output<T>(advantages_out);
    const auto clear = [&](int64_t begin, int64_t end) {
        std::fill(kinds + begin, kinds + end, uint8_t(0));
        std::fill(weights + begin, weights + end, T(0));
        std::fill(out + begin, out + end, T(0));
    };
    clear(0, bounds.front());  // tokens that no sequence owns
    clear(bounds.back(), N);
    for (int64_t s = 0; s < S; ++s) {
        // Demonstrations have no advantage; a rollout without one must not pass for a zero.
        const T of_sequence = expert[s] || (advantage && token_advantages) ? T(0)
                              : advantage                                  ? advantage[s]
                                                                           : std::numeric_limits<T>::quiet_NaN();
        const bool by_token = !expert[s] && advantage && token_advantages;
        for (int64_t i = bounds[s]; i < bounds[s + 1]; ++i) {
            kinds[i] = live[i] ? (expert[s] ? kDemonstration : kRollout) : 0;
            weights[i] = live[i] ? static_cast<T>(scale[s]) : T(0);
            out[i] = live[i] ? (by_token ? advantage[i] : of_sequence) : T(0);
        }
    }
    return {kind, weight, advantages_out};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_weights(
    Tensor mask, OptionalTensor cu_seqlens, int64_t seq_len, Tensor is_expert, OptionalTensor advantages,
    bool token_advantages, Tensor mu, OptionalTensor policy_denominator, OptionalTensor supervised_denominator,
    int64_t aggregation, int64_t supervised_aggregation, double norm_length) {
    const auto of = [&](auto zero) {
        using T = decltype(zero);
        return weigh<T>(
            mask, cu_seqlens, seq_len, is_expert, advantages, token_advantages, mu,
            make_branch<T>(in, aggregation, norm_length, "policy_denominator", policy_denominator, "aggregation"),
            make_branch<T>(
                in, supervised_aggregation, norm_length, "supervised_denominator", supervised_denominator,
                "supervised_aggregation"));
    };
    const int32_t dtype = dtype_of(mu);
    if (dtype == aoti_torch_dtype_float64()) return of(double());
    STD_TORCH_CHECK(dtype == aoti_torch_dtype_float32(), "token_weights: mu must have dtype float32 or float64");
    return of(float());
}

}  // namespace gac
