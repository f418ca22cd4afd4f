"""The hybrid loss of verl's micro-batches, and what one optimizer step needs around it: counts, controller, checkpoint.

Shapes: S sequences of a micro-batch, T tokens of the longest response.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConstantPrior, ControllerConfig, CosinePrior, KLTarget
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
        counts = counts.to(_device())
        torch.distributed.all_reduce(counts, group=dp_group)
    policy_tokens, expert_tokens, policy_rows, expert_rows = counts.tolist()
    tu.assign_non_tensor(
        data, **{COUNTS: {"policy": (policy_tokens, policy_rows), "expert": (expert_tokens, expert_rows)}}
    )


def _device() -> torch.device:
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

    batch, inputs = _micro_batch(model_output, data, config)
    objective, denominators, batch = _objective(data, config, batch, inputs["logp"])
    mu = config.policy_loss.mu if controller is None else controller.mu
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
    batch = TokenBatch.from_padded(
        mask.long(),  # a loss of log-probs reads no ids
        mask,
        is_expert_S=_experts(data, config.policy_loss.expert_key, len(mask)),
        advantages=rows["advantages"],
        old_logprobs=rows["old_log_probs"],
        ref_logprobs=rows.get("ref_log_prob", None),
        rollout_weights=rows.get("rollout_is_weights", None),
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


def controller_config(settings: Mapping[str, Any] | None) -> ControllerConfig:
    """``policy_loss.controller`` of a YAML file as a ControllerConfig: its fields, ``prior`` a number, a mapping of
    CosinePrior's fields, or null."""
    fields = dict(settings or {})
    prior = fields.get("prior", CosinePrior())
    if isinstance(prior, (int, float)) and not isinstance(prior, bool):
        fields["prior"] = ConstantPrior(float(prior))
    elif isinstance(prior, Mapping):  # a DictConfig too
        fields["prior"] = CosinePrior(**prior)
    return ControllerConfig(**fields)


def attach(worker: Any, controller: GuidedAdaptiveController | None = None) -> GuidedAdaptiveController | None:
    """Give a ``TrainingWorker`` that holds ``ppo_loss`` the hybrid loss, in the worker's own process.

    Its engine's ``train_batch`` is one optimizer step: the branches are counted before it and the controller takes its
    step after it. The controller's state goes into the engine's checkpoints, one file a rank.

    Args:
        worker: its ``loss_fn`` is ``partial(..., config=ActorConfig)``, as verl's ActorRolloutRefWorker sets it.
        controller: None makes one from ``policy_loss.controller``, on the engine's ranks; or none at all where
            ``policy_loss.mu`` is a number.

    Returns:
        The controller, or None with a fixed mu.
    """
    from verl.utils import tensordict_utils as tu

    config: Any = getattr(worker.loss_fn, "keywords", {}).get("config")
    settings: Any = getattr(config, "policy_loss", None)
    if not hasattr(settings, "expert_key"):
        raise TypeError(
            "worker must hold a loss with config.policy_loss of type GACPolicyLossConfig (policy_loss._target_), got "
            f"{type(settings).__name__}"
        )
    engine = worker.engine
    if controller is not None and settings.mu is not None:
        raise ValueError("controller and policy_loss.mu exclude each other, got both")
    if controller is None and settings.mu is None:
        controller = GuidedAdaptiveController(
            controller_config(settings.controller),
            device=_device(),
            process_group=engine.get_data_parallel_group(),
        )
    if controller is not None:
        if controller.config.estimator == "hidden":
            raise ValueError("controller's estimator must be 'coefficient' or 'logit' in verl, got 'hidden'")
        if isinstance(controller.config.alpha, KLTarget):
            raise ValueError("controller's alpha must be a number in verl, got a KLTarget, which is not supported here")
    worker.loss_fn = partial(hybrid_loss, config=config, controller=controller)
    train_batch = engine.train_batch

    def one_step(data: Any, loss_function: Any) -> Any:
        count_branches(data, engine.get_data_parallel_group(), settings.expert_key)
        if controller is not None and controller.config.estimator == "logit":
            tu.assign_non_tensor(data, calculate_sum_pi_squared=True)
        outputs = train_batch(data, loss_function)
        if controller is not None:
            controller.step()
            _report(controller, outputs)
        return outputs

    engine.train_batch = one_step
    if controller is not None:
        _keep_state(engine, controller)
    return controller


def _report(controller: GuidedAdaptiveController, outputs: Any) -> None:
    """The controller's numbers among the step's metrics, one value as of one micro-batch; mu is there already."""
    if not outputs.get("metrics"):
        return
    metrics = {name: value for name, value in controller.metrics().items() if name != "gac/mu"}
    values = torch.stack([value.double() for value in metrics.values()]).tolist()
    outputs["metrics"].update({name: [value] for name, value in zip(metrics, values, strict=True)})


def _keep_state(engine: Any, controller: GuidedAdaptiveController) -> None:
    """Save and load the controller where the engine saves and loads."""
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def path_in(folder: Any) -> Path:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return Path(folder) / f"gac_controller_rank_{rank}.pt"

    def save_checkpoint(local_path: Any, *args: Any, **kwargs: Any) -> Any:
        result = save(local_path, *args, **kwargs)
        path = path_in(local_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        torch.save(controller.state_dict(), temporary)
        os.replace(temporary, path)  # whole or not at all
        return result

    def load_checkpoint(local_path: Any, *args: Any, **kwargs: Any) -> Any:
        path = None if local_path is None else path_in(local_path)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"expected {path.name} in {local_path}: the controller's state, for this rank")
        state = None if path is None else torch.load(path, map_location="cpu", weights_only=True)
        result = load(local_path, *args, **kwargs)  # may delete the folder
        if state is not None:
            controller.load_state_dict(state)
        return result

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
