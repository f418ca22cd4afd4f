"""From hidden states on: the head's product, the loss and all gradients, with logits of one chunk of tokens at a time.

Shapes: N tokens of hidden width H, V columns of the head; the operators take hidden states as (A, B, H) with N = A B.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import library, linear
from ..objectives import GIFT, HybridObjective, LogitTransform
from ..schemas import encode_rows
from ..shards import CALL, ROWS, VocabularyShard, checksum, told
from ..types import Denominators, HybridLoss, TokenBatch, TokenLogprobs, rising_offsets
from ..units import rounded
from . import inputs
from .head import Head, base_of, check_chunk, check_head, chunk_of
from .logits import OUTPUTS, PLAIN, anchor_of, check_outputs, checked_transform
from .once import first_order_only
from .plan import LossPlan
from .rows import as_rows, check_targets, live_places, row_temperature
from .token import assemble


class _Spread(NamedTuple):
    """How the work is cut and in what it is done: rows a chunk, the part of the vocabulary that is here, and the dtype
    of the products."""

    chunk: int
    shard: VocabularyShard | None
    dtype: torch.dtype

    def cast(self, *values: Tensor | None) -> tuple[Any, ...]:
        """In the dtype of the products; without autograd, for gradients go back in each input's own."""
        return tuple(None if value is None else value.to(self.dtype) for value in values)


def _run(name: str, shard: VocabularyShard | None, *args: Any, **objective: Any) -> tuple[Tensor, ...]:
    """The operator; the function behind it where it takes what is no operator's argument: a process group, or an
    objective that is a function in Python."""
    if shard is None and not objective:
        results: tuple[Tensor, ...] = linear.LINEAR[name](*args)
    else:
        results = getattr(linear, name)(*args, shard=shard, **objective)
    return results


class _HiddenLoss(torch.autograd.Function):
    """The loss from hidden states, all gradients with it. Anchors hang on the graphs without holding on to memory."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_anchor: Tensor, weight_anchor: Tensor,
        base: tuple[Tensor | None, ...], plan: LossPlan, spread: _Spread,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        wanted, (chunk, shard, _) = tuple(ctx.needs_input_grad[:3]), spread
        ctx.dtypes = tuple(None if value is None else value.dtype for value in (hidden, weight, bias))
        kind, weight_N, advantages = plan.token_weights()
        leading = (*spread.cast(hidden, weight, bias), plan.targets, kind, plan.temperature, *base)
        gradients: tuple[Tensor, ...] = ()
        if any(wanted) and not plan.two_looks:
            objective = {} if plan.custom is None else {"objective": plan.custom[1]}
            logprobs, entropy, sum_sq, supervised, *made = _run(
                "linear_loss", shard, *leading, plan.weighted(kind, weight_N), advantages, *plan.tokens, chunk, *wanted,
                *plan.static, *plan.term, **objective,
            )  # fmt: skip
            gradients = tuple(made)
            gift = supervised if supervised.numel() else None
            loss, scalars, signals, *_ = plan.token_loss(logprobs, entropy, sum_sq, gift)
        else:
            logprobs, entropy, sum_sq, normalizer, supervised = _run(
                "linear_statistics", shard, *leading, chunk, *plan.static
            )
            gift = supervised if supervised.numel() else None
            loss, scalars, signals, _, slope, bonus = plan.token_loss(logprobs, entropy, sum_sq, gift)
            if any(wanted):
                gradients = _run(
                    "linear_gradient", shard, *leading, normalizer, entropy, slope.view(-1),
                    bonus.view(-1) if plan.has_bonus else None, chunk, *wanted, *plan.static,
                )  # fmt: skip
        sums = _sequence_means(plan.batch, gradients[0], weight_N, gradients[3]) if wanted[0] else loss.new_empty(0)
        results = loss, scalars, signals, logprobs, entropy, sums
        ctx.wanted, ctx.spent = wanted, False
        ctx.save_for_backward(hidden_anchor, weight_anchor, *gradients)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if grad is None:
            return None, None, None, *nothing
        if ctx.spent:  # before the saved tensors are asked for, whose own complaint would not say what to do
            raise RuntimeError(
                "second backward through a loss from hidden states, whose gradients the forward made and the first "
                "backward handed on: call hybrid_loss_from_hidden again"
            )
        ctx.spent = True
        *anchors, hidden, weight, bias, unit = ctx.saved_tensors
        results: list[Tensor | None] = []
        with torch.no_grad():
            factor = grad * unit if unit.numel() else grad
        for gradient, want, dtype in zip((hidden, weight, bias), ctx.wanted, ctx.dtypes, strict=True):
            if not want:
                results.append(None)
                continue
            with torch.no_grad():
                gradient = _handed_on(gradient.detach(), factor, dtype)
            results.append(first_order_only(gradient, *anchors, grad))
        return *results, *nothing


def _handed_on(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * factor``, in its own memory where it stays in its dtype."""
    if gradient.dtype is not dtype:
        return rounded(gradient, factor, dtype)
    library.call("scale_", gradient, factor)
    return gradient


def _sequence_means(batch: tuple[Any, ...], gradient: Tensor, weight_N: Tensor, unit: Tensor) -> Tensor:
    """``(S, H)``: the hidden gradient, in ``unit``, summed over each sequence, and its weight in the loss taken out.

    The weight of a token is the same all over its sequence, so that the sum over it is its mean loss's share. A branch
    that mu leaves no weight has no gradient to learn from: nan, which the controller counts and leaves out.
    """
    mask, cu_seqlens, length, is_expert = batch[:4]
    S, (N, H) = is_expert.shape[0], (mask.numel(), gradient.shape[-1])
    rows_NH = gradient.reshape(N, H)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    if cu_seqlens is None:
        sums_SH = rows_NH.view(S, length, H).sum(1, dtype=dtype)
        weight_S = weight_N.view(S, length).sum(1)
        live_S = mask.view(S, length).any(1)
    else:
        edges = torch.nn.functional.pad(rising_offsets(cu_seqlens, N), (1, 1))
        edges[-1] = N  # so that what lies before the first sequence and behind the last has a length too
        lengths = edges.diff()

        def summed(columns: Tensor) -> Tensor:
            # Without its own check, which would read the lengths on the host. They are never negative, and sum to N.
            return torch.segment_reduce(columns.to(dtype), "sum", lengths=lengths, axis=0, unsafe=True)[1:-1]

        sums_SH, of_token_S2 = summed(rows_NH), summed(torch.stack((weight_N, mask.view(-1).to(weight_N.dtype)), 1))
        weight_S, live_S = of_token_S2[:, 0], of_token_S2[:, 1] > 0
    if unit.numel():
        sums_SH = sums_SH * unit
    return torch.where(live_S[:, None], sums_SH / weight_S[:, None], 0.0)


def hybrid_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    batch: TokenBatch,
    objective: HybridObjective,
    mu: float | Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = PLAIN,
    chunk_tokens: int | None = None,
    denominators: Denominators | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    base_hidden: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
) -> HybridLoss:
    """The hybrid loss ``(1 - mu) RL + mu SFT`` from the last hidden states and the head's weight.

    Every weight of the loss is known before the pass, so the forward makes the gradients as well: three matrix products
    a chunk of tokens, and never more logits than a chunk. Masked tokens take no part in the products. Where
    tokens wait for their sequence (GSPO, DFPO, functions of your own with sums over it) the logits are made twice: four
    products. Without gradient it is one product.

    Args:
        hidden: ``(*batch.targets.shape, H)``, float16, bfloat16, float32 or float64; row ``t`` predicts target ``t``.
            ``hidden[:, :-1]`` is taken as it is.
        weight: ``(V, H)`` of the head, in the same dtype; may be tied to an embedding, frozen (then no gradient is made
            for it), or a product such as ``W + B @ A``. Must be the whole tensor: under FSDP or ZeRO-3 call this inside
            the forward of the module that gathers it.
        batch: the tokens. GIFT takes ``batch.base_logits``, or ``base_hidden`` and ``base_weight``.
        objective: what to compute.
        mu: mixing weight in [0, 1], a number or a 0-d tensor on the device (its value is never read by the host).
        bias: ``(V,)`` of the head.
        transform: logit scale, soft cap and temperature, a number or one a sequence.
        chunk_tokens: tokens a chunk. None: as few chunks as keep its logits under 160 MiB on a CPU, 768 MiB elsewhere.
        denominators: global counts, for gradient accumulation and data parallelism.
        tp_group: ranks that hold the vocabulary in parts, in rank order: ``weight`` and ``bias`` are this rank's rows,
            any number of them, none included; ``hidden`` and ``batch`` are the same everywhere. One collective a chunk
            and one for the hidden gradient. Not with GIFT.
        vocab_size: columns of the vocabulary; rows of the weight beyond are padding and take no part.
        base_hidden, base_weight, base_bias: hidden states ``(*batch.targets.shape, H')`` and head of GIFT's base model.

    Returns:
        HybridLoss, its signals with the ``hidden`` estimator's sums where ``hidden`` requires gradient. ``loss`` has
        one backward; a second one, and a second derivative, raise RuntimeError.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Under autocast the products are in its dtype, as a linear layer's. The weight's gradient is summed over chunks in
    float32 and rounded once. On a CPU without bfloat16 instructions 16-bit products run in float32, which is faster
    there and leaves logits unrounded. Results repeat bit for bit; another chunk size moves them by the rounding of the
    products. On a GPU the host waits for the number of live tokens, once in each look at them, unless a CUDA graph is
    being captured.
    """

    def check_call() -> tuple[LogitTransform, Head]:
        inputs.check_objective(objective, batch)
        check_chunk(chunk_tokens)
        checked, call = checked_transform(transform), 0
        if tp_group is not None:
            call = checksum("hybrid_loss_from_hidden", objective, checked, mu, batch, denominators)
        return checked, check_head(hidden, weight, bias, batch.targets, vocab_size, tp_group, chunk_tokens, call)

    def check_rows() -> tuple[tuple[Tensor | None, ...], LossPlan]:
        gift = objective.supervised if isinstance(objective.supervised, GIFT) else None
        base = base_of(gift, batch, head, base_hidden, base_weight, base_bias, vocab_size)
        check_targets("batch.targets", batch.targets, batch.mask, head.columns)
        plan = LossPlan.of(head.hidden, batch, objective, mu, plain, gift, denominators, head.columns)
        return base, plan

    plain, head = told(CALL, tp_group, weight, check_call)
    base, plan = told(ROWS, tp_group, weight, check_rows)
    spread = _Spread(chunk_of(chunk_tokens, batch.targets.numel(), head), head.shard, head.dtype)
    loss, scalars, signals, logprobs, entropy, means = _HiddenLoss.apply(
        as_rows(head.hidden), head.weight, head.bias, anchor_of(head.hidden), anchor_of(head.weight), base, plan, spread
    )
    shape = batch.targets.shape
    return assemble(
        loss, scalars, signals, logprobs.view(shape), entropy.view(shape), batch, objective, True, plan.norm_length,
        means if means.numel() else None, None if head.shard is None else head.shard.replicas,
    )  # fmt: skip


class _HiddenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kind: Tensor,
        temperature: Tensor | None, spread: _Spread, static: tuple[float, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given, none = (*spread.cast(hidden, weight, bias), targets, kind, temperature), (None, None, None, None)
        logprobs, entropy, sum_sq, normalizer, _ = _run(
            "linear_statistics", spread.shard, *given, *none, spread.chunk, *static
        )
        ctx.spread, ctx.static = spread, static
        ctx.save_for_backward(hidden, weight, bias, targets, kind, temperature, normalizer, entropy)
        ctx.mark_non_differentiable(sum_sq)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, sum_sq

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None, entropy_slope: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, kind, temperature, normalizer, entropy = ctx.saved_tensors
        rest, spread = (None,) * 5, ctx.spread
        if slope is None and entropy_slope is None:
            return None, None, None, *rest
        wanted = tuple(ctx.needs_input_grad[:3])
        with torch.no_grad():
            *gradients, unit = _run(
                "linear_gradient", spread.shard, *spread.cast(hidden, weight, bias), targets, kind, temperature,
                *(None,) * 4, normalizer, entropy, torch.zeros_like(entropy) if slope is None else slope.contiguous(),
                None if entropy_slope is None else entropy_slope.contiguous(), spread.chunk, *wanted, *ctx.static,
            )  # fmt: skip
            if unit.numel():
                own = (torch.float32 if value is None else value.dtype for value in (hidden, weight, bias))
                gradients = [_handed_on(gradient, unit, dtype) for gradient, dtype in zip(gradients, own, strict=True)]
        anchors = [value for value in (hidden, weight, slope, entropy_slope) if value is not None]
        results = [
            first_order_only(gradient, *anchors) if want else None
            for gradient, want in zip(gradients, wanted, strict=True)
        ]
        return *results, *rest


def token_logprobs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    transform: LogitTransform | None = PLAIN,
    chunk_tokens: int | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    vocab_size: int | None = None,
    outputs: tuple[str, ...] = OUTPUTS,
) -> TokenLogprobs:
    """Log-prob of each target, entropy and sum of p squared from hidden states, differentiable for any loss.

    Never more logits than a chunk exist. The slopes of a loss that somebody else computes are known in backward only,
    where the logits are made again: four matrix products in all, against three of :func:`hybrid_loss_from_hidden`.

    Args:
        hidden: ``(..., H)``; leading dimensions are free.
        weight, bias, chunk_tokens, tp_group, vocab_size: as in :func:`hybrid_loss_from_hidden`.
        targets: ``(...)`` int32/int64 ids; ``-100`` masks a place.
        mask: ``(...)`` bool or 0-1; masked places hold 0, receive no gradient and take no part in the products.
        transform: logit scale, soft cap and temperature; a temperature a sequence, ``(S,)``, goes with the first
            dimension of ``targets``.
        outputs: which of ``"logprobs"``, ``"entropy"``, ``"sum_sq"`` to return; the others are None.

    Returns:
        TokenLogprobs in float32 (float64 for float64), shaped as ``targets``. ``logprobs`` and ``entropy`` are
        differentiable once, a second derivative raises RuntimeError.
    """

    def check_call() -> tuple[LogitTransform, Head]:
        check_outputs(outputs)
        check_chunk(chunk_tokens)
        checked, call = checked_transform(transform), 0
        if tp_group is not None:
            call = checksum("token_logprobs_from_hidden", checked, *outputs)
        return checked, check_head(hidden, weight, bias, targets, vocab_size, tp_group, chunk_tokens, call)

    def check_rows() -> Tensor:
        live = live_places(targets, mask)
        check_targets("targets", targets, live, head.columns)
        return live

    plain, head = told(CALL, tp_group, weight, check_call)
    live = told(ROWS, tp_group, weight, check_rows)
    dtype = torch.promote_types(head.hidden.dtype, torch.float32)
    results = _HiddenLogprobs.apply(
        as_rows(head.hidden), head.weight, head.bias, targets.reshape(-1).contiguous(),
        live.reshape(-1).to(torch.uint8), row_temperature(plain, targets, dtype),
        _Spread(chunk_of(chunk_tokens, targets.numel(), head), head.shard, head.dtype), encode_rows(plain, None),
    )  # fmt: skip
    named = dict(zip(OUTPUTS, (value.view(targets.shape) for value in results), strict=True))
    return TokenLogprobs(**{name: named[name] if name in outputs else None for name in OUTPUTS})
