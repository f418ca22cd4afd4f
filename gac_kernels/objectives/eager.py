"""An objective's function on tensors: the oracle of its trace, whose slopes are autograd's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .function import evaluating

if TYPE_CHECKING:
    from .function import PolicyObjective, SupervisedObjective

LOG_RATIO_BOUND = 20.0


class TensorToken:
    """``Token`` of tensors. ``counts_N``: the tokens that take part; ``total``: of values that are 0 elsewhere, the sum
    over each token's sequence."""

    def __init__(
        self, logp_N: Tensor, values: Mapping[str, Tensor | None], counts_N: Tensor, total: Callable[[Tensor], Tensor]
    ) -> None:
        self.logp, self._values, self._counts_N, self._total = logp_N, values, counts_N, total

    def __getattr__(self, name: str) -> Any:
        if name not in ("advantage", "ref_logp", "entropy"):
            raise AttributeError(f"a token has no {name}")
        if (value := self._values[name]) is None:
            raise ValueError(f"the objective reads t.{name}, which is not there")
        return value

    @cached_property
    def p(self) -> Tensor:
        return self.logp.exp()

    @cached_property
    def old_logp(self) -> Tensor:
        old = self._values["old_logp"]
        return torch.where(self.logp.isinf(), 0.0, self.logp).detach() if old is None else old

    @cached_property
    def log_ratio(self) -> Tensor:
        return (self.logp - self.old_logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)

    @cached_property
    def ratio(self) -> Tensor:
        return self.log_ratio.exp()

    @cached_property
    def ratio_minus_one(self) -> Tensor:
        return self.log_ratio.expm1()

    def sequence_sum(self, x: Any) -> Tensor:
        x_N = torch.as_tensor(x, dtype=self.logp.dtype, device=self.logp.device).expand_as(self.logp)
        return self._total(torch.where(self._counts_N, x_N, 0.0))

    def sequence_mean(self, x: Any) -> Tensor:
        return self.sequence_sum(x) / self._total(self._counts_N.to(self.logp.dtype)).clamp(min=1.0)


_EXTREMES = {
    function: torch.lt if smaller else torch.gt
    for smaller, functions in (
        (True, (torch.minimum, torch.Tensor.minimum, torch.min, torch.Tensor.min)),
        (False, (torch.maximum, torch.Tensor.maximum, torch.max, torch.Tensor.max)),
    )
    for function in functions
}


class _AsTraced(TorchFunctionMode):
    """torch's functions with two rules of the trace: at ties the whole gradient goes to the second argument, and
    ``torch.where(mask, 1.0, 1.05)`` has the tokens' dtype, where torch takes float32 whatever stands beside it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.where and len(args) == 3 and all(isinstance(x, float) for x in args[1:]):
            condition, *numbers = args
            args = (condition, *(torch.as_tensor(x, dtype=self.dtype, device=condition.device) for x in numbers))
        elif (first := _EXTREMES.get(function)) and len(args) == 2:
            return torch.where(first(*args), *args)
        return function(*args, **(kwargs or {}))


def eager_loss(objective: PolicyObjective | SupervisedObjective, t: TensorToken) -> Tensor:
    """``objective.loss(t)`` of every token, ``(N,)``, with autograd's graph where ``t.logp`` has one."""
    with evaluating(t.logp), _AsTraced(t.logp.dtype):
        loss = objective.loss(t)
    return torch.as_tensor(loss, dtype=t.logp.dtype, device=t.logp.device).expand_as(t.logp)
