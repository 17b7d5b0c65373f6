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
    ],
)
def test_errors_name_the_field(path, override, said):
    with pytest.raises(ConfigError, match=said):
        load_yaml(path, [override], Outer)


@pytest.mark.parametrize(
    ("text", "said"),
    [("name: a\nname: b\n", "given twice"), ("- a\n", "key: value"), ("", "key: value"), ("a: [", "line 1")],
)
def test_bad_files(tmp_path, text, said):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_yaml(file, [], Outer)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_yaml(tmp_path / "none.yaml", [], Outer)
