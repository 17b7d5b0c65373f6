"""A state of one variant of memory given to another under the same name: an error that names both."""

import pytest
from matrix import ARCHITECTURES, SEGMENT, llama, says, tokens

import memlayers as ml

STEPS = {"steps": 1, "segment_length": SEGMENT}
VARIANTS = {
    "tokens in mode recurrent": ml.MemoryTokensConfig(n_tokens=2, segment_length=SEGMENT),
    "tokens in mode prefix": ml.MemoryTokensConfig(n_tokens=2, segment_length=SEGMENT, mode="prefix"),
    "cartridge": ml.CartridgeConfig(n_tokens=2, writer=STEPS),
    "lora": ml.LoRAMemoryConfig(r=2, writer=STEPS),
    "associative": ml.AssociativeMemoryConfig(n_tokens=2, segment_length=SEGMENT, key_dim=8),
    "reversible": ml.ReversibleMemoryConfig(n_tokens=1, ratios=[SEGMENT], heads=4, depth=2),
    "neural in placement mag": ml.NeuralMemoryConfig(layers=[0], heads=2, chunk_size=4),
}


def wrapped(config):
    model = llama().base()
    ml.attach(model, config, name="notes")
    return model


@pytest.mark.parametrize("wrote", VARIANTS)
def test_a_state_of_another_variant(wrote):
    state = ml.write(wrapped(VARIANTS[wrote]), tokens(1, 7))
    for reads, config in VARIANTS.items():
        model = wrapped(config)
        if reads == wrote:
            model(tokens(1, 4), memory_state=state)
            continue
        for call in (
            lambda m: m(tokens(1, 4), memory_state=state),
            lambda m: ml.write(m, tokens(1, 4), state),
        ):
            with pytest.raises(
                ValueError, match=says("'notes'", f"one of kind {wrote}", f"'notes' is of kind {reads}")
            ):
                call(model)


def test_what_accumulated_is_not_recurrent():
    """They look alike. The state says of which kind it is; one that does not is told by its slots."""
    config = VARIANTS["tokens in mode recurrent"]
    many = ml.MemoryTokensConfig(**{**config.model_dump(), "mode": "accumulate"})
    state = ml.write(wrapped(many), tokens(1, 2 * SEGMENT))
    for given, said in [
        (state, ("kind tokens in mode accumulate", "kind tokens in mode recurrent")),
        (ml.MemoryState(state.fields), ("4 slots", "2 tokens in mode 'recurrent'")),
    ]:
        with pytest.raises(ValueError, match=says("'notes'", *said)):
            wrapped(config)(tokens(1, 4), memory_state=given)


def test_a_learned_cartridge_takes_what_a_prompt_wrote():
    """Both are keys and values before a text."""
    fields = {"n_tokens": 3, "writer": {"steps": 0}}
    state = ml.write(wrapped(ml.CartridgeConfig(start="prompt", **fields)), tokens(1, 7))
    wrapped(ml.CartridgeConfig(start="learned", **fields))(tokens(1, 4), memory_state=state)


def test_a_state_without_its_open_segment():
    model = wrapped(VARIANTS["tokens in mode prefix"])
    state = ml.MemoryState({"notes": ml.write(model, tokens(1, 7))["notes"]})
    with pytest.raises(ValueError, match=says("no 'pending'", "['notes']", "whole state")):
        model(tokens(1, 4), memory_state=state)


@pytest.mark.parametrize(
    "config",
    [
        ml.CartridgeConfig(n_tokens=96),
        ml.CartridgeConfig(n_tokens=96, start="learned"),
        ml.CartridgeConfig(n_tokens=200, start="prompt"),
        ml.MemoryTokensConfig(n_tokens=96, segment_length=SEGMENT, mode="prefix"),
        ml.MemoryTokensConfig(n_tokens=48, segment_length=SEGMENT),
        ml.AssociativeMemoryConfig(n_tokens=96, segment_length=SEGMENT),
    ],
    ids=lambda config: f"{config.type}-{getattr(config, 'start', getattr(config, 'mode', ''))}",
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prefix_longer_than_the_models_positions(config, architecture):
    (model,) = (a.build() for a in ARCHITECTURES if a.name == architecture)
    with pytest.raises(ml.ConfigError, match=says("n_tokens:", str(config.n_tokens), "96 positions")):
        ml.attach(model, config, name="notes")
    assert ml.memories(model) == {}
