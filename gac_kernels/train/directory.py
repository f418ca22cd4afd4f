"""A model directory, looked through before transformers reads it: nothing that it holds may run, and what is damaged is
named.

Transformers asks on standard input whether a directory's Python code may run, fetches and imports kernels that a config
names, reads pickled weights, and follows an adapter to its base model. None of that happens here: such a directory is
refused. Every refusal is a ValueError that names ``--model`` and the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JSON_LIMIT = 1 << 26  # bytes; the largest index of shards is some 10 MB
_NO_CODE = "code of a model directory is never run"
# Implementations that transformers holds itself. It gets the others ("flash_attention_2", "deepgemm", "owner/kernel")
# from a hub of kernels where the package `kernels` is installed.
_IMPLEMENTATIONS = (None, "eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")
_REFUSED_KEYS = {
    "auto_map": f"names Python code, and {_NO_CODE}; take the key and the code out if transformers knows this model",
    "custom_generate": f"names Python code, and {_NO_CODE}",
    "use_kernels": f"asks for kernels from a hub, and {_NO_CODE}",
    "kernel_config": f"asks for kernels from a hub, and {_NO_CODE}",
    "quantization_config": "is of quantised weights, which are not trained here; give the model in its own precision",
    "compression_config": "is of compressed weights, which are not trained here; give the model in its own precision",
    "configuration_files": "names further files of settings; only config.json is read",
    "transformers_weights": "names a file of weights; they are read from model.safetensors alone",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OTHER_WEIGHTS = (".h5", ".msgpack", ".gguf", ".onnx", ".npz")
_CONFIGS = ("config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json", ".index.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", ".model", ".tiktoken")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "n_layer", "n_embd", "n_head")


def refused(path: Path, why: str) -> ValueError:
    """The error that a model directory is refused by."""
    return ValueError(f"model (--model): {path}: {why}")


@contextmanager
def told(path: Path, doing: str) -> Iterator[None]:
    """Whatever goes wrong inside, as one line that names ``--model`` and the file.

    What a directory holds reaches many readers (json, tokenizers, safetensors, a model's own constructor), each with
    exceptions of its own. The first stays as the cause.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("model (--model): "):
            raise
        text = " ".join(str(error).split())
        text = text if len(text) <= 400 else f"{text[:400]} ..."
        raise refused(path, f"{doing}: {type(error).__name__}" + (f": {text}" if text else "")) from error


def check_directory(directory: Path) -> None:
    """Raise ValueError where the directory is no causal language model that can be read without running anything."""
    with told(directory, "can't be listed"):
        names = sorted(os.listdir(directory))
    for name in names:
        _check_entry(directory / name)
    if "adapter_config.json" in names:
        raise refused(
            directory / "adapter_config.json",
            "is of an adapter (LoRA), and the model that it belongs to is not here; merge the two, save the result and "
            "give that directory",
        )
    if "config.json" not in names:
        raise refused(directory / "config.json", "there is no such file; expected a directory of save_pretrained")
    for name in names:
        if name.endswith(_CONFIGS):
            _check_settings(directory / name, read_object(directory / name))
    _check_model(directory / "config.json")
    _check_weights(directory, names)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory."""
    with told(path, "can't be read"):
        if (size := path.stat().st_size) > JSON_LIMIT:
            raise refused(path, f"holds {size} bytes, expected at most {JSON_LIMIT}")
        text = path.read_bytes().decode()
    with told(path, "is not valid JSON"):
        value = json.loads(text)
    if not isinstance(value, dict):
        raise refused(path, f"expected a JSON object, got {type(value).__name__}")
    return value


def _check_entry(path: Path) -> None:
    """A file or folder: opening a FIFO would wait for ever, a device may never end."""
    with told(path, "can't be read"):
        mode = path.stat().st_mode
    named_as_file = path.suffix in (".json", ".safetensors", ".model", ".jinja", ".txt")
    if not stat.S_ISREG(mode) and (named_as_file or not stat.S_ISDIR(mode)):
        kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"))
        kind = next((name for test, name in kinds if test(mode)), "device")
        raise refused(path, f"is a {kind}, expected a file")
    if path.suffix in (".py", ".so") or path.name == "custom_generate":
        raise refused(path, f"is code, and {_NO_CODE}; take it out if transformers knows this model by itself")


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """No setting, however deep, may name code, a kernel or weights from elsewhere."""
    rest: list[Any] = [settings]
    while rest:
        value = rest.pop()
        rest.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        for key, held in value.items() if isinstance(value, dict) else ():
            if key in _REFUSED_KEYS and held:
                raise refused(path, f"{key} {_REFUSED_KEYS[key]}")
            if key.strip("_").removesuffix("_internal").endswith("implementation"):
                for named in held.values() if isinstance(held, dict) else (held,):
                    _check_implementation(path, key, named)


def _check_implementation(path: Path, key: str, named: Any) -> None:
    if not isinstance(named, (str, type(None))) or named not in _IMPLEMENTATIONS:
        raise refused(
            path,
            f"{key} must be one of {', '.join(filter(None, _IMPLEMENTATIONS))}, got {named!r}: others are code that is "
            "fetched from a hub of kernels",
        )


def _check_model(path: Path) -> None:
    settings = read_object(path)
    if not isinstance(settings.get("model_type"), str):
        raise refused(path, f"model_type must be a string, got {settings.get('model_type')!r}")
    if settings.get("is_encoder_decoder"):
        raise refused(path, "is of an encoder-decoder; expected a causal language model")
    for name in _SIZES:
        size = settings.get(name, 1)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise refused(path, f"{name} must be an int >= 1, got {size!r}")


def check_tokenizer(directory: Path) -> None:
    """Raise ValueError where the directory holds no tokenizer, or names one that transformers does not have."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not any(name.endswith(_VOCABULARIES) for name in os.listdir(directory)):
        raise refused(directory / "tokenizer.json", "there is no such file, and no vocabulary of another kind")
    for name in ("tokenizer_config.json", "config.json"):
        if not (directory / name).is_file():
            continue
        named = read_object(directory / name).get("tokenizer_class")
        if named is None or named in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            continue
        with told(directory / name, f"tokenizer_class {named!r} can't be loaded"):
            known = isinstance(named, str) and (
                tokenizer_class_from_name(named) or tokenizer_class_from_name(f"{named.removesuffix('Fast')}Fast")
            )
        if not known:
            raise refused(
                directory / name, f"tokenizer_class must name a tokenizer of transformers, got {named!r}; {_NO_CODE}"
            )


def _check_weights(directory: Path, names: list[str]) -> None:
    """Safetensors alone: unpickling runs what the file says. Every file of them is whole."""
    shards = {"model.safetensors": list[str]()}
    index = directory / "model.safetensors.index.json"
    if "model.safetensors" not in names:
        if index.name not in names:
            _refuse_weights(directory, names)
        shards = _shards(index, names)
    from safetensors import safe_open

    for name, wanted in shards.items():
        with told(directory / name, "is no whole safetensors file"), safe_open(directory / name, "pt") as weights:
            held = set(weights.keys())
        if missing := sorted(set(wanted) - held):
            raise refused(directory / name, f"lacks {some(missing)}, which {index.name} says it holds")


def _shards(index: Path, names: list[str]) -> dict[str, list[str]]:
    """The names of the weights in each shard."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise refused(index, f"weight_map must be an object from weights to files, got {type(places).__name__}")
    shards: dict[str, list[str]] = {}
    for weight, name in places.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or name not in names:
            raise refused(
                index, f"weight_map must name .safetensors files of this directory, got {name!r} for {weight}"
            )
        shards.setdefault(name, []).append(weight)
    return shards


def _refuse_weights(directory: Path, names: list[str]) -> None:
    missing = "there is no model.safetensors"
    for name in names:
        if name.endswith(_PICKLES) or name.endswith(".bin.index.json"):
            raise refused(
                directory / name,
                "holds pickled weights, and reading a pickle runs what it says; expected model.safetensors "
                "(load the model where you trust it and save_pretrained it)",
            )
    for name in names:
        if name.endswith((*_OTHER_WEIGHTS, ".safetensors")):
            raise refused(directory / name, f"{missing}, and weights are read from nothing else")
    raise refused(directory / "model.safetensors", "there is no such file")


def some(names: list[str]) -> str:
    """The first three, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
