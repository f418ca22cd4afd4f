"""An independent oracle: every formula of the losses written out with `math`, token by token, loss and slope by hand.

It shares no line with the package. Slopes are the analytic ones of the papers, so it checks the reference's too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import gac_kernels as gk


def gate(name: str, r: float, tau: float) -> tuple[float, float]:
    """f(r) and f'(r)."""
    u = r - 1.0
    if name == "sigmoid":
        s = 1.0 / (1.0 + math.exp(-tau * u)) if tau * u > -700 else 0.0
        return 4.0 / tau * s, 4.0 * s * (1.0 - s)
    if name == "erf":
        value = 1.0 + math.sqrt(math.pi / 2.0) / tau * math.erf(tau * u / math.sqrt(2.0))
        return value, math.exp(-((tau * u) ** 2) / 2.0)
    if name == "arctan":
        return 1.0 + math.atan(tau * u) / tau, 1.0 / (1.0 + (tau * u) ** 2)
    return 1.0 + u / math.sqrt(1.0 + (tau * u) ** 2), (1.0 + (tau * u) ** 2) ** -1.5


@dataclass
class Token:
    logp: float
    old: float | None
    ref: float | None
    adv: float
    rho: float
    entropy: float
    sum_sq: float

    @property
    def log_ratio(self) -> float:
        return 0.0 if self.old is None else max(-20.0, min(20.0, self.logp - self.old))

    @property
    def alive(self) -> float:
        return 1.0 if self.old is None or abs(self.logp - self.old) <= 20.0 else 0.0


@dataclass
class Result:
    loss: float = 0.0
    policy: float = 0.0
    supervised: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    slope: dict[tuple[int, int], float] = field(default_factory=dict)
    entropy_slope: dict[tuple[int, int], float] = field(default_factory=dict)
    rows: list[list[float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def clip_term(r: float, adv: float, low: float, high: float, delta: float | None) -> tuple[float, float, bool]:
    """loss, d loss / d r, clipped"""
    first = r if delta is None else min(r, delta)
    second = max(1.0 - low, min(1.0 + high, r))
    clipped = (
        (adv > 0 and r > 1.0 + high) or (adv < 0 and r < 1.0 - low) or (delta is not None and adv < 0 and r > delta)
    )
    loss = -min(first * adv, second * adv)
    return loss, 0.0 if clipped else -adv, clipped


def separable(policy, t: Token) -> tuple[float, float, float, bool]:
    """loss, slope, update share, clipped of one token"""
    r = math.exp(t.log_ratio)
    if isinstance(policy, gk.SAPO):
        f, f1 = gate(policy.gate, r, policy.tau_pos if t.adv > 0 else policy.tau_neg)
        return -t.adv * f, -t.adv * f1 * r * t.alive, f1, False
    if isinstance(policy, gk.GRPO):
        loss, by_r, clipped = clip_term(r, t.adv, policy.clip_low, policy.clip_high, policy.delta)
        return loss, by_r * r * t.alive, 0.0 if clipped else 1.0, clipped
    weight = min(r, policy.clip_high)
    clipped = r > policy.clip_high
    return -weight * t.adv * t.logp, -weight * t.adv, 0.0 if clipped else 1.0, clipped


def kl_term(name: str, t: Token, weighted: bool) -> tuple[float, float]:
    raw = t.ref - t.logp
    d = max(-20.0, min(20.0, raw))
    alive = 1.0 if abs(raw) <= 20.0 else 0.0
    value, slope = {
        "k1": (-d, 1.0),
        "k2": (d * d / 2.0, -d),
        "k3": (math.exp(d) - d - 1.0, 1.0 - math.exp(d)),
    }[name]
    slope *= alive
    if weighted:
        r = math.exp(t.log_ratio)
        value, slope = r * value, r * slope + r * value * t.alive
    return value, slope


def hybrid_loss(
    sequences, expert, groups, objective, mu, *, has_ref, has_sum_sq, length, denominators=(None, None)
) -> Result:
    """`sequences`: a list of {position: Token} of the live tokens."""
    out, n = Result(), len(sequences)
    terms: list[dict[int, tuple[float, float]]] = [{} for _ in range(n)]  # loss, slope before weights
    seen = []  # ratio, update, clipped, log ratio
    policy = objective.policy
    if isinstance(policy, (gk.GSPO, gk.DFPO)):
        residual = coupled_terms(policy, sequences, expert, groups, terms, seen)
    else:
        residual = None
        for i in range(n):
            for t, token in sequences[i].items() if not expert[i] else ():
                loss, slope, update, clipped = separable(policy, token)
                terms[i][t] = (token.rho * loss, token.rho * slope)
                seen.append((math.exp(token.log_ratio), update, clipped, token.log_ratio))
    live = [[i for i in range(n) if sequences[i] and expert[i] == e] for e in (False, True)]
    tokens = [sum(len(sequences[i]) for i in live[e]) for e in (0, 1)]
    norm = objective.norm_length or length

    def weight(i: int) -> float:
        e = int(expert[i])
        how = (objective.aggregation, objective.supervised_aggregation)[e]
        total = denominators[e] if denominators[e] is not None else (tokens[e] if how == "token-mean" else len(live[e]))
        return 1.0 / total / {"seq-mean-token-mean": len(sequences[i]), "seq-mean-token-sum-norm": norm}.get(how, 1.0)

    phi_on = objective.supervised.weight == "phi"
    for i in range(n):
        row = [0.0] * 12
        if sequences[i]:
            row[0], row[1] = float(expert[i]), float(len(sequences[i]))
        for t, token in sequences[i].items():
            w = weight(i)
            p = math.exp(token.logp)
            cs, cr = -(p * (1.0 - p) if phi_on else 1.0), 0.0
            if expert[i]:
                cs *= token.rho  # weights of demonstrations weigh the supervised term
                value = cs * token.logp if cs else 0.0
                out.supervised += w * value
                out.slope[i, t] = mu * w * cs
            else:
                loss, slope = terms[i][t]
                out.policy += w * loss
                cr = slope
                if has_ref:
                    kl, kl_slope = kl_term(objective.kl_estimator, token, objective.kl_ratio_weighted)
                    out.kl += w * kl
                    cr += objective.kl_coef * kl_slope
                out.entropy += w * token.entropy
                out.slope[i, t] = (1.0 - mu) * w * cr
                out.entropy_slope[i, t] = -(1.0 - mu) * w * objective.entropy_coef
                row[3] += token.adv / len(sequences[i])
            own = cs if expert[i] else cr
            n_t = max(1.0 - 2.0 * p + token.sum_sq, 0.0) if has_sum_sq else 0.0
            sums = (
                -token.logp,
                None,
                (cs - cr) ** 2,
                cs,
                cr,
                cs * cs,
                cr * cr,
                cs * cr,
                own * own * n_t,
                (cs - cr) ** 2 * n_t,
            )
            for column, value in enumerate(sums, start=2):
                row[column] += value or 0.0
        out.rows.append(row)
    rl = out.policy + objective.kl_coef * out.kl - objective.entropy_coef * out.entropy
    out.loss = (1.0 - mu) * rl + mu * out.supervised
    count = max(1, len(seen))
    out.metrics = {
        "ratio_mean": sum(s[0] for s in seen) / count,
        "ratio_max": max((s[0] for s in seen), default=0.0),
        "approx_kl": sum(math.exp(s[3]) - 1.0 - s[3] for s in seen) / count,
        "effective_update_ratio": sum(s[1] for s in seen) / count,
        "clip_fraction": sum(s[2] for s in seen) / count,
        "cancellation_residual": residual,
        "rollout_unscored": 0.0,
    }
    return out


def coupled_terms(policy, sequences, expert, groups, terms, seen) -> float | None:
    """GSPO and DFPO: the sequence's ratio first, then its tokens."""
    members = [i for i in range(len(sequences)) if sequences[i] and not expert[i]]
    product = isinstance(policy, gk.DFPO) and policy.ratio == "product"
    weights, advantage = {}, {}
    for i in members:
        total = sum(t.log_ratio for t in sequences[i].values())
        weights[i] = math.exp(max(-20.0, min(20.0, total)) if product else total / len(sequences[i]))
        advantage[i] = sum(t.adv for t in sequences[i].values()) / len(sequences[i])
    if isinstance(policy, gk.GSPO):
        for i in members:
            tokens, s = sequences[i], weights[i]
            parts = {t: clip_term(s, token.adv, policy.clip_low, policy.clip_high, None) for t, token in tokens.items()}
            upstream = sum(tokens[t].rho * parts[t][1] for t in tokens)  # d (sum of token losses) / d s
            for t, token in tokens.items():
                terms[i][t] = (token.rho * parts[t][0], upstream * s / len(tokens) * token.alive)
                seen.append((s, 0.0 if parts[t][2] else 1.0, parts[t][2], token.log_ratio))
        return None
    new = {}
    for g in {int(groups[i]) for i in members}:
        inside = [i for i in members if int(groups[i]) == g]
        if policy.transform == "min_replace":
            new |= {i: min(weights[j] for j in inside) for i in inside}
            continue
        dot = sum(advantage[j] * weights[j] for j in inside)
        square = sum(advantage[j] ** 2 for j in inside)
        new |= {i: weights[i] - (dot / square * advantage[i] if square else 0.0) for i in inside}
    for i in members:
        for t, token in sequences[i].items():
            terms[i][t] = (-token.rho * new[i] * token.adv * token.logp, -token.rho * new[i] * token.adv)
            seen.append((weights[i], 1.0, False, token.log_ratio))
    residuals = []
    for g in {int(groups[i]) for i in members}:
        forces = [advantage[i] * new[i] for i in members if int(groups[i]) == g]
        before = sum(abs(advantage[i] * weights[i]) for i in members if int(groups[i]) == g)
        rounding = 1e-13 * before if policy.transform == "adv_orthogonal" else 0.0  # of a difference
        if sum(map(abs, forces)) > rounding:  # less is nothing: a group of one has nothing left
            residuals.append(abs(sum(forces)) / sum(map(abs, forces)))
    return sum(residuals) / len(residuals) if residuals else 0.0
