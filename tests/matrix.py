"""Kinds of memory × architectures: what the contract test runs over.

A later kind adds one entry to `KINDS`, a new architecture one to `ARCHITECTURES`. Everything is built on
demand. The tiny models have large random weights, so that what memory holds moves the logits by much more
than the tolerances of the tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import memlayers as ml

VOCAB = 512
FIRST_WORD = 259
SEGMENT = 5
TEXT = 2 * SEGMENT + 3  # a text that ends inside its third segment
CHECKPOINT = Path(__file__).resolve().parents[2] / "shared" / "checkpoints" / "stories260K"


@dataclass(frozen=True)
class Architecture:
    """A model that memory is attached to; `skip` says why it cannot be built here, None where it can."""

    name: str
    build: Callable[[], PreTrainedModel]
    skip: str | None = None


@dataclass(frozen=True)
class Kind:
    """One or more memories of a model, and which parts of the contract they are held to.

    Attributes:
        configs: memories by name.
        additive: adds to the hidden states, zero at attach: logits are bit-equal to the base's.
        stateful: keeps a `MemoryState`.
        segmented: reads a long input in segments; the window ends at a segment's end. Stateful kinds that do not
            stream: every token changes the state, and attention reaches as far as keys and values go.
        accumulates: the state grows with the text.
        decoding_writes: `write_while_decoding` is on.
        chooses: reads what scores best, a step where rounding may tip the scale.
        replaces: takes the place of an MLP, whose parameters get no gradient then.
        by_gradient: `ml.write` takes gradient steps; a forward call only reads.
        n_new_tokens: ids that it adds behind the base's, with logits of their own; the base's logits do not move.
        only: the architectures it is run on, where the others would show nothing new; (): all.
    """

    name: str
    configs: dict[str, ml.MemoryConfig] = field(hash=False)
    additive: bool = False
    stateful: bool = True
    segmented: bool = True
    accumulates: bool = False
    decoding_writes: bool = False
    replaces: bool = False
    chooses: bool = False
    by_gradient: bool = False
    n_new_tokens: int = 0
    only: tuple[str, ...] = ()

    @property
    def streams(self) -> bool:
        """Keeps a state that every token changes; keys and values stay beside it."""
        return self.stateful and not self.segmented and not self.by_gradient

    @property
    def in_one_call(self) -> bool:
        """Generation with a cache is one forward call over all of the text so far."""
        return self.decoding_writes or self.by_gradient

    def with_fields(self, **fields) -> Kind:
        """The same memories with some fields of their configs changed."""
        configs = {n: type(c)(**{**c.model_dump(), **fields}) for n, c in self.configs.items()}
        return Kind(**{**self.__dict__, "configs": configs})


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    kind: Kind
    architecture: Architecture

    def base(self) -> PreTrainedModel:
        """The model without memory, in eval mode, float32; the same weights on each call."""
        return self.architecture.build().eval()

    def model(self, kind: Kind | None = None, **attach) -> PreTrainedModel:
        """The model with its memories, whose parameters are shaken so that none is at a neutral value."""
        return wrap(self.base(), kind or self.kind, **attach)

    def tokens(self, rows: int, length: int, seed: int = 0) -> torch.Tensor:
        """`tokens`, and among them, in their order, the ids that the kind adds."""
        ids, new = tokens(rows, length, seed), torch.arange(VOCAB, VOCAB + self.kind.n_new_tokens)
        ids[:, 1 : 1 + len(new)] = new
        return ids


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


def _tokens_config(**fields) -> ml.MemoryTokensConfig:
    return ml.MemoryTokensConfig(**{"n_tokens": 2, "segment_length": SEGMENT, **fields})


UNLIKE = ("llama", "mistral_sliding", "gpt2", "gemma3")
"""Architectures that differ most: rotary, a sliding window, looked-up positions, layers of two sorts. Enough for a
variant of a kind that is run on all."""

KINDS = [
    Kind("recurrent", {"stream": _tokens_config()}),
    Kind(
        "accumulate",
        {"stream": _tokens_config(mode="accumulate")},
        accumulates=True,
        only=(*UNLIKE, "stories260K"),
    ),
    Kind(
        "writes_decoding",
        {"stream": _tokens_config(write_while_decoding=True)},
        decoding_writes=True,
        only=UNLIKE,
    ),
    Kind(
        "learned_linear",
        {"stream": _tokens_config(write_input="learned", projection="linear", write_layer=0)},
        only=UNLIKE,
    ),
    Kind("prefix", {"stream": _tokens_config(mode="prefix", writer_dim=12)}),
    Kind(
        "two_memories",
        {
            "notes": _tokens_config(),
            "log": _tokens_config(n_tokens=1, mode="accumulate", projection="none"),
        },
        accumulates=True,
        only=UNLIKE,
    ),
]


def _product_key(name: str, only: tuple[str, ...] = (), **fields) -> Kind:
    """Tables of 8² slots in the last layer."""
    small = {"layers": [-1], "n_keys": 8, "heads": 2, "top_k": 4, "key_dim": 8}
    config = ml.ProductKeyMemoryConfig(**{**small, **fields})
    replaces = config.placement == "replace"
    return Kind(
        name,
        {"facts": config},
        additive=not replaces,
        stateful=False,
        segmented=False,
        replaces=replaces,
        chooses=True,
        only=only,
    )


KINDS += [
    _product_key("product_key", layers=[0, 1], value_dim=24),
    _product_key("product_key_gate", UNLIKE, gate="learned", score="sigmoid", share_values=False, heads=3),
    _product_key(
        "product_key_plain", UNLIKE, gate="none", value_proj=False, value_init="zero", qk_norm=False
    ),
    _product_key("product_key_replace", UNLIKE, placement="replace", score="relu", key_init="normal"),
]


def _neural(name: str, additive: bool = False, only: tuple[str, ...] = (), **fields) -> Kind:
    """Small memories in both layers; what is not `mac` streams: every token is written, decoding too."""
    small = {"layers": [0, 1], "heads": 2, "chunk_size": 4, "conv_kernel": 3}
    config = ml.NeuralMemoryConfig(**{**small, **fields})
    segmented = config.placement == "mac"
    flags = {"additive": additive, "segmented": segmented, "decoding_writes": not segmented, "only": only}
    return Kind(name, {"past": config}, **flags)


KINDS += [
    _neural("neural_mag", additive=True),
    _neural("neural_mal", additive=True, depth=2, expansion=2, n_persistent_tokens=3),
    _neural("neural_mac", placement="mac", segment_length=SEGMENT, n_persistent_tokens=2),
    _neural("neural_window", only=UNLIKE, rule="delta", sliding_window=4),
]


KINDS += [
    Kind(
        "lora",
        {
            "notes": ml.LoRAMemoryConfig(
                r=4,
                lora_alpha=8,
                writer={"steps": 2, "learning_rate": 1.0, "optimizer": "sgd", "segment_length": 5},
            )
        },
        additive=True,
        segmented=False,
        by_gradient=True,
    )
]


KINDS += [
    Kind(
        "cartridge",
        {
            "notes": ml.CartridgeConfig(
                n_tokens=3,
                start="learned",
                writer={"steps": 2, "learning_rate": 1.0, "optimizer": "sgd", "segment_length": 5},
            )
        },
        segmented=False,
        by_gradient=True,
    )
]


KINDS += [
    Kind(
        "associative",
        {"past": ml.AssociativeMemoryConfig(n_tokens=3, segment_length=SEGMENT, key_dim=16)},
    ),
    Kind(
        "associative_plain",
        {
            "past": ml.AssociativeMemoryConfig(
                n_tokens=2, segment_length=SEGMENT, key_dim=12, nu=4, layers=[0], correction=False
            )
        },
        only=UNLIKE,
    ),
]


def _task_tokens(name: str, only: tuple[str, ...] = (), **fields) -> Kind:
    """Three procedures behind the vocabulary."""
    config = ml.TaskTokensConfig(names=["sort", "copy", "reverse"], **fields)
    flags = {"additive": True, "stateful": False, "segmented": False, "n_new_tokens": 3, "only": only}
    return Kind(name, {"tasks": config}, **flags)


KINDS += [_task_tokens("task_tokens"), _task_tokens("task_tokens_untied", UNLIKE, tied=False)]


def params(applies: Callable[[Kind], bool] = lambda kind: True, why: str = "") -> list:
    """The matrix as pytest parameters; a cell whose architecture is absent, or to whose kind the part of the
    contract does not apply, is collected as skipped with its reason."""
    cells = []
    for kind in KINDS:
        for architecture in ARCHITECTURES:
            if kind.only and architecture.name not in kind.only:
                continue
            reason = architecture.skip or (None if applies(kind) else f"{kind.name}: {why}")
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            cells.append(
                pytest.param(Case(kind, architecture), id=f"{architecture.name}-{kind.name}", marks=marks)
            )
    return cells


def cases(applies: Callable[[Kind], bool] = lambda kind: True, why: str = "") -> pytest.MarkDecorator:
    """Decorator: run a test on every cell for which `applies(kind)`; `why` says what the others lack."""
    return pytest.mark.parametrize("case", params(applies, why))


def architectures(kind_name: str = "recurrent") -> pytest.MarkDecorator:
    """Decorator: run a test on every architecture with one kind, where another kind would show nothing new."""
    return pytest.mark.parametrize("case", [p for p in params() if p.values[0].kind.name == kind_name])


def llama(kind_name: str = "recurrent") -> Case:
    """One cell, for tests that need no matrix."""
    return Case(next(kind for kind in KINDS if kind.name == kind_name), ARCHITECTURES[0])
