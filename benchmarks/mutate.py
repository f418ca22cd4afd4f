"""Whether the tests notice: one line of the package at a time is made wrong in a copy, and the fitting tests are run.

    python benchmarks/mutate.py [--compiled] [--jobs 2] [NAME ...]

A mutation is caught where the tests fail, and survives where they pass; the copy as it is must pass first. Without
``--compiled`` those of csrc are left out, for each compiles the module anew (some minutes on two cores).
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
REFERENCE, TRITON, MATH = "gac_kernels/reference", "gac_kernels/_triton", "csrc/math"
RULE = ("tests/test_controller.py",)
EDGES = ("tests/test_edges.py", "-k", "refreshes")
SIGNALS = ("tests/test_signals.py",)
LOSS = ("tests/test_token_loss.py", "-k", "reference and (policy or kl or aggregations or branches)")
ADVANTAGES = ("tests/test_advantages.py",)
COMPILED = ("tests/test_compiled.py",)


class Mutation(NamedTuple):
    file: str
    good: str
    bad: str
    tests: tuple[str, ...]
    failure: int | None = None  # the row of tests/README.md's first table that this is an instance of


MUTATIONS = {
    # The controller
    "mu* without sigma_r": Mutation(
        f"{REFERENCE}/controller.py", "(alpha * delta2 + sigma_r2) /", "(alpha * delta2) /", RULE
    ),
    "mu* with the branches swapped": Mutation(
        f"{REFERENCE}/controller.py", "(alpha * delta2 + sigma_r2) /", "(alpha * delta2 + sigma_s2) /", RULE
    ),
    "nan is taken in": Mutation(
        f"{REFERENCE}/controller.py", "present & (values >= 0) & (values < LARGEST_SIGNAL)",
        "present & ~(values < 0) & ~(values >= LARGEST_SIGNAL)", RULE,
    ),
    "the first value is smoothed": Mutation(
        f"{REFERENCE}/controller.py", "state.measured * config.ema_beta", "config.ema_beta", RULE
    ),
    "every step refreshes": Mutation(
        f"{REFERENCE}/controller.py", "(step.remainder(config.update_every) == 0)", "(step >= 0)", EDGES
    ),
    "mu is not capped": Mutation(
        f"{REFERENCE}/controller.py", "clamp_(-config.change_cap, config.change_cap)", "clamp_(-1.0, 1.0)", RULE
    ),
    "the blend the other way round": Mutation(
        f"{REFERENCE}/controller.py", "alpha=1.0 - config.blend", "alpha=config.blend", RULE
    ),
    "alpha is not bounded": Mutation(
        f"{REFERENCE}/controller.py", ".clamp_(target.low, target.high)", "", RULE
    ),
    "what was observed is kept": Mutation(
        "gac_kernels/controller.py", "self._step += 1\n        self._observed = []\n", "self._step += 1\n", RULE
    ),
    "a loaded step is forgotten": Mutation(
        "gac_kernels/controller.py", "self._step, self._observed, self._begun = step, [], ",
        "self._observed, self._begun = [], ", ("tests/test_controller_contract.py",),
    ),
    # Signals
    "trimmed at one end": Mutation(
        "gac_kernels/signals.py", "(place_S >= cut) & (place_S < count - cut)", "(place_S < count - cut)", SIGNALS
    ),
    "hidden noise divided by n": Mutation(
        "gac_kernels/signals.py", "(count * (count - 1))", "(count * count)", SIGNALS
    ),
    "dead sequences count": Mutation(
        "gac_kernels/signals.py", "live_S = rows[:, TOKENS] > 0", "live_S = rows[:, TOKENS] >= 0", SIGNALS
    ),
    "no floor": Mutation(
        "gac_kernels/signals.py", "_variance(rows[:, ADVANTAGE], policy_S).clamp(min=VARIANCE_FLOOR)",
        "_variance(rows[:, ADVANTAGE], policy_S)", SIGNALS,
    ),
    # Advantages
    "biased standard deviation": Mutation(
        f"{REFERENCE}/advantages.py", "others_S = (count_S - 1.0).clamp(min=1.0)", "others_S = count_S", ADVANTAGES
    ),
    "nan rewards count": Mutation(
        f"{REFERENCE}/advantages.py", "count_S = reduce(scored_S.double(), \"sum\")",
        "count_S = reduce(torch.ones_like(x_S), \"sum\")", ADVANTAGES,
    ),
    "equal rewards are divided": Mutation(
        f"{REFERENCE}/advantages.py", "scored_S & (highest_S > lowest_S)", "scored_S", ADVANTAGES, 23
    ),
    # Objectives and the reference of the loss
    "a clip of nan is taken": Mutation(
        "gac_kernels/objectives/checks.py",
        "not abs(value) <= sys.float_info.max or", "abs(value) > sys.float_info.max or",
        ("tests/test_objectives.py", "tests/test_bad_input.py"),
    ),
    "delta below the clip is taken": Mutation(
        "gac_kernels/objectives/policies.py", "1.0 + self.clip_high, open_low=True", "0.0, open_low=True",
        ("tests/test_objectives.py",),
    ),
    "the slope of SAPO without the ratio": Mutation(
        f"{REFERENCE}/terms.py", "slope_N = torch.where(alive_N, -adv_N * seen[\"update\"] * ratio_N, 0.0)",
        "slope_N = torch.where(alive_N, -adv_N * seen[\"update\"], 0.0)", LOSS,
    ),
    "the clip of negative advantages is lost": Mutation(
        f"{REFERENCE}/terms.py", "| ((adv_N < 0) & (ratio_N < 1.0 - low))", "", LOSS
    ),
    "rollout weights are dropped": Mutation(
        f"{REFERENCE}/terms.py", "loss_N, slope_N = tokens.rollout_N * loss_N, tokens.rollout_N * slope_N",
        "loss_N, slope_N = loss_N, slope_N", LOSS, 3
    ),
    "k3 with the other sign": Mutation(
        f"{REFERENCE}/terms.py", "d_N.exp() - d_N - 1.0, 1.0 - d_N.exp()", "d_N.exp() - d_N - 1.0, d_N.exp() - 1.0",
        LOSS, 14
    ),
    "the weighted KL loses the ratio's gradient": Mutation(
        f"{REFERENCE}/terms.py", "slope_N = ratio_N * (slope_N + torch.where(alive_N, value_N, 0.0))",
        "slope_N = ratio_N * slope_N", LOSS, 14
    ),
    "phi without 1 - p": Mutation(
        f"{REFERENCE}/terms.py", "-p_N * (1.0 - p_N) if phi", "-p_N if phi", LOSS
    ),
    "denominators are ignored": Mutation(
        f"{REFERENCE}/terms.py", "total = own if denominator is None else", "total = own if True else", LOSS, 4
    ),
    # A failure seen elsewhere, each
    "columns beyond the row count": Mutation(
        f"{TRITON}/row_pass.py",
        "read_tile(pointer, start, i, V, float(\"-inf\"), LANES, WIDTH).to(dtype)\n"
        "        x = finite(raw, CAPPED)\n        if CAPPED:",
        "read_tile(pointer, start, i, V, 0.0, LANES, WIDTH).to(dtype)\n"
        "        x = finite(raw, CAPPED)\n        if CAPPED:",
        ("tests/test_triton_rows.py", "-k", "vocabulary_sizes"), 1,
    ),
    "a mask that multiplies": Mutation(
        f"{REFERENCE}/terms.py", "return torch.where(policy_N, value.reshape(-1).to(dtype), 0.0)",
        "return value.reshape(-1).to(dtype) * policy_N", LOSS, 2,
    ),
    "every rank divides by its own tokens": Mutation(
        "gac_kernels/train/loop.py",
        "self.ranks.total(\n            batch.count(objective.aggregation, expert=False), "
        "batch.count(objective.supervised_aggregation, expert=True)\n        )",
        "(\n            batch.count(objective.aggregation, expert=False), "
        "batch.count(objective.supervised_aggregation, expert=True)\n        )",
        ("tests/train/test_ranks.py", "-k", "two_ranks_take"), 5,
    ),
    "an empty branch is divided by 0": Mutation(
        f"{REFERENCE}/terms.py", "torch.where(member_S, 1.0 / (per_S * torch.where(member_S, total, 1.0)), 0.0)",
        "member_S / (per_S * total)", ("tests/test_token_loss.py", "-k", "branches_without_tokens"), 6,
    ),
    "one upstream gradient for all": Mutation(
        "gac_kernels/ops/logits.py", "if slope is None else slope.contiguous(),",
        "if slope is None else slope[:1].expand_as(slope).contiguous(),",
        ("tests/test_logits_properties.py", "-k", "token_logprobs"), 7,
    ),
    "logits are overwritten in silence": Mutation(
        "gac_kernels/ops/logits.py", "if inplace and gradient is not None:", "if False:",
        ("tests/test_logits_properties.py", "-k", "in_place_is_seen"), 8,
    ),
    "a second backward scales twice": Mutation(
        "gac_kernels/ops/hidden.py", "ctx.spent = True", "ctx.spent = False",
        ("tests/test_hidden_loss.py", "-k", "one_backward"), 8,
    ),
    "-inf less -inf": Mutation(
        f"{TRITON}/row_pass.py", "tl.where(higher == float(\"-inf\"), 0.0, higher)", "higher",
        ("tests/test_triton_rows.py", "-k", "infinities"), 9,
    ),
    "sequences begin in 31 bits": Mutation(
        f"{TRITON}/memory.py", "return s * T.to(tl.int64), T.to(tl.int64)",
        "return (s * T).to(tl.int32).to(tl.int64), T.to(tl.int64)",
        ("tests/test_triton_kernels.py", "-k", "offsets_past"), 10,
    ),
    "strides are not looked at": Mutation(
        "gac_kernels/ops/inputs.py", "return value if value.is_contiguous() else value.contiguous()", "return value",
        ("tests/test_token_loss.py", "-k", "strided_inputs"), 11,
    ),
    "the cap has no derivative": Mutation(
        f"{REFERENCE}/rows.py", "return slope * (4.0 * e_NV / (1.0 + e_NV).square())",
        "return slope * torch.ones_like(e_NV)",
        ("tests/test_logits_loss.py", "-k", "reference and dtypes_and_transforms"), 12,
    ),
    "old log-probs at temperature 1": Mutation(
        "gac_kernels/train/loop.py", "module(rows, self.config.temperature)[0]", "module(rows, 1.0)[0]",
        ("tests/train/test_loop.py", "-k", "ratio_is_exactly_one"), 13,
    ),
    "the KL is clamped at its output": Mutation(
        f"{REFERENCE}/terms.py", "d_N = raw_N.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)\n", "d_N = raw_N\n",
        ("tests/test_token_loss.py", "-k", "reference and kl"), 14,
    ),
    "padding counts in a sequence's length": Mutation(
        f"{REFERENCE}/loss.py", "segments.sum((tokens.live_N & ~tokens.policy_N).to(dtype))",
        "segments.sum((~tokens.policy_N).to(dtype))",
        ("tests/test_token_loss.py", "-k", "reference and (aggregations or dead_rows)"), 15,
    ),
    "the head's gradient is summed in 16 bits": Mutation(
        "gac_kernels/products.py", "torch.addmm(total, a, b, beta=float(self.begun), out=total)",
        "total.copy_(torch.addmm(total, a, b, beta=float(self.begun)).to(self.head.weight.dtype))",
        ("tests/test_hidden_loss.py", "-k", "number_of_chunks"), 16,
    ),
    "autocast reaches the products": Mutation(
        "gac_kernels/linear.py", "torch.autocast(hidden.device.type, enabled=False)", "torch.enable_grad()",
        ("tests/test_hidden_citizenship.py", "-k", "autocast"), 17,
    ),
    "a sharded head is taken": Mutation(
        "gac_kernels/tensors.py", "if type(value) not in _ORDINARY:", "if False:",
        ("tests/test_hidden_citizenship.py", "-k", "sharded_head"), 19,
    ),
    "the compiler meets a host read": Mutation(
        "gac_kernels/ops/rows.py", "targets.numel() == 0 or torch.compiler.is_compiling()", "targets.numel() == 0",
        ("tests/test_citizenship_logits.py", "-k", "graph_break"), 20,
    ),
    "every length is compiled for": Mutation(
        f"{TRITON}/row_kernel.py", "do_not_specialize=[\"N\", \"B\", \"V\",", "do_not_specialize=[\"N\", \"B\",",
        ("tests/test_triton_aot.py", "-k", "a_new_length"), 21,
    ),
    "the padded length is a constant to the compiler": Mutation(
        "gac_kernels/schemas.py", "Tensor logprobs, Tensor mask, Tensor? cu_seqlens, SymInt seq_len",
        "Tensor logprobs, Tensor mask, Tensor? cu_seqlens, int seq_len",
        ("tests/test_citizenship.py", "-k", "new_length"), 21,
    ),
    "one temperature is spread without a copy": Mutation(
        "gac_kernels/ops/rows.py", ".expand(targets.shape).reshape(-1).contiguous()",
        ".expand(targets.shape).reshape(-1)", ("tests/test_edges.py", "-k", "one_temperature"), 11,
    ),
    "a sequence begins a token late": Mutation(
        f"{REFERENCE}/terms.py", "torch.bucketize(position_N, offsets[1:], right=True)",
        "torch.bucketize(position_N, offsets[1:])", ("tests/test_edges.py", "-k", "packed_sequence"), 22,
    ),
    "phi is differentiated": Mutation(
        f"{REFERENCE}/terms.py", "p_N = logp_N.detach().exp()\n    phi", "p_N = logp_N.exp()\n    phi",
        ("tests/test_token_loss.py", "-k", "written_slopes"), 23,
    ),
    "a target in no shard is a zero": Mutation(
        "gac_kernels/shards.py", "lost_N = owner_RN.sum(0) != 1", "lost_N = owner_RN.sum(0) > 1",
        ("tests/test_vocabulary_parallel.py", "-k", "in_no_shard"), 24,
    ),
    "an empty shard has mass": Mutation(
        "gac_kernels/shards.py", "torch.where(empty_RN, -torch.inf, transform.fall(top_RN, top_N) + log_sum_RN)",
        "transform.fall(top_RN, top_N) + log_sum_RN", ("tests/test_vocabulary_parallel.py", "-k", "without_mass"), 24,
    ),
    "a rank without signals is an error": Mutation(
        "gac_kernels/distributed.py", "[header for header in table if header[0] >= 0]", "table",
        ("tests/test_controller_distributed.py", "-k", "ranks_equal_one_process"), 25,
    ),
    "ranks with other settings are not told": Mutation(
        "gac_kernels/controller.py", "zlib.crc32(config.encode())", "0",
        ("tests/test_controller_distributed.py", "-k", "disagreements"), 26,
    ),
    "ranks that hold the same rows count as samples": Mutation(
        "gac_kernels/distributed.py", "rows = rows if first == rank else 0", "rows = rows + 0",
        ("tests/test_ranks_agree.py", "-k", "count_once"), 26,
    ),
    # csrc/math
    "C++: mu* without sigma_r": Mutation(
        f"{MATH}/controller.h", "(to[kAlpha] * distance + to[kSignals + 1]) /", "(to[kAlpha] * distance) /", RULE
    ),
    "C++: nan is taken in": Mutation(
        f"{MATH}/controller.h", "if (!(seen.value[i] >= 0 && seen.value[i] < kLargestSignal))",
        "if (seen.value[i] < 0 || seen.value[i] >= kLargestSignal)", RULE
    ),
    "C++: mu is not capped": Mutation(
        f"{MATH}/controller.h", "within(-c.change_cap, target - mu, c.change_cap)", "(target - mu)", RULE
    ),
    "C++: trimmed at one end": Mutation(
        f"{MATH}/controller.h", "static_cast<int64_t>(experts) - 2 * cut", "static_cast<int64_t>(experts) - cut", RULE
    ),
    "C++: the KL is not clamped": Mutation(
        f"{MATH}/terms.h", "const V d = clamp(raw, V(-20), V(20));", "const V d = raw;", COMPILED
    ),
    "C++: the clip of negative advantages is lost": Mutation(
        f"{MATH}/terms.h", "((advantage < V(0)) & ((ratio < low) | (ratio > bound)))",
        "((advantage < V(0)) & (ratio > bound))", COMPILED,
    ),
    "C++: the slope of SAPO without the ratio": Mutation(
        f"{MATH}/terms.h", "-advantage * (f.slope * r.value)", "-advantage * f.slope", COMPILED
    ),
    "C++: k2 without its half": Mutation(f"{MATH}/terms.h", "loss = d * d * V(0.5);", "loss = d * d;", COMPILED),
    "C++: dead tokens reach the ratio": Mutation(
        f"{MATH}/terms.h", "const V raw = select(live, logp - old, V(0));", "const V raw = logp - old;", COMPILED
    ),
    "C++: sqrt(pi) in the erf gate": Mutation(
        f"{MATH}/gates.h", "V(1.25331413731550025121)", "V(1.77245385090551602730)", COMPILED
    ),
}  # fmt: skip


def copy_tree(into: Path) -> None:
    """What git tracks, and the compiled modules."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modules = [str(path.relative_to(ROOT)) for path in (ROOT / "gac_kernels").glob("*.so")]
    for name in filter(None, [*names.split("\0"), *modules]):
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)
    where = "import gac_kernels, pathlib; print(pathlib.Path(gac_kernels.__file__).parents[1])"
    found = subprocess.run([sys.executable, "-c", where], cwd=into, capture_output=True, text=True, check=True).stdout
    if Path(found.strip()).resolve() != into.resolve():
        raise RuntimeError(f"the tests would import gac_kernels from {found.strip()}, not from the copy")


def tests_pass(tree: Path, tests: tuple[str, ...], compiled: bool) -> bool:
    """Whether they do; RuntimeError where they could not be run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    if compiled:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
        subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} could not be run:\n{done.stdout[-2000:]}{done.stderr[-1000:]}")
    return done.returncode == 0


def survives(name: str, tree: Path) -> bool:
    """Whether the tests pass with this mutation; the tree is then as it was."""
    mutation = MUTATIONS[name]
    path = tree / mutation.file
    text = path.read_text()
    if text.count(mutation.good) != 1:
        raise RuntimeError(
            f"{name!r}: {mutation.file} has {text.count(mutation.good)} of {mutation.good!r}, expected 1"
        )
    path.write_text(text.replace(mutation.good, mutation.bad))
    try:
        return tests_pass(tree, mutation.tests, mutation.file.startswith("csrc"))
    finally:
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *MUTATIONS], metavar="NAME", help="only these")
    parser.add_argument("--compiled", action="store_true", help="also those of csrc")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    names = given.names or [n for n, m in MUTATIONS.items() if given.compiled or not m.file.startswith("csrc")]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(given.jobs) as pool:
        trees: queue.Queue[Path] = queue.Queue()
        for job in range(given.jobs):
            copy_tree(Path(scratch, str(job)))
            trees.put(Path(scratch, str(job)))

        def one(name: str) -> tuple[str, bool, float]:
            tree, begin = trees.get(), time.monotonic()
            try:
                return name, survives(name, tree), time.monotonic() - begin
            finally:
                trees.put(tree)

        for tests in {MUTATIONS[name].tests for name in names}:
            if not tests_pass(Path(scratch, "0"), tests, False):
                print(f"mutate: {' '.join(tests)} fails without a mutation", file=sys.stderr)
                return 2
        alive = []
        for name, survived, seconds in pool.map(one, names):
            print(f"{'SURVIVED' if survived else 'caught':9}{seconds:6.0f} s  {name}", flush=True)
            alive += [name] * survived
    print(f"caught {len(names) - len(alive)} of {len(names)}")
    return bool(alive)


if __name__ == "__main__":
    sys.exit(main())
