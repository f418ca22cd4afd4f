"""Objectives, configurations, the controller and what it is fed, rewards and backends that must be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bad_input import INF, NAN, Row, S, meta, table

import gac_kernels as gk

HUGE = 10**400  # an integer beyond every float


def numbers(name: str, make: Callable[..., Any], field: str, outside: float) -> list[Row]:
    """What every field that takes a number refuses."""
    return table(
        name, make,
        ("range", {field: outside}, ValueError, field, f"{outside}"),
        ("nan", {field: NAN}, ValueError, field, "nan"),
        ("range", {field: -INF}, ValueError, field, "-inf"),
        ("range", {field: HUGE}, ValueError, field, "1000"),
        ("type", {field: "0.5"}, TypeError, field, "'" if name in IN_CONFIG else "str"),
        ("type", {field: True}, TypeError, field, "True" if name in IN_CONFIG else "bool"),
        ("type", {field: torch.ones(())}, TypeError, field, "ensor"),
    )  # fmt: skip


IN_CONFIG = ("ControllerConfig", "KLTarget", "CosinePrior", "ConstantPrior")
FIELDS = {
    ("SAPO", "tau_pos"): 0.0, ("SAPO", "tau_neg"): -1.0, ("GRPO", "clip_low"): 1.5, ("GRPO", "clip_high"): -0.5,
    ("GRPO", "delta"): 1.1, ("CISPO", "clip_high"): 0.0, ("GSPO", "clip_low"): 2.0, ("GSPO", "clip_high"): -1.0,
    ("GIFT", "beta"): -2.0, ("GIFT", "smooth"): 1.5, ("HybridObjective", "kl_coef"): -0.1,
    ("HybridObjective", "entropy_coef"): -3.0, ("HybridObjective", "norm_length"): 0.0,
    ("DPPO", "low"): -0.1, ("DPPO", "high"): -0.1, ("DPPO", "ratio_cap"): 0.0, ("GMPO", "clip_low"): -1.0,
    ("GMPO", "clip_high"): -1.0, ("VESPO", "k_pos"): -1.0, ("VESPO", "lambda_pos"): -1.0, ("VESPO", "k_neg"): -1.0,
    ("VESPO", "lambda_neg"): -1.0, ("DRO", "beta"): -0.5, ("LUFFY", "gamma"): 0.0,
    ("LogitTransform", "softcap"): 0.0, ("LogitTransform", "scale"): -1.0,
    ("ControllerConfig", "ema_beta"): 1.0, ("ControllerConfig", "blend"): 1.5, ("ControllerConfig", "change_cap"): 0.0,
    ("ControllerConfig", "mu_max"): 1.1, ("ControllerConfig", "mu_min"): 0.95, ("ControllerConfig", "init_mu"): 0.95,
    ("ControllerConfig", "trim"): 0.5, ("ControllerConfig", "alpha"): -0.1,
    ("ControllerConfig", "disagreement_cap"): 0.0, ("KLTarget", "target"): 0.0, ("KLTarget", "low"): 0.96,
    ("KLTarget", "high"): 1.5, ("KLTarget", "gain"): -1.0, ("KLTarget", "init"): 0.05, ("CosinePrior", "peak"): 2.0,
    ("CosinePrior", "valley"): -0.1, ("ConstantPrior", "mu"): 1.2,
}  # fmt: skip
NUMBERS = [row for (name, field), outside in FIELDS.items() for row in numbers(name, getattr(gk, name), field, outside)]


def gate(**given: Any) -> gk.SAPO:
    def value(u: torch.Tensor, tau: float) -> torch.Tensor:
        return u / torch.sqrt(1 + (tau * u) ** 2)

    def slope(u: torch.Tensor, tau: float) -> torch.Tensor:
        return (1 + (tau * u) ** 2) ** -1.5

    return gk.SAPO(gk.Gate(**{"name": "mine", "value": value, "slope": slope} | given))


CHOICES = [
    *table("SAPO", gk.SAPO, ("range", {"gate": "relu"}, ValueError, "gate", "relu"),
           ("type", {"gate": None}, ValueError, "gate", "None")),
    *table("DFPO", gk.DFPO, ("range", {"transform": "min"}, ValueError, "transform", "min"),
           ("type", {"ratio": 1}, ValueError, "ratio", "1")),
    *table("DPPO", gk.DPPO, ("range", {"divergence": "js"}, ValueError, "divergence", "js")),
    *table("GSPO", gk.GSPO, ("type", {"token": 1}, TypeError, "token", "int")),
    *table("PolicyObjective", lambda: gk.HybridObjective(gk.PolicyObjective()),
           ("type", {}, TypeError, "policy must be a frozen dataclass", "PolicyObjective")),
    *table("SupervisedObjective", lambda: gk.HybridObjective(supervised=gk.SupervisedObjective()),
           ("type", {}, TypeError, "supervised must be a frozen dataclass", "SupervisedObjective")),
    *table("with_slope", lambda: gk.with_slope(torch.ones(3), torch.ones(3)),
           ("contradictory", {}, RuntimeError, "with_slope", "loss(t)")),
    *table("NLL", gk.NLL, ("range", {"weight": "Phi"}, ValueError, "weight", "Phi"),
           ("type", {"weight": None}, ValueError, "weight", "None")),
    *table("GRPO", gk.GRPO, ("contradictory", {"clip_high": 0.5, "delta": 1.5}, ValueError, "delta", "1.5")),
    *table("HybridObjective", gk.HybridObjective,
           ("type", {"policy": gk.NLL()}, TypeError, "policy", "NLL"),
           ("type", {"policy": "sapo"}, TypeError, "policy", "str"),
           ("type", {"supervised": None}, TypeError, "supervised", "NoneType"),
           ("range", {"kl_estimator": "k4"}, ValueError, "kl_estimator", "k4"),
           ("type", {"kl_ratio_weighted": 1}, TypeError, "kl_ratio_weighted", "int"),
           ("range", {"aggregation": "mean"}, ValueError, "aggregation", "mean"),
           ("range", {"supervised_aggregation": None}, ValueError, "supervised_aggregation", "None")),
    *table("LogitTransform", gk.LogitTransform,
           ("range", {"temperature": 0.0}, ValueError, "temperature", "0.0"),
           ("nan", {"temperature": NAN}, ValueError, "temperature", "nan"),
           ("type", {"temperature": "hot"}, TypeError, "temperature", "str"),
           ("shape", {"temperature": torch.ones(2, 2)}, ValueError, "temperature", "(2, 2)"),
           ("dtype", {"temperature": torch.ones(2, dtype=torch.long)}, ValueError, "temperature", "int64")),
    *table("Gate", gate,
           ("type", {"value": 3}, TypeError, "Gate.value", "int"),
           ("type", {"slope": None}, TypeError, "Gate.slope", "NoneType"),
           ("type", {"slope": lambda u, tau: 1.0}, ValueError, "slope must give a tensor", "float"),
           ("shape", {"value": lambda u, tau: u[:1]}, ValueError, "value must give a tensor", "(1,)"),
           ("contradictory", {"value": lambda u, tau: u}, ValueError, "slope must be the derivative", "mine")),
    *table("ControllerConfig", gk.ControllerConfig,
           ("range", {"estimator": "oracle"}, ValueError, "estimator", "oracle"),
           ("type", {"smoothing": None}, ValueError, "smoothing", "None"),
           ("range", {"update_every": 0}, ValueError, "update_every", "0"),
           ("type", {"update_every": 2.5}, TypeError, "update_every", "2.5"),
           ("type", {"znorm": 1}, TypeError, "znorm", "1"),
           ("type", {"prior": 0.5}, TypeError, "prior", "0.5"),
           ("contradictory", {"mu_min": 0.5, "mu_max": 0.4}, ValueError, "mu_min", "0.5"),
           ("contradictory", {"init_mu": 0.2, "mu_min": 0.3}, ValueError, "init_mu", "0.2")),
    *table("CosinePrior", gk.CosinePrior,
           ("range", {"warmup": -1}, ValueError, "warmup", "-1"),
           ("type", {"decay": 1.5}, TypeError, "decay", "1.5")),
    *table("KLTarget", gk.KLTarget, ("contradictory", {"low": 0.6, "high": 0.5}, ValueError, "low", "0.6")),
]  # fmt: skip


def use(**given: Any) -> None:
    with gk.use_backend(**given):
        raise AssertionError("the block was entered")


BACKENDS = table("use_backend", use, ("range", {"name": "gpu"}, ValueError, "backend", "gpu"),
                 ("type", {"name": None}, ValueError, "backend", "None"))  # fmt: skip


def advantages(**given: Any) -> torch.Tensor:
    return gk.group_advantages(**{"rewards_S": torch.zeros(6), "groups": 3} | given)


ADVANTAGES = table(
    "group_advantages", advantages,
    ("type", {"rewards_S": [1.0]}, TypeError, "rewards_S", "list"),
    ("dtype", {"rewards_S": torch.zeros(6, dtype=torch.complex64)}, TypeError, "rewards_S", "complex64"),
    ("shape", {"rewards_S": torch.zeros(2, 3)}, ValueError, "rewards_S", "(2, 3)"),
    ("range", {"groups": 0}, ValueError, "groups", "0"),
    ("contradictory", {"groups": 4}, ValueError, "groups", "4"),
    ("type", {"groups": 2.0}, TypeError, "groups", "float"),
    ("type", {"groups": True}, TypeError, "groups", "bool"),
    ("type", {"groups": None}, TypeError, "groups", "NoneType"),
    ("type", {"groups": ["a"] * 6}, TypeError, "groups", "'a'"),
    ("dtype", {"groups": torch.zeros(6)}, TypeError, "groups", "float32"),
    ("shape", {"groups": torch.zeros(5, dtype=torch.long)}, ValueError, "groups", "(5,)"),
    ("empty", {"groups": []}, ValueError, "groups", "(0,)"),
    ("device", {"groups": meta(6, dtype=torch.long)}, ValueError, "groups", "meta"),
    ("range", {"baseline": "median"}, ValueError, "baseline", "median"),
    ("range", {"scale": "std"}, ValueError, "scale", "std"),
    ("range", {"eps": -1e-6}, ValueError, "eps", "-1e-06"),
    ("nan", {"eps": NAN}, ValueError, "eps", "nan"),
    ("range", {"eps": INF}, ValueError, "eps", "inf"),
    ("type", {"eps": "small"}, TypeError, "eps", "str"),
    ("type", {"eps": torch.zeros(())}, TypeError, "eps", "Tensor"),
)  # fmt: skip


def signals(**given: Any) -> gk.Signals:
    return gk.Signals(**{"rows": torch.zeros(S, 12)} | given)


def add(other: Any, **ours: Any) -> Any:
    return signals(**ours) + other


SIGNALS = [
    *table("Signals", signals,
           ("type", {"rows": [[0.0]]}, TypeError, "rows", "list"),
           ("dtype", {"rows": torch.zeros(S, 12).half()}, TypeError, "rows", "float16"),
           ("shape", {"rows": torch.zeros(S, 11)}, ValueError, "rows", "(3, 11)"),
           ("empty", {"rows": torch.zeros(0)}, ValueError, "rows", "(0,)"),
           ("type", {"has_sum_sq": 1}, TypeError, "has_sum_sq", "int"),
           ("range", {"policy_aggregation": "mean"}, ValueError, "policy_aggregation", "mean"),
           ("type", {"supervised_aggregation": None}, ValueError, "supervised_aggregation", "None"),
           ("range", {"norm_length": 0}, ValueError, "norm_length", "0"),
           ("nan", {"norm_length": NAN}, ValueError, "norm_length", "nan"),
           ("range", {"norm_length": INF}, ValueError, "norm_length", "inf"),
           ("type", {"norm_length": "512"}, TypeError, "norm_length", "str"),
           ("type", {"hidden": 0.0}, TypeError, "hidden", "float"),
           ("dtype", {"hidden": torch.zeros(S, 4, dtype=torch.long)}, TypeError, "hidden", "int64"),
           ("shape", {"hidden": torch.zeros(S + 1, 4)}, ValueError, "hidden", "(4, 4)"),
           ("device", {"hidden": meta(S, 4)}, ValueError, "hidden", "meta")),
    *table("Signals", add,
           ("type", {"other": 3}, TypeError, "Signals", "int"),
           ("contradictory", {"other": signals(has_sum_sq=True)}, ValueError, "has_sum_sq", "True"),
           ("contradictory", {"other": signals(policy_aggregation="token-mean")}, ValueError,
            "policy_aggregation", "token-mean"),
           ("contradictory", {"other": signals(norm_length=9.0)}, ValueError, "norm_length", "9.0"),
           ("contradictory", {"other": signals(hidden=torch.zeros(S, 4))}, ValueError, "width of hidden", "4"),
           ("device", {"other": gk.Signals(meta(S, 12))}, ValueError, "signals", "meta")),
    *table("Signals", lambda group: signals().all_reduce(group), ("type", {"group": "all"}, TypeError, "group", "str")),
]  # fmt: skip

KL = gk.ControllerConfig(alpha=gk.KLTarget())


def controller(**given: Any) -> gk.GuidedAdaptiveController:
    return gk.GuidedAdaptiveController(**given)


def load(**changes: Any) -> None:
    state = controller().state_dict()
    controller().load_state_dict({k: v for k, v in (state | changes).items() if v is not ...})


CONTROLLER = [
    *table("GuidedAdaptiveController", controller,
           ("type", {"config": {}}, TypeError, "config", "{}"),
           ("type", {"config": None}, TypeError, "config", "None"),
           ("type", {"process_group": "all"}, TypeError, "process_group", "str")),
    *table("GuidedAdaptiveController", lambda config=KL, **given: controller(config=config).observe(**given),
           ("type", {"signals": torch.zeros(S, 12)}, TypeError, "signals", "Tensor"),
           ("type", {"signals": None}, TypeError, "signals", "NoneType"),
           ("device", {"signals": gk.Signals(meta(S, 12))}, ValueError, "signals", "meta"),
           ("contradictory", {"config": gk.ControllerConfig("logit"), "signals": signals()}, ValueError,
            "sum_sq", "without it"),
           ("contradictory", {"config": gk.ControllerConfig("hidden"), "signals": signals()}, ValueError,
            "hidden", "without it")),
    *table("GuidedAdaptiveController", lambda **given: controller(config=KL).step(**given),
           ("contradictory", {}, ValueError, "kl", "None"),
           ("type", {"kl": "0.1"}, TypeError, "kl", "'0.1'"),
           ("type", {"kl": True}, TypeError, "kl", "True"),
           ("shape", {"kl": torch.zeros(1)}, ValueError, "kl", "(1,)"),
           ("device", {"kl": meta()}, ValueError, "kl", "meta")),
    *table("GuidedAdaptiveController", lambda state: controller().load_state_dict(state),
           ("type", {"state": None}, TypeError, "state_dict", "NoneType"),
           ("type", {"state": [1]}, TypeError, "state_dict", "list"),
           ("empty", {"state": {}}, ValueError, "state_dict", "mu_star")),
    *table("GuidedAdaptiveController", load,
           ("empty", {"alpha": ...}, ValueError, "state_dict", "alpha"),
           ("contradictory", {"nu": 1}, ValueError, "state_dict", "nu"),
           ("range", {"version": 3}, ValueError, "version", "3"),
           ("type", {"config": None}, TypeError, "config", "NoneType"),
           ("contradictory", {"config": gk.ControllerConfig(blend=0.25).as_dict()}, ValueError, "config", "0.25"),
           ("type", {"step": 1.0}, ValueError, "step", "1.0"),
           ("range", {"step": -1}, ValueError, "step", "-1"),
           ("type", {"measured": 1.0}, TypeError, "measured", "float"),
           ("shape", {"signals": torch.zeros(2).double()}, ValueError, "signals", "(2,)"),
           ("dtype", {"mu": torch.tensor(0.5)}, ValueError, "mu", "float32"),
           ("range", {"mu": torch.tensor(0.95).double()}, ValueError, "mu", "0.949"),
           ("nan", {"estimate": torch.tensor(NAN).double()}, ValueError, "estimate", "nan"),
           ("range", {"skipped": torch.tensor(INF).double()}, ValueError, "skipped", "inf")),
]  # fmt: skip

SETTING_ROWS = [*NUMBERS, *CHOICES, *BACKENDS, *ADVANTAGES, *SIGNALS, *CONTROLLER]
