"""Files of problems as tools write them: read, or refused by file, line and field."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re

import pytest

from gac_kernels.train.problems import read_problems
from gac_kernels.train.tasks import JsonlTask

RECORDS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
TEXT = "\n".join(map(json.dumps, RECORDS))
LINES = TEXT.encode()


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "user.jsonl"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize(
    "content",
    [
        codecs.BOM_UTF8 + LINES,
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        LINES.replace(b"\n", b"\r\n") + b"\r\n",
        b"\n \t\n" + LINES.replace(b"\n", b"\n\n\n"),
        json.dumps(RECORDS).encode(),
        codecs.BOM_UTF8 + json.dumps(RECORDS, indent=1).encode(),
        LINES.replace(b"\n", b"\n" + codecs.BOM_UTF8),  # files joined by `cat`
    ],
    ids=["bom", "utf-16", "utf-16, big endian", "crlf", "blank lines", "array", "array, indented", "joined"],
)
def test_every_way_of_writing_it_is_the_same_file(written, content):
    assert [(e.prompt, e.answer) for e in read_problems(written(content))] == [
        (r["prompt"], r["answer"]) for r in RECORDS
    ]


def test_lines_end_at_line_feeds_alone(written):
    """JSON may hold U+2028, U+2029 and U+0085 as they are; to `str.splitlines` they end a line."""
    prompt = "a\u2028b\u2029c\x85d"
    path = written(json.dumps({"prompt": prompt, "answer": "1"}, ensure_ascii=False).encode() + b"\n" + LINES)
    assert read_problems(path)[0].prompt == prompt


@pytest.mark.parametrize("number", ["2", "2.0", "-0.50", "1e3", "1E-3", "12345678901234567890"])
def test_a_number_for_an_answer_is_kept_as_it_is_written(written, number):
    example = read_problems(written(f'{{"prompt": "p", "answer": {number}}}'.encode()))[0]
    assert example.answer == number
    task = JsonlTask(written(f'{{"prompt": "p", "answer": {number}}}\n'.encode() + LINES), eval_size=1)
    assert task.reward(example, f"so it is {number}") == 1.0 and task.reward(example, "so it is 7") == 0.0


def test_further_fields_are_kept(written):
    line = {"prompt": "p", "answer": "a", "id": 7, "level": "hard", "tags": [1, {"x": 2.5}], "source": None}
    example = read_problems(written(json.dumps(line).encode()))[0]
    assert example.fields == {"id": 7, "level": "hard", "tags": [1, {"x": 2.5}], "source": None}
    assert example.where.endswith("user.jsonl, line 1")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"prompt": "a"}', "field 'answer' is missing"),
        ('{"answer": "a"}', "field 'prompt' is missing"),
        ('{"prompt": "a", "answer": null}', "field 'answer' must be text or a number, got null"),
        ('{"prompt": "a", "answer": true}', "field 'answer' must be text or a number, got true (in quotes, \"true\""),
        ('{"prompt": "a", "answer": NaN}', "field 'answer' must be text or a number that is finite, got nan"),
        ('{"prompt": "a", "answer": ["3"]}', "field 'answer' must be text or a number, got list"),
        ('{"prompt": 3, "answer": "3"}', "field 'prompt' must be a string, got int"),
        ('{"prompt": " ", "answer": "3"}', "field 'prompt' must not be empty"),
        ('{"prompt": "a", "answer": "..."}', "field 'answer' is punctuation alone, '...'"),
        ('{"prompt": "a", "answer": "*"}', "field 'answer' is punctuation alone, '*'"),
        ('{"prompt": "a", "answer": "$$"}', "field 'answer' is punctuation alone"),
        ('{"prompt": "a", "answer": "3", "demonstration": ["x"]}', "field 'demonstration' must be a string, got list"),
        ('{"prompt": "a", "answer": "3", "demonstrations": "x"}', "did you mean 'demonstration'?"),
        ('{"prompt": "a", "answer": "3", "Demonstration": "x"}', "did you mean 'demonstration'?"),
        ('{"prompt": "a", "answer": "2", "answer": "3"}', "key 'answer' stands twice"),
        ('{"prompt": "a", "answer": "2", "x": {"k": 1, "k": 2}}', "key 'k' stands twice"),
        ('{"prompt": "a\\u0000", "answer": "3"}', "field 'prompt' must be text, got a NUL character"),
        ('{"prompt": "a\\ud800", "answer": "3"}', "half a surrogate pair"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_malformed_line_names_file_line_and_field(written, line, says):
    path = written(b'{"prompt": "p", "answer": "a"}\n\n' + line.encode() + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: ") + ".*" + re.escape(says)):
        read_problems(path)


def test_an_item_of_an_array_is_named(written):
    path = written(json.dumps([*RECORDS, {"prompt": "a"}]).encode())
    with pytest.raises(ValueError, match=r"user\.jsonl, item 5: field 'answer' is missing"):
        read_problems(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(LINES, mtime=0), "is gzip; .* unpack"),
        (b"PK\x03\x04 and more", "is zip"),
        (b"PAR1 and more", "is Parquet"),
        (TEXT.encode("utf-32"), "is UTF-32"),
        (TEXT.encode("utf-16")[:-1], "not valid UTF-16"),
        (b"", "holds no problem"),
        (b"[]", "holds no problem"),
    ],
)
def test_what_is_no_text_is_named_with_what_to_do(written, content, says):
    path = written(content)
    with pytest.raises(ValueError, match=rf"{path}: .*{says}"):
        read_problems(path)


def test_folders_and_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match=r"pipe\.jsonl: expected a file, got a pipe"):
        read_problems(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="expected a file, got a folder"):
        read_problems(tmp_path)
