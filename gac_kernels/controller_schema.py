"""The controller's step as an operator: its state in one tensor, its configuration as arguments. No implementation.

``controller_step`` is functional: it gives a new state and a new mu, and what holds the old ones keeps their values.
The count of steps is part of the state. The device decides by it whether a step refreshes and where the prior stands,
so the same call can be repeated by a CUDA graph.
"""

from __future__ import annotations

import struct
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import ESTIMATORS, ConstantPrior, ControllerConfig, CosinePrior, KLTarget
from .signals import AGGREGATIONS

if TYPE_CHECKING:
    from .signals import Signals

# A signal from here on counts as not finite: mu* adds up three of them, and must not overflow.
LARGEST_SIGNAL = 1e300

# Places in the state, float64 (13,), shared with csrc/controller.h. signals: the EMAs of sigma_s^2, sigma_r^2, Delta^2,
# 0 until first measured; measured: 1 from then on; prior: the value that the last step used.
STATE_NUMBERS = 13
MU, MU_STAR, ESTIMATE, ALPHA = range(4)
SIGNALS, MEASURED = slice(4, 7), slice(7, 10)
SKIPPED, STEPS, PRIOR = range(10, 13)

PRIORS = {type(None): 0, ConstantPrior: 1, CosinePrior: 2}

# rows: (S, 12) float32 or float64, contiguous, or None where nothing was observed or the step does not refresh;
# hidden: (S, H) float32 or float64 with rows of the estimator "hidden"; estimate: in place of rows, float64 (6,), the
# three values and whether they are present (1 or 0). A step takes them in if state's steps are a multiple of
# update_every. kl: under a KL target (kl_target > 0), float64: of this process alone, one element, or of all ranks,
# (3,): its mean, whether that is finite, how many were not. Returns the new state and mu = state[MU] in float32, 0-d.
CONTROLLER_STEP = """(Tensor state, Tensor? rows, Tensor? hidden, Tensor? estimate, Tensor? kl,
    int estimator, float trim, bool znorm, bool smooth_mu, float ema_beta, int update_every, float blend,
    float change_cap, float mu_min, float mu_max, float disagreement_cap,
    int prior, float warmup, float decay, float peak, float valley,
    float kl_target, float kl_low, float kl_high, float kl_gain,
    int policy_aggregation, int supervised_aggregation, float norm_length) -> (Tensor new_state, Tensor mu)"""


def fake_controller_step(state: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return state.new_empty(STATE_NUMBERS), state.new_empty((), dtype=torch.float32)


# The fields of ControllerConfig that encode_config encodes, or that only say how a controller begins. An estimator
# with an option beside them is computed by signals.estimate, and the operator takes its result: see fused_estimate.
ENCODED_FIELDS = frozenset({
    "estimator", "smoothing", "ema_beta", "update_every", "blend", "change_cap", "mu_min", "mu_max", "init_mu", "trim",
    "alpha", "prior", "disagreement_cap", "znorm",
})  # fmt: skip


def fused_estimate(config: ControllerConfig) -> bool:
    """Whether the operator itself estimates the signals from their rows: where every option that it does not know has
    its default value, which must then mean what the estimators did without the option."""
    return all(
        getattr(config, field.name) == field.default for field in fields(config) if field.name not in ENCODED_FIELDS
    )


def encode_config(config: ControllerConfig) -> tuple[Any, ...]:
    """``estimator`` to ``kl_gain``."""
    prior, alpha = config.prior, config.alpha
    if isinstance(prior, CosinePrior):
        schedule = float(prior.warmup), float(prior.decay), prior.peak, prior.valley
    else:
        schedule = 0.0, 0.0, 0.0, 0.0 if prior is None else prior.mu
    rule = (alpha.target, alpha.low, alpha.high, alpha.gain) if isinstance(alpha, KLTarget) else (0.0, 0.0, 0.0, 0.0)
    return (
        ESTIMATORS.index(config.estimator), config.trim, config.znorm, config.smoothing == "reference", config.ema_beta,
        config.update_every, config.blend, config.change_cap, config.mu_min, config.mu_max,
        config.disagreement_cap or 0.0, PRIORS[type(prior)], *schedule, *rule,
    )  # fmt: skip


@lru_cache(maxsize=64)
def decode_config(
    estimator: int, trim: float, znorm: bool, smooth_mu: bool, ema_beta: float, update_every: int, blend: float,
    change_cap: float, mu_min: float, mu_max: float, disagreement_cap: float,
    prior: int, warmup: float, decay: float, peak: float, valley: float,
    kl_target: float, kl_low: float, kl_high: float, kl_gain: float,
) -> ControllerConfig:  # fmt: skip
    """The inverse of :func:`encode_config`; where alpha or mu begin is not part of it."""
    schedule: CosinePrior | ConstantPrior | None = None
    if prior == PRIORS[CosinePrior]:
        schedule = CosinePrior(int(warmup), int(decay), peak, valley)
    elif prior == PRIORS[ConstantPrior]:
        schedule = ConstantPrior(valley)
    return ControllerConfig(
        ESTIMATORS[estimator], "reference" if smooth_mu else "estimate", ema_beta, update_every, blend, change_cap,
        mu_min, mu_max, init_mu=mu_min, trim=trim, znorm=znorm, prior=schedule,
        alpha=KLTarget(kl_target, kl_low, kl_high, kl_gain, init=kl_low) if kl_target else 0.5,
        disagreement_cap=disagreement_cap or None,
    )  # fmt: skip


def encode_signals(signals: Signals | None) -> tuple[int, int, float]:
    """``policy_aggregation`` to ``norm_length``: how the losses weigh tokens; 0 is no length.

    Raises ValueError where an aggregation by a constant length comes without one.
    """
    if signals is None:
        return 0, 0, 0.0
    ways = signals.policy_aggregation, signals.supervised_aggregation
    if signals.norm_length is None and AGGREGATIONS[-1] in ways:
        raise ValueError(f"signals with aggregation {AGGREGATIONS[-1]!r} need norm_length, got None")
    return AGGREGATIONS.index(ways[0]), AGGREGATIONS.index(ways[1]), signals.norm_length or 0.0


def prior_before(config: ControllerConfig, step: int, estimate: float) -> float:
    """The prior that the step before ``step`` used; without a prior the estimate, which stands in its place."""
    return estimate if config.prior is None else config.prior.value(max(step - 1, 0))


def narrowed_mu(config: ControllerConfig, mu: Tensor) -> Tensor:
    """``mu`` in float32, to the nearest number that is not outside of ``[mu_min, mu_max]``; where no float32 lies
    inside, the nearest."""
    low, high = _float32_within(config.mu_min, config.mu_max)
    return mu.float() if low > high else mu.float().clamp(low, high)


@lru_cache(maxsize=64)
def _float32_within(low: float, high: float) -> tuple[float, float]:
    """The smallest float32 that is not below ``low``, the largest that is not above ``high``; both in [0, 1]."""

    def nearest(x: float) -> tuple[float, int]:
        packed = struct.pack("<f", x)
        return struct.unpack("<f", packed)[0], struct.unpack("<i", packed)[0]

    def at(bits: int) -> float:
        value: float = struct.unpack("<f", struct.pack("<i", bits))[0]
        return value

    (bottom, bottom_bits), (top, top_bits) = nearest(low), nearest(high)
    return at(bottom_bits + (bottom < low)), at(top_bits - (top > high))
