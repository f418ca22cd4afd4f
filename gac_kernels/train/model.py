"""The policy: a tiny Qwen2 built here, or the causal language model in a local directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from .config import TrainConfig
from .tasks import Task
from .tokenizer import character_tokenizer, load_tokenizer


def build_model(config: TrainConfig, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy in ``config.dtype`` on ``config.device`` and its tokenizer.

    Dropout stays off in training as in sampling: with it, a token's log-prob would differ between two passes and the
    importance ratio would not be 1 on-policy.
    """
    dtype = getattr(torch, config.dtype)
    tokenizer: PreTrainedTokenizerBase
    if config.model == "tiny":
        tokenizer = character_tokenizer(task.texts())
        model = tiny_model(config, tokenizer).to(dtype)
    else:
        tokenizer = load_tokenizer(Path(config.model))
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(config.model, local_files_only=True, dtype=dtype)
    return model.to(config.device).eval(), tokenizer


def tiny_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A Qwen2 of ``tiny_layers`` layers and width ``tiny_hidden``; its random weights depend on the seed alone."""
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.tiny_hidden,
        intermediate_size=2 * config.tiny_hidden,
        num_hidden_layers=config.tiny_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Qwen2ForCausalLM(shape)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, weights: dict[str, Tensor]
) -> None:
    """Save the model with these weights, and its tokenizer: ``TrainConfig(model=directory)`` goes on from them."""
    with _no_bars():
        model.save_pretrained(directory, state_dict=weights)
        tokenizer.save_pretrained(directory)


@contextmanager
def _no_bars() -> Iterator[None]:
    """The run shows its own progress; transformers' bars would break its lines."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those of the model's own generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({tokenizer.eos_token_id, *own})
