"""Who imports whom, read from the sources: the floors of the house, no circle, and no kind's name above or below the kinds.

Imports inside of functions count too; those under `if TYPE_CHECKING:` do not.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import memlayers as ml
from memlayers.kinds import KINDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "memlayers"
ROOMS = ("kernels", "train", "eval")
"""Folders beside the package that are parts of it."""
KIND_ROOMS = sorted({kind.__module__.split(".")[1] for kinds in KINDS.values() for kind in kinds})

GROUND = {"config", "errors", "files", "limits", "loading", "version"}
CORE = GROUND | {"kernels", "core"}
KIND = {"config", "files", "limits", "core", "kernels", "writing"}
ATTACHED = CORE | {"adapters", "optim", "tasks", "writing", "kinds", *KIND_ROOMS}
PUBLIC = ATTACHED | {"attach", "write", "checkpoint", "yaml_config", PACKAGE}
MAY_IMPORT = {
    "kernels": set(),
    **dict.fromkeys(GROUND, GROUND),
    "yaml_config": GROUND,
    **dict.fromkeys(["core", "tasks", "optim", "adapters"], CORE),
    **dict.fromkeys(["writing", *KIND_ROOMS], KIND),
    "kinds": CORE | set(KIND_ROOMS),
    **dict.fromkeys(["attach", "write", "checkpoint"], ATTACHED | {"attach", "write", "checkpoint"}),
    PACKAGE: PUBLIC,
    "train": PUBLIC,
    "eval": PUBLIC,
    "cli": PUBLIC | {"train", "eval"},
}
"""Which rooms the modules of a room may import, beside their own. A room is a folder or a file of the package."""


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder in (PACKAGE, *ROOMS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == PACKAGE else (PACKAGE, *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker looks at."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from run_nodes(other)
        else:
            yield from run_nodes(child)


@functools.cache
def imports_of(module: str) -> dict[str, int]:
    """The modules of ours that one imports, and the line. A package is imported with what lies in it, but for what
    lies in the same one."""
    known, found = modules(), {}
    package = module if known[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in run_nodes(tree_of(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *(node.module or "").split(".")]).strip(".")
            inside = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in known else base for name in inside]
        else:
            continue
        for name in names:
            while name and name not in known:  # a folder without __init__, or a name of another library
                name = name.rpartition(".")[0]
            parents = [name[:at] for at, letter in enumerate(name) if letter == "."]
            outside = [
                p for p in parents if p in known and p != PACKAGE and not f"{module}.".startswith(f"{p}.")
            ]
            for each in filter(None, [name, *outside]):
                found.setdefault(each, node.lineno)
    found.pop(module, None)
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else PACKAGE


def place(module: str, line: int) -> str:
    return f"{modules()[module].relative_to(ROOT)}:{line}"


def test_every_room_has_a_floor():
    assert {room_of(module) for module in modules()} - MAY_IMPORT.keys() == set()


def test_no_arrow_goes_upward():
    offenders = [
        f"{place(module, line)} imports {other}"
        for module in modules()
        for other, line in imports_of(module).items()
        if room_of(other) not in MAY_IMPORT.get(room_of(module), set()) | {room_of(module)}
    ]
    assert offenders == []


def test_no_circle():
    assert [" -> ".join(circle) for circle in circles()] == []


def circles() -> list[list[str]]:
    """One way around each circle that a search in depth meets."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in imports_of(module):
                visit(other, [*path, module])
            done.add(module)

    for module in modules():
        visit(module, [])
    return found


def test_kernels_need_torch_and_triton_alone():
    allowed = {"torch", "triton", "numpy"}
    import sys

    offenders = []
    for module in (name for name in modules() if room_of(name) == "kernels"):
        for node in run_nodes(tree_of(module)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for top in {name.split(".")[0] for name in names}:
                if top not in allowed | {PACKAGE} | sys.stdlib_module_names:
                    offenders.append(f"{place(module, node.lineno)} imports {top}")
    assert offenders == []


PUBLIC_OF_KINDS = {
    name
    for name in ml.__all__
    if (getattr(ml, name).__module__ or "").split(".")[:2] in [[PACKAGE, room] for room in KIND_ROOMS]
}
"""What the package gives out of the kinds: their classes, and functions of one kind."""
CLASSES = {kind.__name__ for kinds in KINDS.values() for kind in kinds}
NAMELESS = [m for m in modules() if room_of(m) in ("core", "train", "cli", "attach", "write", "checkpoint")]


@pytest.mark.parametrize("module", NAMELESS)
def test_no_kind_is_named(module):
    """Neither imported, nor its class, nor its `type` compared with. Texts, help and examples may name one."""
    found = [f"line {line} imports {m}" for m, line in imports_of(module).items() if room_of(m) in KIND_ROOMS]
    for node in run_nodes(tree_of(module)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute) and node.attr in PUBLIC_OF_KINDS | CLASSES:
            found.append(f"line {line} names {node.attr}")
        if isinstance(node, ast.Name) and node.id in CLASSES:
            found.append(f"line {line} names {node.id}")
        if isinstance(node, ast.ImportFrom):
            found += [
                f"line {line} imports {a.name}" for a in node.names if a.name in PUBLIC_OF_KINDS | CLASSES
            ]
        if isinstance(node, ast.Compare):
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            found += [f"line {line} compares with {text!r}" for text in texts if text in KINDS]
    assert found == []


def test_the_walk_sees_what_is_there():
    """An import in a function, a relative one, one of a package from outside; not those for a type checker."""
    assert "memlayers.train.run" in imports_of("memlayers.cli.train")
    assert "memlayers.core.memory" in imports_of("memlayers.core.model")
    assert "memlayers.tokens" in imports_of("memlayers.kinds") and "memlayers" in imports_of(
        "memlayers.train.model"
    )
    assert "memlayers.kernels.weighted_gather" in imports_of("memlayers.product_key.module")
    assert (
        set(KIND_ROOMS) >= {"tokens", "lora", "product_key"} and {"read_back", "LoRABank"} <= PUBLIC_OF_KINDS
    )
