"""Cases of Liger's GRPO losses, and their formulas written out token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch

B, T, H, V = 4, 6, 16, 37
EPS = torch.finfo(torch.float32).eps

# What is not said: grpo's defaults below. "weights": shape of vllm_is_ratio. "items": num_items_in_batch.
DEFAULTS = {
    "kind": "dapo", "level": "token", "beta": 0.04, "low": 0.2, "high": 0.3, "delta": None, "corrected": False,
    "length": None, "temperature": 0.9, "taus": (1.0, 1.05), "vespo": (2.0, 3.0, 3.0, 2.0), "old": True,
    "weights": None, "items": None, "masked": True,
}  # fmt: skip
CASES = {
    "defaults": {},
    "no mask": {"masked": False},
    "on-policy": {"old": False},
    "no KL": {"beta": 0.0},
    "temperature": {"temperature": 2.5},
    "weights B": {"weights": "B"},
    "weights B1": {"weights": "B1"},
    "weights BT": {"weights": "BT"},
    "items": {"items": 31},
    "items tensor": {"items": torch.tensor(31)},
    "corrected": {"corrected": True},
    "delta": {"delta": 1.4},
    "delta at sequences": {"level": "sequence", "delta": 1.1, "low": 0.1, "high": 0.05},
    "delta below the clip": {"delta": 1.1},
    "wide clip": {"low": 1.5, "high": 0.0},
    "grpo": {"kind": "grpo", "weights": "BT"},
    "bnpo": {"kind": "bnpo", "corrected": True},
    "dr_grpo": {"kind": "dr_grpo", "length": 9},
    "cispo": {"kind": "cispo", "high": 1.2, "weights": "B1"},
    "cispo low bound": {"kind": "cispo", "high": 0.2, "items": 17},
    "cispo on-policy": {"kind": "cispo", "high": 5.0, "old": False},
    "sapo": {"kind": "sapo"},
    "sapo temperatures": {"kind": "sapo", "taus": (10.0, 12.0), "corrected": True, "weights": "BT"},
    "luspo": {"kind": "luspo"},
    "luspo delta": {"kind": "luspo", "delta": 1.2, "beta": 0.0},
    "luspo no mask": {"kind": "luspo", "masked": False, "weights": "BT"},
    "vespo": {"kind": "vespo", "items": 12},
    "vespo shapes": {"kind": "vespo", "vespo": (1.0, 2.0, 0.5, 1.5), "weights": "BT"},
    "vespo weight B1": {"kind": "vespo", "weights": "B1", "beta": 0.0},
    "vespo on-policy": {"kind": "vespo", "old": False},
    "sequence": {"level": "sequence"},
    "sequence grpo": {"level": "sequence", "kind": "grpo", "weights": "BT", "corrected": True},
    "sequence bnpo": {"level": "sequence", "kind": "bnpo", "delta": 1.02},
    "sequence dr_grpo": {"level": "sequence", "kind": "dr_grpo", "length": 5, "beta": 0.0},
    "sequence luspo": {"level": "sequence", "kind": "luspo", "weights": "B"},
    "sequence luspo no KL": {"level": "sequence", "kind": "luspo", "beta": 0.0},
    "sequence on-policy": {"level": "sequence", "old": False, "low": 0.02, "high": 0.03},
}  # fmt: skip
CASES = {name: DEFAULTS | case for name, case in CASES.items()}


def data(case, dtype, seed=0):
    """Hidden states, head, logits and all that goes with them; log-ratios on both sides of every clip."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    made = {"hidden": normal(B, T, H), "weight": normal(V, H, scale=0.5), "bias": normal(V, scale=0.5)}
    made["logits"] = normal(B, T + 1, V, scale=2.0)
    made["ids"] = torch.randint(0, V, (B, T), generator=generator)
    made["advantages"] = torch.tensor([1.3, -0.7, 0.0, -1.1])
    made["mask"] = torch.ones(B, T, dtype=torch.long)
    if case["masked"]:
        made["mask"][0, 4:] = made["mask"][1, 1:3] = made["mask"][2, 1:] = 0
    shape = {None: None, "B": (B,), "B1": (B, 1), "BT": (B, T)}[case["weights"]]
    made["weights"] = None if shape is None else 0.5 + torch.rand(shape, generator=generator)
    made["noise"] = normal(2, B, T, scale=0.35)
    return made


def near(logp, made, case):
    """Old and reference log-probs not far from these, float32."""
    logp = logp.detach()
    old = (logp + made["noise"][0]).float() if case["old"] else None
    return old, (logp + made["noise"][1]).float()


def logp_of(logits, ids, temperature):
    return (logits / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def logp_from_hidden(made, temperature, *, leaves=None):
    hidden, weight, bias = leaves or (made[name].double() for name in ("hidden", "weight", "bias"))
    return logp_of(hidden @ weight.T + bias, made["ids"], temperature)


def written_out(logp, old, ref, made, case, *, padding=False):
    """``(loss of tokens, kl, clipped, reduced loss, (mean KL, clip fraction))`` by plain arithmetic.

    ``padding``: luspo from hidden states scores every place, as Liger's does.
    """
    live = made["mask"].bool().tolist()
    weights = None if made["weights"] is None else made["weights"].double().reshape(B, -1)
    loss, kl, clipped = (torch.zeros(B, T, dtype=torch.float64) for _ in range(3))
    for b in range(B):
        A = float(made["advantages"][b])
        places = [t for t in range(T) if live[b][t]]
        logs = [logp[b, t] - (logp[b, t].detach() if old is None else old[b, t].double()) for t in range(T)]
        mean = torch.stack([logs[t] for t in places]).mean()
        for t in range(T) if padding else places:
            log = mean if case["level"] == "sequence" else logs[t]
            r = log.exp()
            weight = None if weights is None else weights[b, t if weights.shape[1] > 1 else 0]
            term, is_clipped = policy(logp[b, t], r, A, case)
            if case["kind"] == "vespo":
                term = -vespo(sum(logs[u].detach() for u in places), None if weights is None else weights[b], A, case)
                term = term * A * logp[b, t]
            elif weight is not None:
                term = term * weight
            d = ref[b, t].double() - logp[b, t]
            penalty = (d.exp() - d - 1) * (r if case["corrected"] else 1.0)
            loss[b, t] = term + case["beta"] * penalty
            kl[b, t], clipped[b, t] = penalty.detach(), float(is_clipped)
    counts = made["mask"].sum(1).double()
    total = counts.sum()
    if case["kind"] in ("grpo", "sapo"):
        reduced = (loss.sum(1) / counts).sum() / B
    elif case["kind"] == "bnpo":
        reduced = loss.sum() / total
    elif case["kind"] == "dr_grpo":
        reduced = loss.sum() / (B * case["length"])
    elif case["kind"] == "luspo":
        reduced = (loss * counts[:, None]).sum() / (B * T)
    else:
        reduced = loss.sum() / (total if case["items"] is None else float(case["items"]))
    means = tuple((value * made["mask"]).sum() / total for value in (kl, clipped))
    return loss, kl, clipped, reduced, means if case["beta"] else means[1:]


def policy(logp, r, A, case):
    """Of one token: its loss and whether a clip took its gradient."""
    low, high, value = 1 - case["low"], 1 + case["high"], float(r.detach())
    if case["kind"] == "sapo":
        tau = case["taus"][0] if A > 0 else case["taus"][1]
        return -A * 4 / tau / (1 + (-tau * (r - 1)).exp()), False
    if case["kind"] == "cispo":
        return -min(value, case["high"]) * A * logp, value > case["high"] and A > 0
    if case["kind"] == "vespo":
        return logp * 0, False
    bounded = r if case["delta"] is None or value <= case["delta"] else torch.tensor(case["delta"]).double()
    inside = r if low <= value <= high else torch.tensor(min(max(value, low), high)).double()
    first, second = bounded * A, inside * A
    return -(first if first.detach() <= second.detach() else second), (value < low and A < 0) or (
        value > high and A > 0
    )


def vespo(log_w, weights, A, case):
    """``e^lambda w^k e^(-lambda w)`` of the sequence, rollout weights in w."""
    k, rate = case["vespo"][:2] if A >= 0 else case["vespo"][2:]
    log_w = float(log_w) + (0.0 if weights is None else sum(math.log(weight) for weight in weights.tolist()))
    return math.exp(rate + k * log_w - rate * math.exp(log_w))


def class_options(case):
    """Of LigerFusedLinearGRPOLoss."""
    k_pos, lambda_pos, k_neg, lambda_neg = case["vespo"]
    return {
        "beta": case["beta"], "compiled": False, "use_ref_model": case["beta"] != 0, "epsilon_low": case["low"],
        "epsilon_high": case["high"], "loss_type": case["kind"], "max_completion_length": case["length"],
        "importance_sampling_level": case["level"], "sapo_temperature_pos": case["taus"][0],
        "sapo_temperature_neg": case["taus"][1], "temperature": case["temperature"], "delta": case["delta"],
        "use_bias_correction_kl": case["corrected"], "vespo_k_pos": k_pos, "vespo_lambda_pos": lambda_pos,
        "vespo_k_neg": k_neg, "vespo_lambda_neg": lambda_neg,
    }  # fmt: skip


def function_options(case):
    """Of triton_grpo_loss."""
    renamed = {"epsilon_low": "eps_low", "epsilon_high": "eps_high"}
    left_out = ("compiled", "use_ref_model")
    return {renamed.get(k, k): v for k, v in class_options(case).items() if k not in left_out}


def installed(name):
    module, _, attribute = name.partition(":")
    return getattr(pytest.importorskip(module, reason="liger-kernel is not installed"), attribute)


def close(ours, wanted, bound=32 * EPS):
    """To so many roundings of the largest value."""
    wanted = wanted.double()
    error = (ours.double() - wanted).abs().max()
    assert error <= bound * wanted.abs().max() + bound * 1e-3, f"off by {error:.3g}, largest {wanted.abs().max():.3g}"
