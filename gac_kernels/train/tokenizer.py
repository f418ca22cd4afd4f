"""Tokenizers without a network: one token a character for the tiny model, the model's own for a local directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .directory import check_tokenizer, read_object, refused, told

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is pad, eos, unknown and the characters of ``texts`` in code point order."""
    characters = sorted(set().union(*map(set, texts)))
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a local model directory; padding falls back on eos, which a mask hides anyway.

    Raises:
        ValueError: naming ``--model`` and the file, if it can't be read, asks for code of its own, or has no
            end-of-sequence token, without which no completion ever ends.
    """
    check_tokenizer(directory)
    file = directory / "tokenizer.json"
    with told(file if file.is_file() else directory, "the tokenizer can't be loaded"):
        tokenizer = _tokenizer_class(directory).from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None:
        raise refused(directory / "tokenizer_config.json", "names no eos token; a completion could not end")
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_class(directory: Path) -> type[PreTrainedTokenizerFast] | type[AutoTokenizer]:
    """PreTrainedTokenizerFast where the directory asks for it by name, else AutoTokenizer.

    AutoTokenizer of transformers 5 overrules such a directory for some model types: beside a Qwen2 model, a tokenizer
    of one's own is silently rebuilt as Qwen2's, with another splitting of the text and every space lost.
    """
    file = directory / "tokenizer_config.json"
    if file.is_file() and (directory / "tokenizer.json").is_file():
        named = read_object(file).get("tokenizer_class")
        if named in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast
    return AutoTokenizer
