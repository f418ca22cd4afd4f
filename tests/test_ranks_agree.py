"""Two ranks that were given what does not go together: the same ValueError on both, before any collective of other
sizes. And ranks that hold the same rows: they count once.

All of it runs in one process group, because starting processes costs more than it does. A worker saves what it saw.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hidden_support import HEAD, HiddenCase

import gac_kernels as gk
from gac_kernels import products
from gac_kernels.signals import Signals

V = 37
OBJECTIVE = gk.HybridObjective(entropy_coef=0.05)
BARE = gk.ControllerConfig(update_every=1, prior=None, blend=1.0, ema_beta=0.0, change_cap=1.0)


def case() -> HiddenCase:
    return HiddenCase(dtype=torch.float64, V=V)


def rows(count=4, seed=0):
    made = torch.rand(count, 12, generator=torch.Generator().manual_seed(seed)).double() + 0.5
    made[:, 0], made[:, 1] = torch.arange(count) % 2, 3.0
    return made


def signals(count=4, **options):
    return Signals(rows(count), True, **options)


def told(function, *args, **options):
    """What the call raised: its type, exactly, and its text."""
    try:
        function(*args, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def stepped(config, observed=None, kl=0.01):
    controller = gk.GuidedAdaptiveController(config)
    if observed is not None:
        controller.observe(observed)
    controller.step(kl)
    return controller


def controllers(rank):
    """What differs between the ranks' controllers, by name."""
    kl, seen = gk.KLTarget(), {}
    configs = {
        "alpha": [{"alpha": kl}, {"alpha": 0.5}],
        "update_every": [{"update_every": 1}, {"update_every": 7}],
        "estimator": [{"estimator": "logit"}, {"estimator": "coefficient"}],
        "prior": [{"prior": None}, {"prior": gk.ConstantPrior(0.2)}],
    }
    for name, pair in configs.items():
        seen[name] = told(stepped, replace(gk.ControllerConfig(), **pair[rank]), signals())
    wide = signals(hidden=torch.ones(4, 3 + rank))
    seen["width"] = told(stepped, gk.ControllerConfig("hidden"), wide)
    seen["length"] = told(
        stepped, gk.ControllerConfig("logit"),
        signals(policy_aggregation="seq-mean-token-sum-norm", norm_length=5.0 + rank),
    )  # fmt: skip

    def another_state(**changes):
        def run():
            controller = gk.GuidedAdaptiveController()
            state = controller.state_dict()
            if rank:
                state |= {name: torch.full_like(state[name], value) for name, value in changes.items()}
            controller.load_state_dict(state)
            controller.step()

        return run

    seen["mu"] = told(another_state(mu=0.25))
    seen["skipped"] = told(another_state(skipped=2.0, estimate=0.7))
    going = stepped(gk.ControllerConfig(update_every=1))
    if rank:
        going.load_state_dict(going.state_dict())
    before = going.state_dict()
    seen["begins"] = told(going.step)
    seen["unchanged"] = all(
        torch.equal(v, going.state_dict()[k]) if torch.is_tensor(v) else v == going.state_dict()[k]
        for k, v in before.items()
    )
    bad = gk.GuidedAdaptiveController(gk.ControllerConfig(alpha=kl))
    seen["refused"] = told(bad.step, "0.1" if rank else 0.1)
    bad.step(0.1)  # and the ranks still meet
    seen["calls"] = told(signals().all_reduce) if rank else told(stepped, gk.ControllerConfig(), signals())
    seen["counted"] = told(
        gk.Denominators.of, case().batch,
        gk.HybridObjective(aggregation="token-mean" if rank else "seq-mean-token-mean"),
    )  # fmt: skip
    return seen


def loss(of, weight, function=gk.hybrid_loss_from_hidden, **options):
    options = {"objective": OBJECTIVE, "mu": 0.3, "hidden": of.hidden, "batch": of.batch} | options
    return function(options.pop("hidden"), weight, tp_group=dist.group.WORLD, **options)


def heads(rank):
    """What differs between the ranks' calls of a head that is spread over them, by name."""
    of, seen = case(), {}
    weight = of.weight[:20] if rank == 0 else of.weight[20:]
    fewer = replace(of.batch, mask=of.batch.mask & (torch.arange(of.batch.mask.shape[1]) > rank))
    shorter = gk.TokenBatch.from_padded(
        of.batch.targets[:, : 2 + rank], of.batch.mask[:, : 2 + rank], is_expert_S=of.batch.is_expert,
        advantages=torch.ones(len(of.batch.is_expert)),
    )  # fmt: skip
    leaf = of.hidden.detach().clone().requires_grad_()
    both = {
        "hidden's width": [{}, {"hidden": of.hidden[..., :5], "weight": weight[:, :5]}],
        "hidden's dtype": [{}, {"hidden": of.hidden.float(), "weight": weight.float()}],
        "targets' number": [{"hidden": of.hidden[:, : 2 + rank], "batch": shorter}] * 2,
        "chunk_tokens": [{"chunk_tokens": 3}, {}],
        "requires grad": [{"hidden": leaf}, {"hidden": of.hidden.detach()}],
        "a bias": [{"bias": torch.zeros(len(weight)).double()}, {}],
        "objective": [{}, {"objective": gk.HybridObjective(gk.GSPO())}],
        "and temperature": [{}, {"transform": gk.LogitTransform(torch.ones(len(of.batch.is_expert)))}],
        "mu": [{}, {"mu": 0.4}],
        "its mask": [{"batch": fewer}] * 2,
        "refused early": [{}, {"weight": weight[0]}],
        "refused late": [{"mu": torch.tensor(0.3).double()}, {"mu": torch.ones(3).double()}],
    }
    for name, pair in both.items():
        options = dict(pair[rank])
        seen[name] = told(loss, of, options.pop("weight", weight), **options)

    def logprobs(hidden, weight, batch, objective, mu, tp_group):
        return gk.token_logprobs_from_hidden(hidden, weight, batch.targets, tp_group=tp_group)

    seen["function"] = told(lambda: loss(of, weight, logprobs if rank else gk.hybrid_loss_from_hidden))
    return seen


def uneven(rank):
    """Chunks that ranks derive from their own shards: with 33 and 4 columns they differ."""
    of = case()
    before = dict(products.CHUNK_BYTES)
    products.CHUNK_BYTES["cpu"] = 33 * 8 * 16
    try:
        assert products.chunk_rows(36, 33, torch.float64, torch.device("cpu")) == 16
        assert products.chunk_rows(36, 4, torch.float64, torch.device("cpu")) == 36
        part = slice(0, 33) if rank == 0 else slice(33, V)
        leaves = [value.detach().clone().requires_grad_() for value in (of.hidden, of.weight[part], of.bias[part])]
        out = loss(of, leaves[1], hidden=leaves[0], bias=leaves[2])
        out.loss.backward()
        return {"loss": out.loss.detach(), **dict(zip(HEAD, (leaf.grad for leaf in leaves), strict=True))}
    finally:
        products.CHUNK_BYTES.update(before)


def replicas(rank):
    """Controllers of the default group, fed by a loss with tp_group on both of its ranks."""
    of, seen = case(), {}
    weight = of.weight[:20] if rank == 0 else of.weight[20:]
    hidden = of.hidden.detach().clone().requires_grad_()
    out = loss(of, weight, hidden=hidden)
    seen["replicas"] = out.signals.replicas
    for name in ("coefficient", "logit", "hidden"):
        controller = gk.GuidedAdaptiveController(replace(BARE, estimator=name))
        for part in (out.signals, out.signals):  # two micro-batches
            controller.observe(part)
        controller.step()
        seen[name] = controller.state_dict()
    # Only the second of the two has observed, and a KL of which one rank's copy is lost.
    controller = gk.GuidedAdaptiveController(replace(BARE, alpha=gk.KLTarget(gain=0.5)))
    if rank:
        controller.observe(out.signals)
    controller.step(0.03)
    seen["one observes"] = controller.state_dict()
    controller = gk.GuidedAdaptiveController(replace(BARE, alpha=gk.KLTarget(gain=0.5)))
    controller.observe(out.signals)
    controller.step(float("nan"))
    seen["skipped"] = controller.metrics()["gac/skipped"]
    all_of_them = out.signals.all_reduce()
    seen["reduced"] = all_of_them.rows, all_of_them.all_reduce().rows
    controller = gk.GuidedAdaptiveController(BARE)
    controller.observe(signals(5).all_reduce())  # every rank's rows, on every rank
    controller.step()
    seen["reduced before"] = controller.state_dict()
    alone = gk.GuidedAdaptiveController(BARE, process_group=[dist.new_group([r]) for r in range(2)][rank])
    alone.observe(out.signals)
    alone.step()
    seen["alone"] = alone.state_dict()
    seen["mixed"] = told(lambda: out.signals + replace(out.signals, replicas=None))
    uneven_rows = replace(out.signals, rows=out.signals.rows[: 2 + rank], hidden=None)
    seen["other rows"] = told(stepped, gk.ControllerConfig(), uneven_rows)
    return seen


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seen = {f.__name__: f(rank) for f in (controllers, heads, uneven, replicas)}
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agree")
    mp.start_processes(worker, (str(folder),), 2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


DIFFERENT = {
    "alpha": ["(step, configuration)", "alpha by rank: [{'kind': 'KLTarget'", "0.5]"],
    "update_every": ["(step, configuration)", "update_every by rank: [1, 7]"],
    "estimator": ["(step, configuration)", "estimator by rank: ['logit', 'coefficient']"],
    "prior": ["(step, configuration)", "prior by rank: [None, {"],
    "width": ["signals of all ranks must agree in", "width of hidden"],
    "length": ["signals of all ranks must agree in", "5.0", "6.0"],
    "mu": ["must hold the same state, got by rank {'mu': [0.5, 0.25]}"],
    "skipped": ["must hold the same state", "'skipped': [0.0, 2.0]", "'estimate': [0.5, 0.7]"],
    "begins": ["must begin together: those of ranks [1]"],
    "calls": ["the same calls in the same order, got by rank ['step() of a controller', 'Signals.all_reduce()']"],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_controllers_that_differ_raise_the_same_on_all_ranks(ranks, name):
    for seen in ranks:
        kind, text = seen["controllers"][name]
        assert kind == "ValueError" and all(part in text for part in DIFFERENT[name]), (kind, text)
    assert ranks[0]["controllers"][name] == ranks[1]["controllers"][name]
    assert all(seen["controllers"]["unchanged"] for seen in ranks)


def test_what_one_rank_refuses_is_told_to_the_others(ranks):
    others, own = (seen["controllers"]["refused"] for seen in ranks)
    assert own == ("TypeError", "kl must be a number or a 0-d tensor, got '0.1'")
    assert others[0] == "ValueError" and "step() raised on ranks [1]" in others[1]
    for name, of_rank in (("refused early", "weight must have shape"), ("refused late", "mu must be")):
        others, own = (seen["heads"][name] for seen in ranks)
        assert own[0] == "ValueError" and of_rank in own[1]
        assert others[0] == "ValueError" and "ranks [1] of tp_group have refused their arguments" in others[1]


def test_ranks_that_count_different_things_are_told(ranks):
    for seen in ranks:
        kind, text = seen["controllers"]["counted"]
        assert kind == "ValueError" and "the aggregations of objective must be the same on all ranks" in text


OF_HEADS = {
    "hidden's width": "hidden's width must be the same on all ranks of tp_group, got by rank [12, 5]",
    "hidden's dtype": "hidden's dtype",
    "targets' number": "targets' number must be the same",
    "chunk_tokens": "chunk_tokens must be the same on all ranks of tp_group, got by rank [3, 0]",
    "requires grad": "whether hidden requires grad must be the same on all ranks of tp_group, got by rank [1, 0]",
    "a bias": "whether there is a bias must be the same",
    "objective": "function, objective, transform",
    "and temperature": "function, objective, transform",
    "mu": "function, objective, transform",
    "function": "function, objective, transform",
    "its mask": "batch (its mask) must be the same on all ranks of tp_group",
}


@pytest.mark.parametrize("name", OF_HEADS)
def test_heads_that_differ_raise_the_same_on_all_ranks(ranks, name):
    for seen in ranks:
        kind, text = seen["heads"][name]
        assert kind == "ValueError" and OF_HEADS[name] in text, (kind, text)
    assert ranks[0]["heads"][name] == ranks[1]["heads"][name]


def test_uneven_shards_take_one_chunk(ranks):
    want, gradients = case().oracle(OBJECTIVE)
    for seen, part in zip(ranks, (slice(0, 33), slice(33, V)), strict=True):
        got = seen["uneven"]
        torch.testing.assert_close(got["loss"], want.loss.detach(), rtol=1e-10, atol=1e-13)
        for name in HEAD:
            theirs = gradients[name] if name == "hidden" else gradients[name][part]
            torch.testing.assert_close(got[name], theirs, rtol=1e-10, atol=1e-13)


def one_process(config, *observed, kl=0.01):
    controller = gk.GuidedAdaptiveController(config)
    for one in observed:
        controller.observe(one)
    controller.step(kl)
    return controller.state_dict()


def assert_close(got, want):
    for name, value in want.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-15)


def test_ranks_that_hold_the_same_rows_count_once(ranks):
    """The numbers of one process, with the controller's group as everybody makes it: the default."""
    of = case()
    hidden = of.hidden.detach().clone().requires_grad_()
    whole = gk.hybrid_loss_from_hidden(hidden, of.weight, of.batch, OBJECTIVE, 0.3).signals
    assert whole.replicas is None
    for seen in (one["replicas"] for one in ranks):
        assert seen["replicas"] == (0, 1)
        for name in ("coefficient", "logit", "hidden"):
            assert_close(seen[name], one_process(replace(BARE, estimator=name), whole, whole))
            assert seen[name]["measured"].all()
        config = replace(BARE, alpha=gk.KLTarget(gain=0.5))
        assert_close(seen["one observes"], one_process(config, whole, kl=0.03))
        assert seen["skipped"] == 1
        assert_close(seen["alone"], one_process(BARE, whole))
        for gathered in seen["reduced"]:
            torch.testing.assert_close(gathered, whole.rows, rtol=1e-9, atol=1e-15)
        assert_close(seen["reduced before"], one_process(BARE, signals(5), signals(5)))
        kind, text = seen["mixed"]
        assert kind == "ValueError" and "must be held by the same ranks (replicas)" in text
        kind, text = seen["other rows"]
        assert kind == "ValueError" and "2 rows on rank 0 of the group and 3 on rank 1" in text
    for name in ("coefficient", "logit", "hidden", "one observes", "reduced before"):
        first, second = (one["replicas"][name] for one in ranks)
        assert all(torch.equal(v, second[k]) if torch.is_tensor(v) else v == second[k] for k, v in first.items())


def test_replicas_are_ranks():
    assert Signals(rows(), replicas=(0, 3)).replicas == (0, 3)
    for odd in ([0, 1], (0, -1), (True,), 1, ("0",)):
        with pytest.raises(TypeError, match="replicas must be a tuple of global ranks or None"):
            Signals(rows(), replicas=odd)
