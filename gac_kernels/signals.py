"""What the controller is fed: one row of sums a sequence, and the estimators of (sigma_s^2, sigma_r^2, Delta^2).

The rows are by-products of the loss. Rows of micro-batches and of ranks are put one below the other, never averaged, so
that trimming and variances see every sequence of a step. The estimators run in float64 on the rows' device; masks stand
where one would filter, and nothing is read by the host.

Shapes: S sequences, H hidden width, 3 the signals in the order (sigma_s^2, sigma_r^2, Delta^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .tensors import FLOATS, plain_tensor

__all__ = ["SIGNAL_COLUMNS", "Estimate", "Signals", "coefficient_estimate", "hidden_estimate", "logit_estimate"]

# Columns of Signals.rows. c_s, c_r: slope of the supervised and of the RL term of a token; n_t = 1 - 2 p + sum p^2;
# c_b is the coefficient of the row's own branch. The last two are 0 where sum p^2 was not measured.
SIGNAL_COLUMNS = (
    "expert",  # 1.0 for a demonstration, 0.0 for a rollout
    "tokens",  # live tokens
    "nll_sum",  # -sum logp
    "advantage",  # mean advantage over live tokens; 0 on expert rows
    "disagreement",  # sum (c_s - c_r)^2
    "cs",  # sum c_s
    "cr",  # sum c_r; 0 on expert rows
    "cs2",  # sum c_s^2
    "cr2",  # sum c_r^2
    "cscr",  # sum c_s c_r
    "own_norm",  # sum c_b^2 n_t
    "diff_norm",  # sum (c_s - c_r)^2 n_t
)
EXPERT, TOKENS, NLL_SUM, ADVANTAGE, DISAGREEMENT, CS, CR, CS2, CR2, CSCR, OWN_NORM, DIFF_NORM = range(
    len(SIGNAL_COLUMNS)
)

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")

VARIANCE_FLOOR = 1e-8  # of the coefficient estimator, whose coefficients are of order one
# Squared gradients averaged over tokens and sequences come near 1e-8 on long batches, so that floor would hide them.
# This one only keeps mu* from being 0 / 0.
NORM_FLOOR = 1e-30
# own_norm and diff_norm are sums of c^2 n with n = 1 - 2 p + sum p^2 in [0, 2]. Where p and sum p^2 come in 16 bits,
# which round by 2^-9 of themselves, n may fall below 0 by 3 * 2^-9: that much below 0 counts as 0, and more is no
# squared norm.
NORM_ROUNDING = 2.0**-7
TRIM_FROM = 4  # fewer sequences than this are not trimmed


@dataclass(frozen=True, eq=False)
class Signals:
    """Per-sequence sums of one or more batches.

    rows: (S, 12) float32 or float64, columns as in SIGNAL_COLUMNS; a sequence without live tokens is a row of zeros and
        counts nowhere.
    has_sum_sq: whether own_norm and diff_norm were measured (they need sum p^2).
    policy_aggregation, supervised_aggregation, norm_length: how the loss weighs tokens, read by the `logit` estimator.
    replicas: global ranks that hold these same rows, this one among them, or None where no other does. A loss with
        tp_group sets it, and all_reduce; who gathers signals over ranks then counts the rows once.
    hidden: (S, H) gradient, with respect to a bias on the last hidden state, of each sequence's mean loss in its branch
        (mu and the aggregation taken out), or None.
    """

    rows: Tensor
    has_sum_sq: bool = False
    policy_aggregation: str = "seq-mean-token-mean"
    supervised_aggregation: str = "token-mean"
    norm_length: float | None = None
    hidden: Tensor | None = None
    replicas: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        plain_tensor("rows", self.rows)
        if self.rows.dim() != 2 or self.rows.shape[1] != len(SIGNAL_COLUMNS):
            raise ValueError(f"rows must have shape (S, {len(SIGNAL_COLUMNS)}), got {tuple(self.rows.shape)}")
        if self.rows.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rows must be float32 or float64, got {self.rows.dtype}")
        for name in ("policy_aggregation", "supervised_aggregation"):
            if getattr(self, name) not in AGGREGATIONS:
                raise ValueError(f"{name} must be one of {AGGREGATIONS}, got {getattr(self, name)!r}")
        if not isinstance(self.has_sum_sq, bool):
            raise TypeError(f"has_sum_sq must be a bool, got {type(self.has_sum_sq).__name__}")
        length = self.norm_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, (int, float))):
            raise TypeError(f"norm_length must be a number or None, got {type(length).__name__}")
        if length is not None and not 0 < length < float("inf"):
            raise ValueError(f"norm_length must be positive and finite or None, got {length!r}")
        if self.hidden is not None:
            _check_hidden(self.hidden, self.rows)
        ranks = () if self.replicas is None else self.replicas
        if not isinstance(ranks, tuple) or any(type(rank) is not int or rank < 0 for rank in ranks):
            raise TypeError(f"replicas must be a tuple of global ranks or None, got {ranks!r}")

    def __add__(self, other: Signals) -> Signals:
        """The rows of both, in this order. Raises ValueError where the two were not made in the same way."""
        return concatenate((self, other)) if isinstance(other, Signals) else NotImplemented

    def __radd__(self, other: object) -> Signals:
        """For ``sum(signals)``, which begins with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Signals:
        """The rows of every rank of `group` (default: the default group), in rank order, on every rank.

        Ranks may hold different numbers of rows, none included; all must call. Rows that several ranks hold
        (`replicas`) come once, and the result's replicas are all of the group: a controller over these ranks counts
        them once. Without torch.distributed, or with one rank, returns self. How many rows there are is exchanged
        first: through the group's CPU backend if it has one, else through the device, which the host then waits for.
        """
        from .distributed import check_group, gather_signals  # import this module

        check_group("group", group)
        return gather_signals(self, group, self.rows.device)

    def metadata(self) -> tuple:
        """What must agree between Signals that are put together."""
        width = None if self.hidden is None else self.hidden.shape[1]
        return self.has_sum_sq, self.policy_aggregation, self.supervised_aggregation, self.norm_length, width


def _check_hidden(hidden: Tensor, rows: Tensor) -> None:
    plain_tensor("hidden", hidden, FLOATS)
    if hidden.dim() != 2 or hidden.shape[0] != rows.shape[0]:
        raise ValueError(f"hidden must have shape ({rows.shape[0]}, H), got {tuple(hidden.shape)}")
    if hidden.device != rows.device:
        raise ValueError(f"hidden must be on {rows.device} like rows, got {hidden.device}")


METADATA_FIELDS = ("has_sum_sq", "policy_aggregation", "supervised_aggregation", "norm_length", "width of hidden")


def concatenate(parts: Sequence[Signals]) -> Signals:
    """All rows of `parts` (at least one), in order. Raises ValueError naming what differs between them."""
    first = parts[0]
    for part in parts[1:]:
        require_alike(first, part)
    if len(parts) == 1:
        return first
    hidden = None if first.hidden is None else torch.cat([part.hidden for part in parts])  # type: ignore[misc]
    return replace(first, rows=torch.cat([part.rows for part in parts]), hidden=hidden)


def require_alike(first: Signals, other: Signals) -> None:
    """ValueError naming what keeps the two from being put together."""
    for field, ours, theirs in zip(METADATA_FIELDS, first.metadata(), other.metadata(), strict=True):
        if ours != theirs:
            raise ValueError(f"signals that are added must agree in {field}, got {ours!r} and {theirs!r}")
    if first.replicas != other.replicas:
        raise ValueError(
            "signals that are added must be held by the same ranks (replicas), as those of losses with and without "
            f"tp_group are not, got {first.replicas} and {other.replicas}"
        )
    if first.rows.device != other.rows.device:
        raise ValueError(
            f"signals that are added must lie on one device, got {first.rows.device} and {other.rows.device}"
        )


class Estimate(NamedTuple):
    """sigma_s^2, sigma_r^2, Delta^2 as float64 (3,), and which of them the batch could tell, bool (3,).

    A value whose branch had no sequence is not present, and then has no meaning. A present value may be nan or inf: so
    are all three, and present, where a row does not say what it is (`tokens` or `expert` below 0 or not finite), and so
    is a value from sums of squares of which one is below 0.
    """

    values_3: Tensor
    present_3: Tensor


def estimate(signals: Signals, estimator: str, *, trim: float, znorm: bool) -> Estimate:
    """The estimator by its name in ControllerConfig; trim and znorm are options of "coefficient"."""
    if estimator == "coefficient":
        return coefficient_estimate(signals, trim=trim, znorm=znorm)
    if estimator == "logit":
        return logit_estimate(signals)
    if estimator == "hidden":
        return hidden_estimate(signals)
    raise ValueError(f"estimator must be 'coefficient', 'logit' or 'hidden', got {estimator!r}")


def coefficient_estimate(signals: Signals, *, trim: float = 0.1, znorm: bool = False) -> Estimate:
    """The estimators of GAC (arXiv 2605.26184): variances of the coefficients, not of gradients.

    sigma_r^2: variance over RL sequences of the mean advantage. sigma_s^2: variance over expert sequences of the mean
    NLL without the int(trim * n) smallest and largest (n >= 4). Both biased, and at least 1e-8. Delta^2: mean over all
    sequences of the mean over tokens of (c_s - c_r)^2; with `znorm`, each coefficient is first z-normalised over all
    live tokens.
    """
    rows = signals.rows.double()
    live_S, expert_S, policy_S = _branches(rows)
    tokens_S = rows[:, TOKENS].clamp(min=1)
    sigma_s2 = _trimmed_variance(rows[:, NLL_SUM] / tokens_S, expert_S, trim).clamp(min=VARIANCE_FLOOR)
    sigma_r2 = _variance(rows[:, ADVANTAGE], policy_S).clamp(min=VARIANCE_FLOOR)
    if znorm:
        disagreement_S = _normalised_disagreement(rows, live_S, torch.finfo(signals.rows.dtype).eps)
    else:
        disagreement_S = _squares(rows[:, DISAGREEMENT])
    delta2 = _mean(disagreement_S / tokens_S, live_S)
    present = torch.stack((expert_S.any(), policy_S.any(), live_S.any()))
    return _of_rows(rows, torch.stack((sigma_s2, sigma_r2, delta2)), present)


def logit_estimate(signals: Signals) -> Estimate:
    """Squared norms of the logit gradients as the loss applies them, so that all three numbers have one unit (ours).

    With w_i the weight of a token of sequence i in its branch, relative to the branch's mean over sequences:
    sigma_b^2 = mean_i(w_i^2 sum_t c_b^2 n_t) / S_b over the branch, Delta^2 = mean_i w_i^2 sum_t (c_s - c_r)^2 n_t over
    all sequences. Raises ValueError where the signals were made without sum p^2.
    """
    if not signals.has_sum_sq:
        raise ValueError("the logit estimator needs signals made with sum_sq (sum p^2 a token), got signals without it")
    rows = signals.rows.double()
    live_S, expert_S, policy_S = _branches(rows)
    expert_weight_S, policy_weight_S = _token_weights(signals, rows, expert_S, policy_S)
    weight2_S = torch.where(expert_S, expert_weight_S, policy_weight_S).square()
    own_S = weight2_S * _norms(rows[:, OWN_NORM], torch.where(expert_S, rows[:, CS2], rows[:, CR2]))
    sigma_s2 = (_mean(own_S, expert_S) / expert_S.sum()).clamp(min=NORM_FLOOR)
    sigma_r2 = (_mean(own_S, policy_S) / policy_S.sum()).clamp(min=NORM_FLOOR)
    delta2 = _mean(weight2_S * _norms(rows[:, DIFF_NORM], rows[:, DISAGREEMENT]), live_S)
    present = torch.stack((expert_S.any(), policy_S.any(), live_S.any()))
    return _of_rows(rows, torch.stack((sigma_s2, sigma_r2, delta2)), present)


def hidden_estimate(signals: Signals) -> Estimate:
    """Noise and distance of the two branches' mean gradients on the last hidden state (ours).

    A sequence's gradient is its mean's times the sequence's weight in the branch, relative to the branch's mean weight.
    sigma_b^2 = trace of the covariance over the branch's sequences / number of sequences, with n - 1: only so does
    Delta^2 = max(0, |mean_s - mean_r|^2 - sigma_s^2 - sigma_r^2) lose, on average, what sampling adds to the distance.
    A branch needs two sequences, Delta^2 needs two in each. Raises ValueError where the signals carry no `hidden`.
    """
    if signals.hidden is None:
        raise ValueError("the hidden estimator needs signals that carry `hidden` (S, H), got signals without it")
    rows = signals.rows.double()
    _, expert_S, policy_S = _branches(rows)
    expert_weight_S, policy_weight_S = _token_weights(signals, rows, expert_S, policy_S)
    weight_S = torch.where(expert_S, expert_weight_S, policy_weight_S) * rows[:, TOKENS]
    hidden_SH = weight_S[:, None] * signals.hidden.double()
    means_H, noises, presents = [], [], []
    for member_S in (expert_S, policy_S):
        count = member_S.sum()
        mean_H = torch.where(member_S[:, None], hidden_SH, 0.0).sum(0) / count
        deviation_SH = torch.where(member_S[:, None], hidden_SH - mean_H, 0.0)
        means_H.append(mean_H)
        noises.append((deviation_SH.square().sum() / (count * (count - 1))).clamp(min=NORM_FLOOR))
        presents.append(count >= 2)
    distance2 = (means_H[0] - means_H[1]).square().sum()
    delta2 = _not_negative(distance2 - noises[0] - noises[1])
    return _of_rows(rows, torch.stack((*noises, delta2)), torch.stack((*presents, presents[0] & presents[1])))


def live_policy_tokens(signals: Signals) -> Tensor:
    """Live tokens of the RL sequences, of those rows that say what they are; float64 0-d."""
    policy_S = _branches(signals.rows)[2] & _counts(signals.rows)
    return torch.where(policy_S, signals.rows[:, TOKENS].double(), 0.0).sum()


def _counts(rows: Tensor) -> Tensor:
    """Which rows say how many tokens they are of, and of what; bool (S,)."""
    named_S2 = rows[:, : TOKENS + 1]  # EXPERT and TOKENS
    return ((named_S2 >= 0) & (named_S2 < torch.inf)).all(1)  # false for nan


def _of_rows(rows: Tensor, values_3: Tensor, present_3: Tensor) -> Estimate:
    """The estimate, or nan in its place: one row that does not say what it is spoils what all rows say."""
    good = _counts(rows).all()
    return Estimate(torch.where(good, values_3, torch.nan), present_3 | ~good)


def _squares(sum_S: Tensor) -> Tensor:
    """Sums of squares; what is below 0 is none, and nan."""
    return torch.where(sum_S >= 0, sum_S, torch.nan)


def _norms(sum_S: Tensor, of_S: Tensor) -> Tensor:
    """Sums of c^2 n, where sum c^2 is `of_S`: what rounding alone takes below 0 counts as 0."""
    rounded_S = (sum_S < 0) & (sum_S > -torch.inf) & (-sum_S <= NORM_ROUNDING * of_S)
    return torch.where(rounded_S, 0.0, _squares(sum_S))


def _not_negative(x: Tensor) -> Tensor:
    """What is 0 or more but for rounding. -inf is none: nan, as of nan."""
    return torch.where(x > -torch.inf, x.clamp(min=0.0), torch.nan)


def _branches(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows have live tokens, and which of them are demonstrations and rollouts: bool (S,) each."""
    live_S = rows[:, TOKENS] > 0
    expert_S = live_S & (rows[:, EXPERT] > 0)
    return live_S, expert_S, live_S & ~expert_S


def _mean(x_S: Tensor, member_S: Tensor) -> Tensor:
    """Mean over the members; nan if there are none."""
    return torch.where(member_S, x_S, 0.0).sum() / member_S.sum()


def _variance(x_S: Tensor, member_S: Tensor) -> Tensor:
    """Biased variance over the members, in two passes; nan if there are none."""
    return _mean((x_S - _mean(x_S, member_S)).square(), member_S)


def _trimmed_variance(x_S: Tensor, member_S: Tensor, trim: float) -> Tensor:
    """Biased variance over the members without the int(trim * n) smallest and as many largest; none below four.

    An infinite member is trimmed like any large number. A nan has no place in the order: with one the result is nan.
    """
    unordered_S = member_S & x_S.isnan()
    count = member_S.sum().double()
    cut = torch.where(count < TRIM_FROM, 0.0, (trim * count).floor())
    # Members first, then whatever is not one: after the sort the first `count` places are the members.
    sorted_S = torch.where(member_S & ~unordered_S, x_S, torch.inf).sort().values
    place_S = torch.arange(len(x_S), device=x_S.device)
    variance = _variance(sorted_S, (place_S >= cut) & (place_S < count - cut))
    return torch.where(unordered_S.any(), torch.nan, variance)


def _normalised_disagreement(rows: Tensor, live_S: Tensor, eps: float) -> Tensor:
    """Each row's sum over tokens of (z_s - z_r)^2, z the coefficients z-normalised over all live tokens, from sums.

    A coefficient that does not vary stays as it is. "Does not vary": a variance of less than 64 roundings of the mean
    square, which is all that sums in the rows' own precision can tell.
    """
    tokens_S, cs_S, cr_S, cscr_S = (rows[:, c] for c in (TOKENS, CS, CR, CSCR))
    cs2_S, cr2_S = _squares(rows[:, CS2]), _squares(rows[:, CR2])
    total = torch.where(live_S, tokens_S, 0.0).sum()

    def scale_and_mean(sum_S: Tensor, square_S: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.where(live_S, sum_S, 0.0).sum() / total
        mean_square = torch.where(live_S, square_S, 0.0).sum() / total
        variance = mean_square - mean.square()
        constant = variance <= 64 * eps * mean_square
        return torch.where(constant, 1.0, variance.rsqrt()), torch.where(constant, 0.0, mean)

    (a, mean_s), (b, mean_r) = scale_and_mean(cs_S, cs2_S), scale_and_mean(cr_S, cr2_S)
    shift = a * mean_s - b * mean_r  # sum (a c_s - b c_r - shift)^2, multiplied out
    total_S = (
        a * a * cs2_S + b * b * cr2_S - 2 * a * b * cscr_S + shift * (shift * tokens_S - 2 * a * cs_S + 2 * b * cr_S)
    )
    return _not_negative(total_S)  # a sum of squares, up to rounding


def _token_weights(signals: Signals, rows: Tensor, expert_S: Tensor, policy_S: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_token_weight` in the supervised branch and in the policy's."""
    return (
        _token_weight(signals.supervised_aggregation, rows[:, TOKENS], expert_S, signals.norm_length),
        _token_weight(signals.policy_aggregation, rows[:, TOKENS], policy_S, signals.norm_length),
    )


def _token_weight(aggregation: str, tokens_S: Tensor, member_S: Tensor, norm_length: float | None) -> Tensor:
    """Weight of a token of each sequence, relative to the branch's mean over sequences: (S,) or 0-d."""
    if aggregation == "token-mean":
        return member_S.sum() / torch.where(member_S, tokens_S, 0.0).sum()
    if aggregation == "seq-mean-token-mean":
        return 1.0 / tokens_S.clamp(min=1)
    if aggregation == "seq-mean-token-sum":
        return torch.ones_like(tokens_S)
    if norm_length is None:
        raise ValueError(f"signals with aggregation {aggregation!r} need norm_length for the logit estimator, got None")
    return torch.full_like(tokens_S, 1.0 / norm_length)
