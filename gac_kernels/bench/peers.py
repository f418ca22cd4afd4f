"""The peers: what others compute of the same inputs, by their own installed code.

Imported here, for comparison only, and only when they are asked for. The loss of SAPO is theirs (Liger, verl) or, where
a trainer has it inside (TRL), by hand on their log-probs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..objectives import SAPO
from . import eager
from .case import Case, Outputs
from .cases import HiddenCase, RowCase, TokenCase
from .provider import LOSS, LOSS_ENTROPY, POLICY, POLICY_ENTROPY, Provider, Unavailable, try_compiler


def _require(distribution: str, module: str) -> tuple[Any, str]:
    """Module and version of an installed peer."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise Unavailable(f"{distribution} is not installed")
    version = installed_version(distribution) or "unknown version"
    try:
        return importlib.import_module(module), version
    except Exception as error:  # a peer's import runs its own hosts' imports, which may fail in any way
        raise Unavailable(f"{distribution} {version} is there, but importing {module} failed: {error}") from error


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, read without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _policy_mask(case: Case) -> Tensor:
    return case.policy_batch.mask & ~case.policy_batch.is_expert[:, None]


def _on_gpu(case: Case) -> bool:
    return torch.device(case.device).type == "cuda"


def _sequence_share(mask: Tensor) -> float:
    """Liger's mean is over all sequences it is given; ours over those with a token of the branch."""
    return mask.shape[0] / int((mask.sum(-1) > 0).sum())


def _wide(leaf: Tensor, in_kernel: bool = False) -> Tensor:
    """Logits as trainers hand them over: in half precision to a peer's kernel, which computes in float32, else as
    float32 (as accelerate does), since PyTorch would round the log-probs to the logits' dtype."""
    return leaf if in_kernel or leaf.dtype.itemsize > 2 else leaf.float()


# of ready log-probs -----------------------------------------------------------------------------------------------
def _liger(case: TokenCase) -> Provider:
    """Liger's GRPO loss of ready log-probs, compiled as Liger's fused linear loss compiles it."""
    module, version = _require("liger-kernel", "liger_kernel.chunked_loss.grpo_loss")
    batch, mask = case.batch, _policy_mask(case).float()
    scale = _sequence_share(mask)
    options = {"old_per_token_logps": batch.old_logprobs, "beta": 0.0, "loss_type": "sapo"}
    function = torch.compile(module.LigerFusedLinearGRPOFunction.ppo_loss_fn)

    def forward(leaf: Tensor) -> Outputs:
        loss, _ = function(leaf, mask, batch.advantages, mask, **options)
        return Outputs(loss * scale)

    try_compiler(lambda: forward(case.leaf()).loss.backward())
    return Provider("liger", version, forward, POLICY)


def _verl_sapo(case: Case) -> tuple[Callable[[Tensor], Tensor], str]:
    """verl's SAPO loss of log-probs, eager as verl runs it, and verl's version."""
    module, version = _require("verl", "verl.trainer.ppo.core_algos")
    batch, mask, policy = case.policy_batch, _policy_mask(case), case.objective.policy
    assert isinstance(policy, SAPO) and batch.advantages is not None
    config = module.ActorConfig.__new__(module.ActorConfig)  # its __init__ asks for a whole training setup
    settings: dict[str, Any] = {"tau_pos": policy.tau_pos, "tau_neg": policy.tau_neg, "global_batch_info": {}}
    for name, value in settings.items():
        object.__setattr__(config, name, value)
    advantages_ST = batch.advantages[:, None].expand(mask.shape)

    def loss(logprobs: Tensor) -> Tensor:
        return module.compute_policy_loss_sapo(batch.old_logprobs, logprobs, advantages_ST, mask, config=config)[0]

    return loss, version


def _verl(case: TokenCase) -> Provider:
    loss, version = _verl_sapo(case)
    return Provider("verl", version, lambda leaf: Outputs(loss(leaf)), POLICY)


def _trl(case: TokenCase) -> Provider:
    if (version := installed_version("trl")) is None:
        raise Unavailable("trl is not installed")
    raise Unavailable(f"trl {version} computes its loss inside GRPOTrainer, not in a function of ready log-probs")


# of logits --------------------------------------------------------------------------------------------------------
def _liger_rows(case: RowCase) -> Provider:
    """Liger's Triton GRPO loss, in place as is its default. It takes ``(S, T + 1, V)`` and leaves the last row out."""
    module, version = _require("liger-kernel", "liger_kernel.transformers.grpo_loss")
    if not _on_gpu(case):
        raise Unavailable(f"liger-kernel {version}: triton_grpo_loss is a Triton kernel and takes no CPU tensors")
    batch, mask = case.policy_batch, _policy_mask(case).int()
    scale = _sequence_share(mask)
    S, T = mask.shape
    longer = torch.zeros(S, T + 1, case.vocabulary, dtype=case.dtype, device=case.device)

    def prepare(leaf: Tensor) -> Tensor:
        longer[:, :T].copy_(leaf.detach())
        return longer.detach().requires_grad_()

    def forward(leaf: Tensor) -> Outputs:
        loss, _ = module.triton_grpo_loss(
            leaf, batch.old_logprobs, None, batch.targets, batch.advantages, mask, temperature=1.0, beta=0.0,
            loss_type="sapo", reduce=True,
        )  # fmt: skip
        return Outputs(loss * scale)

    return Provider("liger", version, forward, POLICY, prepare=prepare)


def _liger_chunked(case: RowCase) -> Provider:
    if (version := installed_version("liger-kernel")) is None:
        raise Unavailable("liger-kernel is not installed")
    raise Unavailable(
        f"liger-kernel {version}: the chunked loss takes hidden states and streams over the head's weight; it has no "
        "function of logits"
    )


def _verl_rows(case: RowCase) -> Provider:
    """verl's log-probs and entropy of logits and its SAPO loss. With flash-attn it has a kernel, in place as verl asks
    for it where the entropy needs no gradient."""
    module, version = _require("verl", "verl.utils.torch_functional")
    loss, _ = _verl_sapo(case)
    kernel = module.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE and _on_gpu(case)
    mask, targets = case.batch.mask, case.batch.targets

    def forward(leaf: Tensor) -> Outputs:
        logits = _wide(leaf, kernel)
        logprobs = module.logprobs_from_logits(logits, targets, inplace_backward=True)
        with torch.no_grad():
            entropy = module.entropy_from_logits_with_chunking(logits.flatten(0, 1)).view_as(logprobs)
        return Outputs(
            loss(logprobs), torch.where(mask, logprobs.detach(), 0.0), entropy=torch.where(mask, entropy, 0.0)
        )

    return Provider("verl", version, forward, POLICY_ENTROPY)


def _trl_rows(case: RowCase) -> Provider:
    """TRL's log-probs and entropy of logits (on a GPU by its Triton kernel), then the loss by hand."""
    module, version = _require("trl", "trl.trainer.utils")
    if not hasattr(module, "selective_log_softmax_and_entropy"):
        raise Unavailable(f"trl {version} has no selective_log_softmax_and_entropy")
    batch, kernel = case.batch, _on_gpu(case)
    rest = (batch.mask, batch.is_expert, batch.advantages, batch.old_logprobs, case.mu)

    def forward(leaf: Tensor) -> Outputs:
        logprobs, entropy = module.selective_log_softmax_and_entropy(
            _wide(leaf, kernel), batch.targets, entropy_requires_grad=False, row_mask=batch.mask
        )
        (loss,) = eager.token_loss(logprobs, *rest, everything=False)  # type: ignore[arg-type]
        return Outputs(loss, logprobs.detach(), entropy=entropy)

    return Provider("trl", version, forward, LOSS_ENTROPY)


# of hidden states ---------------------------------------------------------------------------------------------------
def _liger_hidden(case: HiddenCase) -> Provider:
    """Liger's fused linear GRPO loss, compiled and a sequence a chunk, as are its defaults."""
    module, version = _require("liger-kernel", "liger_kernel.chunked_loss.grpo_loss")
    batch, mask = case.policy_batch, _policy_mask(case).int()
    scale = _sequence_share(mask)
    loss = module.LigerFusedLinearGRPOLoss(beta=0.0, loss_type="sapo", use_ref_model=False)

    def forward(leaf: Tensor) -> Outputs:
        value, _ = loss(
            leaf, *case.parameters, batch.targets, mask, batch.advantages, old_per_token_logps=batch.old_logprobs
        )
        return Outputs(value * scale)

    try_compiler(lambda: torch.autograd.grad(forward(leaf := case.leaf()).loss, leaf))
    return Provider("liger", version, forward, POLICY)


def _trl_hidden(case: HiddenCase) -> Provider:
    """TRL's chunked log-probs and entropy as its trainers call them, then the loss by hand."""
    module, version = _require("trl", "trl.trainer.utils")
    if not hasattr(module, "_ChunkedLogProbFunction"):
        raise Unavailable(f"trl {version} has no _ChunkedLogProbFunction")
    batch = case.batch
    rest = (batch.mask, batch.is_expert, batch.advantages, batch.old_logprobs, case.mu)

    def forward(leaf: Tensor) -> Outputs:
        logprobs, entropy, *_ = module._ChunkedLogProbFunction.apply(
            leaf.flatten(0, 1), *case.parameters, None, batch.targets.flatten(), 1.0,
            module._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",),
        )  # fmt: skip
        logprobs, entropy = (torch.where(batch.mask, v.view_as(batch.mask), 0.0) for v in (logprobs, entropy))
        (loss,) = eager.token_loss(logprobs, *rest, everything=False)  # type: ignore[arg-type]
        return Outputs(loss, logprobs.detach(), entropy=entropy.detach())

    return Provider("trl", version, forward, LOSS_ENTROPY)


def _verl_hidden(case: HiddenCase) -> Provider:
    """verl's fused linear log-probs and entropy (its PyTorch backend), then its SAPO loss."""
    module, version = _require("verl", "verl.utils.experimental.torch_functional")
    loss, _ = _verl_sapo(case)
    batch, head = case.policy_batch, module.FusedLinearForPPO()

    def forward(leaf: Tensor) -> Outputs:
        logprobs, _ = head(leaf, *case.parameters, batch.targets)
        return Outputs(loss(logprobs.view_as(batch.mask)), torch.where(batch.mask, logprobs.detach(), 0.0))

    return Provider("verl", version, forward, POLICY_ENTROPY)


def _cce_hidden(case: HiddenCase) -> Provider:
    """Apple's cut cross entropy: log-probs whose logits are made again in the backward, then the loss by hand."""
    module, version = _require("cut-cross-entropy", "cut_cross_entropy")
    if not _on_gpu(case):
        raise Unavailable(f"cut-cross-entropy {version}: its kernel is a Triton kernel and takes no CPU tensors")
    batch = case.batch
    rest = (batch.mask, batch.is_expert, batch.advantages, batch.old_logprobs, case.mu)

    def forward(leaf: Tensor) -> Outputs:
        targets = torch.where(batch.mask, batch.targets, -100)
        logprobs = -module.linear_cross_entropy(leaf, *case.parameters, targets, reduction="none")
        (loss,) = eager.token_loss(logprobs.view_as(batch.mask), *rest, everything=False)  # type: ignore[arg-type]
        return Outputs(loss)

    return Provider("cce", version, forward, LOSS)


OF_LOGPROBS: dict[str, Callable[[Any], Provider]] = {"liger": _liger, "verl": _verl, "trl": _trl}
OF_LOGITS: dict[str, Callable[[Any], Provider]] = {
    "liger": _liger_rows,
    "liger-chunked": _liger_chunked,
    "verl": _verl_rows,
    "trl": _trl_rows,
}
OF_HIDDEN: dict[str, Callable[[Any], Provider]] = {
    "liger": _liger_hidden,
    "trl": _trl_hidden,
    "verl": _verl_hidden,
    "cce": _cce_hidden,
}
