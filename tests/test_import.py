"""What `import memlayers` costs, and where its rooms are found: checkout, wheel, beside other packages."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What `import memlayers` must not load (bar: at most 0.3 s over torch and transformers).
HEAVY = [
    "accelerate",
    "datasets",
    "lm_eval",
    "matplotlib",
    "pandas",
    "peft",
    "rich",
    "scipy",
    "tensorboard",
    "typer",
]


def installed(name: str) -> bool:
    """Whether pip knows a distribution of that name (a folder of that name on the path does not count)."""
    return any(importlib.metadata.distributions(name=name))


def python(code: str, path: list[Path], cwd: Path) -> str:
    """Run `code` in a fresh interpreter that finds packages in `path` first; its stdout."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy(tmp_path):
    """Whatever torch and transformers bring is theirs; memlayers adds none of the packages in HEAVY."""
    code = f"""
import sys, torch, transformers
from transformers import AutoModelForCausalLM
before = set(sys.modules)
import memlayers
added = set(sys.modules) - before
print(sorted(name for name in {HEAVY} if name in added))
"""
    assert python(code, [ROOT], tmp_path).strip() == "[]"


def test_no_kernels_init():
    """It would shadow Hugging Face's package `kernels` wherever the root of the repository is on the path."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_rooms_in_a_checkout(tmp_path):
    code = """
import memlayers.train, memlayers.eval, memlayers.kernels
for room in (memlayers.train, memlayers.eval, memlayers.kernels):
    print([str(p) for p in room.__path__])
"""
    lines = python(code, [ROOT], tmp_path).split("\n")
    for line, room in zip(lines, ("train", "eval", "kernels")):
        assert str(ROOT / room) in line


def test_beside_a_package_called_kernels(tmp_path):
    """Another top-level package `kernels` and memlayers.kernels live side by side, whichever comes first.

    A stand-in takes the place of Hugging Face's, so that the test runs where that one is not installed.
    """
    other = tmp_path / "site" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("WHO = 'the other package'\n")
    for path, order in (
        ([ROOT, other.parent], "import kernels, memlayers.kernels"),
        ([other.parent, ROOT], "import memlayers.kernels, kernels"),
    ):
        code = f"{order}\nprint(kernels.WHO); print(list(memlayers.kernels.__path__))"
        who, ours = python(code, path, tmp_path).strip().split("\n")
        assert who == "the other package"
        assert ours == str([str(ROOT / "kernels")])


@pytest.mark.skipif(not installed("kernels"), reason="the pip package `kernels` is not installed")
def test_beside_hugging_face_kernels(tmp_path):
    code = """
import memlayers, kernels
from transformers import LlamaConfig, LlamaForCausalLM
print(hasattr(kernels, "get_kernel"), LlamaForCausalLM.__name__)
"""
    assert python(code, [ROOT], tmp_path).split() == ["True", "LlamaForCausalLM"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without network from this checkout."""
    if not installed("hatchling"):
        pytest.skip("hatchling is not installed; pip install -e '.[dev]'")
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
    ]
    subprocess.run([*command, str(out), str(ROOT)], check=True, capture_output=True, text=True)
    return next(out.glob("memlayers-*.whl"))


def test_wheel_holds_every_room(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"memlayers"}
    for room in ("train", "eval"):
        ours = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / room).rglob("*.py"))
        assert ours, f"{room}/ holds no Python file"
        assert [name for name in ours if f"memlayers/{name}" not in names] == []
    for path in [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "memlayers" / "demo").rglob("*.safetensors")]:
        name = path.relative_to(ROOT).as_posix()
        assert (name if name.startswith("memlayers/") else f"memlayers/{name}") in names
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in names)


def test_installed_wheel_imports(wheel, tmp_path):
    """Unpacked to a folder that has nothing beside it, the rooms are inside the package and nowhere else."""
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target"]
    subprocess.run([*command, str(target), str(wheel)], check=True, capture_output=True, text=True)
    code = """
import memlayers
import memlayers.train.run, memlayers.eval.runner, memlayers.cli
print(list(memlayers.__path__)); print(memlayers.train.run.__file__); print(memlayers.eval.runner.__file__)
"""
    path, train, evaluate = python(code, [target], tmp_path).strip().split("\n")
    assert path == str([str(target / "memlayers")])
    assert train == str(target / "memlayers" / "train" / "run.py")
    assert evaluate == str(target / "memlayers" / "eval" / "runner.py")
