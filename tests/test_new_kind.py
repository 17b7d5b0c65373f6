"""A kind that the library has never heard of: one class with its config, and one line among the kinds. It passes the
contract, trains from a YAML file and is saved like the others; nothing that it needs is elsewhere."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Literal

import pytest
import torch
from matrix import ARCHITECTURES, Case
from matrix_kinds import Kind
from pydantic import Field
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import memlayers as ml
from memlayers import kinds
from memlayers.config import ConfigError, chosen_layers
from memlayers.core.memory import LayerMemory
from memlayers.core.model import text_config
from memlayers.core.state import Fields
from memlayers.train.config import TrainConfig
from memlayers.train.log import read_log
from memlayers.train.run import train
from memlayers.yaml_config import load_yaml


class ToneConfig(ml.MemoryConfig):
    """Fields of a `Tone`.

    Attributes:
        layers: before which it stands.
        limit: of the entries of a bias, kept after each step.
    """

    type: Literal["tone"] = "tone"
    layers: list[int] | None = None
    limit: float = Field(1.0, gt=0)


class Tone(LayerMemory):
    """Adds to a layer's input: h ← h + size · (bias + gate · (mean − usual)), with the mean of all inputs so far.

    State, per row and layer: `layers.0.sum` (batch, hidden_size) float32 and `layers.0.count` (batch,) int64.

    Attributes:
        bias, gate: layer number, as a string, to (hidden_size,); zero at the start.
        usual: (hidden_size,), which a loss of its own brings to the mean embedding of the texts.
        size: a number that does not learn.
    """

    def __init__(self, config: ToneConfig, hidden_size: int, layers: list[int]):
        super().__init__(config)
        self.at_layers, self.hidden_size = frozenset(layers), hidden_size
        self.bias = nn.ParameterDict({str(n): torch.zeros(hidden_size) for n in layers})
        self.gate = nn.ParameterDict({str(n): torch.zeros(hidden_size) for n in layers})
        self.usual = nn.Parameter(torch.zeros(hidden_size))
        self.size = nn.Parameter(torch.tensor(0.5))

    @classmethod
    def for_model(cls, config: ToneConfig, model: nn.Module) -> Tone:
        text = text_config(model)
        return cls(config, text.hidden_size, chosen_layers(config.layers, text.num_hidden_layers))

    def new_state(self, batch_size: int) -> Fields:
        device = self.usual.device
        fields = {}
        for layer in self.bias:
            fields[f"layers.{layer}.sum"] = torch.zeros(batch_size, self.hidden_size, device=device)
            fields[f"layers.{layer}.count"] = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return fields

    def before_layer(self, block, name: str, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        fields, key = block.fields[name], f"layers.{layer}"
        seen = (hidden.float() * block.mask[..., None]).cumsum(1) + fields[f"{key}.sum"][:, None]
        count = block.mask.cumsum(1) + fields[f"{key}.count"][:, None]
        block.put(name, {f"{key}.sum": seen[:, -1], f"{key}.count": count[:, -1]})
        unusual = seen / count.clamp(min=1)[..., None] - self.usual.float()
        read = self.bias[str(layer)].float() + self.gate[str(layer)].float() * unusual
        return hidden + (self.size.float() * read).to(hidden.dtype)

    def frozen_parameters(self) -> set[str]:
        return {"size"}

    def extra_loss(self, model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        embeds = model.get_input_embeddings()(input_ids).float()
        return ((embeds[mask].mean(0) - self.usual) ** 2).mean()

    def check_extra_loss(self, weight: float) -> str | None:
        return "above 100 would drown what memory {name!r} learns" if weight > 100 else None

    @torch.no_grad()
    def after_step(self) -> None:
        for bias in self.bias.values():
            bias.clamp_(-self.config.limit, self.config.limit)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The one line."""
    monkeypatch.setitem(kinds.KINDS, "tone", (ToneConfig, Tone))


CONTRACT = {
    "test_attach": [
        "test_detach_returns_the_model_it_was",
        "test_attach_keeps_class_keys_and_tensors",
        "test_disabled_is_the_base_bit_for_bit",
        "test_a_deep_copy_is_a_model_of_its_own",
        "test_additive_kinds_start_at_zero_with_a_gradient",
        "test_the_base_is_frozen_and_memory_gets_gradients",
    ],
    "test_state": [
        "test_each_call_without_a_state_starts_fresh",
        "test_forward_changes_no_parameter_or_buffer",
        "test_a_given_state_is_not_changed",
        "test_save_and_load_are_exact",
        "test_select_and_cat_keep_rows_apart",
        "test_the_state_has_a_constant_size",
    ],
    "test_generate": [
        "test_greedy",
        "test_greedy_from_a_written_state",
        "test_decoding_writes_what_a_prompt_would",
        "test_beams",
        "test_two_calls_split_at_every_offset",
        "test_left_padded_generation_is_each_row_alone",
    ],
    "test_rows": ["test_what_stands_at_padding_does_not_matter", "test_rows_do_not_see_each_other"],
    "test_gradients": ["test_the_gradient_crosses_calls_through_the_state"],
    "test_precision": ["test_a_bf16_base_with_float32_memory_is_near_float32"],
    "test_files": ["test_save_then_load_is_exact"],
}
"""Checks of the contract, which run over all kinds, by the file that they are in."""


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("check", [f"{file}.{name}" for file, names in CONTRACT.items() for name in names])
def test_it_passes_the_contract(check, architecture, tmp_path):
    file, name = check.split(".")
    run = getattr(importlib.import_module(f"contract.{file}"), name)
    kind = Kind(
        "tone", {"mood": ToneConfig(layers=[0, 1])}, additive=True, segmented=False, decoding_writes=True
    )
    given = {
        "case": Case(kind, next(a for a in ARCHITECTURES if a.name == architecture)),
        "tmp_path": tmp_path,
    }
    run(**{key: given[key] for key in inspect.signature(run).parameters})


YAML = """
model: {{path: {base}}}
memories:
  mood: {{type: tone, limit: 0.05}}
train_what: memory
data: {{type: text, files: [{text}], length: 18}}
loss: {{cycle: 1.0}}
optimizer: {{learning_rate: 0.02}}
batch_size: 4
max_steps: 12
log_every: 1
output_dir: {out}
"""


@pytest.fixture
def run(tiny_llama, tokenizer, tmp_path):
    """A function: the run that the YAML text above describes, with fields set over it."""
    for part in (tiny_llama, tokenizer):
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("The sky is blue and the grass is green. " * 60)
    places = {"base": tmp_path / "base", "text": tmp_path / "text.txt", "out": tmp_path / "out"}
    (tmp_path / "run.yaml").write_text(YAML.format(**places))
    return lambda *overrides: load_yaml(tmp_path / "run.yaml", list(overrides), TrainConfig)


def test_it_trains_from_a_yaml_file(run, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(Tone, "after_step", lambda self, step=Tone.after_step: (steps.append(1), step(self)))
    final = train(run())
    losses = [line["loss"] for line in read_log(tmp_path / "out" / "log.jsonl")]
    assert losses[-1] < losses[0] - 0.05
    assert len(steps) == 12

    model = ml.load(final).eval()
    mood = ml.memories(model)["mood"]
    for bias in mood.bias.values():
        assert bias.abs().max() == torch.tensor(0.05)  # where the last step went further, it was cut
    assert mood.size == 0.5 and mood.usual.any() and all(gate.any() for gate in mood.gate.values())
    (checkpoint,) = (tmp_path / "out" / "checkpoints").glob("step-*")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    ml.attach(fresh, run().memories["mood"], "mood")
    fresh.load_state_dict(
        load_file(checkpoint / "model.safetensors"), strict=False
    )  # only what learns is in it
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        trained, loaded = fresh(ids), model(ids)
        with ml.disabled(model):
            assert not torch.equal(model(ids).logits, loaded.logits)
    assert torch.equal(trained.logits, loaded.logits)


def test_a_loss_of_its_own_moves_what_only_it_teaches(run, tmp_path):
    """The gates are zero at the start, so that at the first step `usual` learns by the kind's own loss alone."""
    moved = {}
    for weight in (0.0, 1.0):
        out = tmp_path / f"out{weight}"
        final = train(run(f"loss.cycle={weight}", "max_steps=1", f"output_dir={out}"))
        moved[weight] = ml.memories(ml.load(final))["mood"].usual.any()
    assert not moved[0.0] and moved[1.0]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("loss.cycle=200.0", "loss.cycle: above 100 would drown what memory 'mood' learns"),
        ("memories.mood.limmit=1.0", "memories.mood.limmit: unknown field, did you mean 'limit'"),
        ("memories.mood.layers=[7]", r"memories.mood.layers.0: layer 7 is out of range"),
        (
            "memories.mood.type=tune",
            "memories.mood.type: 'tune' is not a kind of memory; known: .*tone.*did you mean",
        ),
        ("train_what=values", "train_what: nothing would learn"),
        ("optimizer.values={}", "optimizer.values: no memory of this model has a value table"),
    ],
)
def test_errors_name_its_fields(run, override, told):
    with pytest.raises(ConfigError, match=told):
        train(run(override))


def test_without_the_line_it_is_no_kind(run, monkeypatch):
    monkeypatch.delitem(kinds.KINDS, "tone")
    with pytest.raises(ConfigError, match=r"memories.mood.type: 'tone' is not a kind of memory"):
        run()


def test_inspect_shows_it(run, tmp_path):
    from typer.testing import CliRunner

    from memlayers.cli import app

    final: Path = train(run("max_steps=1"))
    result = CliRunner().invoke(app, ["inspect", str(final)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    size = 2 * (32 * 4 + 8)
    assert "tone" in result.output and "limit: 0.05" in result.output and f" {size} " in result.output
