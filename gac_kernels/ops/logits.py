"""From logits on: the hybrid loss with its gradient in one pass, and differentiable log-probs for any other loss.

Shapes: N rows (tokens) of V logits; the row operators take logits as (A, B, V) with N = A B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import library
from ..objectives import GIFT, HybridObjective, LogitTransform
from ..overlap import overlap, refuse_leaf, refuse_shared
from ..schemas import encode_rows
from ..types import Denominators, HybridLoss, TokenBatch, TokenLogprobs
from . import inputs
from .late import LateGradientLoss
from .once import first_order_only, scaled
from .plan import LossPlan
from .rows import (
    as_rows,
    check_logits,
    check_targets,
    check_writable,
    in_arithmetic_of,
    live_places,
    row_temperature,
)
from .token import assemble

OUTPUTS = ("logprobs", "entropy", "sum_sq")
PLAIN = LogitTransform()


def _evaluate(
    logits: Tensor, base_logits: Tensor | None, plan: LossPlan, inplace: bool, wants_gradient: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Results and, where wanted, the gradient, which is ``logits`` itself in place."""
    kind, weight, advantages = plan.token_weights()
    rows = (plan.targets, kind, plan.temperature, base_logits)
    suffix, gradient = "_" if inplace else "", None
    if wants_gradient and not plan.two_looks and plan.custom is None:
        out = library.call(
            f"fused_rows{suffix}",
            logits,
            *rows,
            plan.weighted(kind, weight),
            advantages,
            *plan.tokens,
            *plan.static,
            *plan.term,
        )
        logprobs, entropy, sum_sq, supervised = out[:4]
        gradient = logits if inplace else out[4]
        gift = None if base_logits is None else supervised
        loss, scalars, signals, *_ = plan.token_loss(logprobs, entropy, sum_sq, gift)
    else:
        logprobs, entropy, sum_sq, normalizer, supervised = library.call("row_statistics", logits, *rows, *plan.static)
        gift = None if base_logits is None else supervised
        loss, scalars, signals, _, slope, entropy_slope = plan.token_loss(logprobs, entropy, sum_sq, gift)
        if wants_gradient:
            bonus = entropy_slope if plan.has_bonus else None
            new = library.call(f"row_gradient{suffix}", logits, *rows, normalizer, entropy, slope, bonus, *plan.static)
            gradient = logits if inplace else new
    return (loss, scalars, signals, logprobs, entropy), gradient


class _LogitsLoss(torch.autograd.Function):
    """The loss from logits. ``anchor`` hangs on the logits' graph without their memory, which may be freed."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, anchor: Tensor, base_logits: Tensor | None, plan: LossPlan, inplace: bool
    ) -> tuple[Tensor, ...]:
        results, gradient = _evaluate(logits, base_logits, plan, inplace, ctx.needs_input_grad[0])
        ctx.inplace, ctx.spent = inplace, False
        if inplace and gradient is not None:
            # Whoever saved the logits for a backward of their own must learn that they are gone.
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(gradient, anchor)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 4
        if grad is None or not ctx.needs_input_grad[0]:
            return None, *nothing
        if ctx.spent:  # before the saved tensors are asked for, whose own complaint would not say what to do
            raise RuntimeError(
                "second backward through a loss whose gradient was written over the logits and handed on: "
                "call hybrid_loss_from_logits with inplace=False to keep it"
            )
        gradient, anchor = ctx.saved_tensors
        if not ctx.inplace:
            return scaled(gradient, grad, anchor), *nothing
        ctx.spent = True
        with torch.no_grad():
            gradient = gradient.detach()
            library.call("scale_", gradient, grad)
        return first_order_only(gradient, anchor, grad), *nothing


def hybrid_loss_from_logits(
    logits: Tensor,
    batch: TokenBatch,
    objective: HybridObjective,
    mu: float | Tensor,
    *,
    transform: LogitTransform | None = PLAIN,
    inplace: bool = False,
    denominators: Denominators | None = None,
) -> HybridLoss:
    """The hybrid loss ``(1 - mu) RL + mu SFT`` from logits: one read of them gives log-probs, entropy, sum p squared,
    ratios, loss, signals and metrics, and writes the gradient, so that backward is at most a scaling.

    Token-separable objectives (SAPO, GRPO, CISPO with NLL or GIFT) take one look at the logits. GSPO and DFPO,
    whose tokens wait for their sequence, take a second look, and so do objectives and gates that are functions of your
    own, which PyTorch evaluates between the two.

    Args:
        logits: ``(*batch.targets.shape, V)``, float16, bfloat16, float32 or float64; row ``t`` predicts target ``t``.
            Rows may have any strides (``logits[:, :-1]`` is not copied) as long as those of a row are neighbours.
            Sums are in float32, of float64 logits in float64.
        batch: the tokens; ``batch.base_logits`` for GIFT. Rows outside ``batch.mask`` are not read.
        objective: what to compute.
        mu: mixing weight in [0, 1], a number or a 0-d tensor on the device (its value is never read by the host).
        transform: logit scale, soft cap and temperature, a number or one a sequence. The gradient goes back through
            it. It is not applied to ``batch.base_logits``.
        inplace: write the gradient over the logits: no extra memory. Their values are lost; anything else that saved
            them for its own backward raises. One backward only. Of float16 logits it is written in backward, and they
            keep their values until then. Under torch.compile, which plans memory itself, the gradient is a new tensor.
        denominators: global counts, for gradient accumulation and data parallelism.

    Returns:
        HybridLoss; its ``loss`` is differentiable once (a second derivative raises RuntimeError).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also for a live target outside
            ``[0, V)`` where reading it costs no device sync, else that row's results are nan.

    The gradient of float16 logits is made in backward, where the loss scale is known, in float32, and rounded once: the
    logits are kept until then in place of the gradient, and read twice. All other logits are read once, and an upstream
    gradient that is not 1 (``loss / steps``) costs one more read and write of their gradient: give ``denominators``.
    """
    inputs.check_objective(objective, batch)
    check_logits("logits", logits, batch.targets)
    transform = checked_transform(transform)
    gift = objective.supervised if isinstance(objective.supervised, GIFT) else None
    base_logits = None
    if gift is not None:
        if batch.base_logits is None:
            raise ValueError(
                "batch.base_logits must be given: objective.supervised = GIFT compares with the base model"
            )
        if batch.base_logits.shape != logits.shape:
            raise ValueError(
                f"batch.base_logits must have the logits' shape {tuple(logits.shape)}, "
                f"got {tuple(batch.base_logits.shape)}"
            )
        base_logits = as_rows(in_arithmetic_of(batch.base_logits, logits.dtype))
    check_targets("batch.targets", batch.targets, batch.mask, logits.shape[-1])
    inplace = inplace and not torch.compiler.is_compiling()
    rows = as_rows(logits)
    if inplace:
        check_writable(logits, rows)
        _refuse_shared(logits, batch, base_logits, mu, transform, denominators)
        refuse_leaf(logits)
    plan = LossPlan.of(logits, batch, objective, mu, transform, gift, denominators, logits.shape[-1])
    rows = rows if torch.is_grad_enabled() else rows.detach()  # or a gradient is made for it, and in its place
    if rows.dtype is torch.float16 and rows.requires_grad:
        results = LateGradientLoss.apply(rows, base_logits, plan, inplace)
    else:
        results = _LogitsLoss.apply(rows, anchor_of(logits), base_logits, plan, inplace)
    loss, scalars, signals, logprobs, entropy = results
    shape = batch.targets.shape
    return assemble(
        loss, scalars, signals, logprobs.view(shape), entropy.view(shape), batch, objective, True, plan.norm_length
    )


def _refuse_shared(
    logits: Tensor, batch: TokenBatch, base_logits: Tensor | None, mu: float | Tensor, transform: LogitTransform,
    denominators: Denominators | None,
) -> None:  # fmt: skip
    """Nothing that the loss reads may lie where its gradient is written."""
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return  # nothing is written
    counts = () if denominators is None else (denominators.policy, denominators.supervised)
    refuse_shared(
        logits, batch__base_logits=base_logits, batch__old_logprobs=batch.old_logprobs,
        batch__ref_logprobs=batch.ref_logprobs, batch__rollout_weights=batch.rollout_weights,
        batch__advantages=batch.advantages, batch__targets=batch.targets, batch__mask=batch.mask,
        batch__is_expert=batch.is_expert, batch__cu_seqlens=batch.cu_seqlens, batch__groups=batch.groups, mu=mu,
        transform__temperature=transform.temperature,
        **{f"denominators__{name}": count for name, count in zip(("policy", "supervised"), counts, strict=False)},
    )  # fmt: skip


def checked_transform(transform: LogitTransform | None) -> LogitTransform:
    if transform is not None and not isinstance(transform, LogitTransform):
        kind = type(transform).__name__
        raise TypeError(f"transform must be a LogitTransform, as in LogitTransform(temperature=0.7), got {kind}")
    return transform or PLAIN


def anchor_of(value: Tensor) -> Tensor:
    """A 0-d tensor in the graph of ``value`` that does not hold on to its memory."""
    return value[..., :0].sum()


def check_outputs(outputs: tuple[str, ...]) -> None:
    if not isinstance(outputs, (tuple, list)):
        raise TypeError(f"outputs must be a tuple of names, got {outputs!r}")
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise ValueError(f"outputs must be among {', '.join(OUTPUTS)}; got {unknown[0]!r}")


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, kind: Tensor, temperature: Tensor | None, inplace: bool,
        static: tuple[float, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        logprobs, entropy, sum_sq, normalizer, _ = library.call(
            "row_statistics", logits, targets, kind, temperature, None, *static
        )
        ctx.inplace, ctx.spent, ctx.static = inplace, False, static
        ctx.save_for_backward(logits, targets, kind, temperature, normalizer, entropy)
        ctx.mark_non_differentiable(sum_sq)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, sum_sq

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None, entropy_slope: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if slope is None and entropy_slope is None:
            return None, *nothing
        if ctx.spent:  # before the saved tensors are asked for, whose own complaint would not say what to do
            raise RuntimeError(
                "second backward through log-probs whose gradient was written over the logits: call token_logprobs "
                "with inplace=False"
            )
        logits, targets, kind, temperature, normalizer, entropy = ctx.saved_tensors
        with torch.no_grad():
            if ctx.inplace:  # upstream gradients are the user's, and may lie where this one is written
                slope, entropy_slope = (
                    value if value is None or not overlap(logits, value) else value.clone()
                    for value in (slope, entropy_slope)
                )
            rows = (
                logits, targets, kind, temperature, None, normalizer, entropy,
                torch.zeros_like(entropy) if slope is None else slope.contiguous(),
                None if entropy_slope is None else entropy_slope.contiguous(), *ctx.static,
            )  # fmt: skip
            if ctx.inplace:
                ctx.spent = True
                library.call("row_gradient_", *rows)
                torch.autograd.graph.increment_version(logits)
                gradient = logits.detach()
            else:
                gradient = library.call("row_gradient", *rows)
        upstream = [grad for grad in (slope, entropy_slope) if grad is not None]
        return first_order_only(gradient, logits, *upstream), *nothing


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    transform: LogitTransform | None = PLAIN,
    outputs: tuple[str, ...] = OUTPUTS,
    inplace: bool = False,
) -> TokenLogprobs:
    """Log-prob of each target, entropy and sum of p squared of each row of logits, differentiable for any loss.

    One read of the logits; backward reads them once more and writes their gradient. Nothing of the logits' size is kept
    but the logits.

    Args:
        logits: ``(..., V)`` float16, bfloat16, float32 or float64; leading dimensions are free and may be strided.
        targets: ``(...)`` int32/int64 ids; ``-100`` masks a place.
        mask: ``(...)`` bool or 0-1; masked places hold 0, receive no gradient and are not read.
        transform: logit scale, soft cap and temperature; a temperature a sequence, ``(S,)``, goes with the first
            dimension of ``targets``.
        outputs: which of ``"logprobs"``, ``"entropy"``, ``"sum_sq"`` to return; the others are None.
        inplace: backward writes the gradient over the logits, whose values are lost then; it needs no more memory, and
            a second one raises. Under torch.compile, which plans memory itself, the gradient is a new tensor.

    Returns:
        TokenLogprobs in float32 (float64 for float64 logits), shaped as ``targets``. ``logprobs`` and ``entropy``
        are differentiable once, a second derivative raises RuntimeError.

    Raises:
        TypeError, ValueError: naming the argument; also for a target outside ``[0, V)`` where reading it costs no
            device sync, else that row's results are nan.
    """
    check_logits("logits", logits, targets)
    check_outputs(outputs)
    transform = checked_transform(transform)
    live = live_places(targets, mask)
    check_targets("targets", targets, live, logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    inplace = inplace and not torch.compiler.is_compiling()
    rows = as_rows(logits)
    if inplace:
        check_writable(logits, rows)
        if logits.requires_grad and torch.is_grad_enabled():
            refuse_shared(logits, targets=targets, mask=mask, transform__temperature=transform.temperature)
            refuse_leaf(logits)
    results = _TokenLogprobs.apply(
        rows, targets.reshape(-1).contiguous(), live.reshape(-1).to(torch.uint8),
        row_temperature(transform, targets, dtype), inplace, encode_rows(transform, None),
    )  # fmt: skip
    named = dict(zip(OUTPUTS, (value.view(targets.shape) for value in results), strict=True))
    return TokenLogprobs(**{name: named[name] if name in outputs else None for name in OUTPUTS})
