"""verl's policy losses, its hybrid loss and its fused head from this package.

    actor_rollout_ref.actor.policy_loss.loss_mode=gac_sapo        or gac_grpo, gac_cispo, gac_gspo, gac_dfpo

verl finds these names by itself: ``import verl`` loads the entry point of group ``verl.plugins``. Where the package
runs from its sources, ``VERL_USE_EXTERNAL_MODULES=gac_kernels.integrations.verl`` does the same, and :func:`register`
by hand. verl swallows a plugin's errors, so that :func:`registered` and ``gac-kernels doctor`` tell what came of it.

Settings beyond verl's own (a gate, DFPO's transform, the hybrid loss):

    actor_rollout_ref.actor.policy_loss._target_=gac_kernels.integrations.verl.GACPolicyLossConfig
    +actor_rollout_ref.actor.policy_loss.gate=erf

The hybrid loss takes demonstrations as rows of the batch under a bool mask ``expert_mask``:

    VERL_USE_EXTERNAL_MODULES=gac_kernels.integrations.verl_hybrid
    +actor_rollout_ref.actor.policy_loss.hybrid=True

Whoever has a ``TrainingWorker`` at hand calls :func:`attach` instead.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..objectives import DFPO, SAPO
from . import _verl_loss
from ._verl_head import patch_head, unpatch_head
from ._verl_hybrid import count_branches, hybrid_loss
from ._verl_loss import NAMES, policy_loss
from ._verl_worker import attach, controller_config, patch_worker
from .checks import OK, Check, check_host

__all__ = [
    "NAMES",
    "attach",
    "check",
    "count_branches",
    "hybrid_loss",
    "patch_head",
    "patch_worker",
    "policy_loss",
    "register",
    "registered",
    "unpatch_head",
]

_HOOKS = {
    "verl.trainer.ppo.core_algos:register_policy_loss": ("name",),
    "verl.workers.utils.losses:ppo_loss": ("config", "model_output", "data", "dp_group"),
    "verl.workers.config.actor:PolicyLossConfig": (),
    "verl.workers.engine_workers:TrainingWorker.set_loss_fn": ("loss_fn",),
    "verl.workers.engine_workers:ActorRolloutRefWorker.init_model": (),
    "verl.workers.engine.base:BaseEngine.train_batch": ("data", "loss_function"),
    "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward": (
        "hidden_states", "vocab_weights", "input_ids", "temperature",
    ),
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.prepare_model_outputs": (
        "output", "output_args", "micro_batch",
    ),
}  # fmt: skip


def register() -> tuple[str, ...]:
    """Make our losses known to verl, by the names that come back. Again is harmless.

    Raises:
        ImportError: verl is missing or of a version whose hooks are not known.
    """
    _verl_loss.check_version()
    from verl.trainer.ppo.core_algos import register_policy_loss

    for name, loss in _verl_loss.LOSSES.items():
        register_policy_loss(name)(loss)
    return NAMES


def registered() -> bool:
    """Whether verl, as this process has it, would find each of our losses by its name. Imports verl."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    return all(POLICY_LOSS_REGISTRY.get(name) is loss for name, loss in _verl_loss.LOSSES.items())


def check() -> Check:
    """For ``gac-kernels doctor``: the hooks in verl's source, and whether verl will find our entry point."""
    found = check_host("verl", _verl_loss.OLDEST, _verl_loss.BEFORE, _HOOKS)
    if found.status != OK:
        return found
    from importlib.metadata import entry_points

    ours = [point for point in entry_points(group="verl.plugins") if point.value.startswith(f"{__name__}:")]
    if not ours:
        why = f"no entry point of group verl.plugins: set VERL_USE_EXTERNAL_MODULES={__name__}, or install the package"
        return found._replace(why=why)
    return found


def __getattr__(name: str) -> Any:
    if name == "plugin":  # what the entry point names; read by verl whenever verl is imported
        return register()
    if name == "GACPolicyLossConfig":
        return _config_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _config_class() -> Any:
    register()  # whoever configures our losses wants them found
    from verl.workers.config import PolicyLossConfig

    @dataclass
    class GACPolicyLossConfig(PolicyLossConfig):
        """verl's PolicyLossConfig with the settings of our losses; ``loss_mode`` is one of ``NAMES``.

        Clip ratios and SAPO's temperatures are the ActorConfig's, as for verl's own losses.

        Attributes:
            gate: SAPO's: sigmoid, erf, arctan or softsign.
            transform, ratio: DFPO's, see :class:`gac_kernels.DFPO`.
            group_size: DFPO's completions a prompt, which must lie whole and in order in each micro-batch.
            hybrid: demonstrations among the rows, and the hybrid loss for them; see :func:`patch_worker`.
            supervised: of demonstrations: ``phi`` or ``none``, see :class:`gac_kernels.NLL`.
            supervised_aggregation: one of verl's ``loss_agg_mode``.
            expert_key: key of the ``(S,)`` bool mask of demonstrations in verl's data.
            mu: a fixed weight of the demonstrations in [0, 1]; None leaves it to a controller.
            controller: fields of :class:`gac_kernels.ControllerConfig`; ``prior`` a number, a mapping of CosinePrior's
                fields, or None.
        """

        loss_mode: str = "gac_sapo"
        gate: str = "sigmoid"
        transform: str = "min_replace"
        ratio: str = "geometric_mean"
        group_size: int | None = None
        hybrid: bool = False
        supervised: str = "phi"
        supervised_aggregation: str = "token-mean"
        expert_key: str = "expert_mask"
        mu: float | None = None
        controller: dict[str, Any] = field(default_factory=dict)

        def __post_init__(self) -> None:
            if self.loss_mode not in NAMES:
                raise ValueError(f"policy_loss.loss_mode must be one of {', '.join(NAMES)}; got {self.loss_mode!r}")
            if self.supervised not in ("phi", "none"):
                raise ValueError(f"policy_loss.supervised must be phi or none, got {self.supervised!r}")
            if self.supervised_aggregation not in _verl_loss.AGGREGATIONS:
                raise ValueError(
                    f"policy_loss.supervised_aggregation must be one of {', '.join(_verl_loss.AGGREGATIONS)}; "
                    f"got {self.supervised_aggregation!r}"
                )
            size, mu = self.group_size, self.mu
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"policy_loss.group_size must be a positive int or None, got {size!r}")
            if mu is not None and (isinstance(mu, bool) or not isinstance(mu, (int, float)) or not 0 <= mu <= 1):
                raise ValueError(f"policy_loss.mu must be a number in [0, 1] or None, got {mu!r}")
            # Each raises naming its field.
            SAPO(self.gate)
            DFPO(self.transform, self.ratio)
            controller_config(self.controller)

    GACPolicyLossConfig.__module__, GACPolicyLossConfig.__qualname__ = __name__, "GACPolicyLossConfig"
    return GACPolicyLossConfig


if "verl" in sys.modules:  # VERL_USE_EXTERNAL_MODULES: verl imports this module while it is itself imported
    register()
