"""README and docs: their Python runs, their commands exist, their links lead somewhere, their tables are of today."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memlayers.cli import app
from tests.kind_fields import PAGES, page

ROOT = Path(__file__).resolve().parent.parent
DOCS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SMOLLM2, EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct", "memlayers/demo/base"
each = pytest.mark.parametrize("path", DOCS, ids=[str(path.relative_to(ROOT)) for path in DOCS])


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


PYTHON = [(path, i) for path in DOCS for i in range(len(blocks(path, "python")))]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize(("path", "i"), PYTHON, ids=[f"{path.stem}-{i}" for path, i in PYTHON])
def test_python_runs(path, i, tmp_path):
    """In a folder of its own, on the embedded base: no other line is changed."""
    code = blocks(path, "python")[i]
    code = code.replace(SMOLLM2, EMBEDDED).replace(EMBEDDED, (ROOT / EMBEDDED).as_posix())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr


def commands() -> list[str]:
    lines = [line for path in DOCS for block in blocks(path, "") for line in block.splitlines()]
    inline = [
        code
        for path in DOCS
        for code in re.findall(r"`(memlayers [a-z][^`]*)`", path.read_text(encoding="utf-8"))
    ]
    return sorted({line.split("#")[0].strip() for line in [*lines, *inline] if line.startswith("memlayers ")})


@pytest.mark.parametrize("command", commands())
def test_commands_have_these_options(command):
    """Each command with --help behind it: an unknown command or option is an error, nothing is run."""
    words = [word for word in shlex.split(command)[1:] if word != "|"]
    result = CliRunner().invoke(app, [*words[:1], "--help"])
    assert result.exit_code == 0, result.output
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert {option for option in options if option not in plain} == set()


@each
def test_configs_that_are_named_are_there(path):
    named = re.findall(
        r"\b((?:configs|train|eval|memlayers|tests|notebooks)/[\w/.-]+\.(?:yaml|py|md|ipynb|png))",
        path.read_text(encoding="utf-8"),
    )
    assert {name for name in named if not (ROOT / name).exists()} == set()


@each
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert {link for link in links if not (path.parent / link).exists()} == set()


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_the_tables_of_fields_are_of_today(path):
    assert page(path) == path.read_text(encoding="utf-8"), "run: python tests/kind_fields.py"
