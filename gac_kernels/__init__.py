"""Fused losses for hybrid SFT + RL post-training, and the GAC controller that mixes the two signals."""

from .advantages import group_advantages
from .controller import ConstantPrior, ControllerConfig, CosinePrior, GuidedAdaptiveController, KLTarget
from .library import backends, use_backend
from .objectives import (
    CISPO,
    DFPO,
    DPPO,
    DRO,
    GIFT,
    GMPO,
    GRPO,
    GSPO,
    LUFFY,
    NLL,
    REINFORCE,
    SAPO,
    VESPO,
    Gate,
    HybridObjective,
    LogitTransform,
    PolicyObjective,
    SupervisedObjective,
    Token,
    with_slope,
)
from .ops import (
    hybrid_loss,
    hybrid_loss_from_hidden,
    hybrid_loss_from_logits,
    signals_from_logprobs,
    token_logprobs,
    token_logprobs_from_hidden,
)
from .signals import Signals
from .types import Denominators, HybridLoss, TokenBatch, TokenLogprobs

__version__ = "0.1.0"

__all__ = [
    "CISPO",
    "DFPO",
    "DPPO",
    "DRO",
    "GIFT",
    "GMPO",
    "GRPO",
    "GSPO",
    "LUFFY",
    "NLL",
    "REINFORCE",
    "SAPO",
    "VESPO",
    "ConstantPrior",
    "ControllerConfig",
    "CosinePrior",
    "Denominators",
    "Gate",
    "GuidedAdaptiveController",
    "HybridLoss",
    "HybridObjective",
    "KLTarget",
    "LogitTransform",
    "PolicyObjective",
    "Signals",
    "SupervisedObjective",
    "Token",
    "TokenBatch",
    "TokenLogprobs",
    "backends",
    "group_advantages",
    "hybrid_loss",
    "hybrid_loss_from_hidden",
    "hybrid_loss_from_logits",
    "signals_from_logprobs",
    "token_logprobs",
    "token_logprobs_from_hidden",
    "use_backend",
    "with_slope",
]
