"""Fixtures of the bank's tests."""

import pytest
from matrix import ARCHITECTURES

from tests.lora.bank_cases import CONFIG, Makes, attached, files, some, tokenizer_of


def _params():
    for architecture in ARCHITECTURES:
        if architecture.name in ("llama", "gpt2", "stories260K"):
            marks = [pytest.mark.skip(reason=architecture.skip)] if architecture.skip else []
            yield pytest.param(architecture.name, marks=marks)


@pytest.fixture(params=_params())
def everywhere(request, tokenizer, tmp_path) -> Makes:
    """Banks of two architectures and of the real checkpoint."""
    return Makes(attached(request.param), tokenizer_of(request.param, tokenizer), tmp_path)


@pytest.fixture
def makes(tokenizer, tmp_path) -> Makes:
    """Banks of a tiny llama."""
    return Makes(attached("llama"), tokenizer, tmp_path)


@pytest.fixture
def bank(makes):
    """Of two shards that were not trained: steps 0."""
    bank = makes.new(config=CONFIG.model_copy(update={"steps": 0}))
    bank.add(some("handbook", "menu"), "red", "rules")
    bank.add(some("visit"), "blue", "calls")
    return bank


@pytest.fixture
def unchanged(bank):
    """The bank; after the test its folder is as it was before."""
    before = files(bank.path)
    yield bank
    assert files(bank.path) == before
