"""The benchmark's cases: the token-level loss, and the loss of rows of logits, given or made of hidden states.

Shapes: S sequences, T tokens a sequence, padded; N = S T rows or places; V logits a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import products, reference
from ..types import TokenBatch
from .case import EXPERT_SHARE, Case, Expected, make_batch
from .check import WrongResult, compare, elementwise_bound, rounding, summation
from .measure import Contestant

CHUNK = 2**22  # logits that the float64 check holds at a time


@dataclass(frozen=True, eq=False)
class TokenCase(Case):
    """The loss of ready log-probs, ``(S, T)``.

    Lengths are drawn from T / 2 to T, log-probs from -12 to 0, log-ratios from a normal distribution of width 0.2.
    """

    sequences: int
    tokens: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    kernel = "token_loss"
    unit = "sequences x tokens"
    default_sizes = ((64, 2048),)

    def __post_init__(self) -> None:
        if self.sequences < EXPERT_SHARE or self.tokens < 1:
            raise ValueError(f"tokens must be SxT with S >= {EXPERT_SHARE} and T >= 1, got {self.x}")

    @property
    def size(self) -> tuple[int, int]:
        return self.sequences, self.tokens

    @cached_property
    def _inputs(self) -> tuple[Tensor, TokenBatch]:
        generator = torch.Generator().manual_seed(self.seed)
        S, T = shape = self.sequences, self.tokens
        mask = torch.arange(T) < torch.randint((T + 1) // 2, T + 1, (S,), generator=generator)[:, None]
        logp = -12.0 * torch.rand(shape, generator=generator).square()
        old = (logp + 0.2 * torch.randn(shape, generator=generator)).clamp(max=0.0)
        targets = torch.randint(0, 32000, shape, generator=generator)
        batch = make_batch(targets, mask, old.to(self.dtype), generator, self.device)
        return logp.to(self.device, self.dtype), batch

    @property
    def batch(self) -> TokenBatch:
        return self._inputs[1]

    def leaf(self) -> Tensor:
        return self._inputs[0].detach().requires_grad_()

    def bytes(self, mode: str) -> int:
        """Inputs: log-probs and old log-probs of the live tokens, the mask. Outputs: the log-probs with 0 where masked
        (forward), the gradient (backward, which also has to read one slope a live token where it stands alone)."""
        item, places = self.dtype.itemsize, self.sequences * self.tokens
        result = torch.promote_types(self.dtype, torch.float32).itemsize
        inputs, logprobs, gradient = 2 * item * self.live_tokens + places, result * places, item * places
        return {
            "forward": inputs + logprobs,
            "backward": item * self.live_tokens + gradient,
            "full": inputs + logprobs + gradient,
        }[mode]

    def _logprobs(self) -> tuple[Tensor, dict[str, Any]]:
        return self._inputs[0].double(), {}

    def _compare_gradient(self, gradient: Tensor, want: Expected) -> float:
        return compare("gradient", gradient, want.slope, elementwise_bound(want.slope, self.dtype))


@dataclass(frozen=True, eq=False)
class RowCase(Case):
    """The loss of N rows of V logits, ``(S, T, V)`` with N = S T: 8 sequences, or 4 if 8 do not divide N.

    Logits are normal of width 2, those of the targets such that their probabilities are uniform in (0.02, 0.98), the
    log-ratios normal of width 0.2. Every row is live, unless ``ragged``: lengths are then drawn from T / 2 to T.

    Some contestants overwrite their logits. So every call of every contestant, the copy included, starts from one and
    the same buffer, into which the logits have just been copied outside its time: the caches are alike for all, and
    as they are after the matrix product of a model's head.
    """

    num_rows: int
    vocabulary: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    ragged: bool = False

    kernel = "logits_loss"
    unit = "rows x vocabulary"
    default_sizes = ((1024, 32000), (256, 151936))
    modes = ("full",)
    warmup_rounds = 1

    def __post_init__(self) -> None:
        if self.num_rows < EXPERT_SHARE or self.num_rows % EXPERT_SHARE or self.vocabulary < 2:
            raise ValueError(f"rows must be NxV with N a multiple of {EXPERT_SHARE} and V >= 2, got {self.x}")

    @property
    def size(self) -> tuple[int, int]:
        return self.num_rows, self.vocabulary

    @cached_property
    def _inputs(self) -> tuple[Tensor, TokenBatch]:
        generator, device, V = torch.Generator().manual_seed(self.seed), torch.device(self.device), self.vocabulary
        S = 8 if self.num_rows % 8 == 0 else 4
        S, T = shape = S, self.num_rows // S
        length_S = torch.randint((T + 1) // 2, T + 1, (S,), generator=generator) if self.ragged else torch.full((S,), T)
        targets = torch.randint(0, V, shape, generator=generator)
        p = 0.02 + 0.96 * torch.rand(shape, generator=generator)
        old = (p.log() + 0.2 * torch.randn(shape, generator=generator)).clamp(max=0.0)
        others = torch.tensor(float(V - 1)).log() + 0.5 * 2.0**2  # log of their sum of exponentials, on average
        there = torch.Generator(device).manual_seed(self.seed)
        logits = torch.randn((S, T, V), generator=there, device=device, dtype=self.dtype).mul_(2.0)
        logits.scatter_(-1, targets[..., None].to(device), (others + p.logit())[..., None].to(device, self.dtype))
        mask = torch.arange(T) < length_S[:, None]
        return logits, make_batch(targets, mask, old.to(self.mu.dtype), generator, self.device)

    @property
    def batch(self) -> TokenBatch:
        return self._inputs[1]

    @cached_property
    def policy_batch(self) -> TokenBatch:
        """Every sequence a rollout, since masked rows would be work that the others have and the peers do not."""
        return replace(self.batch, is_expert=torch.zeros_like(self.batch.is_expert))

    @cached_property
    def _work(self) -> Tensor:
        return torch.empty_like(self._inputs[0])

    def leaf(self) -> Tensor:
        return self._work.copy_(self._inputs[0]).detach().requires_grad_()

    def bytes(self, mode: str) -> int:
        """The live rows are read once, all rows of the gradient are written once. A forward pass that leaves the
        gradient to the backward pass only reads; a backward pass that stands alone reads once more."""
        read, written = self.live_tokens, self.num_rows if mode != "forward" else 0
        return (read + written) * self.vocabulary * self.dtype.itemsize

    def copy_buffers(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """From the kept logits to the buffer that everyone works in: a GPU need not hold them two times more."""
        source, target = (tensor.view(-1).view(torch.uint8) for tensor in (self._inputs[0], self._work))
        return source[:num_bytes], target[:num_bytes]

    def _chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """``(S, T, ...)`` tensors a few rows at a time: the float64 intermediates of all rows need not fit."""
        yield from zip(*(tensor.flatten(0, 1).split(self._chunk_rows) for tensor in tensors), strict=True)

    @property
    def _chunk_rows(self) -> int:
        return max(1, CHUNK // self.vocabulary)

    @property
    def logprob_error(self) -> float:
        """That of a sum over V, or twice what PyTorch's log_softmax makes here, if that is more: on a CPU it adds small
        terms to a large sum one by one."""
        return max(summation(self.dtype, self.vocabulary), 2.0 * self._answers[1])

    @property
    def entropy_error(self) -> float:
        """Of sums of p and of p log p up to log V, or of the difference of numbers as large as the logits."""
        return 2.0 * self.logprob_error * (1.0 + math.log(self.vocabulary))

    @cached_property
    def _answers(self) -> tuple[list[Tensor], float]:
        """Log-probs, entropy and sum of p squared in float64, and the largest error of PyTorch's log-probs."""
        taken, worst = [], 0.0
        for z, y, live in self._chunks(self._inputs[0], self.batch.targets, self.batch.mask):
            one = reference.token_logprobs(z.double(), y, live)
            assert one.logprobs is not None and one.entropy is not None and one.sum_sq is not None
            eager = torch.log_softmax(z, -1, dtype=self.mu.dtype).gather(-1, y[:, None]).squeeze(-1)
            worst = max(worst, float((eager - one.logprobs).abs().mul(live).max()))
            taken.append((one.logprobs, one.entropy, one.sum_sq))
        return [torch.cat(parts).view(self.batch.targets.shape) for parts in zip(*taken, strict=True)], worst

    def _logprobs(self) -> tuple[Tensor, dict[str, Any]]:
        logp, entropy, sum_sq = self._answers[0]
        return logp, {"entropy": entropy, "sum_sq": sum_sq}

    def _compare_gradient(self, gradient: Tensor, want: Expected) -> float:
        """With ``slope (1_y - p)``: the slope may be off by its own error, p as far as the log-probs are."""
        if gradient.shape != self._work.shape:
            raise WrongResult(f"gradient has shape {tuple(gradient.shape)}, the logits {tuple(self._work.shape)}")
        info, relative = torch.finfo(self.dtype), 32 * rounding(self.dtype) + self.logprob_error
        half = info.eps if self.dtype.itemsize == 2 else 0.0
        worst, targets = 0.0, torch.where(self.batch.mask, self.batch.targets, 0)
        for got, z, y, slope, error in self._chunks(gradient, self._inputs[0], targets, want.slope, want.slope_error):
            p, chosen = torch.softmax(z.double(), -1), y[:, None]
            size = p.scatter_add(-1, chosen, torch.ones_like(p[:, :1]))  # 1_y + p
            right = slope[:, None] * (-p).scatter_add(-1, chosen, torch.ones_like(p[:, :1]))
            bound = size * (error + relative * slope.abs())[:, None] + half * right.abs()
            bound += torch.where(slope != 0, info.smallest_normal * info.eps, 0.0)[:, None]  # the last of the numbers
            worst = max(worst, compare("gradient", got, right, bound))
        return worst


@dataclass(frozen=True, eq=False)
class HiddenCase(RowCase):
    """The loss of N hidden states of width 896 through a head of V rows, and both gradients.

    Hidden states are normal, weights normal of width 0.06 (logits of width 1.8). The floor is the three matrix products
    alone, in the dtype's fastest arithmetic (on a CPU without bfloat16 instructions: on float32 copies made outside the
    time), chunked as ours. Memory is held against the size of the logits.
    """

    width: int = 896

    kernel = "hidden_loss"
    unit = "tokens x vocabulary"
    default_sizes = ((512, 151936), (2048, 151936))
    floor_name = "products"
    min_rounds = 3

    @cached_property
    def _inputs(self) -> tuple[Tensor, TokenBatch]:
        generator, V = torch.Generator().manual_seed(self.seed), self.vocabulary
        S = 8 if self.num_rows % 8 == 0 else 4
        S, T = shape = S, self.num_rows // S
        length_S = torch.randint((T + 1) // 2, T + 1, (S,), generator=generator) if self.ragged else torch.full((S,), T)
        targets = torch.randint(0, V, shape, generator=generator)
        hidden = torch.randn((*shape, self.width), generator=generator).to(self.device, self.dtype)
        chosen = self._weight.detach()[targets.to(self.device)]
        logits = (hidden.double() * chosen.double()).sum(-1).cpu()
        logp = logits - math.log(V) - 0.5 * 0.06**2 * self.width
        old = (logp + 0.2 * torch.randn(shape, generator=generator)).clamp(max=0.0)
        mask = torch.arange(T) < length_S[:, None]
        return hidden, make_batch(targets, mask, old.to(self.mu.dtype), generator, self.device)

    @cached_property
    def _weight(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        weight = 0.06 * torch.randn((self.vocabulary, self.width), generator=generator)
        return weight.to(self.device, self.dtype).requires_grad_()

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self._weight,)

    def leaf(self) -> Tensor:
        return self._inputs[0].detach().requires_grad_()

    def bytes(self, mode: str) -> int:
        """The head and the hidden states are read, their gradients are written: what no cache can spare."""
        return 2 * (self.vocabulary + self.num_rows) * self.width * self.dtype.itemsize

    def floor(self, mode: str) -> Contestant:
        hidden, weight = self._inputs[0].flatten(0, 1)[self.batch.mask.flatten()], self._weight.detach()
        if products.products_in_float32(hidden.device, self.dtype):
            hidden, weight = hidden.float(), weight.float()
        chunk = products.chunk_rows(len(hidden), self.vocabulary, self.dtype, hidden.device)

        def multiply(_: Any) -> object:
            logits = hidden.new_empty((chunk, self.vocabulary))
            to_hidden, to_weight = torch.empty_like(hidden), torch.empty_like(weight)
            for begin in range(0, len(hidden), chunk):
                x = hidden[begin : begin + chunk]
                dz = torch.mm(x, weight.t(), out=logits[: len(x)])
                torch.mm(dz, weight, out=to_hidden[begin : begin + chunk])
                torch.mm(dz.t(), x, out=to_weight) if begin == 0 else to_weight.addmm_(dz.t(), x)
            return to_hidden, to_weight

        return Contestant(self.floor_name, multiply, self.leaf)

    def _logits(self, hidden: Tensor) -> Tensor:
        return hidden.double() @ self._wide_weight.t()

    @cached_property
    def _wide_weight(self) -> Tensor:
        return self._weight.detach().double()

    @cached_property
    def _answers(self) -> tuple[list[Tensor], float]:
        taken, worst, weight = [], 0.0, self._weight.detach()
        for h, y, live in self._chunks(self._inputs[0], self.batch.targets, self.batch.mask):
            one = reference.token_logprobs(self._logits(h), y, live)
            assert one.logprobs is not None and one.entropy is not None and one.sum_sq is not None
            eager = torch.log_softmax(h @ weight.t(), -1, dtype=self.mu.dtype).gather(-1, y[:, None]).squeeze(-1)
            worst = max(worst, float((eager - one.logprobs).abs().mul(live).max()))
            taken.append((one.logprobs, one.entropy, one.sum_sq))
        return [torch.cat(parts).view(self.batch.targets.shape) for parts in zip(*taken, strict=True)], worst

    def release(self) -> None:
        super().release()
        for name in ("_wide_weight", "_columns", "_gradients"):
            vars(self).pop(name, None)

    def _compare_gradient(self, gradient: Tensor, want: Expected) -> float:
        exact, allowed = self._right_gradients(want)[0]
        return compare("gradient of hidden", gradient.flatten(0, 1), exact, allowed)

    def _compare_others(self, gradients: tuple[Tensor, ...], want: Expected) -> float:
        """Of the head the columns of 64 targets and 64 others."""
        exact, allowed = self._right_gradients(want)[1]
        return compare("gradient of weight", gradients[0][self._columns], exact, allowed)

    @cached_property
    def _columns(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        some = torch.randint(0, self.vocabulary, (64,), generator=generator).to(self.device)
        return torch.cat((self.batch.targets.flatten()[:64].long(), some))

    @cached_property
    def _gradients(self) -> dict[int, tuple[tuple[Tensor, Tensor], ...]]:
        """By the identity of what is expected, which `_expected` holds."""
        return {}

    def _right_gradients(self, want: Expected) -> tuple[tuple[Tensor, Tensor], ...]:
        """Of hidden states and of ``_columns`` of the head, each with how far it may be off: ``dh = dz W`` and
        ``dW = dz^T h`` by what ``dz`` may be off, through |W| and |h|, and by the sum's own rounding. They are products
        in float64 with the whole head, many times the work that they judge, and made once for all providers.
        """
        if id(want) in self._gradients:
            return self._gradients[id(want)]
        half = torch.finfo(self.dtype).eps if self.dtype.itemsize == 2 else 0.0
        least = torch.finfo(self.dtype).smallest_normal  # the last of the numbers that a gradient may lose
        W, columns, of_rows = self._wide_weight, self._columns, []
        sizes = W.abs()
        exact = allowed = torch.zeros((), dtype=torch.float64, device=self.device)
        for h, (right, bound, size) in zip(
            self._inputs[0].flatten(0, 1).split(self._chunk_rows), self._logit_gradients(want), strict=True
        ):
            to_hidden, wide = right @ W, h.double()
            slack = (bound + summation(self.dtype, self.vocabulary) * size) @ sizes
            of_rows.append((to_hidden, slack + half * to_hidden.abs() + least))
            exact = exact + right[:, columns].t() @ wide
            slack = bound[:, columns] + summation(self.dtype, self.num_rows) * size[:, columns]
            allowed = allowed + slack.t() @ wide.abs()
        to_hidden, slack = (torch.cat(parts) for parts in zip(*of_rows, strict=True))
        self._gradients[id(want)] = found = ((to_hidden, slack), (exact, allowed + half * exact.abs() + least))
        return found

    @property
    def _chunk_rows(self) -> int:
        """More than of logits: each is a product with the whole head."""
        return max(1, 8 * CHUNK // self.vocabulary)

    def _logit_gradients(self, want: Expected) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of a few rows at a time: ``dz`` in float64, how far it may be off, and its size. In 16 bits it may have been
        rounded, as eager's is."""
        half = torch.finfo(self.dtype).eps if self.dtype.itemsize == 2 else 0.0
        relative = 32 * rounding(self.dtype) + self.logprob_error
        targets = torch.where(self.batch.mask, self.batch.targets, 0)
        for h, y, slope, error in self._chunks(self._inputs[0], targets, want.slope, want.slope_error):
            p, chosen = torch.softmax(self._logits(h), -1), y[:, None]
            size = p.scatter_add(-1, chosen, torch.ones_like(p[:, :1]))
            right = slope[:, None] * (-p).scatter_add(-1, chosen, torch.ones_like(p[:, :1]))
            bound = size * (error + relative * slope.abs())[:, None] + half * right.abs()
            yield right, bound, slope.abs()[:, None] * size


CASES: dict[str, type[TokenCase] | type[RowCase] | type[HiddenCase]] = {
    "token": TokenCase,
    "logits": RowCase,
    "hidden": HiddenCase,
}
