"""The policy: a tiny Qwen2 built here, or the causal language model in a local directory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from .config import TrainConfig
from .directory import check_directory, read_object, refused, some, told
from .padding import check_padding
from .rollouts import Codec
from .tasks import Task
from .tokenizer import character_tokenizer, load_tokenizer


def build_model(config: TrainConfig, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy in ``config.weights_dtype`` on ``config.device`` and its tokenizer.

    Dropout stays off in training as in sampling: with it, a token's log-prob would differ between two passes and the
    importance ratio would not be 1 on-policy.
    """
    dtype = config.weights_dtype
    tokenizer: PreTrainedTokenizerBase
    if config.model == "tiny":
        tokenizer = character_tokenizer(task.texts())
        return tiny_model(config, tokenizer).to(dtype).to(config.device).eval(), tokenizer
    directory = Path(config.model)
    check_directory(directory)
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, dtype).to(config.device).eval()
    _check_tokens(directory, model, tokenizer)
    with told(directory / "config.json", "the model can't be run"):
        check_padding(directory, model, tokenizer.pad_token_id)
    return model, tokenizer


def load_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model in a local directory.

    Raises:
        ValueError: naming ``--model`` and the file, where the directory is damaged, holds another kind of model, or
            could only be read by running something (see ``directory``).
    """
    check_directory(directory)
    generation = directory / "generation_config.json"
    if generation.is_file():  # what can't be saved with the trained model is told before it is trained
        with _quiet(), told(generation, "is not valid"):
            GenerationConfig.from_dict(read_object(generation)).validate(strict=True)
    with _quiet(), told(directory / "config.json", "the model can't be loaded"):
        model, found = AutoModelForCausalLM.from_pretrained(
            str(directory),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are told below, by name
            output_loading_info=True,
        )
    _check_loaded(directory, model, found)
    with _quiet(), told(directory / "config.json", "its settings of generation are not valid"):
        model.generation_config.validate(strict=True)
    return model


def _check_loaded(directory: Path, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Every weight of the model came from the directory, in its shape, and no layer was left behind."""
    path = directory / "config.json"
    if wrong := sorted(map(str, found["mismatched_keys"])):
        raise refused(path, f"the model's sizes are not those of the weights (name, theirs, its own): {some(wrong)}")
    if missing := sorted(found["missing_keys"]):
        raise refused(
            path,
            f"the weights lack {some(missing)} of {type(model).__name__}; expected a causal model with its head",
        )
    if errors := list(map(str, found["error_msgs"])):
        raise refused(path, f"weights could not be read: {some(errors)}")
    left = sorted(map(str, found["unexpected_keys"]))
    kinds = {re.sub(r"\d+", "*", name) for name in model.state_dict()}
    if layers := [name for name in left if re.sub(r"\d+", "*", name) in kinds]:
        raise refused(path, f"the weights hold more layers than the model that it describes: {some(layers)}")
    if left:
        warnings.warn(f"{directory}: weights that {type(model).__name__} has no place for: {some(left)}", stacklevel=2)


def _check_tokens(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every id that the tokenizer can give, and every id that ends a completion, has a row in the embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = {i: f"{token!r} = {i}" for token, i in tokenizer.get_vocab().items() if i >= rows}
    named = [
        f"{name} {beyond[i]}"
        for name in ("pad", "eos", "bos", "unk")
        if (i := getattr(tokenizer, f"{name}_token_id")) in beyond
    ]
    if beyond:
        raise refused(
            directory / "tokenizer.json",
            f"{len(beyond)} tokens lie beyond the model's embedding of {rows} rows: "
            f"{some(named or sorted(beyond.values()))}; resize it (model.resize_token_embeddings) and save both again",
        )
    with told(directory / "generation_config.json", "eos_token_id"):
        own = stop_tokens(model, tokenizer)
    for token in own:
        if not 0 <= token < rows:
            raise refused(directory / "generation_config.json", f"eos_token_id must be in [0, {rows}), got {token}")


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
    """Save the model with these weights, and its tokenizer: ``TrainConfig(model=directory)`` goes on from them.

    Raises:
        OSError: naming the directory, where it can't be written (no space left, no permission).
    """
    try:
        with _quiet():
            model.save_pretrained(directory, state_dict=weights)
            tokenizer.save_pretrained(directory)
    except Exception as error:  # safetensors has a kind of its own for a full disk, and neither names a file
        raise OSError(f"the trained model can't be saved in {directory}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The run shows its own progress, which transformers' bars would break; what its report of the weights warns of is
    said by :func:`_check_loaded` in one line."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those of the model's own generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = [] if own is None else [own] if isinstance(own, int) else own
    if not isinstance(own, (list, tuple)) or not all(isinstance(token, int) for token in own):
        raise TypeError(f"expected an int or a list of ints, got {own!r}")
    return sorted({tokenizer.eos_token_id, *own})


def positions_of(model: PreTrainedModel) -> int | None:
    """The most tokens that the model takes, as its config says; None where it says nothing."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def build_codec(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Codec:
    """Text to the ids that this model reads and back, with the length that it takes."""
    return Codec(tokenizer, stop_tokens(model, tokenizer), positions_of(model))
