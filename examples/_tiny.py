"""What the examples of trainers share: a tiny model and its tokenizer, made here, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from gac_kernels.train.tokenizer import character_tokenizer


def tiny_model(characters: Iterable[str], seed: int = 0) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """A two-layer Qwen2 with one token a character, and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer(characters)
    shape = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(shape), tokenizer
