"""YAML files with overrides: values as people mean them, and errors that name the field."""

from __future__ import annotations

import pytest
from pydantic import Field

from memlayers.config import ConfigError, Strict
from memlayers.yaml_config import load_yaml


class Inner(Strict):
    rate: float = 1.0
    sizes: list[int] = Field([1, 2])


class Outer(Strict):
    name: str
    inner: Inner = Inner()
    more: dict[str, Inner] = Field({})


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name: a\ninner:\n  rate: 2e-3\n")
    return file


def test_scientific_numbers_are_numbers(path):
    assert load_yaml(path, [], Outer).inner.rate == 0.002


def test_overrides_reach_everywhere_and_the_last_wins(path):
    config = load_yaml(
        path,
        ["inner.rate=5e-1", "inner.sizes=[3, 4]", "inner.sizes.1=9", "more.x.rate=3.0", "name=b", "name=c=d"],
        Outer,
    )
    assert config.inner == Inner(rate=0.5, sizes=[3, 9])
    assert config.more["x"].rate == 3.0
    assert config.name == "c=d"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("inner.rat=1.0", r"inner\.rat: unknown field, did you mean 'rate'"),
        ("more.x.size=[1]", r"more\.x\.size: unknown field, did you mean 'sizes'"),
        ("inner.rate=fast", r"inner\.rate: "),
        ("inner.rate", "key.sub=value"),
        ("=3", "key.sub=value"),
        ("inner.rate.deep=1", r"inner\.rate\.deep: inner\.rate is 0\.002, which has no fields"),
        ("inner.sizes.7=1", r"inner\.sizes"),
        ("inner.sizes=[1", r"inner\.sizes: not valid YAML"),
        ("inner.rate=" + "1" * 5000, r"inner\.rate: not valid YAML: .*5000"),
        ("inner.rate=0x" + "f" * 5000, r"inner\.rate: a whole number with 20000 bits"),
        ("inner.rate=.nan", r"inner\.rate: .*finite"),
        ("name=\ud800", r"name: not valid YAML"),
        ("na\ud800me=a", r"override\.0: 'na\\ud800me'"),
        ('name="a\\0b"', r"name: 'a\\x00b' has a character that is no text"),
        ("name=[" + "[" * 200_000, r"name: not valid YAML: it is nested too deep"),
        ("name." * 60 + "a=1", r"which has no fields to set"),
        ("more.x.rate.y=!!bool z", r"more\.x\.rate\.y: not valid YAML: a value that does not fit"),
        ("zzz." * 60 + "a=1", r"is more than 50 levels deep"),
    ],
    ids=lambda text: text[:30].encode("ascii", "backslashreplace").decode(),
)
def test_errors_name_the_field(path, override, said):
    with pytest.raises(ConfigError, match=said):
        load_yaml(path, [override], Outer)


@pytest.mark.parametrize("place", ["2", "-1", "²", "٣", "", "9" * 5000], ids=range(6))
def test_a_place_that_a_list_does_not_have(path, place):
    with pytest.raises(ConfigError, match=r"no place in a list of 2|an override is written"):
        load_yaml(path, ["inner.sizes=[1, 2]", f"inner.sizes.{place}=1"], Outer)


@pytest.mark.parametrize(
    ("text", "said"),
    [("name: a\nname: b\n", "given twice"), ("- a\n", "key: value"), ("", "key: value"), ("a: [", "line 1")],
)
def test_bad_files(tmp_path, text, said):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_yaml(file, [], Outer)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
HOSTILE = [
    (b"name: \xff", r"bad\.yaml: is not UTF-8 text \(invalid start byte at byte 6"),
    ("name: a".encode("utf-16"), r"bad\.yaml: is not UTF-8"),
    ("name: a".encode("utf-16-le"), r"bad\.yaml: not valid YAML: unacceptable character #x0000"),
    (b"name: a\0", r"bad\.yaml: not valid YAML: unacceptable character #x0000"),
    (b"name: " + b"[" * 200_000, r"bad\.yaml: not valid YAML: it is nested too deep"),
    (b"{name: " * 100_000, r"bad\.yaml: not valid YAML: it is nested too deep"),
    (b"name: 1" + b"0" * 5000, r"bad\.yaml: not valid YAML: .*integer string conversion"),
    (b"name: 2024-01-01", r"name: .*string"),
    (b"name: 2024-99-99", r"bad\.yaml: not valid YAML: .*month"),
    (b"name: !!binary QUJD", r"name: .*string"),
    (b"name: !!set {a}", r"name: .*string"),
    (b"name: !!timestamp x", r"bad\.yaml: not valid YAML: a value that does not fit its tag"),
    (b"name: !!python/object/apply:os.getcwd []", r"bad\.yaml: not valid YAML \(line 1, column 7\)"),
    (b"1: x", r"bad\.yaml: .*the key 1 is no text; put it in quotes"),
    (b"null: x", r"bad\.yaml: .*the key None is no text"),
    (b"[a]: b", r"bad\.yaml: .*the key \['a'\] is no text"),
    (b"{a: b}: c", r"bad\.yaml: .*the key \{'a': 'b'\} is no text"),
    (b'"\\ud800": x', r"'\\ud800' is no name of a field"),
    (b'name: "\\ud800"', r"name: '\\ud800' has a character that is no text"),
    (b"&a {name: *a}", r"is more than 50 levels deep"),
    (BOMB.encode(), r"holds more than 1,000,000 values"),
    (b"a: &a {x: 1}\nname: {<<: *a}", r"bad\.yaml: .*merge keys \(<<\) are not taken"),
    (b"#" * 2**20 + b"\nname: a", r"bad\.yaml: has more than 1,048,576 bytes"),
]


@pytest.mark.parametrize(("raw", "said"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files(tmp_path, raw, said):
    file = tmp_path / "bad.yaml"
    file.write_bytes(raw)
    with pytest.raises(ConfigError, match=said):
        load_yaml(file, [], Outer)


def test_the_mark_of_an_editor_is_no_part_of_the_text(tmp_path):
    file = tmp_path / "marked.yaml"
    file.write_bytes(b"\xef\xbb\xbfname: a")
    assert load_yaml(file, [], Outer).name == "a"


def test_a_folder_and_a_file_that_may_not_be_read(tmp_path, path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no config file"):
        load_yaml(tmp_path, [], Outer)

    def forbidden(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", forbidden)
    with pytest.raises(ConfigError, match=r"c\.yaml: cannot be read: Permission denied"):
        load_yaml(path, [], Outer)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_yaml(tmp_path / "none.yaml", [], Outer)
