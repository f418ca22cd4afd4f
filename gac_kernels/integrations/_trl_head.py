"""Our head in TRL: what TRL's own fused head calls for log-probs and entropy, and for how long it is ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..objectives import LogitTransform
from ..ops import token_logprobs_from_hidden

OLDEST, BEFORE = "1.15", "2"
_FUNCTION, _DEVICES = "_ChunkedLogProbFunction", "_use_triton"  # names in trl.trainer.utils
_OFFERED = ("log_probs", "entropy", "log_sum_sq_probs")


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
def our_head() -> Iterator[None]:
    """While this lasts, TRL's fused heads compute with ours. Backward needs no such care: the graph holds ours."""
    from trl.trainer import utils

    # Where TRL asks whether a device has Triton, the answer yes means: only tokens that count are scored. Ours can
    # do so on every device.
    ours = {_FUNCTION: _Head, _DEVICES: lambda device: True}
    theirs = {name: getattr(utils, name) for name in ours if hasattr(utils, name)}
    for name in theirs:
        setattr(utils, name, ours[name])
    try:
        yield
    finally:
        for name, value in theirs.items():
            setattr(utils, name, value)


class _Head:
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
        outputs: tuple[str, ...] = _OFFERED,
    ) -> tuple[Tensor | None, ...]:
        """``log_probs``, entropy, ``log_sum_sq_probs``, mean logits and top-1: None where not asked for.

        ``chunk_size`` counts columns of TRL's tiles; our chunks are of tokens, and the result depends on neither.
        """
        if unknown := sorted(set(outputs) - set(_OFFERED)):
            raise ValueError(f"outputs of a fused head must be among {', '.join(_OFFERED)}; got {', '.join(unknown)}")
        if not torch.is_autocast_enabled(hidden.device.type):  # as TRL: the products are in the hidden states' dtype
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        wanted: dict[str, Any] = {"entropy": "entropy", "log_sum_sq_probs": "sum_sq"}
        result = token_logprobs_from_hidden(
            hidden,
            weight,
            targets,
            bias=bias,
            transform=LogitTransform(temperature, final_logit_softcapping, logit_scale),
            outputs=("logprobs", *(ours for theirs, ours in wanted.items() if theirs in outputs)),
        )
        log_sum_sq = None if result.sum_sq is None else result.sum_sq.log()
        return result.logprobs, result.entropy, log_sum_sq, None, None
