"""Our head in TRL: what TRL's own fused head calls for log-probs and entropy, and for how long it is ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import products
from ..objectives import LogitTransform
from ..ops import token_logprobs_from_hidden

OLDEST, BEFORE = "1.15", "2"
OFFERED = ("log_probs", "entropy", "log_sum_sq_probs", "is_top1")
_FUNCTION, _DEVICES = "_ChunkedLogProbFunction", "_use_triton"  # names in trl.trainer.utils
_GATHERED = "_ToTorchTensorBackward"  # what DTensor.full_tensor() leaves in the graph
_SURE, _SLACK = -0.693, 1e-3  # log(1/2) and -entropy, with room for rounding


def check_version() -> None:
    """ImportError unless a TRL is installed whose hooks are those that were read and tested."""
    try:
        import trl
        from packaging.version import Version
    except ImportError as error:
        raise ImportError(
            f"gac_kernels.integrations.trl needs TRL ({error}): pip install 'gac-kernels[trl]'"
        ) from error
    if not Version(OLDEST) <= Version(trl.__version__) < Version(BEFORE):
        raise ImportError(f"gac_kernels.integrations.trl expects trl >= {OLDEST}, < {BEFORE}; found {trl.__version__}")


def check_head() -> None:
    """ImportError unless TRL's fused head calls the function that ours stands in for."""
    import trl
    from trl.trainer import utils

    if not hasattr(getattr(utils, _FUNCTION, None), "apply"):
        raise ImportError(
            f"expected trl.trainer.utils.{_FUNCTION} with an `apply`, which trl {trl.__version__} does not have here; "
            "head=False leaves TRL's own head in place"
        )


@contextmanager
def our_head(head: Any = None) -> Iterator[None]:
    """While this lasts, TRL's fused heads compute with ours. Backward needs no such care: the graph holds ours.

    ``head``: what stands in for TRL's autograd function with an ``apply``; None takes :class:`Head`.
    """
    from trl.trainer import utils

    # Where TRL asks whether a device has Triton, the answer yes means: only tokens that count are scored. Ours can
    # do so on every device.
    ours = {_FUNCTION: Head if head is None else head, _DEVICES: lambda device: True}
    theirs = {name: getattr(utils, name) for name in ours if hasattr(utils, name)}
    for name in theirs:
        setattr(utils, name, ours[name])
    try:
        yield
    finally:
        for name, value in theirs.items():
            setattr(utils, name, value)


class Head:
    """In the place of TRL's autograd function, with its `apply`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OFFERED,
    ) -> tuple[Tensor | None, ...]:
        """``log_probs``, entropy, ``log_sum_sq_probs``, mean logits (None) and top-1: None where not asked for.

        ``chunk_size`` counts columns of TRL's tiles; our chunks are of tokens, and the result depends on neither.
        """
        check_outputs(outputs, OFFERED)
        weight, bias = checked_head(hidden, weight, bias)
        top1 = "is_top1" in outputs
        wanted = {"entropy": "entropy" in outputs or top1, "sum_sq": "log_sum_sq_probs" in outputs}
        result = token_logprobs_from_hidden(
            hidden,
            weight,
            targets,
            bias=bias,
            transform=LogitTransform(temperature, final_logit_softcapping, logit_scale),
            outputs=("logprobs", *(name for name, asked in wanted.items() if asked)),
        )
        assert result.logprobs is not None
        return (
            result.logprobs,
            result.entropy if "entropy" in outputs else None,
            None if result.sum_sq is None else result.sum_sq.log(),
            None,
            is_top1(hidden, weight, bias, targets, result.logprobs, result.entropy) if top1 else None,
        )


def check_outputs(outputs: tuple[str, ...], offered: tuple[str, ...]) -> None:
    """ValueError for what a head is asked and does not compute."""
    if unknown := sorted(set(outputs) - set(offered)):
        raise ValueError(f"outputs of a fused head must be among {', '.join(offered)}; got {', '.join(unknown)}")


def checked_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head in the dtype of the products: the hidden states', as TRL's, or autocast's.

    RuntimeError for one that FSDP2 shards apart from its model: TRL gathers it with ``full_tensor()``, whose backward
    hands each rank its part of that rank's own gradient, without the sum over ranks.
    """
    if type(weight.grad_fn).__name__ == _GATHERED:
        raise RuntimeError(
            "the head must be gathered by FSDP2, in one fully_shard() with the final norm or the whole model; it is "
            "sharded by itself, and the gradient of a head that is gathered by full_tensor() lacks the other ranks'"
        )
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return weight.to(dtype), None if bias is None else bias.to(dtype)


@torch.no_grad()
def is_top1(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logprobs: Tensor, entropy: Tensor | None
) -> Tensor:  # fmt: skip
    """``(N,)`` bool: whether each target is the most likely token, the first of equals.

    Above a probability of 1/2 it is; below ``exp(-entropy)``, which the largest never is, it is not. Only tokens
    between need their logits: a part of one more product.
    """
    assert entropy is not None
    top = logprobs > _SURE
    unclear = (~top & (logprobs > -entropy - _SLACK)).nonzero()[:, 0]
    head = products.Head(weight, bias)
    chunk = products.chunk_rows(len(unclear), head.columns, weight.dtype, weight.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in unclear.split(chunk) if len(unclear) else ():
            top[rows] = head.logits(hidden[rows].to(head.dtype)).argmax(-1) == targets[rows]
    return top
