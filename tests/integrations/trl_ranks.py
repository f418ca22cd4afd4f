"""What two ranks of torchrun do: every scenario in one process group, for starting TRL costs more than a scenario does.

    torchrun --nproc-per-node 2 trl_ranks.py DIRECTORY SCENARIO ...

Each rank saves what it saw; ``test_trl_distributed.py`` compares.
"""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.trainer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl.trainer.utils import add_fused_lm_head
from trl_support import LETTERS, curve, sft_trainer, tiny_model, trainer

import gac_kernels as gk
from gac_kernels.integrations import _trl_head, _trl_sft
from gac_kernels.integrations.trl import attach, attach_sft
from gac_kernels.train.tokenizer import character_tokenizer

LOSSES = ("sapo", "grpo", "dapo", "dr_grpo", "cispo")
LAYOUTS = ("root", "resharded", "tail", "alone")
HEADS = ("trl", "logprobs", "loss")
TOKENS = 16  # that count, in the batch of the sharded models


class Watch(TrainerCallback):
    """mu before every step, to the bit."""

    def __init__(self):
        self.mu, self.attached = [], None

    def on_step_begin(self, *args, **kwargs):
        self.mu.append(self.attached.mu.clone())


PLAIN = {"optim": "sgd", "learning_rate": 0.1}


def losses(directory):
    """Stock TRL and ours with mu = 0 and demonstrations that so have no weight."""
    results = {}
    for kind in LOSSES:
        for name in ("stock", "hybrid", "head")[: 3 if kind == "dapo" else 2]:
            results[kind, name] = five_steps(directory / kind / name, kind, name, **PLAIN)
    return results


def adam(directory):
    """The same with TRL's default optimizer, and stock TRL in float64 too, its log-probs by a head that can do so."""
    names = ("stock", "hybrid", "float64")
    return {
        (kind, name): five_steps(directory / kind / name, kind, name) for kind in ("dapo", "dr_grpo") for name in names
    }


def five_steps(directory, kind, name, **settings):
    settings |= {"loss_type": kind, "epsilon_high": 5.0 if kind == "cispo" else 0.28}
    made = trainer(directory, dtype=torch.float64 if name == "float64" else torch.float32, **settings)
    if name != "stock":
        attach(made, **({"mu": 0.0, "demonstrations": "demonstration"} if name == "hybrid" else {}))
    made.train()
    return curve(made)


def controlled(directory):
    """A run of six steps, and one that takes up its checkpoint of three."""
    results = {}
    for name in ("whole", "resumed"):
        watch = Watch()
        made = trainer(directory, max_steps=6, save_strategy="steps", save_steps=3, callbacks=[watch])
        controller = gk.GuidedAdaptiveController(gk.ControllerConfig(update_every=1))
        watch.attached = attach(made, demonstrations="demonstration", controller=controller)
        made.train(resume_from_checkpoint=None if name == "whole" else str(directory / "checkpoint-3"))
        results[name] = {
            "mu": [*watch.mu, controller.mu.clone()],
            "curve": curve(made),
            "state": copy.deepcopy(controller.state_dict()),
            "weights": {name: value.detach().clone() for name, value in made.model.named_parameters()},
        }
    return results


def supervised(directory):
    results = {}
    for name, options in (("stock", None), ("none", {"objective": gk.NLL("none")}), ("phi", {})):
        made = sft_trainer(directory / name, **PLAIN)
        if options is not None:
            attach_sft(made, **options)
        made.train()
        results[name] = curve(made)
    return results


def sharded(directory):
    """Of models in FSDP2's layouts: by how much the mean of two ranks' gradients is off one process's, or the error."""
    tokenizer = character_tokenizer([LETTERS, "="])
    torch.manual_seed(5)
    ids = torch.randint(3, len(tokenizer), (2, 1 + TOKENS // 2))
    own, results = ids[dist.get_rank() :][:1], {}
    for tied in (True, False):
        expected = gradients(tiny_model(tokenizer, tied=tied), ids, "trl")
        for layout in LAYOUTS if not tied else LAYOUTS[:-1]:
            for head in HEADS:
                model = tiny_model(tokenizer, tied=tied)
                shard(model, layout, tied)
                try:
                    found = gradients(model, own, head)
                except RuntimeError as error:
                    results[tied, layout, head] = str(error)
                    continue
                scale = {name: value.abs().max() for name, value in expected.items()}
                results[tied, layout, head] = max(
                    float((2 * found[name] - value).abs().max() / scale[name]) for name, value in expected.items()
                )
    return results


def shard(model, layout, tied):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if layout == "tail":  # as accelerate groups them
        embedding = [model.model.embed_tokens] if tied else []
        fully_shard([model.model.norm, *embedding, model.lm_head], mesh=mesh, reshard_after_forward=False)
    if layout == "alone":
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=layout == "resharded")


def gradients(model, ids, head):
    add_fused_lm_head(model)
    ours = {"trl": None, "logprobs": _trl_head.Head, "loss": _trl_sft.Supervised(gk.NLL("none"), None)}[head]
    with nullcontext() if ours is None else _trl_head.our_head(ours):
        asked = model(input_ids=ids, labels=ids, fused_lm_head=True)
    (-asked.log_probs.sum() / TOKENS).backward()
    grads = {name: value.grad for name, value in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def main(directory, names):
    transformers.trainer.round = lambda value, digits=None: value  # the trainer logs its loss rounded
    results = {}
    for name in names:  # the first starts the process group: a trainer's does
        results[name] = SCENARIOS[name](directory / name)
    torch.save(results, directory / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


SCENARIOS = {scenario.__name__: scenario for scenario in (losses, adam, controlled, supervised, sharded)}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
