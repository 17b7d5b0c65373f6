"""The kinds of memory that the contract test runs over: the rows of the matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import memlayers as ml

SEGMENT = 5


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
        learns: has parameters; a cartridge that only texts are written into has none.
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
    learns: bool = True
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


def _cartridge(name: str, start: str) -> Kind:
    """Three places."""
    writer = {"steps": 2, "learning_rate": 1.0, "optimizer": "sgd", "segment_length": 5}
    config = ml.CartridgeConfig(n_tokens=3, start=start, writer=writer)
    fresh = start == "text"  # nothing before a text is written
    flags = {"additive": fresh, "learns": not fresh, "segmented": False, "by_gradient": True}
    return Kind(name, {"notes": config}, **flags)


KINDS += [
    _cartridge("cartridge", "learned"),
    _cartridge("prompt", "prompt"),
    _cartridge("cartridge_text", "text"),
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
    ),
    Kind(
        "associative_delta",
        {"past": ml.AssociativeMemoryConfig(n_tokens=2, segment_length=SEGMENT, key_dim=16, normalize=False)},
    ),
]


KINDS += [
    Kind(
        "reversible",
        {"past": ml.ReversibleMemoryConfig(n_tokens=1, ratios=[SEGMENT], heads=4, depth=2)},
        accumulates=True,
    ),
    Kind(
        "reversible_levels",
        {"past": ml.ReversibleMemoryConfig(n_tokens=1, ratios=[1, SEGMENT], heads=2, depth=2)},
        accumulates=True,
    ),
]


def _task_tokens(name: str, **fields) -> Kind:
    """Three procedures behind the vocabulary."""
    config = ml.TaskTokensConfig(names=["sort", "copy", "reverse"], **fields)
    flags = {"additive": True, "stateful": False, "segmented": False, "n_new_tokens": 3}
    return Kind(name, {"tasks": config}, **flags)


KINDS += [_task_tokens("task_tokens"), _task_tokens("task_tokens_untied", tied=False)]
