"""Text files and JSON lines from anywhere: what is valid is read, what is not is named with its file and line."""

import json
import re

import pytest

from memlayers.config import ConfigError
from memlayers.train import texts
from memlayers.train.texts import MOST_BYTES, read_file, read_jsonl, text_ids


def write(folder, content: bytes | str, name="a.jsonl") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_only_a_newline_ends_a_json_line(tmp_path):
    odd = "one\u2028two\u2029three\u0085four"
    lines = [json.dumps({"text": odd}, ensure_ascii=False), "", json.dumps({"text": "b\x0c\x1c"}), " "]
    assert read_jsonl([write(tmp_path, "\r\n".join(lines))]) == [{"text": odd}, {"text": "b\x0c\x1c"}]


def test_the_mark_before_a_text_is_no_text(tmp_path):
    assert read_jsonl([write(tmp_path, b'\xef\xbb\xbf{"text": "a"}\n')]) == [{"text": "a"}]
    assert read_file(write(tmp_path, b"\xef\xbb\xbfa house", "a.txt")) == "a house"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"text": "a"}\n{"text": "\xff"}', r"line 2 is not UTF-8 text"),
        (b'{"text": "a"}\n' + b"[" * 100_000, r"line 2 is not JSON .* nested too deep"),
        (b'{"text": ' + b"[" * 100_000, r"line 1 is not JSON .* nested too deep"),
        (b'{"text": "a", "n": NaN}', r"line 1 is not JSON \(NaN is no number"),
        (b'{"text": "a", "n": -Infinity}', r"line 1 is not JSON \(-Infinity is no number"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"line 1 is not JSON"),
        (b'{"text": 5}', r"line 1 needs the field text"),
        (b'{"text": ""}', r"line 1 needs the field text"),
        (b"[1]", r"line 1 needs the field text"),
        (b"null", r"line 1 needs the field text"),
        (b'{"text": "a\\ud800b"}', r"line 1 has half of a character in text"),
        (b"\n \n", r"is empty"),
        (b"", r"is empty"),
        ('{"text": "a"}'.encode("utf-16"), r"line 1 is not UTF-8"),
    ],
    ids=range(14),
)
def test_a_bad_line_is_named(tmp_path, content, told):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=f"data.files: {re.escape(path)}.*{told}"):
        read_jsonl([path])


def test_files_of_two_kinds(tmp_path):
    asked = json.dumps({"context": "a", "question": "b", "answer": "c"})
    paths = [write(tmp_path, '{"text": "a"}\n'), write(tmp_path, asked, "b.jsonl")]
    with pytest.raises(
        ConfigError, match=r"b\.jsonl, line 1 has other fields than the first line of .*a\.jsonl"
    ):
        read_jsonl(paths)


def test_a_line_without_end_is_not_read(tmp_path, monkeypatch):
    """A file of 50 MB in one line, sparse on disk; what is read of it is the limit."""
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.truncate(50_000_000)
    with pytest.raises(ConfigError, match=rf"long\.jsonl, line 2 has more than {MOST_BYTES:,} bytes"):
        read_jsonl([str(path)])
    monkeypatch.setattr(texts, "MOST_BYTES", 13)
    assert read_jsonl([write(tmp_path, '{"text": "a"}')]) == [{"text": "a"}]
    with pytest.raises(ConfigError, match="more than 13 bytes"):
        read_jsonl([write(tmp_path, '{"text": "ab"}')])


def test_a_text_that_is_no_text(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.files: .*a\.txt: not UTF-8"):
        read_file(write(tmp_path, b"a \xff", "a.txt"))
    with pytest.raises(ConfigError, match="is empty"):
        read_file(write(tmp_path, b"\xef\xbb\xbf \n", "a.txt"))


def test_a_row_without_text(tokenizer):
    for row in (None, 5, ["a"]):
        with pytest.raises(ConfigError, match=r"data\.text_field: a row holds .*, which is no text"):
            text_ids(tokenizer, row)


def test_a_long_text_is_tokenised_in_pieces(tokenizer, monkeypatch):
    text = "The grass is green. The sky is blue.\nThe sun is yellow. " * 20
    whole = text_ids(tokenizer, text)
    monkeypatch.setattr(texts, "PIECE", 100)
    assert "".join(texts._pieces(text)) == text and len(list(texts._pieces(text))) > 10
    assert "".join(texts._pieces("x" * 250)) == "x" * 250
    cut = text_ids(tokenizer, text)
    assert tokenizer.decode(cut) == tokenizer.decode(whole) and cut[0] == whole[0] and cut[-1] == whole[-1]
