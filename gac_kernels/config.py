"""Configuration of the controller: frozen, hashable, checked when made. Priors, the KL target, and ControllerConfig."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ConstantPrior", "ControllerConfig", "CosinePrior", "KLTarget"]

ESTIMATORS = ("coefficient", "logit", "hidden")
SMOOTHINGS = ("estimate", "reference")


def _set_real(
    config: object, field: str, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Check that a field of a frozen dataclass is a number in the range and store it as a float.

    As a float, so that 1 and 1.0 make one configuration and a NumPy scalar does not reach a checkpoint.
    """
    value = getattr(config, field)
    name = f"{type(config).__name__}.{field}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        value = float(value)
    except OverflowError:  # an integer of more than 308 digits
        raise ValueError(f"{name} must be finite, got {value!r}") from None
    above = low < value if open_low else low <= value
    below = value < high if open_high else value <= high
    if not (above and below):  # also nan
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be in {interval}, got {value!r}")
    object.__setattr__(config, field, value)


def _set_integer(config: object, field: str, *, low: int) -> None:
    """Check that a field of a frozen dataclass is an integer, at least `low`, and store it as an int."""
    value = getattr(config, field)
    name = f"{type(config).__name__}.{field}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")
    object.__setattr__(config, field, int(value))


@dataclass(frozen=True)
class CosinePrior:
    """Linear from 0 to `peak` in `warmup` steps, then a half cosine to `valley` in `decay` steps, then `valley`.

    The schedule of CHORD's mu (arXiv 2508.11408) with the defaults of GAC (arXiv 2605.26184). peak, valley in [0, 1].
    """

    warmup: int = 200
    decay: int = 800
    peak: float = 0.85
    valley: float = 0.15

    def __post_init__(self) -> None:
        _set_integer(self, "warmup", low=0)
        _set_integer(self, "decay", low=0)
        _set_real(self, "peak", 0.0, 1.0)
        _set_real(self, "valley", 0.0, 1.0)

    def value(self, step: int) -> float:
        """The prior at step 0, 1, 2, ..."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        decayed = step - self.warmup
        if decayed >= self.decay:
            return self.valley
        return self.valley + (self.peak - self.valley) * 0.5 * (1.0 + math.cos(math.pi * decayed / self.decay))


@dataclass(frozen=True)
class ConstantPrior:
    """The same `mu` in [0, 1] at every step."""

    mu: float

    def __post_init__(self) -> None:
        _set_real(self, "mu", 0.0, 1.0)

    def value(self, step: int) -> float:
        return self.mu


@dataclass(frozen=True)
class KLTarget:
    """alpha driven by the policy's KL (rule ours, target and range from arXiv 2605.26184).

    alpha <- clip(alpha exp(gain clip(KL / target - 1, -1, 1)), low, high), from `init`. 0 < low <= init <= high <= 1.
    """

    target: float = 0.02
    low: float = 0.1
    high: float = 0.95
    gain: float = 0.1
    init: float = 0.5

    def __post_init__(self) -> None:
        _set_real(self, "target", 0.0, math.inf, open_low=True, open_high=True)
        _set_real(self, "high", 0.0, 1.0, open_low=True)
        _set_real(self, "low", 0.0, self.high, open_low=True)
        _set_real(self, "gain", 0.0, math.inf, open_high=True)
        _set_real(self, "init", self.low, self.high)


@dataclass(frozen=True)
class ControllerConfig:
    """Everything static about a controller; TypeError or ValueError names the field that does not fit.

    estimator: "coefficient" (the paper), "logit" or "hidden" (see gac_kernels.signals).
    smoothing: "estimate" gives the estimate an EMA of its own. "reference" is the published code, whose fixed point at
        blend 0.5 and ema_beta 0.99 is 0.990 prior + 0.0099 mu*: there the estimate hardly counts.
    ema_beta in [0, 1): of the three signals and of the estimate.
    update_every >= 1: steps 0, update_every, 2 update_every, ... take their signals in; mu moves at every step.
    blend in [0, 1]: weight of the estimate against the prior.
    change_cap > 0: bound on mu's change in one step. 0 <= mu_min <= init_mu <= mu_max <= 1.
    trim in [0, 0.5): share of expert sequences cut at each end, estimator "coefficient". znorm: likewise.
    alpha in [0, 1], or KLTarget. prior: CosinePrior, ConstantPrior or None (then the estimate stands alone).
    disagreement_cap > 0: D counts for at most this multiple of sigma_s^2 + sigma_r^2. None: no cap.
    """

    estimator: str = "coefficient"
    smoothing: str = "estimate"
    ema_beta: float = 0.99
    update_every: int = 10
    blend: float = 0.5
    change_cap: float = 0.01
    mu_min: float = 0.05
    mu_max: float = 0.9
    init_mu: float = 0.5
    trim: float = 0.1
    alpha: float | KLTarget = 0.5
    prior: CosinePrior | ConstantPrior | None = CosinePrior()
    disagreement_cap: float | None = None
    znorm: bool = False

    def __post_init__(self) -> None:
        for field, choices in (("estimator", ESTIMATORS), ("smoothing", SMOOTHINGS)):
            if getattr(self, field) not in choices:
                raise ValueError(f"ControllerConfig.{field} must be one of {choices}, got {getattr(self, field)!r}")
        _set_real(self, "ema_beta", 0.0, 1.0, open_high=True)
        _set_integer(self, "update_every", low=1)
        _set_real(self, "blend", 0.0, 1.0)
        _set_real(self, "change_cap", 0.0, math.inf, open_low=True, open_high=True)
        _set_real(self, "mu_max", 0.0, 1.0)
        _set_real(self, "mu_min", 0.0, self.mu_max)
        _set_real(self, "init_mu", self.mu_min, self.mu_max)
        _set_real(self, "trim", 0.0, 0.5, open_high=True)
        if not isinstance(self.alpha, KLTarget):
            _set_real(self, "alpha", 0.0, 1.0)
        if type(self.prior) not in (CosinePrior, ConstantPrior, type(None)):  # the device knows no subclass's value()
            raise TypeError(f"ControllerConfig.prior must be CosinePrior, ConstantPrior or None, got {self.prior!r}")
        if self.disagreement_cap is not None:
            _set_real(self, "disagreement_cap", 0.0, math.inf, open_low=True, open_high=True)
        if not isinstance(self.znorm, bool):
            raise TypeError(f"ControllerConfig.znorm must be a bool, got {self.znorm!r}")

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries and numbers, with the kind of prior and alpha: for checkpoints and logs."""
        fields = asdict(self)
        for name in ("prior", "alpha"):
            if isinstance(fields[name], dict):
                fields[name] = {"kind": type(getattr(self, name)).__name__, **fields[name]}
        return fields
