"""Bad input to a bank: each error says what is wrong, and the bank is as it was."""

import pytest
from matrix import says

import memlayers as ml
from memlayers.lora import training
from tests.lora.bank_cases import CONFIG, QUESTIONS, files, some


def test_documents_that_cannot_be_added(unchanged):
    for texts, expected in (
        ({}, ["no documents"]),
        ({"new": ""}, ["'new' is empty"]),
        ({"new": "."}, ["'new' has one token"]),
        ({**some("secret"), "menu": "again"}, ["'menu' is in the bank already", "update or forget"]),
    ):
        with pytest.raises(ValueError, match=says(*expected)):
            unchanged.add(texts, "red")
    for texts in ({1: "text"}, {"": "text"}, {"new": b"text"}):
        with pytest.raises(TypeError, match="documents are texts by id"):
            unchanged.add(texts, "red")
    with pytest.raises(ValueError, match="'menu' is empty"):
        unchanged.update({"menu": ""})
    for group in ("", None, ["red"]):
        with pytest.raises(ValueError, match="group must be a text"):
            unchanged.add(some("secret"), group)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../out",
        "a/b",
        "a\\b",
        "/tmp/out",
        ".hidden",
        "a..b",
        "a.",
        "a b",
        "a\0",
        "é",
        "x" * 65,
        3,
    ],
)
def test_names_that_cannot_be_folders(unchanged, name):
    with pytest.raises(ValueError, match=says(repr(name), "cannot name a shard")):
        unchanged.add(some("secret"), "red", name)


def test_names_that_are_taken(unchanged):
    with pytest.raises(ValueError, match="has a shard 'rules' already"):
        unchanged.add(some("secret"), "red", "rules")


def test_what_is_not_there(unchanged):
    for change in (
        lambda: unchanged.forget("secret"),
        lambda: unchanged.forget(["menu", "secret"]),
        lambda: unchanged.update({"menu": "Nothing to eat.", "secret": "A new word."}),
    ):
        with pytest.raises(KeyError, match="no document 'secret' in the bank"):
            change()
    with pytest.raises(ValueError, match="no documents"):
        unchanged.forget([])
    for ask in (lambda: unchanged.export("none", "out"), lambda: unchanged.merge(["rules", "none"])):
        with pytest.raises(KeyError, match="no shard 'none'"):
            ask()


def test_shards_that_cannot_be_merged(bank):
    bank.add(some("secret"), "red", "more")
    before = files(bank.path)
    with pytest.raises(ValueError, match="shards of several groups cannot be merged"):
        bank.merge(["rules", "calls"])
    for shards in (["rules"], ["rules", "rules"], [], "rules"):
        with pytest.raises(ValueError, match="two different shards"):
            bank.merge(shards)
    with pytest.raises(ValueError, match="has a shard 'calls' already"):
        bank.merge(["rules", "more"], "calls")
    with pytest.raises(ValueError, match="cannot name a shard"):
        bank.merge(["rules", "more"], "../calls")
    assert files(bank.path) == before


def test_questions_and_groups_that_do_not_fit(unchanged):
    for ask in (unchanged.route, unchanged.read):
        with pytest.raises(ValueError, match="a list of groups for each of the 2 questions"):
            ask(QUESTIONS, groups=[["red"]])
        with pytest.raises(ValueError, match="questions must be a list"):
            ask(QUESTIONS[0], groups=[["red"]])
        with pytest.raises(ValueError, match="top_k must be 1 at least, got 0"):
            ask(QUESTIONS, groups=[["red"]] * 2, top_k=0)
        with pytest.raises(TypeError, match="groups are a list of names, got the text 'red'"):
            ask(QUESTIONS, groups=["red", "red"])
        with pytest.raises(ValueError, match="has no token"):
            ask(["", "why?"], groups=[["red"]] * 2)


def test_a_loss_that_is_not_finite(makes, monkeypatch):
    bank = makes.new(config=CONFIG.model_copy(update={"steps": 5}))
    before, losses = files(bank.path), training.row_losses
    monkeypatch.setattr(training, "row_losses", lambda *a: losses(*a) * float("inf"))
    with pytest.raises(
        ValueError, match=says("of 5 of training shard 'rules'", "the bank is as it was", "learning_rate")
    ):
        bank.add(some("menu"), "red", "rules")
    assert files(bank.path) == before


def test_a_gradient_that_is_not_finite(makes, monkeypatch):
    """The loss is 0, its gradient at B = 0 infinite."""
    bank = makes.new(config=CONFIG.model_copy(update={"steps": 1}))
    before = files(bank.path)

    def root(model, batch, state):
        return state["notes"]["layers.0.mlp.up_proj.lora_B"].sqrt().sum()[None] + 0 * sum(
            x.sum() for x in state["notes"].values()
        )

    monkeypatch.setattr(training, "row_losses", root)
    with pytest.raises(ValueError, match=says("step 1 of 1 of training shard 'rules'", "no longer finite")):
        bank.add(some("menu"), "red", "rules")
    assert files(bank.path) == before


def test_a_memory_that_is_off(makes, unchanged):
    with ml.disabled(makes.model), pytest.raises(ValueError, match="'notes' is disabled"):
        unchanged.add(some("secret"), "red")


def test_configs(makes):
    for fields, expected in (
        ({"steps": -1}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"batchsize": 3}, "did you mean 'batch_size'"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ml.ConfigError, match=expected):
            ml.LoRABankConfig(**fields)
    for field in ("segment_length", "router_length"):
        with pytest.raises(ml.ConfigError, match=says(f"{field}: 96 tokens", "96 positions")):
            makes.new(config=CONFIG.model_copy(update={field: 96}))
    assert not (makes.folder / "bank").exists()
