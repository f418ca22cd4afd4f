"""The benchmark of the loss from logits: bytes, restored logits, a checker that sees errors at any vocabulary."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from triton_support import DEVICE

from gac_kernels import library, reference
from gac_kernels.bench import measure, peers, session
from gac_kernels.bench.case import MODES, Outputs
from gac_kernels.bench.cases import RowCase
from gac_kernels.bench.check import WrongResult, summation
from gac_kernels.bench.measure import copy_contestant, peak_bytes
from gac_kernels.bench.provider import POLICY, Unavailable, verify
from gac_kernels.bench.providers import PROVIDERS as ALL_PROVIDERS
from gac_kernels.bench.session import contestant, run_case
from gac_kernels.cli import main

PROVIDERS = ALL_PROVIDERS[RowCase.kernel]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPILED = ["gac-cpu", "gac-cpu-new"] if library.backends()["cpu"].startswith("cpu:") else []


# the case ---------------------------------------------------------------------------------------------------------
def test_bytes_are_one_read_and_one_write():
    case = RowCase(16, 300)
    assert case.leaf_bytes == 16 * 300 * 4
    assert case.bytes("full") == case.bytes("backward") == 2 * case.leaf_bytes
    assert case.bytes("forward") == case.leaf_bytes
    assert RowCase(16, 300, torch.bfloat16).bytes("full") == case.bytes("full") // 2


def test_masked_rows_are_written_but_not_read():
    case = RowCase(64, 30, ragged=True)
    assert 32 <= case.live_tokens < 64
    assert case.bytes("full") == (case.live_tokens + 64) * 30 * 4


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_every_kind_of_row(seed, ragged):
    """Both branches, both signs of A, ratios on both sides of 1, sure and unsure tokens: a slip in any shows."""
    case = RowCase(256, 50, seed=seed, ragged=ragged)
    batch, logp = case.batch, case._logprobs()[0]
    assert batch.mask.all() != ragged
    assert 0 < batch.is_expert.sum() < len(batch.is_expert)
    assert (batch.advantages[~batch.is_expert] > 0).any() and (batch.advantages[~batch.is_expert] < 0).any()
    ratio = (logp - batch.old_logprobs)[batch.mask & ~batch.is_expert[:, None]]
    assert (ratio > 0.1).any() and (ratio < -0.1).any()
    p = logp[batch.mask].exp()
    assert (p < 0.2).any() and (p > 0.8).any()


def test_a_released_case_is_the_same_again():
    case = RowCase(8, 30)
    first, right = case.leaf().detach().clone(), verify(PROVIDERS["eager"](case), case)
    case.release()
    assert not any(isinstance(value, torch.Tensor) for value in vars(case).values())
    assert torch.equal(case.leaf().detach(), first)
    assert verify(PROVIDERS["eager"](case), case) == right


def test_sizes_that_do_not_fit():
    for size in ((3, 8), (6, 8), (8, 1)):
        with pytest.raises(ValueError, match="rows must be NxV"):
            RowCase(*size)
    assert RowCase(12, 8).batch.num_sequences == 4 and RowCase(16, 8).batch.num_sequences == 8


@pytest.mark.parametrize("ragged", [False, True])
def test_the_answer_is_the_references(ragged):
    """Put together from chunks of rows, the float64 answer is that of the whole."""
    case = RowCase(24, 40, ragged=ragged)
    leaf = case.leaf().detach().double().requires_grad_()
    whole = reference.hybrid_loss_from_logits(leaf, case.batch, case.objective, case.mu.double())
    (gradient,) = torch.autograd.grad(whole.loss, leaf)
    want = case._expected["hybrid"]
    torch.testing.assert_close(want.result.loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(want.result.token_entropy, whole.token_entropy, rtol=1e-12, atol=0)
    torch.testing.assert_close(want.result.signals.rows, whole.signals.rows, rtol=1e-12, atol=1e-14)
    assert case._compare_gradient(gradient, want) < 1e-6  # of a bound for float32


def test_chunks_of_rows_change_nothing(monkeypatch):
    right = RowCase(24, 40)._expected["hybrid"]
    monkeypatch.setattr("gac_kernels.bench.cases.CHUNK", 5 * 40)
    case = RowCase(24, 40)
    assert torch.equal(case._expected["hybrid"].slope, right.slope)
    assert verify(PROVIDERS["eager"](case), case) <= 1.0


# right and wrong --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(4, 2), (24, 130), (16, 5000)], ids=str)
def test_everyone_computes_the_same(size, dtype, ragged):
    names = ["eager", "eager-plain", "eager-loss", "gac-reference", *COMPILED]
    found = run_case(RowCase(*size, dtype, ragged=ragged), names, modes=())
    assert not found.wrong and not found.absent
    assert list(found.errors) == names


def _spoiled(spoil):
    """The baseline with one thing wrong."""

    def build(case):
        right = PROVIDERS["eager"](case)
        return replace(right, forward=lambda leaf: spoil(right.forward(leaf), leaf))

    return build


def _with_gradient(change):
    """The loss as it is, its gradient by the logits changed."""

    def spoil(outputs, leaf):
        class Changed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, logits, loss):
                (ctx.gradient,) = torch.autograd.grad(outputs.loss, leaf, retain_graph=True)
                return loss.detach().clone()

            @staticmethod
            def backward(ctx, grad):
                return change(ctx.gradient.clone()) * grad, None

        return outputs._replace(loss=Changed.apply(leaf, outputs.loss))

    return spoil


def _one_element(gradient):
    gradient[1, 0, 3] *= 1.001  # the first row of a sequence is never masked
    return gradient


def _one_masked_row(gradient):
    gradient[-1, -1, 0] = 1e-12
    return gradient


SPOILT = {
    "loss off by 1e-4": lambda o, _: o._replace(loss=o.loss + 1e-4),
    "gradient off by 1e-4": _with_gradient(lambda g: g * (1 + 1e-4)),
    "gradient of one place off": _with_gradient(_one_element),
    "gradient of the target missing": _with_gradient(lambda g: g.clamp(min=0.0)),
    "gradient of sequences swapped": _with_gradient(lambda g: g.flip(0)),
    "gradient nan": _with_gradient(lambda g: g * torch.nan),
    "gradient of a masked row": _with_gradient(_one_masked_row),
    "log-prob off": lambda o, _: o._replace(logprobs=o.logprobs + 1e-4),
    "entropy off": lambda o, _: o._replace(entropy=o.entropy + 1e-3),
    "entropy of masked rows": lambda o, _: o._replace(entropy=o.entropy.where(o.entropy != 0, 0.1)),
    "signals without p squared": lambda o, _: o._replace(rows=torch.cat([o.rows[:, :10], 0 * o.rows[:, 10:]], 1)),
    "signals off by 1e-3": lambda o, _: o._replace(rows=o.rows * (1 + 1e-3)),
    "a metric off": lambda o, _: o._replace(metrics=o.metrics | {"approx_kl": o.metrics["approx_kl"] * 1.01}),
}


@pytest.mark.parametrize("what", SPOILT)
def test_checker_sees(what):
    case = RowCase(32, 200, ragged=True)
    with pytest.raises(WrongResult, match=r"^eager: "):
        verify(_spoiled(SPOILT[what])(case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checker_sees_a_wrong_gradient_at_a_large_vocabulary(dtype):
    """Where bounds must allow for long sums, a slope that is off by a part in a hundred still shows."""
    case = RowCase(8, 150_000, dtype)
    with pytest.raises(WrongResult, match="gradient is"):
        verify(_spoiled(_with_gradient(lambda g: g * (1.01 if dtype == torch.bfloat16 else 1.001)))(case), case)


def test_bounds_follow_the_length_of_the_sums():
    assert summation(torch.float32, 1) < summation(torch.float32, 32000) < 2e-5
    assert summation(torch.float64, 32000) < 1e-13
    assert summation(torch.bfloat16, 100) == summation(torch.float32, 100)  # sums are in float32
    case = RowCase(8, 100)
    assert case.logprob_error == max(summation(case.dtype, 100), 2 * case._answers[1]) < 1e-5
    assert case.entropy_error == pytest.approx(2 * case.logprob_error * (1 + math.log(100)))


def test_a_wrong_provider_is_not_timed(monkeypatch):
    wrong = _spoiled(SPOILT["gradient of one place off"])
    monkeypatch.setitem(PROVIDERS, "eager-loss", lambda case: replace(wrong(case), name="eager-loss"))
    found = run_case(RowCase(32, 200), ["eager", "eager-loss"], budget_seconds=0)
    assert set(found.wrong) == {"eager-loss"} and "gradient is" in found.wrong["eager-loss"]
    assert {record.provider for record in found.records} == {"eager", "copy"}


def test_a_provider_out_of_memory_is_absent(monkeypatch):
    def hungry(case):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setitem(PROVIDERS, "eager-loss", hungry)
    found = run_case(RowCase(8, 20), ["eager", "eager-loss"], budget_seconds=0)
    assert found.absent == {"eager-loss": "needs more memory than there is: CUDA out of memory"}
    assert found.find("eager", "full") is not None


# in place ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gac-reference", *COMPILED[:1]])
def test_logits_are_restored_before_every_call(name, mode):
    case = RowCase(16, 300)
    before = case.leaf().detach().clone()
    one = contestant(PROVIDERS[name](case), case, mode)
    results = []
    for _ in range(3):
        with one.context():
            state = one.prepare()
            results.append(one.run(state))
    if mode == "full":
        for _, (gradient,) in results:  # in place: one buffer, written three times with the same
            assert gradient.data_ptr() == case._work.data_ptr()
    assert not torch.equal(case._work, before)  # it was written over, so that restoring has something to do
    assert torch.equal(case.leaf().detach(), before)


def test_everyone_starts_from_the_same_memory():
    case = RowCase(16, 300)
    assert case.leaf().data_ptr() == case.leaf().data_ptr() != case._inputs[0].data_ptr()
    case.leaf().detach().zero_()
    source, target = case.copy_buffers(case.bytes("full") // 2)
    copy = copy_contestant(source, target, case.leaf)
    copy.prepare()
    assert torch.equal(source, target)  # the copy, too, meets restored logits
    assert source.nbytes + target.nbytes == case.bytes("full")
    target.zero_()
    copy.run(None)
    assert torch.equal(case._work, case._inputs[0])


@pytest.mark.skipif(not COMPILED, reason="the compiled module is not built")
def test_memory_in_units_of_the_logits():
    case = RowCase(64, 4000)

    def extra(name):
        return peak_bytes(contestant(PROVIDERS[name](case), case, "full")) / case.leaf_bytes

    assert extra("gac-cpu") < 0.02
    assert 1.0 <= extra("gac-cpu-new") < 1.02
    assert extra("eager") >= extra("eager-loss") > 2.0


# peers ------------------------------------------------------------------------------------------------------------
def test_absent_peers_say_why(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "installed_version", lambda name: None)
    names = ["gac-triton", "gac-cuda-new", "liger", "liger-chunked", "verl", "trl"]
    found = run_case(RowCase(4, 8), names, budget_seconds=0)
    assert set(found.absent) == set(names) and found.records == []
    assert "interpreter" in found.absent["gac-triton"]
    assert found.absent["trl"] == "trl is not installed"


def test_liger_takes_no_cpu_tensors():
    pytest.importorskip("liger_kernel")
    for name, why in (("liger", "CPU"), ("liger-chunked", "hidden states")):
        with pytest.raises(Unavailable, match=why):
            PROVIDERS[name](RowCase(4, 8))


@pytest.mark.parametrize("ragged", [False, True])
def test_liger_computes_our_policy_loss(monkeypatch, ragged):
    """In Triton's interpreter: the formula is in question, and how the benchmark calls it."""
    pytest.importorskip("liger_kernel.transformers.grpo_loss")
    monkeypatch.setattr(peers, "_on_gpu", lambda case: True)
    case = RowCase(16, 300, device=DEVICE, ragged=ragged)
    provider = PROVIDERS["liger"](case)
    assert provider.outputs == POLICY and verify(provider, case) <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "module"), [("trl", "trl.trainer.utils"), ("verl", "verl.utils.torch_functional")])
def test_peers_compute_our_outputs(name, module, dtype):
    pytest.importorskip(module)
    case = RowCase(16, 300, dtype, ragged=True)
    assert verify(PROVIDERS[name](case), case) <= 1.0


def test_policy_only_peers_get_every_row():
    """Masked rows would be work that a peer is spared: demonstrations become rollouts, and the answer with them."""
    case = RowCase(32, 60)
    right = replace(PROVIDERS["eager-loss"](replace(case)), outputs=POLICY)
    with pytest.raises(WrongResult):  # it computes the mixture
        verify(right, case)
    assert not case.policy_batch.is_expert.any() and torch.equal(case.policy_batch.mask, case.batch.mask)

    def forward(leaf):
        return Outputs(reference.hybrid_loss_from_logits(leaf, case.policy_batch, case.objective, 0.0).loss)

    assert verify(replace(right, forward=forward), case) <= 1.0


def test_a_provider_with_a_longer_leaf():
    """As Liger's, which wants one row more a sequence: prepared outside the time, compared without that row."""
    case, longer = RowCase(16, 40), torch.zeros(8, 3, 40)
    right = PROVIDERS["eager"](case)

    def prepare(leaf):
        longer[:, :2] = leaf.detach()
        return longer.detach().requires_grad_()

    provider = replace(right, prepare=prepare, forward=lambda leaf: right.forward(leaf[:, :2]))
    assert verify(provider, case) <= 1.0
    one = session.contestant(provider, case, "full")
    assert one.run(one.prepare())[1][0].shape == longer.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(4, 2), (64, 32000), (256, 151936)], ids=str)
def test_on_a_gpu(size, dtype):
    names = ["gac-triton", "gac-triton-new", "eager"]
    case = RowCase(*size, dtype, "cuda", ragged=True)
    found = run_case(case, names, budget_seconds=0)
    assert not found.wrong and set(found.errors) == set(names)
    if size[1] > 2:  # else per-row results weigh as much as the logits
        assert found.find("gac-triton", "full", "memory").p50 * 2**20 < 0.1 * case.leaf_bytes


# the command ------------------------------------------------------------------------------------------------------
def test_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measure, "keep_heap_warm", lambda: "heap untouched")
    chart, table = tmp_path / "out.png", tmp_path / "out.csv"
    args = ["bench", "--kernel", "logits", "--shape", "16x64", "8x128", "--dtype", "fp32", "bf16", "--seconds", "0"]
    args += ["--providers", "eager,eager-loss,gac-reference", "--ragged", "--json"]
    assert main([*args, "--plot", str(chart), "--csv", str(table)]) == 0
    records = json.loads(capsys.readouterr().out.splitlines()[-1])["records"]
    names = {"gac-reference", "eager", "eager-loss"}
    sizes = {f"{size}{dtype} ragged" for size in ("16x64", "8x128") for dtype in ("", " bfloat16")}
    keys = {(r["kernel"], r["provider"], r["mode"], r["metric"], r["x"]) for r in records}
    assert keys == {("logits_loss", p, "full", "speed", x) for p in names | {"copy"} for x in sizes} | {
        ("logits_loss", p, "full", "memory", x) for p in names for x in sizes
    }
    for record in records:
        case = RowCase(*map(int, record["x"].split()[0].split("x")), ragged=True)
        assert record["bytes"] == case.bytes("full") // (2 if "bfloat16" in record["x"] else 1)
        assert (record["floor_ratio"] is None) == (record["metric"] == "memory")
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert len(table.read_text().splitlines()) == 1 + len(records)


def test_both_kernels_in_one_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measure, "keep_heap_warm", lambda: "heap untouched")
    monkeypatch.setattr(RowCase, "default_sizes", ((8, 32),))
    monkeypatch.setattr("gac_kernels.bench.cases.TokenCase.default_sizes", ((4, 8),))
    chart = tmp_path / "out.png"
    assert main(["bench", "--providers", "eager,gac-reference", "--seconds", "0", "--plot", str(chart)]) == 0
    out = capsys.readouterr().out
    titles = [line.split(",")[0] for line in out.splitlines() if "; floor" in line]
    assert titles == ["token_loss 4x8 float32"] * 3 + ["logits_loss 8x32 float32"]
    assert "x input" in out and chart.stat().st_size > 1000
