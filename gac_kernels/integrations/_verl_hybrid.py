"""The hybrid loss of verl's micro-batches, and the counts of an optimizer step that they are divided by.

Shapes: S sequences of a micro-batch, T tokens of the longest response.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..controller import GuidedAdaptiveController
from ..objectives import DFPO, NLL, HybridObjective
from ..ops import hybrid_loss as token_hybrid_loss
from ..types import Denominators, HybridLoss, TokenBatch
from . import _verl_loss

COUNTS = "gac_counts"  # non-tensor key of verl's data: tokens and sequences of the policy's and the expert's branch
_SUMMED = ("actor/pg_loss", "gac/supervised_loss", "actor/entropy_loss", "kl_loss")  # over micro-batches
_ESTIMATORS = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def count_branches(data: Any, dp_group: Any = None, expert_key: str = "expert_mask") -> None:
    """Write into an optimizer step's ``data`` what its branches are divided by, counted over ``dp_group``'s ranks.

    Args:
        data: the TensorDict of the whole mini-batch, before verl splits it into micro-batches. Holds ``response_mask``
            ``(S, T)`` or nested, and ``expert_key`` ``(S,)``.
    """
    from verl.utils import tensordict_utils as tu

    mask = data.select("response_mask").to_padded_tensor()["response_mask"].bool()
    lengths, expert = mask.sum(-1), _experts(data, expert_key, len(mask))
    sums = [lengths[branch].sum() for branch in (~expert, expert)]
    sums += [(lengths[branch] > 0).sum() for branch in (~expert, expert)]
    counts = torch.stack(sums)
    if torch.distributed.is_initialized():
        counts = counts.to(device_of_ranks())
        torch.distributed.all_reduce(counts, group=dp_group)
    policy_tokens, expert_tokens, policy_rows, expert_rows = counts.tolist()
    tu.assign_non_tensor(
        data, **{COUNTS: {"policy": (policy_tokens, policy_rows), "expert": (expert_tokens, expert_rows)}}
    )


def device_of_ranks() -> torch.device:
    """Where verl computes in this process; its own get_device_name() says cuda where there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.empty(0, device=accelerator or "cpu").device


def _experts(data: Any, key: str, rows: int) -> Tensor:
    if key not in data:
        raise ValueError(f"data must hold {key!r}, True for demonstrations; it has {', '.join(sorted(data.keys()))}")
    expert: Tensor = data[key]
    if expert.numel() != rows:
        raise ValueError(f"data[{key!r}] must hold one flag a sequence ({rows}), got shape {tuple(expert.shape)}")
    return expert.reshape(rows).bool()


def settings_of(config: Any) -> Any:
    """An ActorConfig's ``policy_loss``; TypeError where it lacks what the hybrid loss needs."""
    settings = getattr(config, "policy_loss", None)
    if not hasattr(settings, "expert_key"):
        raise TypeError(
            "config.policy_loss must be a GACPolicyLossConfig (policy_loss._target_) for the hybrid loss, got "
            f"{type(settings).__name__}"
        )
    return settings


def hybrid_loss(
    model_output: Any,
    data: Any,
    dp_group: Any = None,
    *,
    config: Any,
    controller: GuidedAdaptiveController | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """A loss function of verl's engines, for ``set_loss_fn(partial(hybrid_loss, config=..., controller=...))``.

    ``(1 - mu) * policy + mu * supervised``: rollouts take the objective that ``policy_loss.loss_mode`` names, with
    verl's KL loss and entropy bonus; demonstrations NLL-phi (``policy_loss.supervised``). A demonstration is a row like
    any other, whose response is the one to imitate; its advantages, old and reference log-probs are not read.

    Args:
        model_output: ``log_probs``, and ``entropy`` and ``sum_pi_squared`` where the engine computed them.
        data: a micro-batch; beyond what ``ppo_loss`` reads it holds the expert mask, a bool ``(S,)`` under
            ``policy_loss.expert_key`` (default ``expert_mask``), and what :func:`count_branches` wrote.
        dp_group: as verl passes it; not used, for the counts are those of all ranks already.
        config: ActorConfig whose ``policy_loss`` is a ``GACPolicyLossConfig``.
        controller: sets mu and observes the signals where a gradient is wanted. Whoever ends the optimizer step calls
            its ``step()``: :func:`attach` does. None takes ``policy_loss.mu``.

    Returns:
        The 0-d loss, and verl's metrics.
    """
    from verl.utils.metric import AggregationType, Metric

    settings = settings_of(config)
    batch, inputs = _micro_batch(model_output, data, config)
    objective, denominators, batch = _objective(data, config, batch, inputs["logp"])
    mu = settings.mu if controller is None else controller.mu
    if mu is None:
        raise ValueError("policy_loss.mu must be a number in [0, 1] where there is no controller, got None")
    result = token_hybrid_loss(
        inputs["logp"],
        batch,
        objective,
        mu,
        entropy=inputs.get("entropy"),
        sum_sq=inputs.get("sum_pi_squared"),
        denominators=denominators,
    )
    if controller is not None and torch.is_grad_enabled():
        controller.observe(result.signals)
    metrics = _metrics(config, inputs, batch, result, mu)
    whole = AggregationType.SUM if COUNTS in data else AggregationType.MEAN
    kinds = {**dict.fromkeys(_SUMMED, whole), "gac/ratio_max": AggregationType.MAX}
    values = torch.stack([torch.as_tensor(value, device=result.loss.device).float() for value in metrics.values()])
    return result.loss, {
        name: Metric(kinds.get(name, AggregationType.MEAN), value)
        for name, value in zip(metrics, values.tolist(), strict=True)
    }


def _micro_batch(model_output: Any, data: Any, config: Any) -> tuple[TokenBatch, dict[str, Tensor]]:
    """verl's micro-batch as ours, and the log-probs ``logp`` with what else the model gave, ``(S, T)`` each."""
    from verl.workers.utils.padding import no_padding_2_padding

    inputs = {"logp": no_padding_2_padding(model_output["log_probs"], data)}
    for name in ("entropy", "sum_pi_squared"):
        if model_output.get(name) is not None:
            inputs[name] = no_padding_2_padding(model_output[name], data)
    fields = ["response_mask", "old_log_probs", "advantages"]
    fields += [name for name in ("rollout_is_weights", "ref_log_prob") if name in data]
    if config.use_kl_loss and "ref_log_prob" not in fields:
        raise ValueError("data must hold 'ref_log_prob' where use_kl_loss is set")
    rows = data.select(*fields).to_padded_tensor()
    mask = rows["response_mask"].bool()
    inputs["old"] = rows["old_log_probs"]
    experts = _experts(data, config.policy_loss.expert_key, len(mask))
    weights = rows.get("rollout_is_weights", None)
    if weights is not None:  # of the sampler; no sampler wrote a demonstration
        weights = weights.masked_fill(experts[:, None], 1.0)
    batch = TokenBatch.from_padded(
        mask.long(),  # a loss of log-probs reads no ids
        mask,
        is_expert_S=experts,
        advantages=rows["advantages"],
        old_logprobs=rows["old_log_probs"],
        ref_logprobs=rows.get("ref_log_prob", None),
        rollout_weights=weights,
    )
    return batch, inputs


def _objective(
    data: Any, config: Any, batch: TokenBatch, logp: Tensor
) -> tuple[HybridObjective, Denominators, TokenBatch]:
    from verl.utils import tensordict_utils as tu

    settings = config.policy_loss
    assert batch.old_logprobs is not None
    policy, old = _verl_loss.policy_of(settings.loss_mode, config, logp, batch.old_logprobs, batch.mask)
    if isinstance(policy, DFPO):
        raise ValueError(
            "gac_dfpo is not supported in a hybrid loss: verl spreads the completions of a prompt over micro-batches"
        )
    if config.use_kl_loss and config.kl_loss_type not in _ESTIMATORS:
        raise ValueError(f"kl_loss_type must be one of {', '.join(_ESTIMATORS)}; got {config.kl_loss_type!r}")
    counts = tu.get_non_tensor_data(data, COUNTS, None)
    if counts is None and (data["dp_size"] > 1 or data["batch_num_tokens"] is not None):
        raise ValueError(f"data must hold {COUNTS!r}, which count_branches() writes before the micro-batches are split")
    split = []
    modes = {"policy": config.loss_agg_mode, "expert": settings.supervised_aggregation}
    for branch, mode in modes.items():
        info = {"dp_size": data["dp_size"], "loss_scale_factor": config.loss_scale_factor}
        if counts is not None:  # a branch without tokens divides nothing
            tokens, rows = counts[branch]
            info |= {"batch_num_tokens": max(tokens, 1), "global_batch_size": max(rows, 1)}
        split.append(_verl_loss.aggregation_of(mode, info))
    (aggregation, norm, policy_count), (supervised_aggregation, supervised_norm, expert_count) = split
    objective = HybridObjective(
        policy,
        NLL(settings.supervised),
        kl_coef=config.kl_loss_coef if config.use_kl_loss else 0.0,
        kl_estimator=_ESTIMATORS.get(config.kl_loss_type, "k3"),
        entropy_coef=float(config.entropy_coeff),
        aggregation=aggregation,
        supervised_aggregation=supervised_aggregation,
        norm_length=norm if norm is not None else supervised_norm,
    )
    return objective, Denominators(policy_count, expert_count), replace(batch, old_logprobs=old.detach())


def _metrics(
    config: Any, inputs: dict[str, Tensor], batch: TokenBatch, result: HybridLoss, mu: Tensor | float
) -> dict[str, Any]:
    seen: dict[str, Any] = {
        "actor/pg_loss": result.policy_loss,
        "gac/supervised_loss": result.supervised_loss,
        "gac/mu": mu,
        "gac/ratio_max": result.metrics["ratio_max"],
    }
    seen |= _verl_loss.policy_metrics(
        config.policy_loss.loss_mode, config, inputs["logp"], inputs["old"], batch, result
    )
    if "entropy" in inputs:
        seen["actor/entropy_loss"] = result.entropy
    if config.use_kl_loss:
        seen |= {"kl_loss": result.kl, "kl_coef": config.kl_loss_coef}
    return seen
