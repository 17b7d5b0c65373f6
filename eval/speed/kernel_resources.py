"""What every Triton kernel takes on GPUs that need not be there: registers, spills, shared memory.

    python -m memlayers.eval.speed.kernel_resources --output eval/speed/results/kernel_resources.md

Compiles the COMPILE_CASES of each kernels/<family>/triton.py for four targets, with the compilers that triton
brings. Not under TRITON_INTERPRET=1. A case is a dict: "name", "kernel", "signature" (argument to type,
"constexpr" for those in "constexprs"), "constexprs", "num_warps", and optionally "hip", what "constexprs" is on AMD
instead; pointers are taken as aligned to 16 bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import memlayers.kernels
from memlayers.files import write_text

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def cases() -> Iterator[tuple[str, dict]]:
    """Family and case, for every case of every family that has a triton.py."""
    for path in sorted(Path(memlayers.kernels.__path__[0]).glob("*/triton.py")):
        family = path.parent.name
        for case in importlib.import_module(f"memlayers.kernels.{family}.triton").COMPILE_CASES:
            yield family, case


def resources(case: dict, target: GPUTarget) -> dict[str, int]:
    """Registers of a thread, what is spilled (bytes; on AMD registers), bytes of shared memory of a program."""
    kernel = case["kernel"]
    signature = {name: case["signature"].get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    constexprs = case["constexprs"] | case.get(target.backend, {})
    source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    with contextlib.redirect_stdout(io.StringIO()) as log, triton.knobs.compilation.scope():
        with triton.knobs.nvidia.scope():
            triton.knobs.compilation.always_compile = True  # what comes from the cache has no log
            triton.knobs.nvidia.dump_ptxas_log = True
            compiled = triton.compile(source, target=target, options={"num_warps": case["num_warps"]})
    if target.backend == "cuda":
        text, registers, spills = (
            log.getvalue(),
            r"Used (\d+) registers",
            r"(\d+) bytes spill (?:stores|loads)",
        )
    else:
        text, registers, spills = (
            compiled.asm["amdgcn"],
            r"\.vgpr_count:\s+(\d+)",
            r"\.vgpr_spill_count:\s+(\d+)",
        )
    return {
        "registers": max(int(n) for n in re.findall(registers, text)),
        "spills": max(int(n) for n in re.findall(spills, text)),
        "shared": compiled.metadata.shared,
    }


def measure(targets: list[str]) -> Iterator[dict]:
    """A row for each case and target."""
    for family, case in cases():
        for target in targets:
            row = {"family": family, "case": case["name"], "warps": case["num_warps"], "target": target}
            yield row | resources(case, TARGETS[target])


def markdown(rows: list[dict]) -> str:
    columns = ["family", "case", "warps", "target", "registers", "spills", "shared"]
    lines = [
        "# What the Triton kernels take",
        "",
        f"Made by `python -m memlayers.eval.speed.kernel_resources` with triton {triton.__version__}, without a GPU.",
        "Registers of a thread, spills (bytes; on gfx942 registers), shared memory of a program in bytes.",
        "",
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
        *("| " + " | ".join(str(row[name]) for name in columns) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--output", type=Path, help="write the table here; without it, a line of JSON a case")
    args = parser.parse_args()
    rows = []
    for row in measure(args.targets):
        print(json.dumps(row), flush=True)
        rows.append(row)
    if args.output:
        write_text(args.output, markdown(rows))


if __name__ == "__main__":
    main()
