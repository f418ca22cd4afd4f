"""The public losses and their autograd Functions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import library, reference
from .objectives import CISPO, DFPO, GIFT, SAPO, Gate, HybridObjective, LogitTransform
from .signals import Signals
from .types import Denominators, HybridLoss, TokenBatch, TokenLogprobs

_OUTPUTS = ("logprobs", "entropy", "sum_sq")


class _FirstOrderOnly(torch.autograd.Function):
    """``slope * grad`` that refuses to be differentiated: the slope is a constant here, so a second derivative through
    it would be silently wrong. ``anchor`` is the differentiated input; it ties the product to the graph."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
        return slope * grad

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("gac_kernels losses have no second derivative: the forward pass made the gradient")


def _chain(slope: Tensor, grad: Tensor, anchor: Tensor) -> Tensor:
    """``slope * grad`` in a backward; the guard costs as much as the product and matters under create_graph only."""
    return _FirstOrderOnly.apply(slope, grad, anchor) if torch.is_grad_enabled() else slope * grad


class _TokenLoss(torch.autograd.Function):
    """The token-level loss. Its slope comes out of the forward pass, so that backward is one multiplication."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, entropy: Tensor | None, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        # `args` is one tuple: autograd looks at each argument of its own, and none of these has a gradient.
        if isinstance(args[0], TokenBatch):  # a gate in Python: eager, on every device
            outputs = library.eager_token_loss(logprobs, args[0], args[1], args[2], entropy, *args[3:])
        else:
            outputs = library.call("token_loss", logprobs, *args[:9], entropy, *args[9:])
        loss, scalars, rows, logprobs_out, slope, entropy_slope = outputs
        ctx.save_for_backward(slope, entropy_slope, logprobs, entropy)
        ctx.mark_non_differentiable(scalars, rows, logprobs_out)
        ctx.set_materialize_grads(False)
        return loss, scalars, rows, logprobs_out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        slope, entropy_slope, logprobs, entropy = ctx.saved_tensors
        if grad is None:
            return None, None, None
        to_logprobs = _chain(slope, grad, logprobs) if ctx.needs_input_grad[0] else None
        to_entropy = _chain(entropy_slope, grad, entropy) if ctx.needs_input_grad[1] else None
        return to_logprobs, to_entropy, None


def _check_tokens(name: str, value: Tensor | None, batch: TokenBatch) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {kind}")
    if value.shape != batch.targets.shape:
        raise ValueError(f"{name} must have the targets' shape {tuple(batch.targets.shape)}, got {tuple(value.shape)}")
    if value.device != batch.targets.device:
        raise ValueError(f"{name} must be on {batch.targets.device} like the batch, got {value.device}")


def _scalar(name: str, value: float | Tensor, like: Tensor, high: float = math.inf) -> Tensor:
    """A 0-d detached tensor on the device. A tensor's value is not read; a number is checked."""
    if isinstance(value, Tensor):
        if value.ndim == 0 and value.dtype is like.dtype and value.device == like.device and not value.requires_grad:
            return value  # as it is, which is the rule
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like logprobs, got {value.device}")
        return value.detach().reshape(()).to(like.dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(value).__name__}")
    if not 0.0 <= value <= high or math.isinf(value):
        raise ValueError(f"{name} must be finite and in [0, {high:g}], got {value!r}")
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def _norm_length(objective: HybridObjective, batch: TokenBatch) -> float | None:
    """The constant length in force; None where no branch divides by one."""
    if "seq-mean-token-sum-norm" not in (objective.aggregation, objective.supervised_aggregation):
        return None
    length = objective.norm_length or batch.max_length
    if length is None:
        raise ValueError("objective.norm_length must be given for seq-mean-token-sum-norm on a packed batch")
    return float(length)


def _check_objective(objective: HybridObjective, batch: TokenBatch) -> None:
    if not isinstance(objective, HybridObjective):
        raise TypeError(f"objective must be a HybridObjective, got {type(objective).__name__}")
    if not isinstance(batch, TokenBatch):
        raise TypeError(f"batch must be a TokenBatch, got {type(batch).__name__}")
    if isinstance(objective.policy, DFPO) and batch.groups is None:
        raise ValueError("batch.groups must be given: DFPO transforms the sequence weights inside each group")
    if objective.kl_coef and batch.ref_logprobs is None:
        raise ValueError(f"batch.ref_logprobs must be given: objective.kl_coef is {objective.kl_coef:g}")


def _plain(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` as the operator takes it: contiguous and in ``dtype``. What is so already is handed on untouched, for a
    call of the dispatcher costs as much as some ten thousand tokens."""
    if value.dtype is not dtype:
        value = value.to(dtype)
    return value if value.is_contiguous() else value.contiguous()


def _token_args(batch: TokenBatch, dtype: torch.dtype, sum_sq: Tensor | None) -> tuple[Any, ...]:
    """The tensors of the batch as the operator takes them."""

    def plain(value: Tensor | None) -> Tensor | None:
        return None if value is None else _plain(value, dtype)

    per_token = batch.advantages is not None and batch.advantages.shape != batch.is_expert.shape
    return (
        batch.mask if batch.mask.is_contiguous() else batch.mask.contiguous(),
        batch.cu_seqlens, batch.max_length or 0, batch.is_expert,
        plain(batch.advantages), per_token, plain(batch.old_logprobs), plain(batch.ref_logprobs),
        plain(batch.rollout_weights), plain(None if sum_sq is None else sum_sq.detach()), batch.groups,
    )  # fmt: skip


def _denominators(denominators: Denominators | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    def count(name: str, value: float | Tensor | None) -> Tensor | None:
        return None if value is None else _scalar(f"denominators.{name}", value, like)

    if denominators is None:
        return None, None
    return count("policy", denominators.policy), count("supervised", denominators.supervised)


def _has_custom_gate(objective: HybridObjective) -> bool:
    return isinstance(objective.policy, SAPO) and isinstance(objective.policy.gate, Gate)


def hybrid_loss(
    logprobs: Tensor,
    batch: TokenBatch,
    objective: HybridObjective,
    mu: float | Tensor,
    *,
    entropy: Tensor | None = None,
    sum_sq: Tensor | None = None,
    denominators: Denominators | None = None,
) -> HybridLoss:
    """The hybrid loss ``(1 - mu) RL + mu SFT`` of ready log-probs, its gradient, signals and metrics in one pass.

    Args:
        logprobs: log-probs of ``batch.targets``, shaped as them. float64 is computed in float64, all else in float32.
        batch: the tokens. Places outside ``batch.mask`` contribute exactly 0 whatever they hold, nan included.
        objective: what to compute. GIFT needs logits: use the loss from logits.
        mu: mixing weight in [0, 1], a number or a 0-d tensor on the device (its value is never read by the host).
        entropy: token entropies in nats, needed where ``objective.entropy_coef`` is not 0; may carry gradient.
        sum_sq: sum over the vocabulary of p squared a token; with it the signals serve the ``logit`` estimator.
        denominators: global counts, for gradient accumulation and data parallelism.

    Returns:
        HybridLoss; its ``loss`` is differentiable once (a second derivative raises RuntimeError). A batch or a branch
        without tokens gives a graph-connected 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check_objective(objective, batch)
    if logprobs is None:
        raise TypeError("logprobs must be a floating point tensor, got None")
    for name, value in (("logprobs", logprobs), ("entropy", entropy), ("sum_sq", sum_sq)):
        _check_tokens(name, value, batch)
    if isinstance(objective.supervised, GIFT):
        raise ValueError("objective.supervised = GIFT needs the logits of two models; log-probs are not enough")
    if objective.entropy_coef and entropy is None:
        raise ValueError(f"entropy must be given: objective.entropy_coef is {objective.entropy_coef:g}")
    norm_length = _norm_length(objective, batch)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    wide, wide_entropy = _plain(logprobs, dtype), None if entropy is None else _plain(entropy, dtype)
    mu = _scalar("mu", mu, wide, 1.0)
    policy_count, supervised_count = _denominators(denominators, wide)
    if _has_custom_gate(objective):
        if library.forced_backend() not in (None, "reference"):
            raise ValueError(
                f"backend {library.forced_backend()!r} does not support the custom gate of objective.policy"
            )
        args = (batch, objective, mu, sum_sq, Denominators(policy_count, supervised_count))
    else:
        args = (
            *_token_args(batch, dtype, sum_sq),
            mu,
            policy_count,
            supervised_count,
            *library.encode(objective, norm_length),
        )
    loss, scalars, rows, logprobs_out = _TokenLoss.apply(wide, wide_entropy, args)
    values = dict(zip(library.SCALARS, scalars.unbind(), strict=True))
    return HybridLoss(
        loss=loss,
        policy_loss=values["policy_loss"],
        supervised_loss=values["supervised_loss"],
        kl=values["kl"],
        entropy=values["entropy"],
        logprobs=logprobs_out,
        token_entropy=None if entropy is None else torch.where(batch.mask, entropy.detach(), 0.0),
        signals=_signals(rows, objective, sum_sq is not None, norm_length),
        metrics={name: values[name] for name in _metric_names(objective)},
    )


def _metric_names(objective: HybridObjective) -> tuple[str, ...]:
    always = ("ratio_mean", "ratio_max", "approx_kl")
    if isinstance(objective.policy, SAPO):
        return *always, "effective_update_ratio"
    if isinstance(objective.policy, DFPO):
        return *always, "cancellation_residual"
    return *always, "effective_update_ratio", "clip_fraction"


def _signals(rows: Tensor, objective: HybridObjective, has_sum_sq: bool, norm_length: float | None) -> Signals:
    return Signals(
        rows=rows,
        has_sum_sq=has_sum_sq,
        policy_aggregation=objective.aggregation,
        supervised_aggregation=objective.supervised_aggregation,
        norm_length=norm_length,
    )


# The paper's coefficients, c_r = -A and c_s = -phi: on-policy, the clipped importance weight is 1.
_PAPER = HybridObjective(CISPO(clip_high=2.0))


@torch.no_grad()
def signals_from_logprobs(
    logprobs: Tensor, batch: TokenBatch, objective: HybridObjective | None = None, *, sum_sq: Tensor | None = None
) -> Signals:
    """What the controller observes, from log-probs alone: for trainers that keep a loss of their own.

    Args:
        logprobs: as in :func:`hybrid_loss`; no gradient flows.
        batch: the tokens.
        objective: whose slopes are the coefficients; None takes the paper's, ``c_r = -A`` and ``c_s = -phi``
            (GAC, arXiv 2605.26184).
        sum_sq: sum of p squared a token, needed by the ``logit`` estimator.
    """
    if objective is None:
        objective, batch = _PAPER, replace(batch, old_logprobs=None, ref_logprobs=None, rollout_weights=None)
    elif isinstance(objective, HybridObjective) and objective.entropy_coef:
        objective = replace(objective, entropy_coef=0.0)  # its gradient is no slope on logp and needs the entropies
    return hybrid_loss(logprobs.detach(), batch, objective, 0.5, sum_sq=sum_sq).signals


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    transform: LogitTransform | None = None,
    outputs: tuple[str, ...] = _OUTPUTS,
) -> TokenLogprobs:
    """Log-prob of each target, entropy and sum of p squared of each row of logits, differentiable for any loss.

    In this version it is composed of eager operations and keeps their intermediates, a few times the logits.

    Args:
        logits: ``(..., V)`` floating point; leading dimensions are free.
        targets: ``(...)`` int32/int64 ids; ``-100`` masks a place.
        mask: ``(...)`` bool; masked places hold 0 and receive no gradient.
        transform: logit scale, soft cap and temperature; None leaves the logits as they are.
        outputs: which of ``"logprobs"``, ``"entropy"``, ``"sum_sq"`` to return; the others are None.

    Raises:
        ValueError: naming the argument; also for a target outside ``[0, V)`` where reading it costs no device sync.
    """
    if logits.ndim < 1 or logits.shape[:-1] != targets.shape:
        expected = (*targets.shape, "V")
        raise ValueError(f"logits must have shape {expected} to match targets, got {tuple(logits.shape)}")
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"mask must have the targets' shape {tuple(targets.shape)}, got {tuple(mask.shape)}")
    unknown = [name for name in outputs if name not in _OUTPUTS]
    if unknown:
        raise ValueError(f"outputs must be among {', '.join(_OUTPUTS)}; got {unknown[0]!r}")
    if targets.device.type == "cpu" and targets.numel():
        live = targets if mask is None else targets[mask.bool()]
        live = live[live != -100]
        if live.numel() and (int(live.min()) < 0 or int(live.max()) >= logits.shape[-1]):
            raise ValueError(
                f"targets must be in [0, {logits.shape[-1]}) or -100, got {int(live.min())} to {int(live.max())}"
            )
    out = reference.token_logprobs(logits, targets, mask, transform)
    return TokenLogprobs(
        logprobs=out.logprobs if "logprobs" in outputs else None,
        entropy=out.entropy if "entropy" in outputs else None,
        sum_sq=out.sum_sq if "sum_sq" in outputs else None,
    )
