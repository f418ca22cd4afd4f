"""CausalLMLoss on padding-free rows: several sequences end to end are the same sequences one a row."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

pytest.importorskip("transformers")

from transformers import DataCollatorWithFlattening, Qwen2Config, Qwen2ForCausalLM

import gac_kernels as gk
from gac_kernels.integrations.transformers import CausalLMLoss

V, LENGTHS = 29, (4, 9, 1, 6)
S, N = len(LENGTHS), sum(LENGTHS)
ENDS = torch.tensor([0, 4, 13, 14, 20])
PARTS = list(zip(ENDS[:-1].tolist(), ENDS[1:].tolist(), strict=True))


@pytest.fixture
def rows():
    """Float64 logits of packed tokens and all that may come with them, keyed as the model's call has it."""
    torch.manual_seed(0)
    labels = torch.randint(V, (1, N))
    labels[:, 6:8] = -100
    return {
        "logits": torch.randn(1, N, V, dtype=torch.float64),
        "labels": labels,
        "advantages": torch.randn(S, dtype=torch.float64),
        "old_logprobs": -3 + 0.3 * torch.randn(1, N, dtype=torch.float64),
    }


def by_sequence(rows):
    """The same, one sequence a row."""

    def cut(value, fill):
        if tuple(value.shape[:2]) != (1, N):
            return value
        parts = [value[0, low:high] for low, high in PARTS]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    return {name: cut(value, -100 if name == "labels" else 0) for name, value in rows.items()}


def value_and_gradient(loss, rows, **more):
    logits = rows["logits"].clone().requires_grad_()
    result = loss(logits * 1.0, **{k: v for k, v in rows.items() if k != "logits"}, **more)
    result.backward()
    return result.detach(), logits.grad


def sapo_by_hand(rows, tau=1.0):
    """Mean over sequences of the mean over their predicted tokens, in a loop."""
    logp, total, counted = rows["logits"][0].log_softmax(-1), 0.0, 0
    for (low, high), advantage in zip(PARTS, rows["advantages"], strict=True):
        terms = []
        for t in range(low + 1, high):
            if (y := rows["labels"][0, t]) >= 0:
                u = (logp[t - 1, y] - rows["old_logprobs"][0, t]).exp() - 1
                terms.append(-advantage * 4 / tau * torch.sigmoid(tau * u))
        if terms:
            total, counted = total + sum(terms) / len(terms), counted + 1
    return total / counted


LAYOUTS = {
    "cu_seq_lens_q": {"cu_seq_lens_q": ENDS.int(), "cu_seq_lens_k": ENDS.int(), "max_length_q": 9, "max_length_k": 9},
    "cu_seqlens": {"cu_seqlens": ENDS},
    "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(S), torch.tensor(LENGTHS))[None].int()},
    "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]},
    "positions from 2": {"position_ids": torch.cat([torch.arange(2, n + 2) for n in LENGTHS])[None]},
}
OBJECTIVES = {
    "sapo": gk.HybridObjective(gk.SAPO(tau_neg=1.0)),
    "gspo": gk.HybridObjective(gk.GSPO()),
    "grpo by token": gk.HybridObjective(gk.GRPO(), aggregation="token-mean"),
    "sums": gk.HybridObjective(gk.GRPO(), aggregation="seq-mean-token-sum"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_sapo_is_the_mean_over_sequences(rows, layout):
    loss, gradient = value_and_gradient(
        CausalLMLoss(OBJECTIVES["sapo"], mu=0.0, evaluation=False), rows, **LAYOUTS[layout]
    )
    leaf = rows["logits"].clone().requires_grad_()
    wanted = sapo_by_hand({**rows, "logits": leaf})
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_is_padded(rows, objective, per_token, inplace):
    """Demonstrations and rollouts in one row, the controller's numbers too."""
    rows["is_expert"] = torch.tensor([False, True, False, False])
    rows["rollout_weights"] = torch.rand(1, N, dtype=torch.float64)
    packed = dict(rows)
    if per_token:
        of_token = torch.repeat_interleave(torch.arange(S), torch.tensor(LENGTHS))
        packed |= {name: rows[name][of_token][None] for name in ("advantages", "is_expert")}
    seen = []
    for given, more in ((by_sequence(rows), {}), (packed, LAYOUTS["cu_seq_lens_q"])):
        controller = gk.GuidedAdaptiveController(gk.ControllerConfig(update_every=1))
        loss, gradient = value_and_gradient(
            CausalLMLoss(OBJECTIVES[objective], controller=controller, inplace=inplace), given, **more
        )
        controller.step()
        seen.append((loss, gradient, torch.stack([v.double() for v in controller.metrics().values()])))
    (padded, padded_gradient, numbers), (ours, gradient, ours_numbers) = seen
    torch.testing.assert_close(ours, padded, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours_numbers, numbers, rtol=1e-6, atol=1e-9)
    live = torch.cat([padded_gradient[i, : high - low] for i, (low, high) in enumerate(PARTS)])
    torch.testing.assert_close(gradient[0], live, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["rollout_weights", "token_weights"])
def test_weights_of_tokens_and_of_sequences(rows, name, packed):
    """They scale demonstrations too and not what is divided by: NLL and REINFORCE, in a loop."""
    expert, weights = torch.tensor([False, True, False, True]), torch.rand(1, N, dtype=torch.float64)
    objective = gk.HybridObjective(gk.REINFORCE(), gk.NLL("none"), aggregation="token-mean")
    by_row = torch.rand(S, dtype=torch.float64)
    of_token = torch.repeat_interleave(torch.arange(S), torch.tensor(LENGTHS))
    logp, labels = rows["logits"][0].log_softmax(-1), rows["labels"][0]
    for given, at in ((weights, weights[0]), (by_row, by_row[of_token]), (by_row[:, None], by_row[of_token])):
        sums, counts = [0.0, 0.0], [0, 0]
        for sequence, (low, high) in enumerate(PARTS):
            for t in range(low + 1, high):
                if labels[t] >= 0:
                    scale = 1.0 if expert[sequence] else rows["advantages"][sequence]
                    sums[int(expert[sequence])] -= at[t] * scale * logp[t - 1, labels[t]]
                    counts[int(expert[sequence])] += 1
        batch = {**rows, "is_expert": expert, "old_logprobs": None, name: given}
        batch = batch if packed else by_sequence({k: v for k, v in batch.items() if v is not None})
        loss, _ = value_and_gradient(
            CausalLMLoss(objective, mu=0.25), batch, **(LAYOUTS["cu_seqlens"] if packed else {})
        )
        wanted = 0.75 * sums[0] / counts[0] + 0.25 * sums[1] / counts[1]
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)


def test_the_first_token_of_a_sequence_never_counts(rows):
    """Whatever its label: only another sequence's token stands before it."""
    loss = CausalLMLoss(OBJECTIVES["gspo"], mu=0.0)
    plain = value_and_gradient(loss, rows, **LAYOUTS["cu_seq_lens_q"])
    ignored = {**rows, "labels": rows["labels"].index_fill(1, ENDS[:-1], -100)}
    for layout in LAYOUTS.values():
        for ours, wanted in zip(value_and_gradient(loss, ignored, **layout), plain, strict=True):
            assert torch.equal(ours, wanted)


def test_shifted_labels_stay_where_they_are(rows):
    loss = CausalLMLoss(OBJECTIVES["sapo"], mu=0.0)
    wanted = value_and_gradient(loss, rows, **LAYOUTS["seq_idx"])
    moved = {
        "shift_labels": pad(rows["labels"].index_fill(1, ENDS[:-1], -100), (0, 1), value=-100)[:, 1:],
        "old_logprobs": pad(rows["old_logprobs"], (0, 1))[:, 1:],
        "labels": None,
    }
    for ours, expected in zip(value_and_gradient(loss, {**rows, **moved}, **LAYOUTS["seq_idx"]), wanted, strict=True):
        assert torch.equal(ours, expected)


def test_several_packed_rows(rows):
    """Two rows of two sequences each."""
    lengths = [(4, 9), (7, 6)]
    cuts = torch.tensor([0, 4, 13, 20, 26])
    torch.manual_seed(1)
    flat = {"logits": torch.randn(1, 26, V).double(), "labels": torch.randint(V, (1, 26))}
    flat |= {"old_logprobs": -3 + 0.3 * torch.randn(1, 26).double(), "advantages": torch.randn(4).double()}
    loss = CausalLMLoss(OBJECTIVES["sapo"], mu=0.0)
    wanted, gradient = value_and_gradient(loss, flat, cu_seq_lens_q=cuts)
    two = {k: v if k == "advantages" else v.view(2, 13, *v.shape[2:]) for k, v in flat.items()}
    layouts = {
        "cu_seq_lens_q": cuts,
        "seq_idx": torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths]),
        "position_ids": torch.tensor([[t for n in row for t in range(n)] for row in lengths]),
    }
    for name, layout in layouts.items():
        ours, ours_gradient = value_and_gradient(loss, two, **{name: layout})
        assert torch.equal(ours, wanted) and torch.equal(ours_gradient.view_as(gradient), gradient), name


PADDED = {  # positions of padded rows, of five, three and four tokens
    "left, ones": [[0, 1, 2, 3, 4], [1, 1, 0, 1, 2], [1, 0, 1, 2, 3]],
    "left, zeros": [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 0, 1, 2, 3]],
    "right, ones": [[0, 1, 2, 3, 4], [0, 1, 2, 1, 1], [0, 1, 2, 3, 1]],
    "between": [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 1, 1, 2, 3]],
    "one row for all": [[0, 1, 2, 3, 4]],
}


@pytest.mark.parametrize("how", PADDED)
def test_positions_of_padded_rows_make_no_sequences(how):
    torch.manual_seed(0)
    dead = {"left": [[], [0, 1], [0]], "right": [[], [3, 4], [4]], "between": [[], [1, 2], [2]]}
    labels = torch.randint(V, (3, 5))
    for row, places in enumerate(dead.get(how.split(",")[0], [[], [], []])):
        labels[row, places] = -100
    given = {"logits": torch.randn(3, 5, V), "labels": labels, "advantages": torch.tensor([1.0, -1.0, 0.5])}
    loss = CausalLMLoss(OBJECTIVES["gspo"], mu=0.0)
    wanted, gradient = value_and_gradient(loss, given)
    ours, ours_gradient = value_and_gradient(loss, given, position_ids=torch.tensor(PADDED[how]))
    assert torch.equal(ours, wanted) and torch.equal(ours_gradient, gradient)


def test_positions_of_images_do_not_restart():
    """Three axes; on the first an image stays, and the text behind it goes on from the largest of all."""
    positions = torch.stack([torch.tensor([0, 1, 2, 2, 2, 2, 4, 5]), *torch.zeros(2, 8).long()])[:, None]
    torch.manual_seed(0)
    given = {"logits": torch.randn(1, 8, V), "labels": torch.randint(V, (1, 8)), "advantages": torch.ones(1)}
    loss = CausalLMLoss(OBJECTIVES["sapo"], mu=0.0)
    assert torch.equal(loss(**given), loss(**given, position_ids=positions))


def model():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa",
        )
    ).double()  # fmt: skip


@pytest.mark.parametrize("kernel_arguments", [False, True])
def test_transformers_own_collator(kernel_arguments):
    """Its positions alone reach the model and not the loss, which sees them all the same; dense attention keeps the
    sequences apart by these positions."""
    net = model()
    net.loss_function = CausalLMLoss(OBJECTIVES["gspo"], mu=0.0)
    sequences = [torch.randint(V, (n,)) for n in (4, 9, 6)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=kernel_arguments)
    batch = collate([{"input_ids": one.tolist(), "labels": one.tolist()} for one in sequences])
    advantages, old = torch.randn(3).double(), [-3 + 0.2 * torch.randn(n).double() for n in (4, 9, 6)]
    ours = net(**batch, advantages=advantages, old_logprobs=torch.cat(old)[None]).loss

    logits = net(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0].split([4, 9, 6])
    terms = []
    for one, ids, before, advantage in zip(logits, sequences, old, advantages, strict=True):
        logp = one[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        ratio = (logp - before[1:]).mean().exp()
        terms.append(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    torch.testing.assert_close(ours, sum(terms) / 3, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"advantages": torch.ones(1)}, r"advantages must have shape \(4,\), one for each of the 4 sequences packed"),
        ({"is_expert": torch.ones(1, dtype=torch.bool)}, r"is_expert must have shape \(4,\)"),
        ({"rollout_weights": torch.ones(3)}, r"rollout_weights must have shape \(4,\)"),
        ({"cu_seq_lens_q": ENDS[:-1]}, "cu_seq_lens_q must rise from 0 to the number of tokens, 20"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 4, 20])}, "cu_seq_lens_q must rise"),
        ({"cu_seq_lens_q": ENDS.float()}, r"cu_seq_lens_q must be integers of shape \(S \+ 1,\)"),
        ({"seq_idx": torch.zeros(N).int(), "cu_seq_lens_q": None}, "seq_idx must have the labels' shape"),
    ],
)
def test_what_does_not_fit_packed_rows_raises(rows, more, says):
    with pytest.raises(ValueError, match=says):
        CausalLMLoss(mu=0.5)(**{**rows, "cu_seq_lens_q": ENDS, **more})


def test_offsets_in_a_list_are_named(rows):
    with pytest.raises(TypeError, match=r"cu_seq_lens_q must be a torch\.Tensor, got list"):
        CausalLMLoss(mu=0.5)(**rows, cu_seq_lens_q=ENDS.tolist())


def test_a_sequence_across_two_rows_raises():
    given = {"logits": torch.randn(2, 5, V), "labels": torch.randint(V, (2, 5)), "advantages": torch.ones(2)}
    with pytest.raises(ValueError, match="cu_seq_lens_q must have an offset wherever one of the 2 rows of 5 tokens"):
        CausalLMLoss(mu=0.5)(**given, cu_seq_lens_q=torch.tensor([0, 6, 10]))
