"""Kinds of memory × architectures: what the contract test runs over.

A later kind adds one entry to `matrix_kinds.KINDS`, a new architecture one to `ARCHITECTURES`. Everything is built on
demand. The tiny models have large random weights, so that what memory holds moves the logits by much more
than the tolerances of the tests.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import memlayers as ml
from tests.matrix_kinds import KINDS, SEGMENT, Kind

VOCAB = 512
FIRST_WORD = 259
TEXT = 2 * SEGMENT + 3  # a text that ends inside its third segment
CHECKPOINT = Path(__file__).resolve().parents[2] / "shared" / "checkpoints" / "stories260K"


@dataclass(frozen=True)
class Architecture:
    """A model that memory is attached to; `skip` says why it cannot be built here, None where it can."""

    name: str
    build: Callable[[], PreTrainedModel]
    skip: str | None = None


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    kind: Kind
    architecture: Architecture

    def base(self) -> PreTrainedModel:
        """The model without memory, in eval mode, float32; the same weights on each call."""
        return copy.deepcopy(prototype(self.architecture))

    def model(self, kind: Kind | None = None, **attach) -> PreTrainedModel:
        """The model with its memories, whose parameters are shaken so that none is at a neutral value."""
        return wrap(self.base(), kind or self.kind, **attach)

    def tokens(self, rows: int, length: int, seed: int = 0) -> torch.Tensor:
        """`tokens`, and among them, in their order, the ids that the kind adds."""
        ids, new = tokens(rows, length, seed), torch.arange(VOCAB, VOCAB + self.kind.n_new_tokens)
        ids[:, 1 : 1 + len(new)] = new
        return ids


@functools.cache
def prototype(architecture: Architecture) -> PreTrainedModel:
    """The model that copies are made of: building one takes longer than copying it."""
    return architecture.build().eval()


def wrap(model: PreTrainedModel, kind: Kind, shake: bool = True, **attach) -> PreTrainedModel:
    """Attach the memories of `kind`, the same weights on each call; `shake` moves them off their start values."""
    torch.manual_seed(1)
    for name, config in kind.configs.items():
        ml.attach(model, config, name=name, **attach)
    if shake:
        with torch.no_grad():
            for _, parameter in ml.memory_parameters(model):
                parameter.add_(torch.randn_like(parameter) * parameter.std(correction=0).clamp(min=0.05))
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids (rows, length) that every architecture knows; in the real checkpoint these are pieces of words."""
    return torch.randint(FIRST_WORD, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def another(token: torch.Tensor) -> torch.Tensor:
    """Some other token."""
    return (token - FIRST_WORD + 1) % (VOCAB - FIRST_WORD) + FIRST_WORD


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids (length,) as one batch padded with a real token's id, and its mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), FIRST_WORD)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return ids, mask


def positions(case: Case, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Positions of a padded batch, where the caller has to give them: kinds that read in segments count on
    their own, the others leave it to the model, which counts padding as well."""
    return {} if case.kind.segmented else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def near(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-4) -> None:
    """Equal up to float32 rounding in another order of summation: logits here have a spread of 1.4 to 9, what
    memory holds moves them by 0.3 to 7, and two layers of rounding stay below 1e-4."""
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def same_state(got: ml.MemoryState, expected: ml.MemoryState, tolerance: float = 2e-4) -> None:
    """The same memories and fields; values as in `near`, or exact with `tolerance=0`."""
    assert {n: set(part) for n, part in got.fields.items()} == {
        n: set(part) for n, part in expected.fields.items()
    }
    for name, part in expected.fields.items():
        for field_name, tensor in part.items():
            assert got[name][field_name].dtype == tensor.dtype
            torch.testing.assert_close(
                got[name][field_name],
                tensor,
                atol=tolerance,
                rtol=tolerance,
                msg=lambda text, at=f"{name}.{field_name}": f"{at}: {text}",
            )


def says(*parts: str):
    """A regular expression that wants all parts, in any order."""
    return "".join(f"(?=[\\s\\S]*{re.escape(part)})" for part in parts)


def _tiny(config_class: str, **fields) -> Callable[[], PreTrainedModel]:
    shared = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.25,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**{**shared, **fields})
        return AutoModelForCausalLM.from_config(config)

    return build


def _real() -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    model.generation_config.eos_token_id = None
    return model


ARCHITECTURES = [
    Architecture("llama", _tiny("LlamaConfig")),
    Architecture("qwen3", _tiny("Qwen3Config", head_dim=8)),
    Architecture("mistral_sliding", _tiny("MistralConfig", sliding_window=3)),
    Architecture("gpt2", _tiny("GPT2Config", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)),
    Architecture("gpt_neox", _tiny("GPTNeoXConfig")),
    Architecture(
        "gemma3",
        _tiny(
            "Gemma3TextConfig",
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        ),
    ),
    Architecture("phi3", _tiny("Phi3Config")),
    Architecture(
        "stories260K",
        _real,
        skip=None if CHECKPOINT.is_dir() else f"no real checkpoint at {CHECKPOINT}",
    ),
]


REPRESENTATIVES = {
    *("recurrent", "prefix", "reversible", "associative", "neural_mag", "neural_mac"),
    *("lora", "cartridge", "product_key", "task_tokens"),
}
"""One kind for each way in which memory stands in a model; the others differ from them in arithmetic, for which one
architecture is enough."""
CORE = {"llama", "gpt2", "mistral_sliding", "gemma3"}
"""Architectures that differ in what memory meets: turned positions or a table, a sliding window, mixed layers."""


def params(applies: Callable[[Kind], bool] = lambda kind: True, why: str = "", scope: str = "core") -> list:
    """The matrix as pytest parameters, without cells to whose kind the part of the contract does not apply.

    `make test` runs a part of it: every kind on llama, and representatives on the architectures of the scope, `core`, `all`
    or `none`; the rest carries the mark `full` (docs/testing.md shows that this part finds the same faults). A cell whose
    architecture is absent is collected as skipped with its reason.
    """
    cells = []
    for kind in filter(applies, KINDS):
        for architecture in ARCHITECTURES:
            if kind.only and architecture.name not in kind.only:
                continue
            marks = [] if _is_quick(kind, architecture, scope) else [pytest.mark.full]
            if architecture.skip:
                marks.append(pytest.mark.skip(reason=architecture.skip))
            cells.append(
                pytest.param(Case(kind, architecture), id=f"{architecture.name}-{kind.name}", marks=marks)
            )
    return cells


def _is_quick(kind: Kind, architecture: Architecture, scope: str) -> bool:
    if architecture.name == "llama":
        return True
    others = {"none": set(), "core": CORE, "all": {a.name for a in ARCHITECTURES}}[scope]
    return kind.name in REPRESENTATIVES and architecture.name in others


LEARNS = (lambda kind: kind.learns, "has no parameters")


def cases(
    applies: Callable[[Kind], bool] = lambda kind: True, why: str = "", scope: str = "core"
) -> pytest.MarkDecorator:
    """Decorator: run a test on every cell for which `applies(kind)`; `why` says what the others lack. `scope`: as in `params`."""
    return pytest.mark.parametrize("case", params(applies, why, scope))


def architectures(kind_name: str = "recurrent") -> pytest.MarkDecorator:
    """Decorator: run a test on every architecture with one kind, where another kind would show nothing new."""
    return pytest.mark.parametrize("case", [p for p in params() if p.values[0].kind.name == kind_name])


def llama(kind_name: str = "recurrent") -> Case:
    """One cell, for tests that need no matrix."""
    return Case(next(kind for kind in KINDS if kind.name == kind_name), ARCHITECTURES[0])
