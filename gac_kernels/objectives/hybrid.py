"""A policy term and a supervised term together with their aggregations, and how raw logits become a softmax's."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from torch import Tensor

from ..tensors import FLOATS, plain_tensor
from .checks import choice, number
from .function import PolicyObjective, SupervisedObjective, check_function
from .policies import CISPO, DFPO, GRPO, GSPO, SAPO
from .supervised import GIFT, NLL
from .term import Term, term_of

KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")

Policy = SAPO | GRPO | CISPO | GSPO | DFPO | PolicyObjective
Supervised = NLL | GIFT | SupervisedObjective
_POLICIES = (SAPO, GRPO, CISPO, DFPO, PolicyObjective)
_SUPERVISED = (GIFT, SupervisedObjective)


def _term(name: str, objective: object) -> Term | None:
    if not isinstance(objective, (PolicyObjective, SupervisedObjective)):
        return None
    if type(objective) is GSPO and not objective.token:
        return None
    if type(objective) is NLL and objective.weight in ("phi", "none"):
        return None
    check_function(name, objective)
    return term_of(objective)


class _Terms:
    """The terms that are functions of a token; None where the kernels know a term by name. In slots, so that
    ``vars(objective)`` holds the fields alone."""

    __slots__ = ("policy_term", "supervised_term")
    policy_term: Term | None
    supervised_term: Term | None


@dataclass(frozen=True)
class HybridObjective(_Terms):
    """One policy term for rollouts, one supervised term for demonstrations, and how each is aggregated.

    Attributes:
        policy: SAPO, GRPO, CISPO, GSPO, DFPO, DPPO, GMPO, VESPO, DRO, REINFORCE or a :class:`PolicyObjective` of your
            own.
        supervised: NLL, GIFT, LUFFY or a :class:`SupervisedObjective` of your own.
        kl_coef: weight of the KL penalty against ``batch.ref_logprobs``, added to rollout tokens.
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"`` (http://joschu.net/blog/kl-approx.html), with
            ``d = clamp(ref_logp - logp, -20, 20)``: ``-d``, ``d^2 / 2``, ``e^d - d - 1``.
        kl_ratio_weighted: multiply the estimator by the token's importance ratio, with the ratio's gradient.
        entropy_coef: weight of the entropy bonus on rollout tokens.
        aggregation: of the policy branch: ``"token-mean"`` (DAPO), ``"seq-mean-token-mean"`` (GRPO, SAPO),
            ``"seq-mean-token-sum"`` or ``"seq-mean-token-sum-norm"`` (Dr. GRPO).
        supervised_aggregation: of the supervised branch, same names.
        norm_length: the constant length of ``"seq-mean-token-sum-norm"``; None uses the padded length ``T``.
    """

    policy: Policy = field(default_factory=SAPO)
    supervised: Supervised = field(default_factory=NLL)
    kl_coef: float = field(default=0.0, kw_only=True)
    kl_estimator: str = field(default="k3", kw_only=True)
    kl_ratio_weighted: bool = field(default=False, kw_only=True)
    entropy_coef: float = field(default=0.0, kw_only=True)
    aggregation: str = field(default="seq-mean-token-mean", kw_only=True)
    supervised_aggregation: str = field(default="token-mean", kw_only=True)
    norm_length: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.policy, _POLICIES):
            kind = type(self.policy).__name__
            raise TypeError(
                f"policy must be SAPO, GRPO or another policy objective of this package, or one of your own: a "
                f"subclass of PolicyObjective; got {kind}"
            )
        if not isinstance(self.supervised, _SUPERVISED):
            kind = type(self.supervised).__name__
            raise TypeError(f"supervised must be NLL, GIFT, LUFFY or a subclass of SupervisedObjective; got {kind}")
        # Traced here and not when first used: torch.compile would trace the tracing.
        object.__setattr__(self, "policy_term", _term("policy", self.policy))
        object.__setattr__(self, "supervised_term", _term("supervised", self.supervised))
        number("kl_coef", self.kl_coef, 0.0)
        number("entropy_coef", self.entropy_coef, 0.0)
        choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        choice("aggregation", self.aggregation, AGGREGATIONS)
        choice("supervised_aggregation", self.supervised_aggregation, AGGREGATIONS)
        if not isinstance(self.kl_ratio_weighted, bool):
            raise TypeError(f"kl_ratio_weighted must be a bool, got {type(self.kl_ratio_weighted).__name__}")
        if self.norm_length is not None:
            number("norm_length", self.norm_length, 0.0, open_low=True)

    def __getstate__(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.__post_init__()


@dataclass(frozen=True, eq=False)
class LogitTransform:
    """How raw logits become the logits of the softmax: ``scale * raw``, soft cap, then ``/ temperature``.

    Attributes:
        temperature: float > 0, or an ``(S,)`` tensor with one temperature a sequence.
        softcap: ``c`` of ``c * tanh(z / c)``, or None.
        scale: the model's logit scale.
    """

    temperature: float | Tensor = 1.0
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.temperature, Tensor):
            plain_tensor("temperature", self.temperature)
            if self.temperature.ndim != 1 or not self.temperature.is_floating_point():
                raise ValueError(
                    f"temperature must be a float or a floating (S,) tensor, got shape {tuple(self.temperature.shape)} "
                    f"of {self.temperature.dtype}"
                )
            plain_tensor("temperature", self.temperature, FLOATS)
        else:
            number("temperature", self.temperature, 0.0, open_low=True)
        if self.softcap is not None:
            number("softcap", self.softcap, 0.0, open_low=True)
        number("scale", self.scale, 0.0, open_low=True)
