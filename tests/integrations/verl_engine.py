"""verl's FSDP engine with nothing sharded, on the CPU, around a tiny model: batches, forwards and steps are verl's."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.utils import fsdp_utils
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional as verl_F
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding
from verl_support import LENGTH, PROMPT, actor

VOCABULARY = 23
ON_CPU = ((transformer_impl, "get_device_id"), (transformer_impl, "get_device_name"), (fsdp_utils, "get_device_id"))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """A process group of one rank, which verl's engines ask for."""
    path = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(path), 1), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def on_cpu(monkeypatch, one_rank):
    """verl asks for a CUDA device where there is none."""
    for module, name in ON_CPU:
        monkeypatch.setattr(module, name, lambda: "cpu")


def tiny_model(fused=None):
    class Model(Qwen2ForCausalLM):  # verl patches the class
        pass

    torch.manual_seed(0)
    model = Model(
        Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        )
    )  # fmt: skip
    if fused is not None:
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=fused)
    return model


class Engine(transformer_impl.FSDPEngineWithLMHead):
    """The parts of verl's engine's constructor that its forward, backward and step read."""

    def __init__(self, model):
        self.module, self.mode = model, "train"
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        self.engine_config = SimpleNamespace(
            entropy_checkpointing=False, entropy_from_logits_with_chunking=False,
            use_no_sync_for_gradient_accumulation=True,
        )  # fmt: skip
        self.optimizer_config = SimpleNamespace(clip_grad=1e9)
        self.ulysses_sequence_parallel_size, self.use_ulysses_sp, self.ulysses_device_mesh = 1, False, None
        self.pad_to_length, self.scaler, self._autocast_dtype, self._qat_enabled = False, None, torch.float32, False
        self.compute_entropy_from_logits = verl_F.entropy_from_logits
        self.saved = []

    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None, **kwargs):
        self.saved.append((str(local_path), global_step))

    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=True, **kwargs):
        self.saved.append(str(local_path))


def worker(config, *, fused=None, sharded=False):
    """What attach() takes: verl's TrainingWorker, as ActorRolloutRefWorker leaves it."""
    model = tiny_model(fused)
    if sharded:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in (*model.model.layers, model):
            fully_shard(layer, mesh=mesh)
    return SimpleNamespace(engine=Engine(model), loss_fn=partial(ppo_loss, config=config))


def step(made, data, **flags):
    """One optimizer step as TrainingWorker.train_batch takes it; losses and metrics of its micro-batches."""
    tu.assign_non_tensor(data, **flags)
    return made.engine.train_batch(data, loss_function=made.loss_fn)


def mini_batch(seed=0, rows=8, expert=(), micro=4, fused=False, entropy=False, reference=False):
    """A mini-batch as the trainer sends it to the actor."""
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, PROMPT + 1, (rows,), generator=g)
    responses = torch.randint(2, LENGTH + 1, (rows,), generator=g)
    live = torch.arange(LENGTH) < responses[:, None]
    attention = torch.cat([torch.arange(PROMPT) >= PROMPT - prompts[:, None], live], dim=1).long()
    ids = torch.randint(0, VOCABULARY, (rows, PROMPT + LENGTH), generator=g) * attention
    tensors = {
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(-1) - 1).clamp(min=0),
        "response_mask": live.long(),
        "advantages": torch.randn(rows, 1, generator=g).expand(rows, LENGTH) * live,
        "old_log_probs": -3.0 + 0.3 * torch.randn(rows, LENGTH, generator=g),
        "expert_mask": torch.tensor([row in expert for row in range(rows)]),
    }
    if reference:
        tensors["ref_log_prob"] = -3.0 + 0.3 * torch.randn(rows, LENGTH, generator=g)
    data = left_right_2_no_padding(tu.get_tensordict(tensors))
    return tu.assign_non_tensor(
        data, global_batch_size=rows, temperature=0.7, calculate_entropy=entropy, use_dynamic_bsz=False,
        micro_batch_size_per_gpu=micro, use_remove_padding=False, use_fused_kernels=fused, compute_loss=True,
    )  # fmt: skip


EXPERT, STEPS = (1, 4, 6), 3
RANKS = {  # the settings of each run, and whether its head is ours
    "logits": ({"loss_agg_mode": "token-mean"}, None),
    "fused": ({"loss_agg_mode": "seq-mean-token-mean", "supervised_aggregation": "seq-mean-token-sum"}, "torch"),
}


def several_steps(rank, ranks):
    """Per run: losses over ranks, gradients of the last step, mu after each step."""
    from gac_kernels.integrations.verl import attach, patch_head

    patch_head()
    seen = {}
    for name, (settings, fused) in RANKS.items():
        config = actor("gac_sapo", controller={"update_every": 1, "prior": 0.2}, **settings)
        made = worker(config, fused=fused, sharded=ranks > 1)
        controller, losses, mus = attach(made), [], []
        for index in range(STEPS):
            data = mini_batch(seed=index, expert=EXPERT, micro=2, fused=fused is not None)
            rows = [row for row in range(8) if row % ranks == rank]
            mine = data if ranks == 1 else tu.index_select_tensor_dict(data, rows)
            loss = torch.tensor(sum(step(made, mine)["loss"]))
            torch.distributed.all_reduce(loss)
            losses.append(loss / ranks)  # as verl logs it
            mus.append(controller.mu)
        gradients = [parameter.grad for parameter in made.engine.module.parameters()]
        gradients = [one.full_tensor() if ranks > 1 else one for one in gradients]
        seen[name] = (torch.stack(losses), gradients, torch.stack(mus))
    return seen


def one_of_two(rank, file):
    """A process of two, whose model FSDP2 shards."""
    for module, name in ON_CPU:
        setattr(module, name, lambda: "cpu")
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        torch.save(several_steps(rank, 2), f"{file}.{rank}")
    finally:
        torch.distributed.destroy_process_group()
