"""Trinity-RFT's policy loss from this package, by its dotted path:

    algorithm:
      algorithm_type: mix_chord              # brings sample_strategy: mix, whose batches hold demonstrations
      policy_loss_fn: gac_kernels.integrations.trinity.GACPolicyLossFn
      policy_loss_fn_args:
        objective: sapo                      # or grpo, cispo, gspo; objective_args are those of gac_kernels' classes
        objective_args: {gate: erf, tau_pos: 10.0, tau_neg: 12.0}
        ppo_mini_batch_size: 64              # these six as for Trinity's own MIX and CHORD losses
        ppo_micro_batch_size_per_gpu: 4
        ngpus_trainer: 8
        train_batch_size_usual: 48
        train_batch_size_expert: 16
        use_dynamic_bsz: false
        controller: {update_every: 10}       # or mu: 0.3, a fixed weight of the demonstrations

Trinity adds its own KL and entropy terms to what comes out. Shapes: S sequences of a micro-batch, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..config import ControllerConfig, KLTarget
from ..controller import GuidedAdaptiveController
from ..objectives import CISPO, GRPO, GSPO, NLL, SAPO, HybridObjective
from ..ops import hybrid_loss
from ..types import Denominators, HybridLoss, TokenBatch
from ._verl_worker import controller_config
from .checks import Check, check_host, release, version_of

__all__ = ["check"]

OLDEST, BEFORE = "0.6", "0.7"
_OBJECTIVES = {"sapo": SAPO, "grpo": GRPO, "cispo": CISPO, "gspo": GSPO}
_HOOKS = {
    "trinity.algorithm.policy_loss_fn.policy_loss_fn:PolicyLossFn": ("backend",),
    "trinity.algorithm.policy_loss_fn.policy_loss_fn:PolicyLossFn.default_args": (),
    "trinity.algorithm.policy_loss_fn:POLICY_LOSS_FN": (),
    "trinity.utils.registry:Registry.get": ("module_key",),
    "trinity.trainer.verl.losses:TrinityPolicyLoss": ("algo_config",),
    "trinity.algorithm.sample_strategy.mix_sample_strategy:MixSampleStrategy.sample": ("step",),
}


def check() -> Check:
    """For ``gac-kernels doctor``: Trinity's version, and its hooks in its source."""
    return check_host("trinity-rft", OLDEST, BEFORE, _HOOKS)


def __getattr__(name: str) -> Any:
    if name == "GACPolicyLossFn":
        return _loss_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _check_version() -> None:
    version = version_of("trinity-rft")
    if version is None:
        raise ImportError("gac_kernels.integrations.trinity needs Trinity-RFT: pip install 'gac-kernels[trinity]'")
    if not release(OLDEST) <= release(version) < release(BEFORE):
        raise ImportError(
            f"gac_kernels.integrations.trinity expects trinity-rft >= {OLDEST}, < {BEFORE}; found {version}"
        )


@cache
def _loss_class() -> Any:
    _check_version()
    from trinity.algorithm.policy_loss_fn import PolicyLossFn

    class GACPolicyLossFn(PolicyLossFn):
        """``(1 - mu) * policy + mu * supervised`` on batches of Trinity's ``mix`` sample strategy.

        Each branch weighs as in Trinity's MIX and CHORD losses, so that with ``objective: grpo, objective_args:
        {delta: 3.0}`` and a fixed mu this is theirs. mu comes from the controller where none is fixed: it takes a step
        when the trainer's ``step`` moves on, on what it saw under the step before.

        Args:
            backend: ``verl`` or ``tinker``, as Trinity passes it.
            objective: sapo, grpo, cispo or gspo. objective_args: arguments of that class of gac_kernels.
            supervised: of demonstrations, ``phi`` or ``none``, see :class:`gac_kernels.NLL`.
            mu: a fixed weight in [0, 1]; None: a controller's.
            controller: fields of :class:`gac_kernels.ControllerConfig`; ``prior`` a number, a mapping of CosinePrior's
                fields, or None. Ranks share its state through torch.distributed's default group, so that each of them
                must compute a loss: not with pipeline parallelism.
            loss_agg_mode, grpo_loss_agg_mode, sft_loss_agg_mode: how each branch is aggregated in a micro-batch.
            train_batch_size_usual, train_batch_size_expert: rollouts and demonstrations of a training step.
            ppo_mini_batch_size, ppo_micro_batch_size_per_gpu, ngpus_trainer, use_dynamic_bsz: as of the trainer.
        """

        def __init__(
            self,
            backend: str = "verl",
            objective: str = "sapo",
            objective_args: Mapping[str, Any] | None = None,
            supervised: str = "phi",
            mu: float | None = None,
            controller: Mapping[str, Any] | None = None,
            loss_agg_mode: str = "token-mean",
            sft_loss_agg_mode: str | None = None,
            grpo_loss_agg_mode: str | None = None,
            use_dynamic_bsz: bool = False,
            ppo_mini_batch_size: int = 1,
            ppo_micro_batch_size_per_gpu: int = 1,
            ngpus_trainer: int = 1,
            train_batch_size_usual: int | None = None,
            train_batch_size_expert: int | None = None,
        ) -> None:
            super().__init__(backend=backend)
            if objective not in _OBJECTIVES:
                raise ValueError(f"objective must be one of {', '.join(_OBJECTIVES)}; got {objective!r}")
            self.objective = HybridObjective(
                _OBJECTIVES[objective](**dict(objective_args or {})),
                NLL(supervised),
                aggregation=grpo_loss_agg_mode or loss_agg_mode,
                supervised_aggregation=sft_loss_agg_mode or loss_agg_mode,
            )
            self.fixed_mu, self.controller_config = mu, _mixing(mu, controller)
            self.controller: GuidedAdaptiveController | None = None  # made where the first batch lies
            self.trainer_step: int | None = None
            sizes = {
                "ppo_mini_batch_size": ppo_mini_batch_size,
                "ppo_micro_batch_size_per_gpu": ppo_micro_batch_size_per_gpu,
                "ngpus_trainer": ngpus_trainer,
                "train_batch_size_usual": train_batch_size_usual,
                "train_batch_size_expert": train_batch_size_expert,
            }
            for name, size in sizes.items():
                if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                    raise ValueError(f"{name} must be a positive int, got {size!r}")
            self.per_gpu = ppo_mini_batch_size // ngpus_trainer
            self.accumulated = ppo_mini_batch_size // ppo_micro_batch_size_per_gpu
            self.dynamic = use_dynamic_bsz
            self.usual = (train_batch_size_usual or 1) // ngpus_trainer
            self.expert = (train_batch_size_expert or 1) // ngpus_trainer
            if not self.usual or not self.expert:
                raise ValueError(
                    f"train_batch_size_usual and train_batch_size_expert must be at least ngpus_trainer = "
                    f"{ngpus_trainer}, got {train_batch_size_usual} and {train_batch_size_expert}"
                )

        def __call__(
            self,
            logprob: Tensor,
            old_logprob: Tensor,
            action_mask: Tensor,
            advantages: Tensor,
            expert_mask: Tensor,
            step: Tensor,
            **kwargs: Any,
        ) -> tuple[Tensor, dict[str, float]]:
            """The 0-d loss and metrics. All ``(S, T)`` but ``expert_mask``, bool ``(S,)``, and ``step``, ``(S,)``."""
            batch = TokenBatch.from_padded(
                action_mask.long(),  # a loss of log-probs reads no ids
                action_mask,
                is_expert_S=expert_mask.bool(),
                advantages=advantages,
                old_logprobs=old_logprob,
            )
            mu = self._mu(logprob, step)
            result = hybrid_loss(logprob, batch, self.objective, mu, denominators=self._denominators(batch))
            if self.controller is not None and torch.is_grad_enabled():
                self.controller.observe(result.signals)
            own = _trinitys_metrics(logprob, batch, self.objective.policy, self._weight(batch, self.usual))
            if self.objective.supervised == NLL("phi"):
                own["expert/sft_phi_loss"] = result.supervised_loss  # its CHORD's name
            return result.loss, _metrics(result, mu, self.controller, own)

        def _mu(self, logprob: Tensor, step: Tensor) -> float | Tensor:
            if self.controller_config is None:
                assert self.fixed_mu is not None
                return self.fixed_mu
            first, last = torch.stack([step.min(), step.max()]).tolist()
            if first != last:
                raise ValueError(f"step must be the same for all of a micro-batch, got {first} to {last}")
            if self.controller is None:
                self.controller = GuidedAdaptiveController(self.controller_config, device=logprob.device)
            if torch.is_grad_enabled():
                if self.trainer_step not in (None, first):
                    self.controller.step()
                self.trainer_step = first
            return self.controller.mu

        def _weight(self, batch: TokenBatch, size: int) -> float:
            """Of a row of a branch in this micro-batch, as in Trinity's MIX."""
            return self.per_gpu / (batch.num_sequences * size) if self.dynamic else self.accumulated / size

        def _denominators(self, batch: TokenBatch) -> Denominators:
            """So that a branch counts ``rows * weight * mean`` of this micro-batch, as in Trinity's MIX."""
            lengths = batch.mask.sum(-1)

            def of(branch: Tensor, aggregation: str, size: int) -> Tensor:
                weight = self._weight(batch, size)
                count = branch.sum().clamp(min=1)
                if aggregation == "token-mean":
                    return lengths[branch].sum().clamp(min=1) / (count * weight)
                # Trinity's sum-norm is no mean over sequences.
                return 1.0 / (weight * (count if aggregation == "seq-mean-token-sum-norm" else torch.ones_like(count)))

            return Denominators(
                policy=of(~batch.is_expert, self.objective.aggregation, self.usual),
                supervised=of(batch.is_expert, self.objective.supervised_aggregation, self.expert),
            )

        @classmethod
        def default_args(cls) -> dict[str, Any]:
            """SAPO and NLL-phi with a controller. The two batch sizes have no default and must be given."""
            return {"objective": "sapo", "supervised": "phi", "loss_agg_mode": "token-mean"}

    GACPolicyLossFn.__module__, GACPolicyLossFn.__qualname__ = __name__, "GACPolicyLossFn"
    return GACPolicyLossFn


def _mixing(mu: object, controller: Mapping[str, Any] | None) -> ControllerConfig | None:
    """The controller's settings; None with a fixed mu."""
    if mu is not None:
        if controller is not None:
            raise ValueError("mu and controller exclude each other, got both")
        if isinstance(mu, bool) or not isinstance(mu, (int, float)) or not 0 <= mu <= 1:
            raise ValueError(f"mu must be a number in [0, 1] or None, got {mu!r}")
        return None
    config = controller_config(controller)
    if config.estimator != "coefficient":
        raise ValueError(
            "controller's estimator must be 'coefficient' in Trinity, which hands over log-probs only; "
            f"got {config.estimator!r}"
        )
    if isinstance(config.alpha, KLTarget):
        raise ValueError("controller's alpha must be a number in Trinity, got a KLTarget")
    return config


@torch.no_grad()
def _trinitys_metrics(
    logprob: Tensor, batch: TokenBatch, policy: object, weight: float
) -> dict[str, Tensor]:  # fmt: skip
    """What Trinity's PPO loss tells of the rollouts, by its names and weighted as its MIX weighs it; 0 of an objective
    that clips nothing. Means over tokens (``ppo_kl``: of the old log-prob over the new one)."""
    assert batch.old_logprobs is not None and batch.advantages is not None
    rollouts = batch.mask & ~batch.is_expert[:, None]
    advantages = batch.advantages.to(logprob.dtype)
    log_ratio = torch.where(rollouts, (logprob - batch.old_logprobs).clamp(-20.0, 20.0), 0.0)

    def mean(value: Tensor) -> Tensor:
        return torch.where(rollouts, value.to(logprob.dtype), 0.0).sum() / rollouts.sum().clamp(min=1)

    absent = logprob.new_zeros(())
    clipped = lower = absent
    if isinstance(policy, GSPO):
        shared = log_ratio.sum(-1, keepdim=True) / rollouts.sum(-1, keepdim=True).clamp(min=1)
        ratio = shared.exp().expand_as(log_ratio)
    else:
        ratio = log_ratio.exp()
    bounds = None
    if isinstance(policy, (GRPO, GSPO)):
        bounds = 1 - policy.clip_low, 1 + policy.clip_high
    elif isinstance(policy, CISPO):
        bounds = 0.0, policy.clip_high
    if bounds is not None:
        plain, bounded = -advantages * ratio, -advantages * ratio.clamp(*bounds)
        clipped = mean(bounded > plain)
        if isinstance(policy, GRPO) and policy.delta is not None:
            lower = mean((torch.maximum(plain, bounded) > -advantages * policy.delta) & (advantages < 0))
    share = weight * (~batch.is_expert).sum()
    named = {"pg_clipfrac": clipped, "pg_clipfrac_lower": lower, "ppo_kl": -mean(log_ratio)}
    return {f"usual/{name}": share * value for name, value in named.items()}


def _metrics(
    result: HybridLoss, mu: float | Tensor, controller: GuidedAdaptiveController | None, own: dict[str, Tensor]
) -> dict[str, float]:  # fmt: skip
    """In Trinity's words and in ours, read from the device in one go."""
    seen: dict[str, Any] = {
        "loss": result.loss.detach(),
        "mu": mu,
        "usual/pg_loss": result.policy_loss,
        "expert/sft_loss": result.supervised_loss,
        **own,
        **{f"usual/{name}": value for name, value in result.metrics.items()},
    }
    if controller is not None:
        seen |= {name: value for name, value in controller.metrics().items() if name != "gac/mu"}
    device = result.loss.device
    values = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in seen.values()])
    return dict(zip(seen, values.tolist(), strict=True))
