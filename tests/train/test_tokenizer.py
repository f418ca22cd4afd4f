"""The character tokenizer, and a tokenizer that comes with a user's model."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer, Qwen2Config

from gac_kernels.train.tokenizer import EOS, PAD, UNKNOWN, _tokenizer_class, character_tokenizer, load_tokenizer

TEXT = 'a1+ #\n\t"é😀'


def test_every_character_is_one_token_and_comes_back():
    tokenizer = character_tokenizer([TEXT, "1a"])
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT) and len(set(ids)) == len(set(TEXT))
    assert tokenizer.decode(ids) == TEXT
    assert len(tokenizer) == 3 + len(set(TEXT))


def test_special_tokens_are_no_characters_and_leave_the_text():
    tokenizer = character_tokenizer([TEXT])
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [PAD, EOS, UNKNOWN]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("Z")["input_ids"] == [2]
    ids = tokenizer("a1")["input_ids"]
    assert tokenizer.decode([0, 0, *ids, 1], skip_special_tokens=True) == "a1"


def test_the_vocabulary_does_not_depend_on_the_order_of_the_texts():
    assert character_tokenizer(["abc", "d"]).get_vocab() == character_tokenizer(["d", "cab"]).get_vocab()


def test_a_saved_tokenizer_is_read_back_as_it_was(tmp_path):
    tokenizer = character_tokenizer([TEXT])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert loaded.decode(loaded(TEXT)["input_ids"]) == TEXT


def test_a_tokenizer_of_ones_own_stays_beside_a_qwen2_model(tmp_path):
    """AutoTokenizer puts Qwen2's own in its place, which drops the spaces: nothing fails, the model just unlearns."""
    tokenizer = character_tokenizer([TEXT])
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_a_directory_that_names_a_tokenizer_of_a_model_leaves_it_to_auto_tokenizer(tmp_path):
    character_tokenizer([TEXT]).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "Qwen2Tokenizer"}))
    assert _tokenizer_class(tmp_path) is AutoTokenizer
    assert _tokenizer_class(tmp_path / "nothing") is AutoTokenizer


def test_a_tokenizer_without_eos_is_refused_and_one_without_pad_pads_with_eos(tmp_path):
    tokenizer = character_tokenizer(["ab"])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no-pad")
    assert load_tokenizer(tmp_path / "no-pad").pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no-eos")
    with pytest.raises(ValueError, match="no eos token"):
        load_tokenizer(tmp_path / "no-eos")
