"""Liger's names for the GRPO losses, with the signatures and results of liger-kernel 0.8.5, over our operators.

    from gac_kernels.integrations.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss

Liger itself is not needed. Every loss type and option gives its results or raises. On purpose otherwise: a token's
log-ratios are clamped to [-20, 20], beyond which Liger overflows; what stands at masked places, nan included, never
reaches the loss; a wrong shape or option raises ValueError in place of AssertionError; and gradients are those of the
loss in two cases where 0.8.5's kernels have others (``triton_grpo_loss`` with token-level ``"luspo"`` and ``reduce``,
and with a ``delta`` under ``1 + eps_high``).

Shapes: B sequences of T completion tokens, hidden width H, V columns of the head.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..objectives import LogitTransform
from ..ops import hybrid_loss_from_hidden, token_logprobs, token_logprobs_from_hidden
from ..overlap import is_leaf_memory
from ..types import IGNORE_INDEX, Denominators, TokenBatch, shape_text
from ._liger_loss import Options, Rollouts, check_delta, check_temperatures
from .checks import Check, check_host

OLDEST, BEFORE = "0.8.5", "0.9"


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """GRPO and its relatives from hidden states, as ``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``.

    Token-level ratios without ``delta`` take :func:`gac_kernels.hybrid_loss_from_hidden` (three matrix products, Liger
    four); the rest takes :func:`gac_kernels.token_logprobs_from_hidden`. The gradient of the former is handed on by one
    backward; a second one raises RuntimeError.

    Args:
        beta: weight of the k3 KL penalty. use_ref_model: False leaves it 0, whatever ``beta`` is.
        compiled: the loss's arithmetic is not compiled here; either value gives the same result, as in Liger.
        chunk_size: sequences a chunk: logits of ``chunk_size * T`` tokens exist at a time.
        epsilon_low, epsilon_high: the ratio is clipped to ``[1 - epsilon_low, 1 + epsilon_high]``; for ``"cispo"`` its
            upper bound is ``epsilon_high`` itself.
        loss_type: ``"grpo"``, ``"bnpo"``, ``"dr_grpo"``, ``"dapo"``, ``"cispo"``, ``"sapo"``, ``"luspo"``, ``"vespo"``.
        max_completion_length: the constant length of ``"dr_grpo"``, which needs it.
        importance_sampling_level: ``"token"``, or ``"sequence"`` (GSPO, arXiv 2507.18071) where the loss clips.
        sapo_temperature_pos, sapo_temperature_neg: of SAPO's gate (arXiv 2511.20347).
        temperature: of the logits, and of the reference model's.
        delta: upper bound of the unclipped ratio (arXiv 2505.07291); raises with a loss type that does not clip.
        use_bias_correction_kl: the KL penalty is multiplied by the importance ratio.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of VESPO's weight ``w^k exp(lambda (1 - w))``.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.beta, self.compiled, self.use_ref_model, self.chunk_size = beta, compiled, use_ref_model, chunk_size
        self.epsilon_low, self.epsilon_high, self.delta = epsilon_low, epsilon_high, delta
        self.loss_type, self.max_completion_length = loss_type, max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.temperature, self.use_bias_correction_kl = temperature, use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        check_temperatures((sapo_temperature_pos, sapo_temperature_neg))  # Liger checks the rest in the call, as here
        check_delta(delta)

    def _options(self) -> Options:
        """Read and checked anew in each call: attributes may be set, as Liger's may."""
        if isinstance(self.chunk_size, bool) or not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive int, got {self.chunk_size!r}")
        return Options(
            loss_type=self.loss_type, level=self.importance_sampling_level, beta=self.beta, low=self.epsilon_low,
            high=self.epsilon_high, delta=self.delta, sapo=(self.sapo_temperature_pos, self.sapo_temperature_neg),
            vespo=(self.vespo_k_pos, self.vespo_lambda_pos, self.vespo_k_neg, self.vespo_lambda_neg),
            ratio_weighted_kl=self.use_bias_correction_kl, length=self.max_completion_length,
        )  # fmt: skip

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and its metrics.

        Args:
            _input: ``(B, T, H)`` hidden states, row ``t`` for token ``t``. lin_weight: ``(V, H)``. bias: ``(V,)``.
            selected_token_ids: ``(B, T)`` ids of the completion's tokens.
            attention_mask: ``(B, T)`` bool or 0-1, the tokens that count. ``"luspo"`` reads the others as well and
                counts only their length by it, as Liger does.
            advantages: ``(B,)``.
            ref_per_token_logps, old_per_token_logps: ``(B, T)``; no old ones: on-policy.
            ref_input, ref_weight, ref_bias: hidden states and head of the reference model, in place of its log-probs.
            vllm_is_ratio: ``(B,)``, ``(B, 1)`` or ``(B, T)`` weights of the policy term.
            num_items_in_batch: tokens of the whole generation batch over all ranks: what ``"dapo"``, ``"cispo"`` and
                ``"vespo"`` divide by.

        Returns:
            The 0-d loss and ``(mean KL, clip fraction)`` over the tokens that count, detached; without the KL where
            ``beta`` is 0.

        Raises:
            TypeError, ValueError: naming the argument or option, what was expected and what came.
        """
        options = self._options()
        if options.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length must be given with loss_type 'dr_grpo', got None")
        if selected_token_ids.ndim != 2:
            raise ValueError(f"selected_token_ids must have shape (B, T), got {tuple(selected_token_ids.shape)}")
        if _input.ndim != 3 or _input.shape[:2] != selected_token_ids.shape:
            expected = shape_text(selected_token_ids.shape, "H")
            raise ValueError(f"_input must have shape {expected}, got {tuple(_input.shape)}")
        ref = self._reference(selected_token_ids, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        everywhere = options.loss_type == "luspo"
        rollouts = Rollouts.of(
            ("attention_mask", attention_mask), advantages, ("old_per_token_logps", old_per_token_logps),
            ("ref_per_token_logps", ref), vllm_is_ratio, selected_token_ids.shape, everywhere,
        )  # fmt: skip
        denominator = options.denominator(rollouts.mask, num_items_in_batch)
        weight, bias = _like(_input, lin_weight, bias)
        head: dict[str, Any] = {
            "bias": bias, "transform": LogitTransform(self.temperature),
            "chunk_tokens": max(1, self.chunk_size * selected_token_ids.shape[1]),
        }  # fmt: skip
        objective = options.objective(has_reference=ref is not None)
        if objective is not None:
            weights = None if rollouts.weights is None else rollouts.weights.expand(selected_token_ids.shape)
            batch = TokenBatch.from_padded(
                selected_token_ids, rollouts.mask, advantages=advantages, old_logprobs=rollouts.old,
                ref_logprobs=rollouts.ref, rollout_weights=weights,
            )  # fmt: skip
            result = hybrid_loss_from_hidden(
                _input, weight, batch, objective, 0.0, denominators=Denominators(policy=denominator), **head
            )
            return result.loss, options.metrics(options.terms(result.logprobs, rollouts), rollouts.mask)
        logprobs = token_logprobs_from_hidden(
            _input, weight, selected_token_ids, mask=rollouts.scored, outputs=("logprobs",), **head
        ).logprobs
        assert logprobs is not None  # asked for
        terms = options.terms(logprobs, rollouts)
        return options.reduced(terms.loss, rollouts.mask, denominator), options.metrics(terms, rollouts.mask)

    def _reference(
        self, ids: Tensor, logprobs: Tensor | None, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """The reference model's log-probs, made where they are not given; None where none are wanted."""
        if not self.use_ref_model:
            return None
        if logprobs is None and hidden is None:
            raise ValueError("ref_per_token_logps or ref_input must be given: use_ref_model is True")
        if logprobs is not None:
            if hidden is not None:
                warnings.warn("ref_per_token_logps and ref_input are both given: the former is used", stacklevel=3)
            return logprobs
        if weight is None:
            raise ValueError("ref_weight must be given with ref_input, got None")
        assert hidden is not None
        with torch.no_grad():
            weight, bias = _like(hidden, weight, bias)
            return token_logprobs_from_hidden(
                hidden, weight, ids, bias=bias, transform=LogitTransform(self.temperature), outputs=("logprobs",),
                chunk_tokens=max(1, self.chunk_size * ids.shape[1]),
            ).logprobs  # fmt: skip


def _like(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A head in the dtype of the hidden states, as Liger takes it; autocast has a dtype of its own."""
    if torch.is_autocast_enabled(hidden.device.type):
        return weight, bias
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def triton_grpo_loss(
    logits,
    old_logp,
    ref_logp,
    completion_ids,
    advantages,
    completion_mask=None,
    temperature=0.9,
    beta=0.04,
    eps_low=0.2,
    eps_high=0.4,
    inplace=True,
    loss_type="dapo",
    max_completion_length=None,
    importance_sampling_level="token",
    reduce=False,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vllm_is_ratio=None,
    delta=None,
    use_bias_correction_kl=False,
    num_items_in_batch=None,
    vespo_k_pos=2.0,
    vespo_lambda_pos=3.0,
    vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
):
    """GRPO and its relatives from logits, as ``liger_kernel.transformers.grpo_loss.triton_grpo_loss``; on every device.

    Args:
        logits: ``(B, T + 1, V)``; row ``t`` is for token ``t``, the last row for none. Need not be contiguous.
        old_logp, ref_logp: ``(B, T)`` or None (on-policy; ``ref_logp`` is needed where ``beta`` is not 0).
        completion_ids: ``(B, T)``. advantages: ``(B,)``. completion_mask: ``(B, T)`` bool or 0-1; None: all count.
        eps_low, eps_high: as ``epsilon_low`` and ``epsilon_high`` of :class:`LigerFusedLinearGRPOLoss`, and so on for
            the arguments of the same names.
        inplace: backward writes the gradient over the logits; their values are lost, and a second backward raises. Of
            logits that are a leaf, or a view of one, the gradient is a new tensor: else their grad were their own
            memory.
        max_completion_length: None takes ``T``.
        reduce: whether to return the loss of the batch, or that of each token.

    Returns:
        ``reduce=True``: the 0-d loss and ``[mean KL, clip fraction]``, without the KL where ``beta`` is 0.
        ``reduce=False``: ``(B, T)`` each: loss, KL (None where ``beta`` is 0) and 1 where clipped; 0 where masked.
        Gradient flows through the loss only. All in float32.

    Raises:
        TypeError, ValueError: naming the argument or option, what was expected and what came.
    """
    for name, value in (("logits", logits), ("completion_ids", completion_ids), ("advantages", advantages)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if completion_ids.ndim != 2:
        raise ValueError(f"completion_ids must have shape (B, T), got {tuple(completion_ids.shape)}")
    B, T = completion_ids.shape
    if logits.ndim != 3 or logits.shape[:2] != (B, T + 1):
        raise ValueError(
            f"logits must have shape ({B}, {T + 1}, V), one row more than completion_ids, got {tuple(logits.shape)}"
        )
    options = Options(
        loss_type=loss_type, level=importance_sampling_level, beta=beta, low=eps_low, high=eps_high, delta=delta,
        sapo=(sapo_temperature_pos, sapo_temperature_neg),
        vespo=(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg), ratio_weighted_kl=use_bias_correction_kl,
        length=T if max_completion_length is None else max_completion_length,
    )  # fmt: skip
    if beta != 0.0 and ref_logp is None:
        raise ValueError(f"ref_logp must be given where beta is not 0, got None with beta = {beta!r}")
    if completion_mask is None:
        completion_mask = torch.ones_like(completion_ids, dtype=torch.bool)
    rollouts = Rollouts.of(
        ("completion_mask", completion_mask), advantages, ("old_logp", old_logp), ("ref_logp", ref_logp), vllm_is_ratio,
        completion_ids.shape,
    )  # fmt: skip
    # The last row goes along, masked: a view without it would have a gradient to be copied into one with it.
    targets = pad(completion_ids.masked_fill(~rollouts.mask, IGNORE_INDEX), (0, 1), value=IGNORE_INDEX)
    logprobs = token_logprobs(
        logits, targets, transform=LogitTransform(temperature), outputs=("logprobs",),
        inplace=inplace and not torch.compiler.is_compiling() and not is_leaf_memory(logits),
    ).logprobs  # fmt: skip
    assert logprobs is not None  # asked for
    terms = options.terms(logprobs[:, :-1], rollouts)
    if not reduce:
        return terms.loss, terms.kl, terms.clipped
    denominator = options.denominator(rollouts.mask, num_items_in_batch)
    return options.reduced(terms.loss, rollouts.mask, denominator), list(options.metrics(terms, rollouts.mask))


def check() -> Check:
    """Whether an installed Liger has these names with these parameters. Our own work without it."""
    return check_host(
        "liger-kernel",
        OLDEST,
        BEFORE,
        {
            "liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss": (),
            "liger_kernel.chunked_loss.grpo_loss:LigerFusedLinearGRPOLoss": _parameters(LigerFusedLinearGRPOLoss),
            "liger_kernel.chunked_loss.grpo_loss:LigerFusedLinearGRPOLoss.forward": _parameters(
                LigerFusedLinearGRPOLoss.forward
            ),
            "liger_kernel.transformers.grpo_loss:triton_grpo_loss": _parameters(triton_grpo_loss),
        },
    )


def _parameters(function: object) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)  # type: ignore[arg-type]
