"""Forty seeded faults: does the part of the contract that `make test` runs find what the whole matrix finds?

    python tests/faults.py --out /tmp/faults           # makes a copy of the repository there and changes that alone
    python tests/faults.py --out /tmp/faults --table   # the table of docs/testing.md from what was measured

Each fault changes one place of the code. First `make test`'s part of tests/contract runs until a test fails; only a fault
that it does not find is given to the whole matrix. Results stand in OUT/results.jsonl; a run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache")


class Fault(NamedTuple):
    """One place of the code, and what stands there instead."""

    name: str
    file: str
    old: str
    new: str


CORE = "memlayers/core/"
FAULTS = [
    Fault(
        "rows without a token are written",
        CORE + "loop.py",
        "block.active, block.write_at = mask.any(1), write_at",
        "block.active, block.write_at = mask.new_ones(len(mask)), write_at",
    ),
    Fault(
        "an inactive row's tokens change",
        "memlayers/tokens/module.py",
        'after["memory"] = torch.where(active[:, None, None], written, memory)',
        'after["memory"] = written',
    ),
    Fault(
        "positions of a segment begin at 1",
        CORE + "masks.py",
        "return (mask.cumsum(1) - 1).clamp(min=0)",
        "return mask.cumsum(1)",
    ),
    Fault(
        "positions count padding",
        CORE + "masks.py",
        "return (mask.cumsum(1) - 1).clamp(min=0)",
        "return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)",
    ),
    Fault(
        "padding goes behind the tokens",
        CORE + "masks.py",
        "return mask.int().argsort(dim=1, stable=True)",
        "return (~mask).int().argsort(dim=1, stable=True)",
    ),
    Fault(
        "tokens lose their order where padding moves",
        CORE + "masks.py",
        "return mask.int().argsort(dim=1, stable=True)",
        "return mask.int().argsort(dim=1, stable=True).flip(1)",
    ),
    Fault(
        "the mask of read tokens is full",
        CORE + "loop.py",
        "mask = torch.cat([*(used for _, used in reads), mask, always], dim=1)",
        "mask = torch.cat([*(torch.ones_like(used) for _, used in reads), mask, always], dim=1)",
    ),
    Fault(
        "write tokens are masked",
        CORE + "loop.py",
        "always = mask.new_ones(len(mask), 1)",
        "always = mask.new_zeros(len(mask), 1)",
    ),
    Fault(
        "outputs at the write tokens are one early",
        CORE + "loop.py",
        "write_at[name] = slice(stop, stop + writer.shape[1])",
        "write_at[name] = slice(stop - 1, stop - 1 + writer.shape[1])",
    ),
    Fault(
        "the open segment is written at once",
        CORE + "loop.py",
        "writes=call.flush or not last",
        "writes=True",
    ),
    Fault(
        "full segments are one token longer",
        CORE + "schedule.py",
        "full = (length - 1).clamp(min=0) // size",
        "full = (length - 2).clamp(min=0) // size",
    ),
    Fault(
        "the last segment is left-aligned",
        CORE + "schedule.py",
        "late = packed + (n_full * size + last_width - length)[:, None]",
        "late = packed + (n_full * size - full * size)[:, None]",
    ),
    Fault(
        "pending tokens keep their padding",
        CORE + "loop.py",
        "        if not mask.all():\n            tokens = take(tokens, padding_first(used))",
        "        if False:\n            tokens = take(tokens, padding_first(used))",
    ),
    Fault(
        "an open segment's length counts padding",
        CORE + "loop.py",
        'return {PENDING: {"embeds": tokens, "length": used.sum(1)}}',
        'return {PENDING: {"embeds": tokens, "length": torch.full_like(used.sum(1), used.shape[1])}}',
    ),
    Fault(
        "the window of the cache forgets padding",
        CORE + "loop.py",
        "cache.window_mask = torch.cat([cache.window_mask, call.mask], dim=1)",
        "cache.window_mask = torch.cat([cache.window_mask, torch.ones_like(call.mask)], dim=1)",
    ),
    Fault(
        "a sliding window sees one token less",
        CORE + "masks.py",
        "near = (key <= query) & (key > query - reach)",
        "near = (key <= query) & (key > query - reach + 1)",
    ),
    Fault(
        "a sliding window ignores the model's own",
        CORE + "masks.py",
        'reach = min(sliding_window, own) if own and layer_type == "sliding_attention" else sliding_window',
        "reach = sliding_window",
    ),
    Fault(
        "a sliding window drops one key too many",
        CORE + "loop.py",
        "mask = slide(window, mask, reach - 1)",
        "mask = slide(window, mask, reach - 2)",
    ),
    Fault(
        "positions start anew with each call",
        CORE + "loop.py",
        "position_ids = call.cache.seen + torch.arange(n_tokens, device=embeds.device)[None]",
        "position_ids = torch.arange(n_tokens, device=embeds.device)[None]",
    ),
    Fault(
        "positions of a cartridge are not counted",
        "memlayers/cartridge/patch.py",
        '        return fields["length"]\n\n    def state_to_try',
        '        return torch.zeros_like(fields["length"])\n\n    def state_to_try',
    ),
    Fault(
        "places of a cartridge that are not in use are seen",
        "memlayers/cartridge/attention.py",
        "used = torch.arange(places, device=length.device) >= places - length[:, None]",
        "used = torch.arange(places, device=length.device) >= places - length.max() + 0 * length[:, None]",
    ),
    Fault(
        "a cartridge's mask is shared by all kinds of attention",
        "memlayers/cartridge/patch.py",
        "key = name, id(mask), previous",
        "key = name, previous",
    ),
    Fault(
        "a cartridge's keys in place of its values",
        "memlayers/cartridge/attention.py",
        "torch.cat([self.values, values], dim=2)",
        "torch.cat([self.keys, values], dim=2)",
    ),
    Fault(
        "crop-like: keys before a call are not counted",
        "memlayers/cartridge/attention.py",
        "return self.keys.shape[2] + (0 if self.below is None else self.below.get_seq_length(layer_idx))",
        "return 0 if self.below is None else self.below.get_seq_length(layer_idx)",
    ),
    Fault(
        "a state is changed in place",
        "memlayers/tokens/module.py",
        "after, hidden, active = dict(fields), written.float(), mask.any(1)",
        'fields["length"] += 0 * mask.sum(1)\n        fields["memory"].mul_(0.5) if not fields["memory"].requires_grad else None\n        after, hidden, active = dict(fields), written.float(), mask.any(1)',
    ),
    Fault(
        "clone shares its storage",
        CORE + "state.py",
        "return self._map(torch.Tensor.clone)",
        "return self._map(lambda t: t)",
    ),
    Fault(
        "select gives the rows as they stand",
        CORE + "state.py",
        "return self._map(lambda t: t.index_select(0, index.to(t.device)))",
        "return self._map(lambda t: t[: len(index)] if len(index) <= len(t) else t.index_select(0, index.to(t.device)))",
    ),
    Fault(
        "beams keep the state of their place",
        CORE + "state.py",
        "            self.window.reorder_cache(beam_idx)\n        self._rows(beam_idx)",
        "            self.window.reorder_cache(beam_idx)",
    ),
    Fault(
        "copies of rows are interleaved wrongly",
        CORE + "state.py",
        "return self._map(lambda t: t.repeat_interleave(repeats, dim=0))",
        "return self._map(lambda t: t.repeat(repeats, *[1] * (t.dim() - 1)))",
    ),
    Fault(
        "a hook stays after detach",
        CORE + "hooks.py",
        "        self.removed = True\n        top",
        "        top",
    ),
    Fault(
        "what stood on the instance is not given back",
        CORE + "hooks.py",
        "            if self.below is not None:\n                self.module.__dict__[self.name] = self.below\n            return",
        "            return",
    ),
    Fault(
        "decoding writes as a prompt does",
        CORE + "methods.py",
        "decoding = framed and inputs.shape[1] == 1 and cache.seen > 0",
        "decoding = False",
    ),
    Fault(
        "a gradient does not cross checkpointing",
        CORE + "hooks.py",
        "        return grad, ctx.leaf.grad, None",
        "        return grad, None, None",
    ),
    Fault(
        "checkpointing runs a layer without its block",
        CORE + "hooks.py",
        "    with holding(BLOCK, block):\n        return forward(*args, **kwargs)",
        "    return forward(*args, **kwargs)",
    ),
    Fault(
        "associative memory adds without subtracting what is there",
        "memlayers/associative/module.py",
        "new = self._linear(self.value, m) - self._associated(keys, matrix, normalizer)",
        "new = self._linear(self.value, m)",
    ),
    Fault(
        "neural memory writes rows without a token",
        "memlayers/neural/patch.py",
        "mask = block.mask if block.active is None else block.mask & block.active[:, None]",
        "mask = block.mask",
    ),
    Fault(
        "neural memory in the context turns its keys by the wrong place",
        "memlayers/neural/context.py",
        "torch.cat([torch.ones_like(start), cos.repeat_interleave(2, dim=1)], dim=1)",
        "torch.cat([torch.ones_like(start), cos.repeat(1, 2, 1)], dim=1)",
    ),
    Fault(
        "two memories in the context share a place in the cache",
        "memlayers/neural/patch.py",
        "place = (1 + list(block.call.memories).index(name)) * self.n_layers + hook.layer",
        "place = self.n_layers + hook.layer - hook.layer % 2",
    ),
    Fault(
        "a table is read with another head's weights",
        "memlayers/product_key/module.py",
        "return indices.flatten(-2), weights.flatten(-2)",
        "return indices.flatten(-2), weights.flip(-2).flatten(-2)",
    ),
    Fault(
        "product keys move the base at attach",
        "memlayers/product_key/module.py",
        "std=self.value_dim**-0.5 if starts_the_model else 0.0",
        "std=self.value_dim**-0.5",
    ),
]


def changed_copy(out: Path, fault: Fault) -> Path:
    """A copy of the repository with one fault in it."""
    copy = out / "copy" / "main"
    shutil.rmtree(out / "copy", ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    (out / "copy" / "shared").symlink_to(ROOT.parent / "shared")
    path = copy / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name}: {fault.file} has {text.count(fault.old)} times {fault.old!r}; mend the table"
        )
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    return copy


def first_failure(copy: Path, marks: str) -> str | None:
    """The first test of the contract that fails, None where all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "--no-header", "-p", "no:cacheprovider"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [*command, *(["-m", marks] if marks else []), "tests/contract"],
        cwd=copy, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].split(" - ")[0] if failed else done.stdout[-300:]


def measure(out: Path) -> None:
    """Try every fault that has no result yet."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    done = (
        {json.loads(line)["fault"] for line in results.read_text().splitlines()}
        if results.is_file()
        else set()
    )
    for fault in FAULTS:
        if fault.name in done:
            continue
        start, copy = time.perf_counter(), changed_copy(out, fault)
        thin = first_failure(copy, "not full")
        whole = thin or first_failure(copy, "")
        row = {"fault": fault.name, "file": fault.file, "thin": thin, "full": whole}
        row["seconds"] = round(time.perf_counter() - start)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def table(out: Path) -> str:
    """What was measured, as Markdown."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    lines = ["| fault | file | found by `make test` | by the whole matrix |", "|---|---|---|---|"]
    for row in rows:
        names = [
            (row[part] or "not found").removeprefix("FAILED tests/contract/").split("::")[-1]
            for part in ("thin", "full")
        ]
        lines.append(
            f"| {row['fault']} | `{row['file']}` | {names[0]} | {'the same' if row['thin'] else names[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.out))
    else:
        measure(arguments.out)
