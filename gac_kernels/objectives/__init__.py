"""The objectives as frozen, hashable descriptions that validate themselves.

Every objective is one scalar function of a token, giving (loss, slope) with slope = d loss / d logp. The terms that
kernels know by name are described here and computed in ``reference`` and in each backend; the others, and the user's
own, are functions that stand here as they are (``function.py``).
"""

from .function import PolicyObjective, SupervisedObjective, Token, with_slope
from .gate import Gate
from .hybrid import AGGREGATIONS, KL_ESTIMATORS, HybridObjective, LogitTransform, Policy, Supervised
from .policies import CISPO, DFPO, GATES, GRPO, GSPO, SAPO
from .recent import DPPO, DRO, GMPO, REINFORCE, VESPO
from .supervised import GIFT, LUFFY, NLL

__all__ = [
    "AGGREGATIONS",
    "CISPO",
    "DFPO",
    "DPPO",
    "DRO",
    "GATES",
    "GIFT",
    "GMPO",
    "GRPO",
    "GSPO",
    "KL_ESTIMATORS",
    "LUFFY",
    "NLL",
    "REINFORCE",
    "SAPO",
    "VESPO",
    "Gate",
    "HybridObjective",
    "LogitTransform",
    "Policy",
    "PolicyObjective",
    "Supervised",
    "SupervisedObjective",
    "Token",
    "with_slope",
]
