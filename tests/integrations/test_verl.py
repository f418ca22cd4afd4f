"""Our losses as verl calls them, against verl's own; and the plugin, as verl loads it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed (extra [verl])")

from verl.trainer.ppo import core_algos
from verl.utils.config import omega_conf_to_dataclass
from verl_support import GLOBAL, LENGTH, LOCAL, ROWS, actor, micro_batch, through_ppo_loss, values

import gac_kernels as gk
from gac_kernels.integrations import verl as integration

ROOT = Path(__file__).parents[2]
MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
SAME = {"gac_grpo": "vanilla", "gac_sapo": "sapo", "gac_cispo": "cispo", "gac_gspo": "gspo"}
EXACT = {"rtol": 1e-7, "atol": 1e-12}  # verl adds 1e-8 to the lengths


@pytest.fixture(autouse=True)
def registered():
    integration.register()


@pytest.fixture
def sapo_heeds_the_mode(monkeypatch):
    """verl's sapo with the aggregation that is set: its own takes seq-mean-token-mean whatever that is."""

    def set_to(mode):
        aggregate = core_algos.agg_loss
        monkeypatch.setattr(core_algos, "agg_loss", lambda **kwargs: aggregate(**{**kwargs, "loss_agg_mode": mode}))

    return set_to


def compare(ours, theirs, *, alive=True, **tolerance):
    (loss, gradient, metrics), (their_loss, their_gradient, their_metrics) = ours, theirs
    assert bool(their_gradient.abs().max() > 1e-4) is alive
    torch.testing.assert_close(loss, their_loss, **tolerance)
    torch.testing.assert_close(gradient, their_gradient, **tolerance)
    found, expected = values(metrics), values(their_metrics)
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("rollout", [False, True], ids=["", "rollout_is_weights"])
@pytest.mark.parametrize("info", [LOCAL, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SAME)
def test_losses_are_verls_own(name, mode, info, rollout, sapo_heeds_the_mode):
    if name == "gac_sapo":
        sapo_heeds_the_mode(mode)
    scale = 7 if info is GLOBAL else None
    ours, theirs = (actor(kind, loss_agg_mode=mode, loss_scale_factor=scale) for kind in (name, SAME[name]))
    batch = {"info": info, "rollout": rollout, "seed": 3}
    compare(through_ppo_loss(ours, **batch), through_ppo_loss(theirs, **batch), **EXACT)


@pytest.mark.parametrize("name", SAME)
def test_kl_and_entropy_are_verls_to_add(name, sapo_heeds_the_mode):
    if name == "gac_sapo":
        sapo_heeds_the_mode("token-mean")
    more = {"use_kl_loss": True, "kl_loss_coef": 0.3, "entropy_coeff": 0.2}
    batch = {"reference": True, "with_entropy": True, "info": GLOBAL}
    compare(
        through_ppo_loss(actor(name, **more), **batch), through_ppo_loss(actor(SAME[name], **more), **batch), **EXACT
    )


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("seed", range(4))
def test_far_from_the_old_policy(name, seed, sapo_heeds_the_mode):
    """Ratios beyond every clip, and log ratios beyond verl's clamp of 20."""
    if name == "gac_sapo":
        sapo_heeds_the_mode("token-mean")
    ours, theirs = (actor(kind, clip_ratio_low=0.1, clip_ratio_c=2.5) for kind in (name, SAME[name]))
    batch = {"spread": 1.0 if name == "gac_gspo" else 9.0, "seed": seed, "rollout": True}
    compare(through_ppo_loss(ours, **batch), through_ppo_loss(theirs, **batch), **EXACT)


def test_gspo_beyond_verls_bound_on_a_sequences_ratio(monkeypatch):
    """Beyond e^10 verl holds the value where it is and has no gradient."""
    import verl_support

    made = verl_support.micro_batch

    def far(**batch):
        logp, entropy, data = made(**batch)
        data["old_log_probs"] -= 12.0
        data["advantages"] = -data["advantages"].abs()
        return logp, entropy, data

    monkeypatch.setattr(verl_support, "micro_batch", far)
    ours, theirs = (through_ppo_loss(actor(name)) for name in ("gac_gspo", "gspo"))
    assert float(theirs[0]) > 1e3
    compare(ours, theirs, alive=False, **EXACT)


@pytest.mark.parametrize("low", [0.2, 1.0, 10.0])
def test_cispo_with_and_without_a_lower_bound(low):
    ours, theirs = (actor(name, clip_ratio_low=low) for name in ("gac_cispo", "cispo"))
    compare(through_ppo_loss(ours, spread=1.0), through_ppo_loss(theirs, spread=1.0), **EXACT)


@pytest.mark.parametrize("name", SAME)
def test_float32(name, sapo_heeds_the_mode):
    if name == "gac_sapo":
        sapo_heeds_the_mode("token-mean")
    batch = {"dtype": torch.float32, "info": GLOBAL}
    compare(through_ppo_loss(actor(name), **batch), through_ppo_loss(actor(SAME[name]), **batch), rtol=1e-5, atol=1e-7)


def called(name, config, **batch):
    """Our registered function itself: its loss, the gradient, and the tensors it was given."""
    logp, _, data = micro_batch(**batch)
    given = {"old_log_prob": data["old_log_probs"], "advantages": data["advantages"]}
    logp = torch.nn.functional.pad(logp.detach(), (0, 100))[: ROWS * LENGTH].view(ROWS, LENGTH).requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(name)(
        **given, log_prob=logp, response_mask=data["response_mask"], loss_agg_mode="seq-mean-token-mean", config=config,
        rollout_is_weights=None,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), logp, data, metrics


@pytest.mark.parametrize("gate", ["erf", "arctan", "softsign"])
def test_the_other_gates(gate):
    loss, logp, data, metrics = called("gac_sapo", actor("gac_sapo", gate=gate, tau_pos=10.0, tau_neg=12.0))
    u = (logp.detach() - data["old_log_probs"]).exp() - 1.0
    tau = torch.where(data["advantages"] > 0, 10.0, 12.0)
    value = {
        "erf": lambda: 1 + (torch.pi / 2) ** 0.5 / tau * torch.erf(tau * u / 2**0.5),
        "arctan": lambda: 1 + torch.atan(tau * u) / tau,
        "softsign": lambda: 1 + u / torch.sqrt(1 + (tau * u) ** 2),
    }[gate]()
    mask = data["response_mask"]
    counted = mask.sum(-1) > 0
    rows = (-data["advantages"] * value * mask).sum(-1)[counted] / mask.sum(-1)[counted]
    torch.testing.assert_close(loss, rows.mean())
    assert 0 < metrics["gac/effective_update_ratio"] < 1


@pytest.mark.parametrize("name", ["gac_gspo", "gac_dfpo"])
def test_sequence_coupled_losses_are_the_packages(name):
    """GSPO's token form, where advantages are one a sequence, is GSPO; DFPO takes its groups from the settings."""
    settings = {"group_size": 3, "transform": "adv_orthogonal"} if name == "gac_dfpo" else {}
    loss, logp, data, metrics = called(name, actor(name, **settings))
    policy = gk.GSPO(0.2, 0.3) if name == "gac_gspo" else gk.DFPO("adv_orthogonal")
    batch = gk.TokenBatch.from_padded(
        data["responses"], data["response_mask"], advantages=data["advantages"], old_logprobs=data["old_log_probs"],
        groups=torch.arange(ROWS) // 3,
    )  # fmt: skip
    twin = logp.detach().clone().requires_grad_()
    expected = gk.hybrid_loss(twin, batch, gk.HybridObjective(policy), 0.0)
    expected.loss.backward()
    torch.testing.assert_close(loss, expected.loss.detach())
    torch.testing.assert_close(logp.grad, twin.grad)
    if name == "gac_dfpo":
        assert metrics["gac/cancellation_residual"] == pytest.approx(float(expected.metrics["cancellation_residual"]))


def test_verls_sapo_ignores_the_mode_and_ours_does_not():
    theirs = [through_ppo_loss(actor("sapo", loss_agg_mode=mode))[0] for mode in MODES]
    ours = [through_ppo_loss(actor("gac_sapo", loss_agg_mode=mode))[0] for mode in MODES]
    assert len({float(loss) for loss in theirs}) == 1 and len({float(loss) for loss in ours}) == len(MODES)


@pytest.mark.parametrize(
    ("name", "settings", "info", "message"),
    [
        ("gac_grpo", {"clip_ratio_c": 1.3}, LOCAL, "clip_ratio_c must exceed 1 \\+ clip_ratio_high"),
        ("gac_sapo", {"tau_pos": 0.0}, LOCAL, "tau_pos"),
        ("gac_sapo", {"hybrid": True}, LOCAL, "integrations.verl_hybrid"),
        ("gac_dfpo", {}, LOCAL, "group_size"),
        ("gac_dfpo", {"group_size": 4}, LOCAL, "whole groups of 4"),
        ("gac_dfpo", {"group_size": 3, "shuffle": True}, LOCAL, "shuffle=False"),
        ("gac_dfpo", {"group_size": 3, "use_dynamic_bsz": True}, LOCAL, "use_dynamic_bsz=False"),
        ("gac_grpo", {}, {**GLOBAL, "batch_num_tokens": None}, "batch_num_tokens"),
        ("gac_grpo", {"loss_agg_mode": "seq-mean-token-sum"}, {**GLOBAL, "global_batch_size": None}, "global_batch_s"),
    ],
)
def test_what_is_not_supported_raises(name, settings, info, message):
    with pytest.raises(ValueError, match=message):
        through_ppo_loss(actor(name, **settings), info=info)


def test_unknown_aggregation_and_missing_config():
    logp = torch.zeros(2, 3)
    arguments = {"old_log_prob": logp, "log_prob": logp, "advantages": logp, "response_mask": logp.bool()}
    loss = core_algos.get_policy_loss_fn("gac_sapo")
    with pytest.raises(ValueError, match="loss_agg_mode must be one of"):
        loss(**arguments, loss_agg_mode="mean", config=actor("gac_sapo"))
    with pytest.raises(ValueError, match="config must be"):
        loss(**arguments)
    config = actor("gac_sapo")
    config.global_batch_info["world"] = 3
    with pytest.raises(ValueError, match=r"global_batch_info .* got world"):
        loss(**arguments, config=config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss_mode", "vanilla"), ("gate", "tanh"), ("transform", "max"), ("ratio", "sum"), ("group_size", 0),
        ("supervised", "gift"), ("supervised_aggregation", "mean"), ("mu", 1.5), ("controller", {"blend": 3.0}),
    ],
)  # fmt: skip
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=field if field != "controller" else "blend"):
        integration.GACPolicyLossConfig(**{field: value})


def test_settings_come_from_a_target():
    target = f"{integration.__name__}.GACPolicyLossConfig"
    made = omega_conf_to_dataclass({"_target_": target, "loss_mode": "gac_sapo", "gate": "erf", "mu": 0.25})
    assert type(made) is integration.GACPolicyLossConfig and (made.gate, made.mu) == ("erf", 0.25)
    assert made.get("clip_cov_ratio") == 0.0002  # verl's own fields are there
    assert pickle.loads(pickle.dumps(made)) == made  # Ray sends it to the workers


def test_verls_own_configuration_takes_them():
    """The overrides that the module's docstring shows, on the configuration that verl's trainer starts from."""
    import verl
    from hydra import compose, initialize_config_dir

    shown = [line.strip() for line in integration.__doc__.splitlines() if "actor_rollout_ref.actor." in line]
    shown = [line.split("  ")[0] for line in shown] + ["+actor_rollout_ref.actor.policy_loss.controller={prior: 0.3}"]
    assert len(shown) == 5
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        needed = ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"]
        config = compose("ppo_trainer", overrides=[*shown, *needed])
    made = pickle.loads(pickle.dumps(omega_conf_to_dataclass(config.actor_rollout_ref.actor)))
    settings = made.policy_loss
    assert (settings.loss_mode, settings.gate, settings.hybrid) == ("gac_sapo", "erf", True)
    assert integration.controller_config(settings.controller).prior == gk.ConstantPrior(0.3)


# The plugin ---------------------------------------------------------------------------------------------------
LOOK = """
import sys
import verl
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
print(sorted(name for name in POLICY_LOSS_REGISTRY if name.startswith("gac_")))
"""


def in_a_new_process(code, path, **environment):
    import os

    paths = os.pathsep.join([*map(str, path), str(ROOT), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def metadata(folder, value):
    info = folder / "gac_plugin_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gac-plugin-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[verl.plugins]\ngac_kernels = {value}\n")


def test_verl_loads_the_entry_point(tmp_path):
    line = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if "integrations.verl:" in line)
    metadata(tmp_path, line.split("=", 1)[1].strip().strip('"'))
    # Imported before verl, so that nothing is left to the import itself.
    out = in_a_new_process("import gac_kernels.integrations.verl" + LOOK, [tmp_path])
    assert out.splitlines()[-1] == str(sorted(integration.NAMES))


def test_verl_loads_the_external_modules():
    modules = ",".join(f"gac_kernels.integrations.{name}" for name in ("verl_hybrid", "verl_head"))
    code = LOOK + (
        "from gac_kernels.integrations import _verl_head; print(sorted(_verl_head._ORIGINALS))\n"
        "from verl.workers.engine_workers import ActorRolloutRefWorker as worker\n"
        "print(worker.init_model.of_gac_kernels)"
    )
    out = in_a_new_process(code, [], VERL_USE_EXTERNAL_MODULES=modules, VERL_USE_EXTERNAL_PLUGINS="none")
    assert out.splitlines()[-3:] == [str(sorted(integration.NAMES)), "['head', 'outputs', 'triton_head']", "True"]


def test_check_and_registered(monkeypatch):
    found = integration.check()
    assert found.status == "ok" and found.version and integration.registered()
    monkeypatch.delitem(core_algos.POLICY_LOSS_REGISTRY, "gac_sapo")
    assert not integration.registered()


def test_other_versions_are_refused(monkeypatch):
    from gac_kernels.integrations import _verl_loss

    monkeypatch.setattr(_verl_loss, "version_of", lambda name: "0.10.0")
    with pytest.raises(ImportError, match=r">= 0.9, < 0.10; found 0.10.0"):
        integration.register()
    monkeypatch.setattr(_verl_loss, "version_of", lambda name: None)
    with pytest.raises(ImportError, match="gac-kernels\\[verl\\]"):
        integration.register()
