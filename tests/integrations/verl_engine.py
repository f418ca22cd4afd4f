"""verl's FSDP engine with nothing sharded, on the CPU, around a tiny model: batches, forwards and steps are verl's."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional as verl_F
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding
from verl_support import LENGTH, PROMPT

VOCABULARY = 23


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
    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(transformer_impl, "get_device_name", lambda: "cpu")


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


def worker(config, *, fused=None):
    """What attach() takes: verl's TrainingWorker, as ActorRolloutRefWorker leaves it."""
    return SimpleNamespace(engine=Engine(tiny_model(fused)), loss_fn=partial(ppo_loss, config=config))


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
