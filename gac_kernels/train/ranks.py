"""The processes of one run: what they exchange, and how the policy is spread over them.

Under ``torchrun`` every rank takes its share of a step's rows; DDP or FSDP2 average the gradients, so that each rank's
loss, divided by the counts of all rows, is multiplied by the number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .policy import Policy


class Ranks:
    """This process among those of the run; one alone exchanges nothing.

    Attributes:
        rank, size: this process and how many there are. local_rank: among those of its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank must be in [0, size = {size}), got {rank}")
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._began = False

    @classmethod
    def from_environment(cls, device: str) -> Ranks:
        """As ``torchrun`` says; joins the default process group, unless the program has done so already."""
        if dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(f"{name} must be set where WORLD_SIZE is {size}: start the run with torchrun")
        ranks = cls(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(ranks.local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo")
        ranks._began = True
        return ranks

    def close(self) -> None:
        """Leave the group, if it was joined here."""
        if self._began:
            dist.destroy_process_group()

    def sum(self, value: Tensor) -> Tensor:
        """Of all ranks, the same bits on each."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.MAX)

    def total(self, *counts: int) -> list[int]:
        """Sums of host integers."""
        if self.size == 1:
            return list(counts)
        return [sum(column) for column in zip(*self.gather(counts), strict=True)]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's plain value, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def alike(self, function: Callable[[], Any]) -> Any:
        """``function()`` on every rank; where one fails, all raise, so that none waits for it."""
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        failures = [text for text in self.gather(None if error is None else str(error)) if text is not None]
        if error is not None:
            raise error
        if failures:
            raise ValueError(failures[0])
        return result

    def _reduced(self, value: Tensor, op: Any) -> Tensor:
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value, op)
        return value


class Engine:
    """The policy as it trains: alone, under DDP, or with its weights spread by FSDP2."""

    def __init__(self, policy: Policy, ranks: Ranks, fsdp: bool) -> None:
        self.policy, self.ranks, self.fsdp = policy, ranks, fsdp and ranks.size > 1
        self.module: torch.nn.Module = policy
        if self.fsdp:
            mesh = init_device_mesh(policy.model.device.type, (ranks.size,))
            for layer in policy.layers():
                fully_shard(layer, mesh=mesh)
            fully_shard(policy, mesh=mesh)
            register_fsdp_forward_method(policy, "generate")
            policy.synced = True
        elif ranks.size > 1:
            self.module = DistributedDataParallel(policy, broadcast_buffers=False)

    def synced(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: gradients are averaged over ranks with the ``last`` of a step."""
        if self.fsdp:
            self.policy.set_requires_gradient_sync(last)  # type: ignore[operator]  # fully_shard made it an FSDPModule
        elif isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def clip(self, limit: float) -> Tensor:
        """Bound the gradient's norm; returns what it was. RuntimeError where it is not finite."""
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not bool(norm.isfinite()):
            raise RuntimeError(
                f"the gradient's norm is {float(norm)}: nothing was changed; the last checkpoint is good"
            )
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.mul_(scale.to(parameter.grad.dtype))
        return norm

    # state, whole on every rank ---------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The model's state, gathered: every rank must call."""
        return {name: whole(value) for name, value in self.policy.model.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        own = self.policy.model.state_dict()
        for name, value in weights.items():
            if name in own and value.dtype != own[name].dtype:
                raise ValueError(
                    f"resume needs weights in {own[name].dtype}, the checkpoint holds {name} in {value.dtype}: begin "
                    "a new run (earlier versions kept bfloat16 weights under dtype='bfloat16')"
                )
        self.policy.model.load_state_dict({n: _spread_like(v, own[n]) if n in own else v for n, v in weights.items()})

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        return {**state, "state": {i: {n: whole(v) for n, v in one.items()} for i, one in state["state"].items()}}

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        parameters: Sequence[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        spread = {
            index: {n: _spread_like(v, parameters[index]) if v.ndim else v for n, v in one.items()}
            for index, one in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": spread})


def whole(value: Any) -> Any:
    """A tensor that FSDP2 spread, gathered; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _spread_like(value: Tensor, other: Tensor) -> Tensor:
    if not isinstance(other, DTensor):
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
