"""The hybrid loss and the fused head inside verl's own engine, on a tiny model."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed (extra [verl])")
pytest.importorskip("peft", reason="verl's FSDP engine needs peft")

from verl.utils import tensordict_utils as tu
from verl.utils.metric import reduce_metrics
from verl_engine import EXPERT, mini_batch, on_cpu, one_of_two, one_rank, several_steps, step, tiny_model, worker  # noqa: F401
from verl_support import GLOBAL, actor, micro_batch, padded_responses, through_ppo_loss, values

import gac_kernels as gk
from gac_kernels.integrations import verl as integration
from gac_kernels.integrations._verl_hybrid import COUNTS

MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def gradients(made):
    """Of a step, the parameters' gradients, which the SGD step has left."""
    return [parameter.grad.clone() for parameter in made.engine.module.parameters()]


def assert_same(ours, theirs, **tolerance):
    assert any(bool(theirs_one.abs().max() > 1e-4) for theirs_one in theirs)
    for our_one, their_one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_one, their_one, **{"rtol": 1e-5, "atol": 1e-7, **tolerance})


@pytest.fixture
def head():
    integration.patch_head()
    yield
    integration.unpatch_head()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gac_sapo", "gac_grpo", "gac_cispo", "gac_gspo"])
def test_without_demonstrations_it_is_ppo_loss(on_cpu, name, mode):  # noqa: F811
    """Counts, KL and entropy included: with mu 0 and no demonstration a step is that of the registered loss."""
    settings = {
        "loss_agg_mode": mode, "entropy_coeff": 0.1, "use_kl_loss": True, "kl_loss_coef": 0.2, "loss_scale_factor": 11
    }  # fmt: skip
    batch = {"entropy": True, "reference": True, "micro": 2}
    stock = worker(actor(name, ours=True, **settings))
    theirs = step(stock, mini_batch(**batch))
    made = worker(actor(name, mu=0.0, **settings))
    assert integration.attach(made) is None
    ours = step(made, mini_batch(**batch))
    assert_same(gradients(made), gradients(stock))
    assert sum(ours["loss"]) == pytest.approx(sum(theirs["loss"]), rel=1e-5)
    found, expected = reduce_metrics(ours["metrics"]), reduce_metrics(theirs["metrics"])
    for key in expected.keys() - {"grad_norm"}:
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("mode", MODES[:1] + MODES[2:])
def test_micro_batches_add_up_to_the_packages_loss(on_cpu, mode):  # noqa: F811
    """However verl splits the batch, each branch is divided by its own counts of the whole step."""
    runs = []
    for micro in (8, 2, 1):
        made = worker(actor("gac_sapo", mu=0.3, loss_agg_mode=mode, supervised_aggregation="seq-mean-token-mean"))
        integration.attach(made)
        outputs = step(made, mini_batch(expert=EXPERT, micro=micro))
        runs.append((sum(outputs["loss"]), gradients(made), outputs["metrics"]))
    for loss, gradient, metrics in runs[1:]:
        assert loss == pytest.approx(runs[0][0], rel=1e-5)
        assert_same(gradient, runs[0][1])
        for name in ("actor/pg_loss", "gac/supervised_loss", "gac/ratio_max"):
            assert metrics[name].aggregate() == pytest.approx(runs[0][2][name].aggregate(), rel=1e-5)
    assert runs[0][0] == pytest.approx(expected_loss(mode), rel=1e-5)


def expected_loss(mode):
    """The same from the model's logits, by the package alone."""
    data, model = mini_batch(expert=EXPERT), tiny_model()
    rows = list(data["input_ids"].unbind())
    attention = data["attention_mask"]
    logp = torch.zeros(data["responses"].shape)
    for row, ids in enumerate(rows):
        scores = model(input_ids=ids[None]).logits[0, :-1] / 0.7
        count = int(attention[row, -logp.shape[1] :].sum())
        logp[row, :count] = gk.token_logprobs(scores, ids[1:]).logprobs[-count:].detach()
    batch = gk.TokenBatch.from_padded(
        data["responses"], data["response_mask"], is_expert_S=data["expert_mask"], advantages=data["advantages"],
        old_logprobs=data["old_log_probs"],
    )  # fmt: skip
    objective = gk.HybridObjective(
        gk.SAPO(), aggregation=mode, supervised_aggregation="seq-mean-token-mean", norm_length=None
    )
    return float(gk.hybrid_loss(logp, batch, objective, 0.3).loss)


def test_the_controller_steps_once_a_step(on_cpu):  # noqa: F811
    """And holds what a controller holds that was fed each step's batch in one piece."""
    made = worker(actor("gac_sapo", controller={"update_every": 1, "prior": {"warmup": 2, "decay": 5}}))
    controller = integration.attach(made)
    twin = gk.GuidedAdaptiveController(gk.ControllerConfig(update_every=1, prior=gk.CosinePrior(warmup=2, decay=5)))
    before = []
    for index in range(5):
        before.append(float(controller.mu))
        twin.observe(signals_of_the_whole_batch(made, index))
        metrics = step(made, mini_batch(seed=index, expert=EXPERT, micro=2))["metrics"]
        assert metrics["gac/mu"].values == pytest.approx([before[-1]] * 4)
        twin.step()
        torch.testing.assert_close(controller.mu, twin.mu, rtol=1e-5, atol=1e-7)
        assert metrics["gac/sigma_s2"] == pytest.approx([float(twin.metrics()["gac/sigma_s2"])], rel=1e-4)
    assert controller.steps == 5 and len(set(before)) >= 3


def signals_of_the_whole_batch(made, index):
    """With the parameters that ``made`` has now."""
    whole, kept = worker(actor("gac_sapo", ours=True)), []
    whole.engine.module.load_state_dict(made.engine.module.state_dict())
    watching = gk.GuidedAdaptiveController()
    watching.observe = kept.append
    integration.attach(whole, watching)
    step(whole, mini_batch(seed=index, expert=EXPERT, micro=8))
    return kept[0]


def test_two_ranks_under_fsdp2_are_one(on_cpu, tmp_path, head):  # noqa: F811
    """Each rank has half of every batch, neither of them the same share of demonstrations."""
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path / "ranks"),), nprocs=2, start_method="spawn")
    both = [torch.load(tmp_path / f"ranks.{rank}", weights_only=True) for rank in range(2)]
    alone = several_steps(0, 1)
    for name, (losses, gradients, mus) in alone.items():
        assert torch.equal(both[0][name][2], both[1][name][2])
        for other_losses, other_gradients, other_mus in (rank[name] for rank in both):
            torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(other_mus, mus, rtol=1e-5, atol=1e-6)
            assert_same(other_gradients, gradients, rtol=1e-4, atol=1e-6)
        assert len(set(mus.tolist())) == len(mus)


def test_evaluation_is_not_observed(on_cpu):  # noqa: F811
    made = worker(actor("gac_sapo", controller={"update_every": 1}))
    controller = integration.attach(made)
    data = mini_batch(expert=EXPERT)
    tu.assign_non_tensor(data, **{COUNTS: {"policy": (20, 5), "expert": (10, 3)}})
    made.engine.infer_batch(data, loss_function=made.loss_fn)
    assert not controller._observed and controller.steps == 0


def test_the_state_goes_with_the_checkpoint(on_cpu, tmp_path):  # noqa: F811
    def run():
        made = worker(actor("gac_sapo", controller={"update_every": 1, "ema_beta": 0.5}))
        return made, integration.attach(made)

    made, controller = run()
    for index in range(3):
        step(made, mini_batch(seed=index, expert=EXPERT))
    made.engine.save_checkpoint(str(tmp_path / "step_3"), global_step=3)
    assert made.engine.saved == [(str(tmp_path / "step_3"), 3)]
    resumed, restored = run()
    resumed.engine.module.load_state_dict(made.engine.module.state_dict())
    resumed.engine.load_checkpoint(str(tmp_path / "step_3"))
    assert resumed.engine.saved == [str(tmp_path / "step_3")] and restored.steps == 3
    for index in range(3, 5):
        ours, theirs = (step(one, mini_batch(seed=index, expert=EXPERT)) for one in (resumed, made))
        assert ours["loss"] == theirs["loss"]
    assert torch.equal(controller.mu, restored.mu)
    with pytest.raises(FileNotFoundError, match=r"gac_controller_rank_0\.pt"):
        resumed.engine.load_checkpoint(str(tmp_path))


def test_what_the_hybrid_loss_refuses(on_cpu):  # noqa: F811
    def attached(name="gac_sapo", **settings):
        made = worker(actor(name, **{"mu": 0.5, **settings}))
        integration.attach(made)
        return made

    with pytest.raises(ValueError, match="gac_dfpo is not supported in a hybrid loss"):
        step(attached("gac_dfpo", group_size=2), mini_batch(expert=EXPERT))
    with pytest.raises(ValueError, match="kl_loss_type"):
        step(attached(use_kl_loss=True, kl_loss_type="abs"), mini_batch(expert=EXPERT, reference=True))
    with pytest.raises(ValueError, match="ref_log_prob"):
        step(attached(use_kl_loss=True), mini_batch(expert=EXPERT))
    with pytest.raises(ValueError, match="entropy"):
        step(attached(entropy_coeff=0.1), mini_batch(expert=EXPERT))
    with pytest.raises(ValueError, match="'demonstration'"):
        step(attached(expert_key="demonstration"), mini_batch(expert=EXPERT))
    with pytest.raises(TypeError, match="GACPolicyLossConfig"):
        integration.attach(worker(actor("gac_sapo")))
    with pytest.raises(ValueError, match="exclude each other"):
        integration.attach(worker(actor("gac_sapo", mu=0.5)), gk.GuidedAdaptiveController())
    for controller, message in (
        (gk.ControllerConfig(estimator="hidden"), "estimator"),
        (gk.ControllerConfig(alpha=gk.KLTarget()), "KLTarget"),
    ):
        with pytest.raises(ValueError, match=message):
            integration.attach(worker(actor("gac_sapo", ours=True)), gk.GuidedAdaptiveController(controller))
    logp, _, data = micro_batch(expert=EXPERT, info=GLOBAL)
    with pytest.raises(ValueError, match="count_branches"):
        integration.hybrid_loss({"log_probs": logp}, data, config=actor("gac_sapo", mu=0.5))


def test_verls_worker_attaches_where_it_is_asked_to(monkeypatch):
    """After verl's own init_model; what verl reads off its workers' methods stands on ours too."""
    from verl.workers.engine_workers import ActorRolloutRefWorker

    integration.register()
    marks = {name: value for name, value in vars(ActorRolloutRefWorker.init_model).items() if "attrs" in name}
    actors = [worker(actor("gac_sapo", mu=0.5, hybrid=wanted)) for wanted in (True, False)]
    actors += [worker(actor("vanilla")), None]  # a worker of rollouts has no actor

    def init_model(self):
        self.actor = next(self.order)

    vars(init_model).update(marks)
    monkeypatch.setattr(ActorRolloutRefWorker, "init_model", init_model)
    integration.patch_worker()
    ours = ActorRolloutRefWorker.init_model
    integration.patch_worker()  # once is enough
    assert ActorRolloutRefWorker.init_model is ours is not init_model
    assert marks and marks.items() <= vars(ours).items()
    made = object.__new__(ActorRolloutRefWorker)
    made.order, seen = iter(actors), []
    for one in actors:
        made.init_model()
        assert made.actor is one
        seen.append(one is not None and one.loss_fn.func is integration.hybrid_loss)
    assert seen == [True, False, False, False]


def test_the_example_learns(capsys):
    path = Path(__file__).parents[2] / "examples" / "verl_losses.py"
    runpy.run_path(str(path))["main"]()
    rows = [line.split(":") for line in capsys.readouterr().out.splitlines() if "reward" in line]
    assert len(rows) == 2
    for _, figures in rows:
        first, *_, last = map(float, figures.split())
        assert last > first + 0.1


@pytest.mark.parametrize("name", ["gac_sapo", "gac_grpo", "gac_cispo", "gac_gspo"])
def test_without_an_engine_the_batchs_own_counts_serve(name):
    """``set_loss_fn(partial(hybrid_loss, ...))`` on one rank and one micro-batch needs nothing else."""
    integration.register()
    logp, _, data = micro_batch(expert=(0, 3))
    loss, metrics = integration.hybrid_loss({"log_probs": logp}, data, config=actor(name, mu=0.25))
    loss.backward()
    mask, expert = data["response_mask"].bool(), data["expert_mask"]
    padded = padded_responses(logp.detach(), data["attention_mask"])
    p = padded.exp()
    supervised = (-p * (1 - p) * padded)[mask & expert[:, None]].mean()
    without = mask.clone()
    without[expert] = False
    rollouts = data.clone()
    rollouts["response_mask"] = without.long()
    twin = logp.detach().clone().requires_grad_()
    policy, _ = ppo(actor(name), twin, rollouts)
    policy.backward()
    torch.testing.assert_close(loss.detach(), 0.75 * policy.detach() + 0.25 * supervised)
    assert values(metrics)["gac/supervised_loss"] == pytest.approx(float(supervised), rel=1e-6)
    rows = padded_responses(logp.grad, data["attention_mask"])
    torch.testing.assert_close(rows[~expert], 0.75 * padded_responses(twin.grad, data["attention_mask"])[~expert])
    phi = -(p * (1 - p)) * mask / (mask & expert[:, None]).sum()
    torch.testing.assert_close(rows[expert], 0.25 * phi[expert])


def ppo(config, logp, data):
    from verl.workers.utils.losses import ppo_loss

    return ppo_loss(config, {"log_probs": logp}, data)


# The fused head -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fused", ["torch", "triton", "liger"])
def test_our_head_is_verls_fused_head(on_cpu, head, fused):  # noqa: F811
    """A step with our head is that of verl's logits, whatever fused backend is set."""
    made = worker(actor("gac_sapo", entropy_coeff=0.1), fused=fused)
    ours = step(made, mini_batch(fused=True, entropy=True))
    integration.unpatch_head()
    stock = worker(actor("gac_sapo", entropy_coeff=0.1))
    theirs = step(stock, mini_batch(entropy=True))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-7)
    assert_same(gradients(made), gradients(stock), rtol=1e-4, atol=1e-6)


def test_sum_pi_squared_where_verl_has_none(on_cpu):  # noqa: F811
    flags = {"calculate_sum_pi_squared": True, "return_model_output": True}
    stock = worker(actor("gac_sapo"))
    expected = step(stock, mini_batch(), **flags)["model_output"]
    with pytest.raises(NotImplementedError, match="calculate_sum_pi_squared"):
        step(worker(actor("gac_sapo"), fused="torch"), mini_batch(fused=True), **flags)
    integration.patch_head()
    try:
        integration.patch_head()  # once is enough
        found = step(worker(actor("gac_sapo"), fused="torch"), mini_batch(fused=True), **flags)["model_output"]
        unfused = step(worker(actor("gac_sapo")), mini_batch(), **flags)["model_output"]
    finally:
        integration.unpatch_head()
    offsets = expected["log_probs"].offsets()
    read = torch.ones(int(offsets[-1]), dtype=torch.bool)
    read[offsets[1:] - 1] = False  # the last token of a row predicts nothing: verl's two ways label it differently
    for name, places in (("log_probs", read), ("sum_pi_squared", slice(None))):
        assert torch.equal(found[name].offsets(), offsets)
        torch.testing.assert_close(found[name].values()[places], expected[name].values()[places], rtol=1e-5, atol=1e-6)
        assert torch.equal(unfused[name].values(), expected[name].values())
    with pytest.raises(NotImplementedError, match="calculate_sum_pi_squared"):
        step(worker(actor("gac_sapo"), fused="torch"), mini_batch(fused=True), **flags)


def test_packed_sum_pi_squared(on_cpu, head):  # noqa: F811
    """Where padding is removed: a row of all tokens, padded at its end."""
    from verl_engine import Engine

    engine = Engine(tiny_model("torch"))
    data = mini_batch(rows=3)
    ids = data["input_ids"].values()
    hidden = torch.randn(1, len(ids) + 2, 16)
    targets = torch.nn.functional.pad(ids.roll(-1), (0, 2))[None]
    output = engine.module(
        inputs_embeds=hidden, shift_labels=targets, input_ids=None, temperature=0.7, return_dict=True
    )
    tu.assign_non_tensor(
        data, use_remove_padding=True, use_fused_kernels=True, calculate_sum_pi_squared=True, calculate_entropy=True
    )
    arguments = {"input_ids_rmpad_rolled": targets[0], "temperature_rmpad": None, "pad_size": 2}
    found = engine.prepare_model_outputs(output, arguments, data, None)
    integration.unpatch_head()
    logits = tiny_model()(inputs_embeds=hidden).logits[0, :-2] / 0.7
    torch.testing.assert_close(found["sum_pi_squared"].values(), logits.softmax(-1).square().sum(-1))
    assert torch.equal(found["sum_pi_squared"].offsets(), data["input_ids"].offsets())
    assert set(found) == {"log_probs", "entropy", "sum_pi_squared"}


def test_a_forward_past_the_head_is_not_taken_for_one_through_it(on_cpu, head):  # noqa: F811
    """Of two forwards with the head and none of whose outputs was read, and one without: no stale sum p^2."""
    made = worker(actor("gac_sapo"))  # a model whose forward was not patched, with the flag set all the same
    made.engine.module.forward = lambda **inputs: type("Output", (), {"log_probs": None, "entropy": None})()
    with pytest.raises(RuntimeError, match="did not pass through verl's fused head"):
        step(made, mini_batch(fused=True), calculate_sum_pi_squared=True)


def test_a_changed_host_is_refused(monkeypatch):
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    monkeypatch.setattr(FusedLinearForPPO, "forward", lambda self, hidden, weight: None)
    with pytest.raises(ImportError, match=r"expected FusedLinearForPPO\.forward"):
        integration.patch_head()


def test_the_logit_estimator_has_its_sum_of_squares(on_cpu, head):  # noqa: F811
    made = worker(actor("gac_sapo", controller={"estimator": "logit", "update_every": 1}), fused="torch")
    controller = integration.attach(made)
    step(made, mini_batch(expert=EXPERT, fused=True))
    assert float(controller.metrics()["gac/sigma_s2"]) > 0 and float(controller.metrics()["gac/skipped"]) == 0


def test_the_registered_losses_run_in_the_engine(on_cpu):  # noqa: F811
    """Unchanged loss function, our name: the actor's whole step against verl's own objective."""
    made, stock = worker(actor("gac_grpo")), worker(actor("vanilla"))
    ours, theirs = step(made, mini_batch()), step(stock, mini_batch())
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert_same(gradients(made), gradients(stock))
    assert through_ppo_loss(actor("gac_grpo"))[0] is not None
