"""Numbers that make no sense: every field of every config refuses them by its name, and what is too large for the machine
together is counted before it is built."""

import math

import pytest
import torch
from config_fuzz import STARTS
from matrix import llama, says

import memlayers as ml
from memlayers.config import ConfigError, Strict, validate
from memlayers.core import size
from memlayers.eval.experiments.recall import SuiteConfig, make_items
from memlayers.train.config import LossSection, TrainConfig


def configs(of: type[Strict] = Strict) -> set[type[Strict]]:
    """All config classes of the package, without what a bank writes for itself."""
    found = {of} if of.__module__.startswith("memlayers.") else set()
    found = found.union(*(configs(below) for below in of.__subclasses__()))
    return {cls for cls in found if cls in STARTS or not cls.__module__.startswith("memlayers.lora.")}


def number_fields() -> list[tuple[type[Strict], str, str]]:
    fields = [
        (cls, name, str(field.annotation)) for cls in configs() for name, field in cls.model_fields.items()
    ]
    numbers = [field for field in fields if "int" in field[2] or "float" in field[2]]
    return sorted(numbers, key=lambda field: (field[0].__name__, field[1]))


def test_all_starts_are_looked_at():
    assert set(STARTS) <= configs() and len(number_fields()) > 150


@pytest.mark.parametrize(
    "value", [10**12, -(10**12), 10**30, math.nan, math.inf, -math.inf, 1e300, -1e300], ids=str
)
def test_every_number_has_a_limit(value):
    for cls, field, annotation in number_fields():
        for given in (value, [value, value]) if "list" in annotation else (value,):
            with pytest.raises(ConfigError) as error:
                validate(cls, {field: given})
            lines = str(error.value).splitlines()
            assert any(line.startswith((f"{field}:", f"{field}.")) for line in lines), (cls, field, lines)
            assert "unknown field" not in str(error.value)


def test_numbers_in_the_fields_of_a_model():
    section = {"model": {"config": {"model_type": "llama", "rope": [{"theta": math.nan}]}, "tokenizer": "t"}}
    with pytest.raises(ConfigError, match=r"model\.config\.rope.*finite"):
        validate(TrainConfig, section)


def test_nothing_to_learn():
    for fields in ({"answer": 0.0, "rest": 0.0}, {"answer": 0.0, "rest": 0.0, "context": 0.0, "cycle": 0.0}):
        with pytest.raises(ConfigError, match=r"answer: all weights are 0, .* nothing to learn"):
            LossSection(**fields)
    assert LossSection(answer=0.0, rest=0.0, cycle=1.0).cycle == 1


def test_stages_are_not_listed_before_they_are_looked_at():
    for stages in ({"stop": 2**31}, [1, 2**31], {"start": 2**31, "stop": 2**31}):
        with pytest.raises(ConfigError, match=r"curriculum\.segments"):
            validate(TrainConfig, {"curriculum": {"segments": stages}})


def test_texts_that_no_machine_holds_are_not_asked(tokenizer):
    suite = SuiteConfig(task={"type": "passkey"}, n=1_000_000, lengths=[2**24])
    with pytest.raises(ConfigError, match=r"n: 1,000,000 texts of 16,777,216 tokens are more"):
        make_items("passkey", suite, tokenizer, 16, seed=0)


LARGE = [
    ({"type": "neural", "heads": 4096, "head_dim": 65_536}, "head_dim"),
    ({"type": "neural", "expansion": 4096, "depth": 2, "head_dim": 8192}, "head_dim"),
    ({"type": "associative", "key_dim": 4096, "nu": 16}, "key_dim"),
    ({"type": "product_key", "n_keys": 65_536, "top_k": 1}, "n_keys"),
    ({"type": "product_key", "heads": 4096, "key_dim": 65_536}, "heads"),
    ({"type": "reversible", "n_tokens": 1, "ratios": [2000]}, "ratios"),
    ({"type": "tokens", "mode": "prefix", "writer_dim": 65_536}, "writer_dim"),
    ({"type": "lora", "r": 65_536}, "r"),
    ({"type": "cartridge", "start": "learned", "n_tokens": 65}, "n_tokens"),
]


@pytest.mark.parametrize(("fields", "named"), LARGE, ids=lambda value: str(value)[:40])
def test_a_memory_that_does_not_fit_is_not_built(fields, named, monkeypatch):
    """Each field is within its limit. A machine with little memory is played, so that all are refused anywhere."""
    free = 10_000 if fields["type"] == "cartridge" else 100_000_000
    real = size.psutil.virtual_memory()
    monkeypatch.setattr(size.psutil, "virtual_memory", lambda: real._replace(available=free))
    model = llama().base()
    before, random = {name: p.clone() for name, p in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(ConfigError, match=says(f"{named}: lower it", "bytes", f"{free:,} are free")):
        ml.attach(model, ml.parse_memory_config(fields))
    assert ml.memories(model) == {} and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_places_of_a_level_that_attend_to_each_other():
    with pytest.raises(ConfigError, match=r"ratios\.1: 64 tokens for 64 times as many are 4,160 places"):
        ml.ReversibleMemoryConfig(n_tokens=64, ratios=[8, 64])
    with pytest.raises(
        ConfigError, match=r"ratios: with 1 tokens they make a segment of 1,073,741,824 text tokens"
    ):
        ml.ReversibleMemoryConfig(n_tokens=1, ratios=[1024, 1024, 1024])


def test_an_allocator_without_memory_is_a_config_error(monkeypatch):
    """Where a memory is counted as small enough and is not."""
    kind = ml.MemoryTokens

    def no_memory(*arguments):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        )

    monkeypatch.setattr(kind, "for_model", no_memory)
    with pytest.raises(ConfigError, match=says("kind tokens", "not enough memory")):
        ml.attach(llama().base(), ml.MemoryTokensConfig())


def test_what_a_teacher_says_is_counted(monkeypatch):
    real = size.psutil.virtual_memory()
    model = llama().base()
    ml.attach(model, ml.CartridgeConfig(n_tokens=2, writer={"distill": {"continuations": 4096, "length": 8}}))
    monkeypatch.setattr(size.psutil, "virtual_memory", lambda: real._replace(available=10_000_000))
    with pytest.raises(ConfigError, match=r"writer\.distill\.continuations: lower it, or length"):
        ml.write(model, torch.randint(3, 40, (1, 8)))


def test_counting_draws_no_random_numbers():
    model = llama().base()
    for fields in (
        {"type": "tokens"},
        {"type": "task_tokens", "names": ["a"]},
        {"type": "cartridge"},
        {"type": "lora"},
    ):
        config = ml.parse_memory_config(fields)
        random = torch.get_rng_state()
        size.check_size(ml.kinds.module_class(config), config, model)
        assert torch.equal(torch.get_rng_state(), random)
