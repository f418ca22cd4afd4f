"""Every tensor argument of every public function, and the layouts and kinds of tensors that none of them takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bad_input import H, S, T, V, packed, padded
from torch import Tensor

import gac_kernels as gk

N = S * T
GIFT, DFPO = gk.HybridObjective(supervised=gk.GIFT()), gk.HybridObjective(gk.DFPO())
ALL = gk.HybridObjective(kl_coef=0.1, entropy_coef=0.1)


class Tagged(Tensor):
    """A subclass that takes part in what torch does with it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Plain(Tensor):
    """A subclass that changes nothing."""


def quantized(value: Tensor) -> Tensor:
    return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8)


def compressed(value: Tensor) -> Tensor:
    """CSR has two dimensions at least."""
    return torch.atleast_2d(value).to_sparse_csr()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "csr": compressed,
    "mkldnn": lambda value: torch.atleast_1d(value).float().to_mkldnn(),
    "nested": lambda value: torch.nested.as_nested_tensor([torch.atleast_1d(value)], layout=torch.strided),
    "quantized": quantized,
    "float8": lambda value: value.float().to(torch.float8_e4m3fn),
    "complex": lambda value: value.to(torch.complex64),
    "subclass": lambda value: value.as_subclass(Tagged),
}


def step(kl: Tensor) -> Tensor:
    return gk.GuidedAdaptiveController(gk.ControllerConfig(alpha=gk.KLTarget())).step(kl)


def causal(**given: Any) -> Tensor:
    from gac_kernels.integrations.transformers import CausalLMLoss

    logits, labels = given.pop("logits", torch.zeros(S, T, V)), given.pop("labels", torch.zeros(S, T, dtype=torch.long))
    return CausalLMLoss(mu=0.5)(logits, labels, **{"advantages": torch.zeros(S)} | given)


def of_logprobs(**given: Any) -> Any:
    return gk.hybrid_loss(
        **{"logprobs": -torch.ones(S, T), "batch": padded(), "objective": gk.HybridObjective(), "mu": 0.5} | given
    )


def of_logits(**given: Any) -> Any:
    return gk.hybrid_loss_from_logits(
        **{"logits": torch.zeros(S, T, V), "batch": padded(), "objective": gk.HybridObjective(), "mu": 0.5} | given
    )


def of_hidden(**given: Any) -> Any:
    leading = {"hidden": torch.zeros(S, T, H), "weight": torch.zeros(V, H), "batch": padded(), "mu": 0.5}
    return gk.hybrid_loss_from_hidden(**leading | {"objective": gk.HybridObjective()} | given)


def based(**given: Any) -> Any:
    base = {"base_hidden": torch.zeros(S, T, H), "base_weight": torch.zeros(V, H), "base_bias": torch.zeros(V)}
    return of_hidden(objective=GIFT, **base | given)


def token_logprobs(**given: Any) -> Any:
    return gk.token_logprobs(**{"logits": torch.zeros(S, T, V), "targets": torch.zeros(S, T, dtype=torch.long)} | given)


def hidden_logprobs(**given: Any) -> Any:
    leading = {"hidden": torch.zeros(S, T, H), "weight": torch.zeros(V, H)}
    return gk.token_logprobs_from_hidden(**leading | {"targets": torch.zeros(S, T, dtype=torch.long)} | given)


def count(name: str) -> Callable[..., Any]:
    return lambda **given: of_logprobs(denominators=gk.Denominators(**{name: given[name]}))


TOKENS, FLAT, BOOL = torch.ones(S, T), torch.ones(N), torch.zeros(S, dtype=torch.bool)
IDS = torch.zeros(S, dtype=torch.long)
# name of the call, argument, a value that fits, the call
ARGUMENTS: list[tuple[str, str, Tensor, Callable[..., Any]]] = [
    *(("from_padded", name, value, padded) for name, value in {
        "targets_ST": torch.zeros(S, T, dtype=torch.long), "mask_ST": TOKENS.bool(), "is_expert_S": BOOL,
        "advantages": torch.ones(S), "old_logprobs": -TOKENS, "ref_logprobs": -TOKENS, "rollout_weights": TOKENS,
        "token_weights": TOKENS, "base_logits": torch.zeros(S, T, V), "groups": IDS,
    }.items()),
    *(("from_packed", name, value, packed) for name, value in {
        "targets_N": torch.zeros(N, dtype=torch.long), "cu_seqlens": torch.tensor([0, 4, 9, N]), "mask_N": FLAT.bool(),
        "is_expert_S": BOOL, "advantages": FLAT, "old_logprobs": -FLAT, "ref_logprobs": -FLAT, "rollout_weights": FLAT,
        "token_weights": FLAT, "base_logits": torch.zeros(N, V), "groups": IDS,
    }.items()),
    *(("hybrid_loss", name, value, of_logprobs) for name, value in {
        "logprobs": -TOKENS, "mu": torch.tensor(0.5), "entropy": TOKENS, "sum_sq": TOKENS,
    }.items()),
    ("Denominators", "policy", torch.tensor(3.0), count("policy")),
    ("Denominators", "supervised", torch.tensor(3.0), count("supervised")),
    *(("hybrid_loss_from_logits", name, value, of_logits) for name, value in {
        "logits": torch.zeros(S, T, V), "mu": torch.tensor(0.5),
    }.items()),
    *(("hybrid_loss_from_hidden", name, value, of_hidden) for name, value in {
        "hidden": torch.zeros(S, T, H), "weight": torch.zeros(V, H), "bias": torch.zeros(V), "mu": torch.tensor(0.5),
    }.items()),
    *(("base", name, value, based) for name, value in {
        "base_hidden": torch.zeros(S, T, H), "base_weight": torch.zeros(V, H), "base_bias": torch.zeros(V),
    }.items()),
    *(("token_logprobs", name, value, token_logprobs) for name, value in {
        "logits": torch.zeros(S, T, V), "targets": torch.zeros(S, T, dtype=torch.long), "mask": TOKENS.bool(),
    }.items()),
    *(("token_logprobs_from_hidden", name, value, hidden_logprobs) for name, value in {
        "hidden": torch.zeros(S, T, H), "weight": torch.zeros(V, H), "bias": torch.zeros(V), "mask": TOKENS.bool(),
        "targets": torch.zeros(S, T, dtype=torch.long),
    }.items()),
    ("signals_from_logprobs", "logprobs", -TOKENS, lambda logprobs: gk.signals_from_logprobs(logprobs, padded())),
    ("signals_from_logprobs", "sum_sq", TOKENS,
     lambda sum_sq: gk.signals_from_logprobs(-TOKENS, padded(), sum_sq=sum_sq)),
    ("group_advantages", "rewards_S", torch.ones(6), lambda rewards_S: gk.group_advantages(rewards_S, 3)),
    ("group_advantages", "groups", torch.zeros(6, dtype=torch.long),
     lambda groups: gk.group_advantages(torch.ones(6), groups)),
    ("LogitTransform", "temperature", torch.ones(S), lambda temperature: gk.LogitTransform(temperature)),
    ("Signals", "rows", torch.zeros(S, 12), lambda rows: gk.Signals(rows)),
    ("Signals", "hidden", torch.zeros(S, H), lambda hidden: gk.Signals(torch.zeros(S, 12), hidden=hidden)),
    ("step", "kl", torch.tensor(0.1), step),
    *(("CausalLMLoss", name, value, causal) for name, value in {
        "logits": torch.zeros(S, T, V), "labels": torch.zeros(S, T, dtype=torch.long), "advantages": torch.ones(S),
        "is_expert": BOOL, "old_logprobs": -TOKENS, "rollout_weights": TOKENS, "token_weights": TOKENS,
        "shift_labels": torch.zeros(S, T, dtype=torch.long),
    }.items()),
]  # fmt: skip
