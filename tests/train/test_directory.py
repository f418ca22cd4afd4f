"""Model directories as people have them and as an attacker would write them: read, or refused in one line that names
--model and the file; nothing that they hold is ever run."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers as tf
from small_runs import small

from gac_kernels.cli import main
from gac_kernels.train.directory import check_directory
from gac_kernels.train.model import build_model, load_model, save_model
from gac_kernels.train.tasks import ArithmeticTask
from gac_kernels.train.tokenizer import character_tokenizer, load_tokenizer

TOKENIZER = character_tokenizer(ArithmeticTask(eval_size=1).texts())
SIZES = {
    "vocab_size": len(TOKENIZER), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def saved(directory, model, tokenizer=TOKENIZER):
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("good") / "m", tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)))


@pytest.fixture
def directory(good, tmp_path):
    return shutil.copytree(good, tmp_path / "m")


def change(directory, file, **values):
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def build(directory):
    return build_model(small(model=directory), ArithmeticTask(eval_size=1))


def test_a_good_directory_is_read_and_its_weights_are_those_of_the_file(good):
    model, tokenizer = build(good)
    want = tf.LlamaForCausalLM.from_pretrained(good, local_files_only=True).state_dict()
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab() and not model.training


def setting(file, **values):
    return lambda directory: change(directory, file, **values)


def put(file, content):
    return lambda directory: (directory / file).write_bytes(content)


def deep(value):
    for _ in range(30):
        value = {"text_config": [value]}
    return value


def fifo(directory):
    (directory / "generation_config.json").unlink()
    os.mkfifo(directory / "generation_config.json")


def loop(directory):
    (directory / "a.json").symlink_to(directory / "b.json")
    (directory / "b.json").symlink_to(directory / "a.json")


def folder(directory):
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").mkdir()


def pickled(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")


def index(**places):
    def edit(directory):
        (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return edit


def without_head(directory):
    shape = tf.LlamaConfig(**SIZES)
    shutil.rmtree(directory)
    saved(directory, tf.LlamaForSequenceClassification(shape))


def more_tokens(directory):
    tokenizer = character_tokenizer(ArithmeticTask(eval_size=1).texts())
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(directory)


def other(kind, config, **sizes):
    def edit(directory):
        shutil.rmtree(directory)
        saved(directory, kind(config(vocab_size=len(TOKENIZER), **sizes)))

    return edit


CODE = "code of a model directory is never run"
ODD = {
    "auto_map": (setting("config.json", auto_map={"AutoConfig": "evil.C"}), "config.json", CODE),
    "auto_map of a tokenizer": (setting("tokenizer_config.json", auto_map=["e.T"]), "tokenizer_config.json", CODE),
    "auto_map far inside": (setting("config.json", x=deep({"auto_map": {"A": "o/r--e.C"}})), "config.json", CODE),
    "auto_map elsewhere": (setting("generation_config.json", auto_map={"A": "e.C"}), "generation_config.json", CODE),
    "python": (put("modeling_my.py", b"raise SystemExit"), "modeling_my.py", CODE),
    "custom generate": (lambda d: (d / "custom_generate").mkdir(), "custom_generate", CODE),
    "kernel": (setting("config.json", attn_implementation="kernels-community/x"), "config.json", "hub of kernels"),
    "kernel, private": (setting("config.json", _attn_implementation="a/b@main:f"), "config.json", "hub of kernels"),
    "kernel, internal": (setting("config.json", _attn_implementation_internal="a/b"), "config.json", "hub of kernels"),
    "kernel by parts": (setting("config.json", attn_implementation={"": "a/b"}), "config.json", "hub of kernels"),
    "kernel in a part": (setting("config.json", text_config={"attn_implementation": "a/b"}), "config.json", "hub"),
    "kernel by another name": (setting("config.json", attn_implementation="flash_attention_2"), "config.json", "hub"),
    "experts": (setting("config.json", experts_implementation="deepgemm"), "config.json", "hub of kernels"),
    "kernels": (setting("config.json", use_kernels=True), "config.json", CODE),
    "quantised": (setting("config.json", quantization_config={"quant_method": "mxfp4"}), "config.json", "quantised"),
    "other settings": (setting("config.json", configuration_files=["config.9.json"]), "config.json", "further files"),
    "other weights": (setting("config.json", transformers_weights="w.bin"), "config.json", "model.safetensors alone"),
    "unknown tokenizer": (setting("tokenizer_config.json", tokenizer_class="Evil"), "tokenizer_config.json", "'Evil'"),
    "tokenizer's class a list": (setting("tokenizer_config.json", tokenizer_class=["x"]), "tokenizer_config.json", "x"),
    "tokenizer's class in config": (setting("config.json", tokenizer_class="Evil"), "config.json", "'Evil'"),
    "a list": (put("config.json", b"[]"), "config.json", "expected a JSON object, got list"),
    "broken": (put("tokenizer_config.json", b"{x"), "tokenizer_config.json", "is not valid JSON: JSONDecodeError"),
    "deep": (put("generation_config.json", b"[" * 100_000), "generation_config.json", "RecursionError"),
    "not text": (put("config.json", b"\xff\xfe{"), "config.json", "UnicodeDecodeError"),
    "no type": (setting("config.json", model_type=None), "config.json", "model_type must be a string, got None"),
    "unknown type": (setting("config.json", model_type="mine"), "config.json", "mine"),
    "no layers": (setting("config.json", num_hidden_layers=-1), "config.json", "num_hidden_layers must be an int >= 1"),
    "width a string": (setting("config.json", hidden_size="16"), "config.json", "hidden_size must be an int >= 1"),
    "heads": (setting("config.json", num_attention_heads=3), "config.json", "the model can't be loaded"),
    "smaller vocabulary": (setting("config.json", vocab_size=5), "config.json", "sizes are not those of the weights"),
    "more layers": (setting("config.json", num_hidden_layers=2), "config.json", "the weights lack model.layers.1"),
    "encoder-decoder": (setting("config.json", is_encoder_decoder=True), "config.json", "encoder-decoder"),
    "classifier": (without_head, "config.json", "the weights lack lm_head.weight"),
    "adapter": (put("adapter_config.json", b"{}"), "adapter_config.json", "adapter"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json", "there is no such file"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json", "there is no such file"),
    "broken tokenizer": (put("tokenizer.json", b"{}"), "tokenizer.json", "the tokenizer can't be loaded"),
    "no eos": (setting("tokenizer_config.json", eos_token=None), "tokenizer_config.json", "no eos token"),
    "eos not in the model": (setting("tokenizer_config.json", eos_token="<new>"), "tokenizer.json", "eos '<new>' = 17"),
    "pad not in the model": (more_tokens, "tokenizer.json", "pad '[PAD]' = 17"),
    "eos a string": (setting("generation_config.json", eos_token_id="x"), "generation_config.json", "eos_token_id"),
    "eos beyond": (setting("generation_config.json", eos_token_id=[1, 99]), "generation_config.json", "got 99"),
    "odd generation": (setting("generation_config.json", temperature=0.5), "generation_config.json", "do_sample"),
    "no generation": (setting("generation_config.json", max_new_tokens=-1), "generation_config.json", "but is -1"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors", "there is no such file"),
    "truncated": (lambda d: os.truncate(d / "model.safetensors", 5000), "model.safetensors", "no whole safetensors"),
    "no header": (put("model.safetensors", b"\xff" * 64), "model.safetensors", "no whole safetensors"),
    "pickle": (pickled, "pytorch_model.bin", "reading a pickle runs what it says"),
    "shard missing": (index(w="model-2.safetensors"), "model.safetensors.index.json", "'model-2.safetensors'"),
    "shard outside": (index(w="../m/x.safetensors"), "model.safetensors.index.json", "of this directory"),
    "shard a number": (index(w=3), "model.safetensors.index.json", "of this directory, got 3"),
    "shard lacks": (index(w="model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors", "lacks w"),
    "fifo": (fifo, "generation_config.json", "is a FIFO, expected a file"),
    "loop": (loop, "a.json", "can't be read"),
    "folder": (folder, "tokenizer.json", "is a folder, expected a file"),
    "recurrent": (
        other(tf.RwkvForCausalLM, tf.RwkvConfig, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2),
        "config.json", "reads padding on the left as text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_directory_is_refused_in_one_line_that_names_the_file(directory, name, capfd):
    edit, file, says = ODD[name]
    edit(directory)
    with pytest.raises(ValueError, match="model") as error:
        build(directory)
    text = str(error.value)
    assert text.startswith(f"model (--model): {directory / file}: ") and says in text and "\n" not in text, text
    assert "REPORT" not in capfd.readouterr().err


def test_every_command_ends_in_exit_2_and_one_line(directory, tmp_path, capsys):
    change(directory, "config.json", auto_map={"AutoModelForCausalLM": "evil.M"})
    commands = (["train", "--output", str(tmp_path / "o")], ["validate", "--smoke"], ["overhead", "--seconds", "0"])
    for command in commands:
        assert main([*command, "--model", str(directory)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and f"--model): {directory / 'config.json'}: auto_map" in lines[0], lines


def test_code_does_not_run_even_past_the_check(directory, monkeypatch):
    """The second lock: what transformers is told, should the first one miss a place."""
    trace = directory / "trace"
    code = (
        f"open({str(trace)!r}, 'w')\nfrom transformers import *\nclass C(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    (directory / "evil.py").write_text(code)
    change(directory, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})
    monkeypatch.setattr("gac_kernels.train.model.check_directory", lambda directory: None)
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    with pytest.raises(ValueError, match="contains custom code"):
        load_model(directory, torch.float32)
    config = tf.LlamaConfig(**SIZES).to_dict() | {"auto_map": {}}
    (directory / "config.json").write_text(json.dumps(config))
    change(directory, "tokenizer_config.json", tokenizer_class="EvilTok", auto_map={"AutoTokenizer": [None, "evil.T"]})
    monkeypatch.setattr("gac_kernels.train.tokenizer.check_tokenizer", lambda directory: None)
    with pytest.raises(ValueError, match="contains custom code"):
        load_tokenizer(directory)
    assert not trace.exists()


def test_a_kernel_that_a_config_names_is_not_asked_for(directory, monkeypatch):
    asked = []
    fake = types.ModuleType("kernels")
    fake.get_kernel = lambda *args, **kw: asked.append(args)
    monkeypatch.setitem(sys.modules, "kernels", fake)
    change(directory, "config.json", attn_implementation="kernels-community/x")
    with pytest.raises(ValueError, match="hub of kernels"):
        load_model(directory, torch.float32)
    assert not asked


def test_fewer_layers_than_the_weights_have_are_refused_and_other_weights_are_told(directory):
    shape = tf.LlamaConfig(**(SIZES | {"num_hidden_layers": 3}))
    model = tf.LlamaForCausalLM(shape)
    model.value_head = torch.nn.Linear(16, 1)
    saved(directory, model)
    with pytest.warns(UserWarning, match=r"no place for: value_head.bias, value_head.weight"):
        load_model(directory, torch.float32)
    change(directory, "config.json", num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"more layers than .*: model\.layers\.2\..* and 6 more"):
        load_model(directory, torch.float32)


def test_links_to_files_elsewhere_are_followed(directory, tmp_path):
    """A cache of models is made of them."""
    blob = tmp_path / "blob"
    (directory / "model.safetensors").rename(blob)
    (directory / "model.safetensors").symlink_to(blob)
    check_directory(directory)


@pytest.mark.parametrize(
    ("kind", "config", "sizes"),
    [
        (tf.GPT2LMHeadModel, tf.GPT2Config, {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}),
        (tf.BloomForCausalLM, tf.BloomConfig, {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
        (tf.MambaForCausalLM, tf.MambaConfig, {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}),
    ],
    ids=["learned positions", "alibi", "recurrent, with a mask"],
)
def test_models_that_heed_the_mask_pass(directory, kind, config, sizes):
    other(kind, config, eos_token_id=1, pad_token_id=0, bos_token_id=None, **sizes)(directory)
    assert type(build(directory)[0]) is kind


def test_weights_that_are_not_finite_are_refused(directory):
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    saved(directory, model)
    with pytest.raises(ValueError, match="log-probs are not finite"):
        build(directory)


def test_a_full_disk_names_the_directory(good, tmp_path, monkeypatch):
    model, tokenizer = build(good)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "file" / "model")):
        save_model(model, tokenizer, tmp_path / "file" / "model", model.state_dict())
    from safetensors import SafetensorError

    def full(*args, **keywords):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match=f"{tmp_path / 'out'}: .*No space left") as error:
        save_model(model, tokenizer, Path(tmp_path / "out"), model.state_dict())
    assert isinstance(error.value.__cause__, SafetensorError)


def test_weights_in_several_files_are_read(directory):
    model = tf.LlamaForCausalLM.from_pretrained(directory, local_files_only=True)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="4KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    want = model.state_dict()
    assert all(value.equal(want[name]) for name, value in build(directory)[0].state_dict().items())


def test_overhead_refuses_sequences_longer_than_the_model(directory, capsys):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "eos_token_id": 1, "bos_token_id": None}
    other(tf.GPT2LMHeadModel, tf.GPT2Config, **sizes)(directory)
    assert main(["overhead", "--seconds", "0", "--model", str(directory)]) == 2
    assert "--prompt and --response must fit the model's 8 positions" in capsys.readouterr().err
