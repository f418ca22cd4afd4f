"""Calls of the batch and of every loss that must be refused."""

from __future__ import annotations

from typing import Any

import torch
from bad_input import INF, NAN, H, S, T, V, meta, packed, padded, table

import gac_kernels as gk

TARGETS = torch.zeros(S, T, dtype=torch.long)
LONG, COMPLEX = torch.zeros(S, T, dtype=torch.long), torch.zeros(S, T, dtype=torch.complex64)
GIFT = gk.HybridObjective(supervised=gk.GIFT())
NORM = gk.HybridObjective(aggregation="seq-mean-token-sum-norm")


def outside(target: int) -> gk.TokenBatch:
    targets = TARGETS.clone()
    targets[1, 2] = target
    return padded(targets_ST=targets)


PADDED = table(
    "TokenBatch", padded,
    ("type", {"targets_ST": [[1]]}, TypeError, "targets_ST", "list"),
    ("dtype", {"targets_ST": TARGETS.float()}, TypeError, "targets_ST", "float32"),
    ("shape", {"targets_ST": TARGETS[0]}, ValueError, "targets_ST", "(5,)"),
    ("type", {"mask_ST": None}, TypeError, "mask_ST", "NoneType"),
    ("dtype", {"mask_ST": COMPLEX}, TypeError, "mask_ST", "complex64"),
    ("range", {"mask_ST": torch.full((S, T), -1e9)}, ValueError, "mask_ST", "-1e+09"),
    ("nan", {"mask_ST": torch.full((S, T), NAN)}, ValueError, "mask_ST", "nan"),
    ("shape", {"mask_ST": torch.ones(S, T + 1)}, ValueError, "mask_ST", "(3, 6)"),
    ("device", {"mask_ST": meta(S, T)}, ValueError, "mask_ST", "meta"),
    ("dtype", {"is_expert_S": torch.zeros(S)}, TypeError, "is_expert_S", "float32"),
    ("shape", {"is_expert_S": torch.zeros(S, T, dtype=torch.bool)}, ValueError, "is_expert_S", "(3, 5)"),
    ("device", {"is_expert_S": meta(S, dtype=torch.bool)}, ValueError, "is_expert_S", "meta"),
    ("type", {"advantages": 1.0}, TypeError, "advantages", "float"),
    ("dtype", {"advantages": torch.zeros(S, dtype=torch.long)}, TypeError, "advantages", "int64"),
    ("shape", {"advantages": torch.zeros(T)}, ValueError, "advantages", "(5,)"),
    ("contradictory", {"advantages": None}, ValueError, "advantages", "rollout sequences"),
    ("contradictory", {"advantages": None, "is_expert_S": torch.tensor([True, False, True])}, ValueError,
     "advantages", "rollout sequences"),
    ("dtype", {"old_logprobs": LONG}, TypeError, "old_logprobs", "int64"),
    ("shape", {"old_logprobs": torch.zeros(S)}, ValueError, "old_logprobs", "(3,)"),
    ("dtype", {"ref_logprobs": COMPLEX}, TypeError, "ref_logprobs", "complex64"),
    ("shape", {"ref_logprobs": torch.zeros(T, S)}, ValueError, "ref_logprobs", "(5, 3)"),
    ("device", {"rollout_weights": meta(S, T)}, ValueError, "rollout_weights", "meta"),
    ("type", {"rollout_weights": "ones"}, TypeError, "rollout_weights", "str"),
    ("shape", {"base_logits": torch.zeros(())}, ValueError, "base_logits", "()"),
    ("dtype", {"base_logits": torch.zeros(S, T, V, dtype=torch.long)}, TypeError, "base_logits", "int64"),
    ("dtype", {"groups": torch.zeros(S)}, TypeError, "groups", "float32"),
    ("shape", {"groups": torch.zeros(2, dtype=torch.long)}, ValueError, "groups", "(2,)"),
)  # fmt: skip

PACKED = table(
    "TokenBatch", packed,
    ("dtype", {"targets_N": torch.zeros(15)}, TypeError, "targets_N", "float32"),
    ("shape", {"targets_N": TARGETS}, ValueError, "targets_N", "(3, 5)"),
    ("type", {"cu_seqlens": [0, 15]}, TypeError, "cu_seqlens", "list"),
    ("dtype", {"cu_seqlens": torch.zeros(4)}, TypeError, "cu_seqlens", "float32"),
    ("shape", {"cu_seqlens": torch.tensor([[0, 15]])}, ValueError, "cu_seqlens", "(1, 2)"),
    ("empty", {"cu_seqlens": torch.zeros(0, dtype=torch.long)}, ValueError, "cu_seqlens", "(0,)"),
    ("device", {"cu_seqlens": meta(4, dtype=torch.long)}, ValueError, "cu_seqlens", "meta"),
    ("range", {"cu_seqlens": torch.tensor([1, 4, 9, 15])}, ValueError, "cu_seqlens", "first 1"),
    ("range", {"cu_seqlens": torch.tensor([0, 4, 9, 16])}, ValueError, "cu_seqlens", "last 16"),
    ("range", {"cu_seqlens": torch.tensor([0, 9, 4, 15])}, ValueError, "cu_seqlens", "smallest step -5"),
    ("contradictory", {"cu_seqlens": torch.tensor([0])}, ValueError, "cu_seqlens", "last 0"),
    ("shape", {"mask_N": torch.ones(14)}, ValueError, "mask_N", "(14,)"),
    ("contradictory", {"cu_seqlens": torch.tensor([0, 15])}, ValueError, "advantages", "(3,)"),
)  # fmt: skip


def hybrid_loss(**given: Any) -> gk.HybridLoss:
    given = {"logprobs": torch.zeros(S, T), "batch": padded(), "objective": gk.HybridObjective(), "mu": 0.5} | given
    return gk.hybrid_loss(**given)


def from_logits(**given: Any) -> gk.HybridLoss:
    given = {"logits": torch.zeros(S, T, V), "batch": padded(), "objective": gk.HybridObjective(), "mu": 0.5} | given
    return gk.hybrid_loss_from_logits(**given)


def from_hidden(**given: Any) -> gk.HybridLoss:
    leading = {"hidden": torch.zeros(S, T, H), "weight": torch.zeros(V, H)}
    return gk.hybrid_loss_from_hidden(
        **leading | {"batch": padded(), "objective": gk.HybridObjective(), "mu": 0.5} | given
    )


# What every hybrid loss refuses alike.
COMMON = (
    ("type", {"batch": None}, TypeError, "batch", "NoneType"),
    ("type", {"objective": gk.SAPO()}, TypeError, "objective", "SAPO"),
    ("range", {"mu": 1.5}, ValueError, "mu", "1.5"),
    ("range", {"mu": -0.1}, ValueError, "mu", "-0.1"),
    ("nan", {"mu": NAN}, ValueError, "mu", "nan"),
    ("type", {"mu": True}, TypeError, "mu", "bool"),
    ("type", {"mu": None}, TypeError, "mu", "NoneType"),
    ("shape", {"mu": torch.zeros(2)}, ValueError, "mu", "(2,)"),
    ("dtype", {"mu": torch.zeros((), dtype=torch.complex64)}, TypeError, "mu", "complex64"),
    ("device", {"mu": meta()}, ValueError, "mu", "meta"),
    ("type", {"denominators": 12.0}, TypeError, "denominators", "float"),
    ("contradictory", {"objective": gk.HybridObjective(gk.DFPO())}, ValueError, "batch.groups", "DFPO"),
    ("contradictory", {"objective": gk.HybridObjective(kl_coef=0.25)}, ValueError, "batch.ref_logprobs", "0.25"),
)
DENOMINATORS = (
    ("range", {"denominators": gk.Denominators(policy=-1.0)}, ValueError, "denominators.policy", "-1"),
    ("nan", {"denominators": gk.Denominators(supervised=NAN)}, ValueError, "denominators.supervised", "nan"),
    ("range", {"denominators": gk.Denominators(policy=INF)}, ValueError, "denominators.policy", "inf"),
    ("range", {"denominators": gk.Denominators(policy=10**400)}, ValueError, "denominators.policy", "1000"),
    ("type", {"denominators": gk.Denominators(supervised="9")}, TypeError, "denominators.supervised", "str"),
    ("shape", {"denominators": gk.Denominators(policy=torch.ones(3))}, ValueError, "denominators.policy", "(3,)"),
    ("device", {"denominators": gk.Denominators(policy=meta())}, ValueError, "denominators.policy", "meta"),
)
TRANSFORMS = (
    ("type", {"transform": 0.7}, TypeError, "transform", "float"),
    ("shape", {"transform": gk.LogitTransform(torch.ones(2))}, ValueError, "transform.temperature", "(2,)"),
    ("device", {"transform": gk.LogitTransform(meta(S))}, ValueError, "transform.temperature", "meta"),
    ("range", {"transform": gk.LogitTransform(torch.tensor([1.0, 0.0, 1.0]))}, ValueError,
     "transform.temperature", "[1.0, 0.0, 1.0]"),
    ("nan", {"transform": gk.LogitTransform(torch.tensor([1.0, NAN, 1.0]))}, ValueError,
     "transform.temperature", "nan"),
)  # fmt: skip

FROM_LOGPROBS = table(
    "hybrid_loss", hybrid_loss, *COMMON,
    ("type", {"logprobs": None}, TypeError, "logprobs", "None"),
    ("dtype", {"logprobs": LONG}, TypeError, "logprobs", "int64"),
    ("shape", {"logprobs": torch.zeros(S, T + 1)}, ValueError, "logprobs", "(3, 6)"),
    ("device", {"logprobs": meta(S, T)}, ValueError, "logprobs", "meta"),
    ("empty", {"logprobs": torch.zeros(0, T)}, ValueError, "logprobs", "(0, 5)"),
    ("type", {"entropy": 0.5}, TypeError, "entropy", "float"),
    ("shape", {"entropy": torch.zeros(S)}, ValueError, "entropy", "(3,)"),
    ("dtype", {"sum_sq": LONG}, TypeError, "sum_sq", "int64"),
    ("device", {"sum_sq": meta(S, T)}, ValueError, "sum_sq", "meta"),
    ("contradictory", {"objective": gk.HybridObjective(entropy_coef=0.1)}, ValueError, "entropy", "0.1"),
    ("contradictory", {"objective": GIFT}, ValueError, "objective.supervised", "GIFT"),
    ("contradictory", {"objective": NORM, "batch": packed(), "logprobs": torch.zeros(S * T)}, ValueError,
     "objective.norm_length", "packed"),
) + table("Denominators", hybrid_loss, *DENOMINATORS) + table(
    "Denominators", lambda **given: gk.Denominators.of(**{"batches": padded(), "objective": NORM} | given),
    ("empty", {"batches": []}, ValueError, "batches", "none"),
    ("type", {"batches": [None]}, TypeError, "batches", "NoneType"),
    ("type", {"batches": torch.zeros(2)}, TypeError, "batches", "Tensor"),
    ("type", {"objective": gk.SAPO()}, TypeError, "objective", "SAPO"),
    ("type", {"group": 2}, TypeError, "group", "int"),
)  # fmt: skip

LOGITS = (
    ("type", {"logits": [1.0]}, TypeError, "logits", "list"),
    ("dtype", {"logits": torch.zeros(S, T, V, dtype=torch.long)}, TypeError, "logits", "int64"),
    ("shape", {"logits": torch.zeros(S, T + 1, V)}, ValueError, "logits", "(3, 6, 7)"),
    ("shape", {"logits": torch.zeros(())}, ValueError, "logits", "()"),
    ("empty", {"logits": torch.zeros(S, T, 0)}, ValueError, "logits", "(3, 5, 0)"),
    ("device", {"logits": meta(S, T, V)}, ValueError, "logits", "meta"),
    ("contradictory", {"logits": torch.zeros(S, T, 1).expand(S, T, V), "inplace": True}, ValueError,
     "logits", "(5, 1, 0)"),
    ("contradictory", {"logits": torch.zeros(S, 1, V).expand(S, T, V), "inplace": True}, ValueError,
     "logits", "(7, 0, 1)"),
)  # fmt: skip
FROM_LOGITS = table(
    "hybrid_loss_from_logits", from_logits, *COMMON, *TRANSFORMS, *LOGITS,
    ("range", {"batch": outside(V)}, ValueError, "batch.targets", "0 to 7"),
    ("range", {"batch": outside(-1)}, ValueError, "batch.targets", "-1 to 0"),
    ("contradictory", {"objective": GIFT}, ValueError, "batch.base_logits", "GIFT"),
    ("contradictory", {"objective": GIFT, "batch": padded(base_logits=torch.zeros(S, T, V + 1))}, ValueError,
     "batch.base_logits", "(3, 5, 8)"),
    ("contradictory", {"objective": NORM, "batch": packed(), "logits": torch.zeros(S * T, V)}, ValueError,
     "objective.norm_length", "packed"),
)  # fmt: skip


def token_logprobs(**given: Any) -> gk.TokenLogprobs:
    return gk.token_logprobs(**{"logits": torch.zeros(S, T, V), "targets": TARGETS} | given)


PER_TOKEN = (
    ("type", {"targets": 3}, TypeError, "targets", "int"),
    ("dtype", {"targets": TARGETS.float()}, TypeError, "targets", "float32"),
    ("range", {"targets": TARGETS + V}, ValueError, "targets", "7 to 7"),
    ("device", {"targets": TARGETS.to("meta")}, ValueError, "targets", "meta"),
    ("type", {"mask": [[True]]}, TypeError, "mask", "list"),
    ("dtype", {"mask": COMPLEX}, TypeError, "mask", "complex64"),
    ("shape", {"mask": torch.ones(S)}, ValueError, "mask", "(3,)"),
    ("device", {"mask": meta(S, T)}, ValueError, "mask", "meta"),
    ("range", {"outputs": ("logprobs", "entropies")}, ValueError, "outputs", "entropies"),
    ("type", {"outputs": "logprobs"}, TypeError, "outputs", "'logprobs'"),
    ("type", {"outputs": None}, TypeError, "outputs", "None"),
)
LOGPROBS = table("token_logprobs", token_logprobs, *TRANSFORMS, *LOGITS, *PER_TOKEN)

HEADS = (
    ("type", {"hidden": None}, TypeError, "hidden", "NoneType"),
    ("dtype", {"hidden": torch.zeros(S, T, H, dtype=torch.long)}, TypeError, "hidden", "int64"),
    ("shape", {"hidden": torch.zeros(S, T + 1, H)}, ValueError, "hidden", "(3, 6, 4)"),
    ("device", {"hidden": meta(S, T, H)}, ValueError, "like hidden", "meta"),
    ("empty", {"hidden": torch.zeros(S, T, 0), "weight": torch.zeros(V, 0)}, ValueError, "hidden", "none"),
    ("type", {"weight": [[1.0]]}, TypeError, "weight", "list"),
    ("dtype", {"weight": torch.zeros(V, H).double()}, TypeError, "weight", "float64"),
    ("shape", {"weight": torch.zeros(H, V)}, ValueError, "weight", "(4, 7)"),
    ("device", {"weight": meta(V, H)}, ValueError, "weight", "meta"),
    ("empty", {"weight": torch.zeros(0, H)}, ValueError, "weight", "none"),
    ("type", {"bias": 0.0}, TypeError, "bias", "float"),
    ("dtype", {"bias": torch.zeros(V).half()}, TypeError, "bias", "float16"),
    ("shape", {"bias": torch.zeros(V, 1)}, ValueError, "bias", "(7, 1)"),
    ("device", {"bias": meta(V)}, ValueError, "bias", "meta"),
    ("range", {"chunk_tokens": 0}, ValueError, "chunk_tokens", "0"),
    ("type", {"chunk_tokens": 2.0}, ValueError, "chunk_tokens", "2.0"),
    ("range", {"vocab_size": V + 1}, ValueError, "vocab_size", "8"),
    ("range", {"vocab_size": 0}, ValueError, "vocab_size", "0"),
    ("type", {"vocab_size": True}, TypeError, "vocab_size", "True"),
    ("type", {"vocab_size": "7"}, TypeError, "vocab_size", "'7'"),
    ("type", {"tp_group": "model"}, TypeError, "tp_group", "str"),
)
HIDDEN = table(
    "hybrid_loss_from_hidden", from_hidden, *COMMON, *TRANSFORMS, *HEADS,
    ("range", {"batch": outside(V)}, ValueError, "batch.targets", "0 to 7"),
    ("range", {"batch": padded(targets_ST=TARGETS + 5), "vocab_size": 5}, ValueError, "batch.targets", "5 to 5"),
    ("contradictory", {"objective": GIFT}, ValueError, "base_hidden", "GIFT"),
    ("contradictory", {"base_hidden": torch.zeros(S, T, H)}, ValueError, "base_hidden must be None", "GIFT"),
    ("contradictory", {"base_weight": torch.zeros(V, H)}, ValueError, "base_weight must be None", "GIFT"),
    ("contradictory", {"base_bias": torch.zeros(V)}, ValueError, "base_bias must be None", "GIFT"),
    ("contradictory", {"objective": GIFT, "base_hidden": torch.zeros(S, T, H)}, ValueError,
     "base_weight must be given", "base_hidden"),
    ("contradictory", {"objective": GIFT, "base_weight": torch.zeros(V, H)}, ValueError,
     "base_hidden must be given", "base_weight"),
    ("contradictory", {"objective": GIFT, "base_bias": torch.zeros(V)}, ValueError,
     "base_hidden must be given", "base_bias"),
    ("shape", {"objective": GIFT, "base_hidden": torch.zeros(S, H), "base_weight": torch.zeros(V, H)}, ValueError,
     "base_hidden", "(3, 4)"),
    ("shape", {"objective": GIFT, "base_hidden": torch.zeros(S, T, H), "base_weight": torch.zeros(V - 1, H)},
     ValueError, "base_weight", "6"),
    ("shape", {"objective": GIFT, "batch": padded(base_logits=torch.zeros(S, T, V + 1))}, ValueError,
     "batch.base_logits", "(3, 5, 8)"),
)  # fmt: skip


def logprobs_from_hidden(**given: Any) -> gk.TokenLogprobs:
    given = {"hidden": torch.zeros(S, T, H), "weight": torch.zeros(V, H), "targets": TARGETS} | given
    return gk.token_logprobs_from_hidden(**given)


HIDDEN_LOGPROBS = table("token_logprobs_from_hidden", logprobs_from_hidden, *TRANSFORMS, *HEADS, *PER_TOKEN)


def from_logprobs(**given: Any) -> gk.Signals:
    return gk.signals_from_logprobs(**{"logprobs": torch.zeros(S, T), "batch": padded()} | given)


SIGNALS = table(
    "signals_from_logprobs", from_logprobs,
    ("type", {"batch": None}, TypeError, "batch", "NoneType"),
    ("type", {"logprobs": None}, TypeError, "logprobs", "NoneType"),
    ("dtype", {"logprobs": LONG}, TypeError, "logprobs", "int64"),
    ("shape", {"logprobs": torch.zeros(S)}, ValueError, "logprobs", "(3,)"),
    ("device", {"logprobs": meta(S, T)}, ValueError, "logprobs", "meta"),
    ("type", {"objective": "sapo"}, TypeError, "objective", "str"),
    ("contradictory", {"objective": GIFT}, ValueError, "objective.supervised", "GIFT"),
    ("contradictory", {"objective": gk.HybridObjective(gk.DFPO())}, ValueError, "batch.groups", "DFPO"),
    ("shape", {"sum_sq": torch.zeros(T)}, ValueError, "sum_sq", "(5,)"),
)  # fmt: skip

LOSS_ROWS = [*PADDED, *PACKED, *FROM_LOGPROBS, *FROM_LOGITS, *LOGPROBS, *HIDDEN, *HIDDEN_LOGPROBS, *SIGNALS]
