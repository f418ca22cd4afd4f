"""A GRPO step of TRL, loss and backward, with and without our head: seconds and peak memory at V = 151,936, on a CPU.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/trl_step.py --dtype fp32 bf16

Contestants, each a ``GRPOTrainer`` on two layers of Qwen2-0.5B's width with the same micro-batch:
    logits   log-probs and entropy from the model's logits by TRL's own functions, as TRL did before it had a fused head
    trl      TRL's fused head, as it comes
    ours     ``attach(trainer)``: TRL's loss, our head
    hybrid   ``attach(trainer, mu=0.0)``: our head and loss

Each lives in a process of its own, so that its peak memory is its own; they take turns in random order every round, one
runs at a time. Seconds are the process's own CPU time where it has one thread, else wall time: other work on the
machine then counts less. Memory is the resident set's high-water mark over a step beyond what stood before it, which is
the model and the inputs: the gradients of the parameters count. All must agree on loss and gradient norm before
anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

CONTESTANTS = ("logits", "trl", "ours", "hybrid")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = 32
AGREE = {"fp32": 1e-4, "bf16": 5e-2}  # relative; in bfloat16 the peers' logits, or their gradients, are rounded


class Step:
    """One contestant's trainer and micro-batch."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.trainer = make_trainer(options)
        if name == "logits":
            self.trainer._get_per_token_logps_and_entropies = from_logits
        elif name != "trl":
            from gac_kernels.integrations.trl import attach

            attach(self.trainer, mu=0.0 if name == "hybrid" else None)
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        draw = torch.Generator().manual_seed(0)
        shape = (options.sequences, options.completion)
        self.inputs = {
            "prompt_ids": torch.randint(options.vocabulary, (options.sequences, PROMPT), generator=draw),
            "completion_ids": torch.randint(options.vocabulary, shape, generator=draw),
            "prompt_mask": torch.ones(options.sequences, PROMPT, dtype=torch.long),
            "completion_mask": torch.ones(shape, dtype=torch.long),
            "advantages": torch.randn(options.sequences, generator=draw),
            "num_items_in_batch": torch.tensor(float(options.sequences * options.completion)),
        }

    def run(self) -> dict[str, float]:
        """Seconds, peak bytes beyond those before, loss and gradient norm of one step."""
        self.trainer.model.zero_grad(set_to_none=True)
        gc.collect()
        release_heap()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = memory("VmRSS")
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.trainer._compute_loss(self.trainer.model, dict(self.inputs))
        loss.backward()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak = memory("VmHWM") - before
        parts = [value.grad.float().norm() for value in self.trainer.model.parameters() if value.grad is not None]
        norm = torch.stack(parts).norm().item()
        return {"wall": wall, "cpu": cpu, "peak": peak, "loss": loss.item(), "norm": norm}


def from_logits(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """What TRL's trainer computes here, from logits."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    outputs = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep + 1)
    logits = outputs.logits[:, :-1]
    with torch.no_grad():
        entropy = entropy_from_logits(logits)
    return selective_log_softmax(logits, input_ids[:, -logits_to_keep:]), entropy, None


def make_trainer(options: argparse.Namespace) -> Any:
    """A GRPOTrainer whose model has no more than two layers below its head."""
    import pyarrow as pa
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from gac_kernels.train.tokenizer import character_tokenizer

    tokenizer = character_tokenizer(["abc"])
    shape = Qwen2Config(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=2 * options.hidden,
        num_hidden_layers=2, num_attention_heads=options.hidden // 64, num_key_value_heads=options.hidden // 64,
        max_position_embeddings=PROMPT + options.completion, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    settings = GRPOConfig(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=options.sequences, report_to=[], use_cpu=True,
        num_generations=options.sequences, max_completion_length=options.completion, gradient_checkpointing=False,
        bf16=False, loss_type="grpo",
    )  # fmt: skip
    return GRPOTrainer(
        model=Qwen2ForCausalLM(shape).to(DTYPES[options.dtype[0]]), reward_funcs=lambda completions, **_: [0.0],
        args=settings, train_dataset=Dataset(pa.table({"prompt": ["a", "b"]}), fingerprint="two"),
        processing_class=tokenizer,
    )  # fmt: skip


def memory(name: str) -> int:
    """Bytes, of /proc/self/status."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def release_heap() -> None:
    """Give what the allocator keeps for later back to the system, that a step's pages count in that step."""
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)


class Process:
    """A contestant in a process of its own, which takes a step when told to."""

    def __init__(self, name: str, dtype: str, options: argparse.Namespace) -> None:
        numbers = [f"--{key}={getattr(options, key)}" for key in ("sequences", "completion", "hidden", "vocabulary")]
        command = [sys.executable, __file__, "--contestant", name, "--dtype", dtype, *numbers]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                result: dict[str, float] = json.loads(line)
                return result
        raise RuntimeError(f"contestant {self.name} ended with status {self.process.wait()}")

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def serve(name: str, options: argparse.Namespace) -> None:
    step = Step(name, options)
    for _ in sys.stdin:
        print(json.dumps(step.run()), flush=True)


def measure(dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record a contestant."""
    processes = [Process(name, dtype, options) for name in options.contestants]
    try:
        first = {process.name: process.step() for process in processes}  # warms up as well
        check(first, AGREE[dtype])
        rounds: dict[str, list[dict[str, float]]] = {process.name: [] for process in processes}
        order = random.Random(0)
        for _ in range(options.rounds):
            for process in order.sample(processes, len(processes)):
                rounds[process.name].append(process.step())
    finally:
        for process in processes:
            process.end()
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    base = [result[clock] for result in rounds["trl" if "trl" in rounds else options.contestants[0]]]
    return [
        {
            "contestant": name, "dtype": dtype, "clock": clock, "rounds": options.rounds,
            "seconds": statistics.median(result[clock] for result in results),
            "low": min(result[clock] for result in results), "high": max(result[clock] for result in results),
            "ratio": statistics.median(b / result[clock] for b, result in zip(base, results, strict=True)),
            "peak_mib": statistics.median(result["peak"] for result in results) / 2**20,
        }
        for name, results in rounds.items()
    ]  # fmt: skip


def check(results: dict[str, dict[str, float]], tolerance: float) -> None:
    """SystemExit where contestants do not compute the same."""
    reference = next(iter(results.values()))
    for name, result in results.items():
        for key in ("loss", "norm"):
            if abs(result[key] - reference[key]) > tolerance * max(abs(reference[key]), 1e-3):
                raise SystemExit(f"{name} computes another {key}: {result[key]:.6g}, expected {reference[key]:.6g}")


def main() -> None:
    """Measure, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--completion", type=int, default=128, help="tokens a completion")
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        serve(options.contestant, options)
        return
    records = []
    print(f"{'dtype':6s} {'contestant':10s} {'seconds':>8s} {'from':>7s} {'to':>7s} {'trl / x':>7s} {'peak MiB':>9s}")
    for dtype in options.dtype:
        for r in measure(dtype, options):
            records.append(r)
            print(
                f"{r['dtype']:6s} {r['contestant']:10s} {r['seconds']:8.2f} {r['low']:7.2f} {r['high']:7.2f} "
                f"{r['ratio']:7.2f} {r['peak_mib']:9.0f}",
                flush=True,
            )
    about = {
        "date": date.today().isoformat(), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(), "load": os.getloadavg()[0], "tokens": options.sequences
        * options.completion, "hidden": options.hidden, "vocabulary": options.vocabulary,
    }  # fmt: skip
    print(json.dumps({"about": about, "records": records}))


if __name__ == "__main__":
    main()
