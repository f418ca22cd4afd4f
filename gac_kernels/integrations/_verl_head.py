"""Our head in verl's fused path: log-probs and entropy from hidden states, and sum p^2, which verl has not there.

Shapes: B rows and T tokens of a fused forward (B is 1 where padding is removed), V vocabulary, H hidden width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..objectives import LogitTransform
from ..ops import token_logprobs_from_hidden
from . import _verl_loss

_ORIGINALS: dict[str, Any] = {}  # what stood in verl before; empty where nothing is patched
_LATEST: list[Tensor] = []  # sum p^2 of the forward pass that prepare_model_outputs is about to read
_EXPECTED = {  # parameters of what is replaced
    "head": ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
    "outputs": ("self", "output", "output_args", "micro_batch", "logits_processor_func"),
}


def _places() -> dict[str, tuple[Any, str]]:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy as triton_head
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    return {
        "head": (FusedLinearForPPO, "forward"),
        "triton_head": (triton_head, "linear_cross_entropy"),
        "outputs": (FSDPEngineWithLMHead, "prepare_model_outputs"),
    }


def patch_head() -> None:
    """Put our head into verl's fused path in this process: FSDP engine, every ``fused_kernel_options.impl_backend``.

    ``use_fused_kernels=True`` then computes log-probs and entropy with
    :func:`gac_kernels.token_logprobs_from_hidden`, and ``calculate_sum_pi_squared=True`` no longer raises. Must run in
    the process that trains: ``VERL_USE_EXTERNAL_MODULES=gac_kernels.integrations.verl_head`` does so in each. Once is
    enough; :func:`unpatch_head` takes it back.

    Raises:
        ImportError: verl is missing, of a version whose hooks are not known, or without what is replaced.
    """
    if _ORIGINALS:
        return
    _verl_loss.check_version()
    places = _places()
    originals = {key: getattr(owner, name) for key, (owner, name) in places.items()}
    for key, expected in _EXPECTED.items():
        found = tuple(inspect.signature(originals[key]).parameters)
        if found != expected:
            owner, name = places[key]
            raise ImportError(f"expected {owner.__name__}.{name}({', '.join(expected)}) in verl, found {found}")
    _ORIGINALS.update(originals)
    for key, ours in (("head", _head), ("triton_head", _triton_head), ("outputs", _outputs)):
        owner, name = places[key]
        setattr(owner, name, ours)


def unpatch_head() -> None:
    """Put back what :func:`patch_head` replaced."""
    if not _ORIGINALS:
        return
    for key, (owner, name) in _places().items():
        setattr(owner, name, _ORIGINALS[key])
    _ORIGINALS.clear()
    _LATEST.clear()


def _from_hidden(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``log_probs`` (float32) and ``entropy``, shaped as the targets; sum p^2 waits in ``_LATEST``."""
    result = token_logprobs_from_hidden(
        hidden,
        weight.to(hidden.dtype),
        targets.long(),
        transform=LogitTransform(float(temperature)),
        outputs=("logprobs", "entropy", "sum_sq"),
    )
    assert result.logprobs is not None and result.entropy is not None and result.sum_sq is not None
    _LATEST[:] = [result.sum_sq]
    return result.logprobs, result.entropy


def _head(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``FusedLinearForPPO.forward``; our chunks need no ``chunk_size``."""
    return _from_hidden(hidden_states, vocab_weights, input_ids, temperature)


def _triton_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, reduction: str = "none",
    dist_process_group: Any = None,
) -> Any:  # fmt: skip
    """``linear_cross_entropy``; what the FSDP engine does not ask for goes to verl's own."""
    if reduction.lower() != "none" or dist_process_group is not None:
        return _ORIGINALS["triton_head"](hidden, weight, labels, temperature, reduction, dist_process_group)
    return _from_hidden(hidden, weight, labels, temperature)


def _outputs(self: Any, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any) -> Any:
    """``prepare_model_outputs``, with ``sum_pi_squared`` from the fused head laid out as verl lays out log-probs."""
    from verl.utils import tensordict_utils as tu

    def flag(name: str, default: bool = False) -> bool:
        return bool(tu.get_non_tensor_data(data=micro_batch, key=name, default=default))

    original = _ORIGINALS["outputs"]
    latest = _LATEST.pop() if _LATEST else None
    if not (flag("calculate_sum_pi_squared") and flag("use_fused_kernels")):
        return original(self, output, output_args, micro_batch, logits_processor_func)
    if latest is None:
        raise RuntimeError(
            "calculate_sum_pi_squared with use_fused_kernels: the model's forward did not pass through verl's fused "
            f"head, which gac_kernels replaced; its output is {type(output).__name__}"
        )
    tu.assign_non_tensor(micro_batch, calculate_sum_pi_squared=False)
    try:
        outputs = original(self, output, output_args, micro_batch, logits_processor_func)
    finally:
        tu.assign_non_tensor(micro_batch, calculate_sum_pi_squared=True)
    offsets = micro_batch["input_ids"].offsets()
    if flag("use_remove_padding", True):
        flat = self._gather_and_unpad_packed(latest.reshape(-1), output_args["pad_size"])
    else:
        flat = latest[torch.arange(latest.shape[1], device=latest.device) < offsets.diff().unsqueeze(1)]
    outputs["sum_pi_squared"] = torch.nested.nested_tensor_from_jagged(flat, offsets)
    return outputs
