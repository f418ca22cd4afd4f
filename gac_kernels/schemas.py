"""What the operators take and give: schemas, fakes, and how an objective becomes arguments. No implementation.

Three primitives over rows of logits, one of them fused, and the token-level loss between them:

* separable objectives: ``token_weights`` -> ``fused_rows`` -> ``token_loss``;
* GSPO, DFPO and functions in Python look twice: ``row_statistics`` -> ``token_loss`` -> ``row_gradient``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .controller_schema import CONTROLLER_STEP, fake_controller_step
from .objectives import (
    AGGREGATIONS,
    CISPO,
    DFPO,
    GATES,
    GIFT,
    GRPO,
    GSPO,
    KL_ESTIMATORS,
    NLL,
    SAPO,
    HybridObjective,
    LogitTransform,
)
from .signals import SIGNAL_COLUMNS
from .types import SCALARS

# Codes of the policy term, shared with csrc/math/codes.h and _triton/codes.py.
POLICY_CODES = {**{gate: i for i, gate in enumerate(GATES)}, "grpo": 4, "cispo": 5, "gspo": 6, "dfpo": 7}
DFPO_TRANSFORMS, DFPO_RATIOS = ("min_replace", "adv_orthogonal"), ("geometric_mean", "product")

# What a token is: the row kernels' mask and branch in one.
DEAD, ROLLOUT, DEMONSTRATION = range(3)

# The target of a live row whose target is not among these columns but in another shard of the vocabulary: its log-prob
# reads 0, and its gradient has no column with t = 1. Not for the fused operators, whose slope needs the log-prob.
ELSEWHERE = -(2**31)


# Objectives and transforms as arguments ----------------------------------------------------------------------
def encode_term(objective: HybridObjective) -> tuple[Any, ...]:
    """The static arguments of a token's term: ``policy`` to ``entropy_coef``."""
    p = objective.policy
    if isinstance(p, SAPO):
        policy, parameters = POLICY_CODES[str(p.gate)], (p.tau_pos, p.tau_neg, 0.0)
    elif isinstance(p, GRPO):
        policy, parameters = POLICY_CODES["grpo"], (p.clip_low, p.clip_high, p.delta or 0.0)
    elif isinstance(p, CISPO):
        policy, parameters = POLICY_CODES["cispo"], (p.clip_high, 0.0, 0.0)
    elif isinstance(p, GSPO):
        policy, parameters = POLICY_CODES["gspo"], (p.clip_low, p.clip_high, 0.0)
    else:
        assert isinstance(p, DFPO)
        codes = DFPO_TRANSFORMS.index(p.transform), DFPO_RATIOS.index(p.ratio)
        policy, parameters = POLICY_CODES["dfpo"], (float(codes[0]), float(codes[1]), 0.0)
    phi = isinstance(objective.supervised, NLL) and objective.supervised.weight == "phi"
    return (
        policy, *(float(value) for value in parameters), phi,
        float(objective.kl_coef), KL_ESTIMATORS.index(objective.kl_estimator) + 1, objective.kl_ratio_weighted,
        float(objective.entropy_coef),
    )  # fmt: skip


def encode_weights(objective: HybridObjective, norm_length: float | None) -> tuple[int, int, float]:
    """``aggregation``, ``supervised_aggregation``, ``norm_length``, the last one as it is in force."""
    return (
        AGGREGATIONS.index(objective.aggregation),
        AGGREGATIONS.index(objective.supervised_aggregation),
        float(norm_length or 1.0),
    )


def encode(objective: HybridObjective, norm_length: float | None) -> tuple[Any, ...]:
    """The trailing static arguments of ``token_loss``, from ``policy`` on."""
    return (*encode_term(objective), *encode_weights(objective, norm_length))


def decode(
    policy: int, p0: float, p1: float, p2: float, phi: bool, kl_coef: float, kl_estimator: int, kl_ratio_weighted: bool,
    entropy_coef: float, aggregation: int = 0, supervised_aggregation: int = 0, norm_length: float = 1.0,
) -> HybridObjective:  # fmt: skip
    """The inverse of :func:`encode` and :func:`encode_term`, for the reference backend."""
    name = next(name for name, code in POLICY_CODES.items() if code == policy)
    make: dict[str, Callable[[], Any]] = {
        "grpo": lambda: GRPO(p0, p1, p2 or None),
        "cispo": lambda: CISPO(p0),
        "gspo": lambda: GSPO(p0, p1),
        "dfpo": lambda: DFPO(DFPO_TRANSFORMS[int(p0)], DFPO_RATIOS[int(p1)]),
    }
    return HybridObjective(
        make[name]() if name in make else SAPO(name, p0, p1),
        NLL("phi" if phi else "none"),
        kl_coef=kl_coef,
        kl_estimator=KL_ESTIMATORS[kl_estimator - 1],
        kl_ratio_weighted=kl_ratio_weighted,
        entropy_coef=entropy_coef,
        aggregation=AGGREGATIONS[aggregation],
        supervised_aggregation=AGGREGATIONS[supervised_aggregation],
        norm_length=norm_length,
    )


def encode_rows(
    transform: LogitTransform, gift: GIFT | None, columns: int = 0
) -> tuple[float, float, float, float, float]:
    """``scale, softcap, temperature_value, beta, smooth``; a temperature a sequence travels as a tensor instead.
    ``columns`` of the base model's distribution are what GIFT's floor is spread over."""
    single = transform.temperature
    temperature = 1.0 if isinstance(single, Tensor) else float(single)
    beta, smooth = (0.0, 0.0) if gift is None else (float(gift.beta), gift.smoothing(columns))
    return float(transform.scale), float(transform.softcap or 0.0), temperature, beta, smooth


# Schemas ---------------------------------------------------------------------------------------------------------
# One pass over ready log-probs. Token tensors hold N elements in any shape, contiguous, in the dtype of logprobs
# (float32 or float64); the results that are one a token are shaped as logprobs.
# Sequence s owns [cu_seqlens[s], cu_seqlens[s + 1]), or [s seq_len, (s + 1) seq_len) where cu_seqlens is None.
# mu () or (2,): mu, or mu and 1 - mu, each rounded by itself.
# supervised holds the values of the supervised term of demonstrations (GIFT) in place of c_s logp; phi is then False.
# Returns loss (), scalars (10,) as types.SCALARS, rows (S, 12) as signals.SIGNAL_COLUMNS, logprobs with 0 where masked,
# slope = d loss / d logprobs, entropy_slope = d loss / d entropy, or (0,) where no entropy is given.
_TERM = """int policy, float p0, float p1, float p2, bool phi, float kl_coef, int kl_estimator,
    bool kl_ratio_weighted, float entropy_coef"""
_WEIGHTS = "int aggregation, int supervised_aggregation, float norm_length"
_TOKEN_LOSS = f"""(
    Tensor logprobs, Tensor mask, Tensor? cu_seqlens, SymInt seq_len, Tensor is_expert,
    Tensor? advantages, bool token_advantages, Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? rollout_weights,
    Tensor? entropy, Tensor? sum_sq, Tensor? supervised, Tensor? groups,
    Tensor mu, Tensor? policy_denominator, Tensor? supervised_denominator, {_TERM}, {_WEIGHTS}
) -> (Tensor loss, Tensor scalars, Tensor rows, Tensor logprobs_out, Tensor slope, Tensor entropy_slope)"""

# What each token is and weighs before any logit is seen, N = mask.numel(): kind (N,) uint8 (DEAD, ROLLOUT,
# DEMONSTRATION; a token of no sequence is dead), weight (N,) = (1 - mu) a_t or mu b_t, and advantages_out (N,), 0 where
# no rollout's; both in mu's dtype.
_TOKEN_WEIGHTS = f"""(
    Tensor mask, Tensor? cu_seqlens, SymInt seq_len, Tensor is_expert, Tensor? advantages, bool token_advantages,
    Tensor mu, Tensor? policy_denominator, Tensor? supervised_denominator, {_WEIGHTS}
) -> (Tensor kind, Tensor weight, Tensor advantages_out)"""

# Rows of logits (A, B, V): any strides of the two leading dimensions, stride 1 in V; float16, bfloat16, float32 or
# float64. Row n of the N = A B is logits[n // B, n % B]. Results are one a row, (N,), in acc: float64 for float64
# logits, else float32. base_logits (A, B, V) turn GIFT on: they are read for demonstrations, and never transformed.
# temperature (N,) in acc, or None for temperature_value; softcap 0 is none. Dead rows are neither read nor computed;
# their results and gradients are 0. A live target outside [0, V), but for ELSEWHERE, makes its row nan and touches
# nothing else.
_ROWS = "Tensor targets, Tensor kind, Tensor? temperature, Tensor? base_logits"
_STATIC = "float scale, float softcap, float temperature_value, float beta, float smooth"
# normalizer (N, 2): the largest raw logit and log sum exp(z - z(largest)) >= 0, 0 where not computed; with base_logits
# (N, 4), then the base row's. A raw logit is exact, where a z would be rounded, by hundreds for large ones.
# supervised (N,): GIFT's loss of demonstrations, 0 elsewhere; (0,) without base_logits.
_ROW_STATISTICS = f"""(Tensor logits, {_ROWS}, {_STATIC}
) -> (Tensor logprobs, Tensor entropy, Tensor sum_sq, Tensor normalizer, Tensor supervised)"""
# dz = slope (t - p) - entropy_slope p (log p + entropy), with t = 1_y or GIFT's q, then back through the transform.
_GRADIENT = f"{_ROWS}, Tensor normalizer, Tensor entropy, Tensor slope, Tensor? entropy_slope, {_STATIC}"
# Statistics, the token's slope and the row's gradient while the row is in cache. Token inputs (N,) in acc.
# rollout_weights are read for rollouts alone: what weighs a demonstration is in its weight already, where token_loss
# multiplies by it itself.
_FUSED = f"""{_ROWS}, Tensor weight, Tensor? advantages, Tensor? old_logprobs, Tensor? ref_logprobs,
    Tensor? rollout_weights, {_STATIC}, {_TERM}"""
_FUSED_RESULTS = "Tensor logprobs, Tensor entropy, Tensor sum_sq, Tensor supervised"

# Rows of hidden states (A, B, H), any strides of the two leading dimensions, times a head weight (V, H) and bias (V,),
# all of one dtype; `chunk` rows of logits exist at a time. GIFT's base logits are given, (A, B, V), or made of
# base_hidden (A, B, H'), base_weight (V, H') and base_bias. Gradients are wanted or (0,). Those of a float16 head come
# in float32 and in a unit, a power of two (0-d float32) that they are to be multiplied by; else unit is (0,).
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_BASE = "Tensor? base_logits, Tensor? base_hidden, Tensor? base_weight, Tensor? base_bias"
_LINEAR = "Tensor targets, Tensor kind, Tensor? temperature"
_WANTED = "SymInt chunk, bool want_hidden, bool want_weight, bool want_bias"
_GRADIENTS = "Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient, Tensor unit"
# Three products: statistics, slope and gradient of a chunk while it is there.
_LINEAR_LOSS = f"""({_HEAD}, {_LINEAR}, {_BASE}, Tensor weight_N, Tensor? advantages, Tensor? old_logprobs,
    Tensor? ref_logprobs, Tensor? rollout_weights, {_WANTED}, {_STATIC}, {_TERM}) -> ({_FUSED_RESULTS}, {_GRADIENTS})"""
_LINEAR_STATISTICS = f"""({_HEAD}, {_LINEAR}, {_BASE}, SymInt chunk, {_STATIC}
) -> (Tensor logprobs, Tensor entropy, Tensor sum_sq, Tensor normalizer, Tensor supervised)"""
_LINEAR_GRADIENT = f"""({_HEAD}, {_LINEAR}, {_BASE}, Tensor normalizer, Tensor entropy, Tensor slope,
    Tensor? entropy_slope, {_WANTED}, {_STATIC}) -> ({_GRADIENTS})"""

SCHEMAS = {
    "token_loss": _TOKEN_LOSS,
    "token_weights": _TOKEN_WEIGHTS,
    "row_statistics": _ROW_STATISTICS,
    "row_gradient": f"(Tensor logits, {_GRADIENT}) -> Tensor gradient",
    "row_gradient_": f"(Tensor(a!) logits, {_GRADIENT}) -> ()",
    "fused_rows": f"(Tensor logits, {_FUSED}) -> ({_FUSED_RESULTS}, Tensor gradient)",
    "fused_rows_": f"(Tensor(a!) logits, {_FUSED}) -> ({_FUSED_RESULTS})",
    # gradient *= factor (0-d), and nothing at all where factor is 1. Any dense shape, or rows as above.
    "scale_": "(Tensor(a!) gradient, Tensor factor) -> ()",
    "controller_step": CONTROLLER_STEP,
    # Over lists of contiguous gradients, pairs of one size (gradients.py): ||s||^2, ||p||^2, <s, p>, float64 (3,);
    # sums += gradients, and the gradients' ||g||^2, float64 0-d.
    "gradient_moments": "(Tensor[] supervised, Tensor[] policy) -> Tensor moments",
    "accumulate_moments_": "(Tensor(a!)[] sums, Tensor[] gradients) -> Tensor norm2",
    # Advantages (S,) of rewards (S,), float32 or float64, in their dtype. groups (S,) int64: ids, equal ones side by
    # side if adjacent; None: group_size consecutive sequences each. baseline, scale: indices in BASELINES and SCALES of
    # reference/advantages.py.
    "group_advantages": """(Tensor rewards, Tensor? groups, int group_size, bool adjacent, int baseline, int scale,
        float eps) -> Tensor""",
}
# Made of the operators above and matrix products, on every device: they have no form of their own for a backend.
COMPOSITES = {
    "linear_loss": _LINEAR_LOSS,
    "linear_statistics": _LINEAR_STATISTICS,
    "linear_gradient": _LINEAR_GRADIENT,
}


# Fakes -------------------------------------------------------------------------------------------------------
def _token_loss(
    logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None, seq_len: int, is_expert: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    entropy = rest[5]
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(len(SCALARS)),
        logprobs.new_empty((is_expert.shape[0], len(SIGNAL_COLUMNS))),
        torch.empty_like(logprobs),
        torch.empty_like(logprobs),
        torch.empty_like(logprobs) if entropy is not None else logprobs.new_empty(0),
    )


def _token_weights(mask: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    mu, count = rest[5], mask.numel()
    return mask.new_empty(count, dtype=torch.uint8), mu.new_empty(count), mu.new_empty(count)


def _per_row(logits: Tensor, columns: tuple[int, ...] = ()) -> Tensor:
    count = logits.shape[0] * logits.shape[1]
    return logits.new_empty((count, *columns), dtype=torch.promote_types(logits.dtype, torch.float32))


def _supervised(logits: Tensor, base_logits: Tensor | None) -> Tensor:
    return _per_row(logits) if base_logits is not None else _per_row(logits).new_empty(0)


def _row_statistics(
    logits: Tensor, targets: Tensor, kind: Tensor, temperature: Any, base_logits: Any, *static: Any
) -> tuple[Tensor, ...]:
    columns = (2,) if base_logits is None else (4,)
    outputs = (_per_row(logits), _per_row(logits), _per_row(logits), _per_row(logits, columns))
    return *outputs, _supervised(logits, base_logits)


def _fused_rows_(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _per_row(logits), _per_row(logits), _per_row(logits), _supervised(logits, rest[3])


def _new_gradient(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _sums(tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=tensors[0].device if tensors else None)


def _linear_rows(hidden: Tensor) -> Tensor:
    """Stands for logits of the hidden states' rows."""
    return hidden.new_empty((*hidden.shape[:2], 1))


def _gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, *wanted: bool) -> tuple[Tensor, ...]:
    half = hidden.dtype is torch.float16
    dtype = torch.float32 if half else hidden.dtype
    gradients = (
        hidden.new_empty(value.shape if want and value is not None else (0,), dtype=dtype)
        for value, want in zip((hidden, weight, bias), wanted, strict=True)
    )
    return *gradients, hidden.new_empty(() if half else 0, dtype=torch.float32 if half else hidden.dtype)


def _linear_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    has_base = rest[3] if rest[3] is not None else rest[4]
    rows = _linear_rows(hidden)
    results = _per_row(rows), _per_row(rows), _per_row(rows), _supervised(rows, has_base)
    return *results, *_gradients(hidden, weight, bias, *rest[13:16])


def _linear_statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    base = rest[3] if rest[3] is not None else rest[4]
    return _row_statistics(_linear_rows(hidden), rest[0], rest[1], rest[2], base)


FAKES: dict[str, Callable[..., Any]] = {
    "token_loss": _token_loss,
    "token_weights": _token_weights,
    "row_statistics": _row_statistics,
    "row_gradient": lambda logits, *rest: _new_gradient(logits),
    "row_gradient_": lambda logits, *rest: None,
    "fused_rows": lambda logits, *rest: (*_fused_rows_(logits, *rest), _new_gradient(logits)),
    "fused_rows_": _fused_rows_,
    "scale_": lambda gradient, factor: None,
    "controller_step": fake_controller_step,
    "gradient_moments": lambda supervised, policy: _sums(supervised, (3,)),
    "accumulate_moments_": lambda sums, gradients: _sums(sums, ()),
    "group_advantages": lambda rewards, *rest: torch.empty_like(rewards),
    "linear_loss": _linear_loss,
    "linear_statistics": _linear_statistics,
    "linear_gradient": lambda hidden, weight, bias, *rest: _gradients(hidden, weight, bias, *rest[12:15]),
}
