"""Files that were damaged: 0 loads that are silently wrong, 0 errors but those that name the file."""

import json
import os
import random
import resource
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import xxhash
from damage import LENGTHS, TRIALS, Target, damage, outcome, with_new_checksums
from matrix import KINDS, TEXT, llama, says, tokens, wrap
from peft import LoraConfig, inject_adapter_in_model
from typer.testing import CliRunner

import memlayers as ml
from memlayers.checkpoint.contents import is_read
from memlayers.cli import app
from memlayers.files import read_json, write_json
from tests.killing import run_child

CHOSEN = {k.name: k for k in KINDS}
CHOSEN = [
    CHOSEN[name]
    for name in (
        *("recurrent", "accumulate", "product_key", "neural_mag", "lora", "cartridge_text", "associative"),
        *("reversible", "task_tokens"),
    )
]
STATEFUL = [kind for kind in CHOSEN if kind.stateful]
INITIAL = "memlayers.stream.initial_memory"
ROOM = 2 * 2**30
"""Bytes that a process may take beyond what it has, so that damage that makes a large allocation is an error."""


def digest(named) -> str:
    found = xxhash.xxh3_128()
    for name, tensor in named:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def loaded(folder) -> str:
    """What stands for all that `ml.load` reads."""
    model = ml.load(folder)
    configs = [model.config.to_dict(), model.generation_config.to_dict(), str(model.peft_config)]
    configs += [memory.config for memory in ml.memories(model).values()]
    return f"{digest(model.state_dict().items())} {configs}".replace(str(folder), "")


@torch.no_grad()
def used(path, model) -> str:
    """What stands for a state, and what a model makes of it."""
    state = ml.MemoryState.load(path)
    output = model(tokens(2, 3), memory_state=state)
    parts = (state, output.memory_state, ml.write(model, tokens(2, TEXT, seed=4), state))
    named = [(f"{n}.{f}", t) for each in parts for n, part in each.fields.items() for f, t in part.items()]
    return digest([*named, ("logits", output.logits)]) + str(state.kinds)


def saved(folder, kind, seed: int) -> None:
    """A checkpoint with a base, a memory and an adapter of its own, all small."""
    model = wrap(llama().base(), kind)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    ml.save(model, folder, save_base=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """For each kind the same config saved twice, and the files of one that `load` reads."""
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in CHOSEN:
        saved(root / kind.name / "whole", kind, 1)
        saved(root / kind.name / "other", kind, 2)
    return root


def files_of(folder) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in names if name == "memory_config.json" or is_read(name)]


def check_in_a_child(trials, report: Path) -> None:
    """Run `trials` in a child that may take no more memory than now and a little; each gives "refused" or "right"."""

    def run():
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, now + ROOM))
        report.write_text(json.dumps(Counter(trials)))

    assert run_child(run) == 0
    found = json.loads(report.read_text())
    print(found)
    assert not found.keys() - {"refused", "right"}


def test_damaged_checkpoints(checkpoints, tmp_path):
    rng = random.Random(int(os.environ.get("MEMLAYERS_SEED", "1")))

    def trials():
        right = {}
        for number in range(TRIALS):
            kind = rng.choice(CHOSEN).name
            whole, other = (checkpoints / kind / name for name in ("whole", "other"))
            if kind not in right:
                right[kind] = loaded(whole)
            folder = tmp_path / "out"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            name = rng.choice(files_of(folder))
            wrong = [path for path in files_of(folder) if path.endswith(name[-5:]) and path != name]
            others = [other / name, *(whole / path for path in wrong)]
            told = damage(rng, Target(folder / name, others))
            names = [str(folder / name), str(folder)]
            found = outcome(lambda folder=folder: loaded(folder), right[kind], names)
            if found not in ("refused", "right"):
                found = f"{number}: {kind}, {name}, {told}: {found}"
            yield found

    check_in_a_child(trials(), tmp_path / "report.json")


def test_damaged_states(checkpoints, tmp_path):
    rng = random.Random(int(os.environ.get("MEMLAYERS_SEED", "2")))
    models = {kind.name: wrap(llama().base(), kind) for kind in STATEFUL}
    for name, model in models.items():
        ml.write(model, tokens(2, TEXT), close=False).save(tmp_path / f"{name}.whole")

    def trials():
        right = {}
        for number in range(TRIALS):
            name = rng.choice(list(models))
            whole, path = tmp_path / f"{name}.whole", tmp_path / "state.safetensors"
            if name not in right:
                right[name] = used(whole, models[name])
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            shutil.copy(whole, path)
            told = damage(rng, Target(path, [checkpoints / name / "whole/memory.safetensors"]))
            found = outcome(lambda path=path, name=name: used(path, models[name]), right[name], [str(path)])
            if found not in ("refused", "right"):
                found = f"{number}: {name}, {told}: {found}"
            yield found

    check_in_a_child(trials(), tmp_path / "report.json")


@pytest.mark.parametrize("kind", [k for k in KINDS if k.stateful], ids=lambda kind: kind.name)
def test_states_whose_checksums_fit_and_whose_numbers_do_not(kind, tmp_path):
    """As somebody could make them who knows the format."""
    model, path = wrap(llama().base(), kind), tmp_path / "state.safetensors"
    state = ml.write(model, tokens(2, TEXT), close=False)
    state.save(path)
    right = used(path, model)
    fields = [(n, f, t) for n, part in state.fields.items() for f, t in part.items()]

    def trials():
        for memory, field, tensor in fields:
            for change in changes_of(tensor):
                state.save(path)
                with_new_checksums(
                    path, lambda found, at=f"{memory}.{field}", new=change: found.update({at: new})
                )
                result = outcome(lambda: used(path, model), right, [str(path), f"'{memory}"])
                if result != "refused":
                    result = f"{memory}.{field} {tuple(change.shape)} {change.dtype} {change.flatten()[:3]}: {result}"
                yield result

    check_in_a_child(trials(), tmp_path / "report.json")


def changes_of(tensor: torch.Tensor):
    """What a field could be instead."""
    if tensor.is_floating_point():
        yield tensor.long()
    else:
        yield from (torch.full_like(tensor, value) for value in LENGTHS)
        yield from (tensor.float(), tensor.int())
    yield tensor[..., None]
    yield tensor[:1]
    if tensor.dim() > 1:
        yield torch.cat([tensor, tensor], dim=-1) if tensor.shape[-1] else tensor[0]
        yield tensor.flatten(1)[:, :, None, None, None]


def test_weights_whose_checksums_fit_and_that_are_not_finite(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "recurrent/whole", tmp_path / "out")
    path, config = (tmp_path / "out" / name for name in ("memory.safetensors", "memory_config.json"))
    checksum = with_new_checksums(path, lambda found: found[INITIAL].view(-1)[:1].fill_(torch.nan))
    fields = read_json(config)
    write_json(config, {**fields, "files": {**fields["files"], path.name: checksum}})
    with pytest.raises(ValueError, match=says(str(path), INITIAL, "nan or inf")):
        ml.load(tmp_path / "out")


def test_the_command_line_tells_it_in_a_paragraph(checkpoints, tmp_path):
    rng, found = random.Random(3), Counter()
    whole, other = checkpoints / "recurrent/whole", checkpoints / "recurrent/other"
    for _ in range(max(20, TRIALS // 10)):
        folder = tmp_path / "out"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        name = rng.choice(files_of(folder))
        told = damage(rng, Target(folder / name, [other / name]))
        result = CliRunner().invoke(app, ["inspect", str(folder)])
        assert isinstance(result.exception, SystemExit | None), told
        assert result.exit_code in (0, 1) and "Traceback" not in result.output, told
        if result.exit_code:
            assert "is a defect" not in result.output, (told, result.output)
        found[result.exit_code] += 1
    print(dict(found))
