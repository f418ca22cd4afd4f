"""The operators: schemas, fakes, and which backend fills which slot. Everything that dispatches is here.

Python owns the schemas, so that an install without a compiler works. Every operator has a default form, served on each
device type by the best backend there is, and forms that one backend serves alone, for :func:`use_backend`:

* ``reference``: eager PyTorch, any device;
* ``cpu``: the compiled module ``gac_kernels._C``, which fills the CPU slot of the default form by being loaded;
* ``triton``: one kernel source for GPUs (and, under ``TRITON_INTERPRET=1``, for tests on a CPU);
* ``cuda``: CUDA C++, when the package carries it.

Nothing falls back in silence: what a backend does not support raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import reference
from .objectives import AGGREGATIONS, CISPO, DFPO, GATES, GRPO, GSPO, KL_ESTIMATORS, NLL, SAPO, HybridObjective
from .signals import SIGNAL_COLUMNS
from .types import Denominators, TokenBatch

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Scalar outputs of ``token_loss``, in this order.
SCALARS = ("policy_loss", "supervised_loss", "kl", "entropy", *reference.METRICS)

# Codes of the policy term, shared with csrc/math/codes.h and _triton/codes.py.
POLICY_CODES = {**{gate: i for i, gate in enumerate(GATES)}, "grpo": 4, "cispo": 5, "gspo": 6, "dfpo": 7}
DFPO_TRANSFORMS, DFPO_RATIOS = ("min_replace", "adv_orthogonal"), ("geometric_mean", "product")

# One pass over ready log-probs. Token tensors hold N elements in any shape, contiguous, in the dtype of logprobs
# (float32 or float64); the results that are one a token are shaped as logprobs.
# Sequence s owns [cu_seqlens[s], cu_seqlens[s + 1]), or [s seq_len, (s + 1) seq_len) where cu_seqlens is None.
# Returns loss (), scalars (10,) as in SCALARS, rows (S, 12) as signals.SIGNAL_COLUMNS, logprobs with 0 where masked,
# slope = d loss / d logprobs, entropy_slope = d loss / d entropy, or (0,) where no entropy is given.
_TOKEN_LOSS = """(
    Tensor logprobs, Tensor mask, Tensor? cu_seqlens, int seq_len, Tensor is_expert,
    Tensor? advantages, bool token_advantages, Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? rollout_weights,
    Tensor? entropy, Tensor? sum_sq, Tensor? groups,
    Tensor mu, Tensor? policy_denominator, Tensor? supervised_denominator,
    int policy, float p0, float p1, float p2, bool phi, float kl_coef, int kl_estimator, bool kl_ratio_weighted,
    float entropy_coef, int aggregation, int supervised_aggregation, float norm_length
) -> (Tensor loss, Tensor scalars, Tensor rows, Tensor logprobs_out, Tensor slope, Tensor entropy_slope)"""

_lib = torch.library.Library("gac_kernels", "DEF")
_forced: str | None = None


def encode(objective: HybridObjective, norm_length: float | None) -> tuple[Any, ...]:
    """The trailing static arguments of ``token_loss``, from ``policy`` on. ``norm_length`` is the one in force."""
    p = objective.policy
    if isinstance(p, SAPO):
        policy, parameters = POLICY_CODES[str(p.gate)], (p.tau_pos, p.tau_neg, 0.0)
    elif isinstance(p, GRPO):
        policy, parameters = POLICY_CODES["grpo"], (p.clip_low, p.clip_high, p.delta or 0.0)
    elif isinstance(p, CISPO):
        policy, parameters = POLICY_CODES["cispo"], (p.clip_high, 0.0, 0.0)
    elif isinstance(p, GSPO):
        policy, parameters = POLICY_CODES["gspo"], (p.clip_low, p.clip_high, 0.0)
    else:
        codes = DFPO_TRANSFORMS.index(p.transform), DFPO_RATIOS.index(p.ratio)
        policy, parameters = POLICY_CODES["dfpo"], (float(codes[0]), float(codes[1]), 0.0)
    phi = isinstance(objective.supervised, NLL) and objective.supervised.weight == "phi"
    return (
        policy, *(float(value) for value in parameters), phi,
        float(objective.kl_coef), KL_ESTIMATORS.index(objective.kl_estimator) + 1, objective.kl_ratio_weighted,
        float(objective.entropy_coef), AGGREGATIONS.index(objective.aggregation),
        AGGREGATIONS.index(objective.supervised_aggregation), float(norm_length or 1.0),
    )  # fmt: skip


def decode(
    policy: int, p0: float, p1: float, p2: float, phi: bool, kl_coef: float, kl_estimator: int, kl_ratio_weighted: bool,
    entropy_coef: float, aggregation: int, supervised_aggregation: int, norm_length: float,
) -> HybridObjective:  # fmt: skip
    """The inverse of :func:`encode`, for the reference backend."""
    name = next(name for name, code in POLICY_CODES.items() if code == policy)
    make: dict[str, Callable[[], Any]] = {
        "grpo": lambda: GRPO(p0, p1, p2 or None),
        "cispo": lambda: CISPO(p0),
        "gspo": lambda: GSPO(p0, p1),
        "dfpo": lambda: DFPO(DFPO_TRANSFORMS[int(p0)], DFPO_RATIOS[int(p1)]),
    }
    return HybridObjective(
        make[name]() if name in make else SAPO(name, p0, p1),
        NLL("phi" if phi else "none"),
        kl_coef=kl_coef,
        kl_estimator=KL_ESTIMATORS[kl_estimator - 1],
        kl_ratio_weighted=kl_ratio_weighted,
        entropy_coef=entropy_coef,
        aggregation=AGGREGATIONS[aggregation],
        supervised_aggregation=AGGREGATIONS[supervised_aggregation],
        norm_length=norm_length,
    )


def _reference_token_loss(
    logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None, seq_len: int, is_expert: Tensor,
    advantages: Tensor | None, token_advantages: bool, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None, entropy: Tensor | None, sum_sq: Tensor | None, groups: Tensor | None, mu: Tensor,
    policy_denominator: Tensor | None, supervised_denominator: Tensor | None, *static: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    shape = (is_expert.shape[0], seq_len) if cu_seqlens is None else logprobs.shape

    def shaped(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.view(shape)

    batch = TokenBatch(
        targets=mask.view(shape), mask=mask.view(shape), cu_seqlens=cu_seqlens, is_expert=is_expert,
        advantages=shaped(advantages) if token_advantages else advantages, old_logprobs=shaped(old_logprobs),
        ref_logprobs=shaped(ref_logprobs), rollout_weights=shaped(rollout_weights), groups=groups,
    )  # fmt: skip
    denominators = Denominators(policy_denominator, supervised_denominator)
    return eager_token_loss(logprobs, batch, decode(*static), mu, entropy, sum_sq, denominators)


def eager_token_loss(
    logprobs: Tensor, batch: TokenBatch, objective: HybridObjective, mu: Tensor, entropy: Tensor | None,
    sum_sq: Tensor | None, denominators: Denominators | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The outputs of ``token_loss`` by the reference; also the one implementation of a custom gate."""
    out, slope, entropy_slope = reference.token_loss(
        logprobs, batch, objective, mu, entropy=entropy, sum_sq=sum_sq, denominators=denominators
    )
    parts = (out.policy_loss, out.supervised_loss, out.kl, out.entropy)
    absent = out.loss.new_zeros(())
    scalars = torch.stack([*parts, *(out.metrics.get(name, absent) for name in reference.METRICS)])
    shape = logprobs.shape
    entropy_slope = slope.new_empty(0) if entropy is None else entropy_slope.view(shape)
    return out.loss, scalars, out.signals.rows, out.logprobs.view(shape).clone(), slope.view(shape), entropy_slope


def _fake_token_loss(
    logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None, seq_len: int, is_expert: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    entropy = rest[5]
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(len(SCALARS)),
        logprobs.new_empty((is_expert.shape[0], len(SIGNAL_COLUMNS))),
        torch.empty_like(logprobs),
        torch.empty_like(logprobs),
        torch.empty_like(logprobs) if entropy is not None else logprobs.new_empty(0),
    )


def _triton_token_loss(*args: Any) -> tuple[Tensor, ...]:
    from ._triton.token_loss import token_loss  # triton is imported when a kernel is asked for, not before

    return token_loss(*args)


def _load_compiled() -> tuple[bool, str]:
    """Load ``gac_kernels._C``, whose loading fills the CPU slots."""
    if importlib.util.find_spec("gac_kernels._C") is None:
        return False, "gac_kernels._C is not built: no C++ compiler or no torch headers were found at installation"
    module = importlib.import_module("gac_kernels._C")
    return True, f"compiled module, {module.instruction_set()} instructions"


def _warn_uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The reference in a CPU slot says once that it is there because the compiled module is not."""
    said = False

    def slot(*args: Any) -> Any:
        nonlocal said
        if not said:
            said = True
            warnings.warn(
                f"gac_kernels runs its eager reference on the CPU: {_compiled_why}", RuntimeWarning, stacklevel=2
            )
        return function(*args)

    return slot


def _define(name: str, schema: str, fake: Callable[..., Any], impl: dict[str, Callable[..., Any]]) -> None:
    for form in (name, f"{name}_reference", f"{name}_triton"):
        _lib.define(form + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"gac_kernels::{form}", fake, lib=_lib)
    _lib.impl(f"{name}_reference", impl["reference"], "CompositeExplicitAutograd")
    _lib.impl(f"{name}_triton", impl["triton"], "CompositeExplicitAutograd")
    _lib.impl(name, impl["reference"], "CompositeExplicitAutograd")
    if has_triton:
        _lib.impl(name, impl["triton"], "CUDA")
    if not _compiled:
        _lib.impl(name, _warn_uncompiled(impl["reference"]), "CPU")


has_triton = importlib.util.find_spec("triton") is not None
_compiled, _compiled_why = _load_compiled()
_define("token_loss", _TOKEN_LOSS, _fake_token_loss, {"reference": _reference_token_loss, "triton": _triton_token_loss})


def call(name: str, *args: Any) -> tuple[Tensor, ...]:
    """Call the form of operator ``name`` that :func:`use_backend` asks for, else the device's own."""
    form = name if _forced in (None, "cpu", "cuda") else f"{name}_{_forced}"
    if _forced in ("cpu", "cuda") and args[0].device.type != _forced:
        raise ValueError(f"backend {_forced!r} was forced, but logprobs are on {args[0].device}")
    return getattr(torch.ops.gac_kernels, form).default(*args)


def forced_backend() -> str | None:
    """The backend of the innermost :func:`use_backend`, None outside."""
    return _forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator by one backend inside a ``with`` block: for tests and comparisons.

    The setting is one for the process. An input that the backend does not support raises; nothing falls back.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: for an unknown name. RuntimeError: when this install does not have the backend, saying why.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "cpu" and not _compiled:
        raise RuntimeError(f"backend 'cpu' is not available: {_compiled_why}")
    if name == "triton" and not has_triton:
        raise RuntimeError("backend 'triton' is not available: the triton package is not installed")
    if name == "cuda":
        raise RuntimeError("backend 'cuda' is not available: this version carries no CUDA C++ kernels")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backends() -> dict[str, str]:
    """Which backend serves each device type, and why. Decided once, at import."""
    cpu = f"cpu: {_compiled_why}" if _compiled else f"reference: {_compiled_why}"
    cuda = "triton: kernels compile on first use" if has_triton else "reference: the triton package is not installed"
    if not torch.cuda.is_available():
        cuda += " (no CUDA device is visible)"
    return {"cpu": cpu, "cuda": cuda, "other": "reference: no kernels for other device types"}
