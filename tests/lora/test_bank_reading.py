"""Reading a bank of LoRA shards: access rights, mixing, a user's encoder, PEFT."""

import json

import pytest
import torch
from matrix import near, says
from safetensors.torch import load_file

import memlayers as ml
from memlayers.files import DamagedFile
from tests.lora.bank_cases import CONFIG, QUESTIONS, TEXTS, attached, shard_files, some


def logits(makes, state, rows=2):
    ids = torch.tensor([[1, 300, 301, 302, 303]] * rows)
    with torch.no_grad():
        return makes.model(ids, memory_state=state).logits


# rights


def test_a_shard_that_may_not_be_read_changes_nothing(everywhere):
    bank, without = everywhere.new("bank"), everywhere.new("without")
    for each in (bank, without):
        each.add(some("handbook"), "red", "m")
        each.add(some("menu"), "red", "n")
    for i, name in enumerate(("a", "m-hidden", "z")):
        bank.add({f"hidden {i}": QUESTIONS[i % 2] * 2 + TEXTS["secret"]}, "blue", name)
    rights = [["red"], ["red"]]
    for top_k in (1, 2, 3):
        assert bank.route(QUESTIONS, groups=rights, top_k=top_k) == without.route(
            QUESTIONS, groups=rights, top_k=top_k
        )
        state, other = (b.read(QUESTIONS, groups=rights, top_k=top_k) for b in (bank, without))
        assert all(torch.equal(x, other["notes"][field]) for field, x in state["notes"].items())
        assert torch.equal(logits(everywhere, state), logits(everywhere, other))
    assert (
        bank.route(QUESTIONS, groups=[["red"], ["blue", "red"]], top_k=2)[0]
        == without.route(QUESTIONS[:1], groups=[["red"]], top_k=2)[0]
    ), "the rights of another row change nothing"
    assert not torch.equal(
        logits(everywhere, state), logits(everywhere, bank.read(QUESTIONS, groups=[["blue"]] * 2, top_k=2))
    )


def test_a_broken_shard_is_nobodys_trouble_but_its_readers(makes):
    bank = makes.new()
    bank.add(some("menu"), "red", "a")
    bank.add(some("secret"), "blue", "b")
    for path in shard_files(bank, "b").values():
        path.write_bytes(b"broken")
    reader = makes.open()
    assert reader.route(QUESTIONS, groups=[["red"]] * 2, top_k=2) == [[("a", 1.0)]] * 2
    assert reader.list(["red"])[0].name == "a"
    with pytest.raises(DamagedFile, match=r"shards.b-.*router\.safetensors is damaged"):
        reader.route(QUESTIONS, groups=[["blue"], ["red"]], top_k=2)
    with pytest.raises(DamagedFile, match=r"shards.b-.*manifest\.json is damaged"):
        reader.list(["blue"])


def test_a_group_that_is_not_there_is_one_without_shards(makes):
    """An asker cannot tell a group that never was from one that lost its last document, nor stop another's row."""
    bank = makes.new()
    bank.add(some("menu"), "red", "a")
    bank.add(some("secret"), "blue", "b")
    bank.forget("secret")
    for group in ("blue", "green", "", "red ", "\udc80"):
        assert bank.list([group]) == []
        assert bank.route(QUESTIONS, groups=[["red"], [group]], top_k=2) == [[("a", 1.0)], []]
        state, alone = (bank.read(QUESTIONS, groups=[["red"], own], top_k=2) for own in ([group], []))
        assert all(torch.equal(x, alone["notes"][field]) for field, x in state["notes"].items())
    for ask in (lambda: bank.list([3]), lambda: bank.route(QUESTIONS, groups=[["red"], [None]])):
        with pytest.raises(TypeError, match="groups are a list of names"):
            ask()


def test_a_row_without_rights_reads_the_model_as_it_is(makes):
    bank = makes.new()
    bank.add(some("menu"), "red", "a")
    state = bank.read(QUESTIONS, groups=[[], ["red"]], top_k=2)
    plain = makes.model(torch.tensor([[1, 300, 301, 302, 303]] * 2)).logits
    near(logits(makes, state)[0], plain[0])
    assert (logits(makes, state)[1] - plain[1]).abs().max() > 1e-2
    assert bank.route(QUESTIONS, groups=[[], []], top_k=2) == [[], []]


# mixing


def test_rows_of_different_rights_and_shards_in_one_forward(everywhere):
    bank = everywhere.new()
    for name, group in (("handbook", "red"), ("menu", "red"), ("secret", "blue"), ("visit", "green")):
        bank.add(some(name), group, name)
    rights = [["red"], ["red", "blue"], ["green"], []]
    questions = [*QUESTIONS, "Who comes in May?", "And who goes?"]
    state = bank.read(questions, groups=rights, top_k=2)
    assert state["notes"][next(iter(state["notes"]))].shape[:2] == (4, 4)
    together = logits(everywhere, state, rows=4)
    for row, (question, own) in enumerate(zip(questions, rights)):
        alone = bank.read([question], groups=[own], top_k=2)
        assert all(torch.equal(x[0], state["notes"][f][row]) for f, x in alone["notes"].items())
        near(together[row], logits(everywhere, alone, rows=1)[0])
    assert (
        len(
            {
                tuple(names)
                for names in ([n for n, _ in row] for row in bank.route(questions, groups=rights, top_k=2))
            }
        )
        == 4
    )


def test_a_mixture_is_the_weighted_sum(makes):
    bank = makes.new()
    for name in ("handbook", "menu", "visit"):
        bank.add(some(name), "red", name)
    (route,) = bank.route(QUESTIONS[:1], groups=[["red"]], top_k=3)
    assert len(route) == 3 and abs(sum(w for _, w in route) - 1) < 1e-12
    assert [w for _, w in route] == sorted((w for _, w in route), reverse=True)
    state = bank.read(QUESTIONS[:1], groups=[["red"]], top_k=3)["notes"]
    layer = "layers.1.mlp.up_proj"
    expected = 0
    for name, weight in route:
        tensors = load_file(shard_files(bank, name)["adapter_model.safetensors"])
        a, b = (tensors[f"base_model.model.model.{layer}.lora_{x}.weight"] for x in "AB")
        expected = expected + weight * (b @ a)
    torch.testing.assert_close(state[f"{layer}.lora_B"][0] @ state[f"{layer}.lora_A"][0], expected)


def test_a_state_of_the_bank_generates_and_is_saved(makes):
    bank = makes.new()
    bank.add(some("menu"), "red")
    state = bank.read(QUESTIONS, groups=[["red"], []], top_k=2)
    state.save(makes.folder / "state.safetensors")
    loaded = ml.MemoryState.load(makes.folder / "state.safetensors")
    ids = torch.tensor([[1, 300, 301]] * 2)
    out = [
        makes.model.generate(
            ids, past_key_values=s.to_cache(), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        for s in (state, loaded)
    ]
    assert out[0].shape == (2, 7) and torch.equal(*out)


# PEFT


def test_an_exported_shard_is_a_peft_adapter(everywhere):
    from peft import PeftModel

    bank = everywhere.new()
    bank.add(some("handbook", "menu"), "red", "rules")
    folder = bank.export("rules", everywhere.folder / "peft")
    with_shard = logits(everywhere, bank.read(QUESTIONS, groups=[["red"]] * 2, top_k=1))
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    base = ml.detach(everywhere.model)
    ids = torch.tensor([[1, 300, 301, 302, 303]] * 2)
    with torch.no_grad():
        plain = base(ids).logits
        peft = PeftModel.from_pretrained(base, folder)
        near(peft(ids).logits, with_shard)
        assert (with_shard - plain).abs().max() > 1e-2
        peft.save_pretrained(everywhere.folder / "again")
    again = everywhere.folder / "again"
    assert (
        load_file(again / "adapter_model.safetensors").keys()
        == load_file(folder / "adapter_model.safetensors").keys()
    )
    written, ours = (json.loads((f / "adapter_config.json").read_text()) for f in (again, folder))
    del written["target_modules"], ours["target_modules"]  # PEFT shortens long lists where it can
    assert written == ours


# encoders, other memories


def test_an_encoder_of_the_user(makes):
    seen = []

    def encoder(texts):
        seen.append(texts)
        return torch.tensor([[float("key" in t), float("eat" in t), 0.1] for t in texts])

    bank = makes.new(encoder=encoder)
    for name in ("handbook", "menu", "visit"):
        bank.add(some(name), "red", name)
    routes = bank.route(QUESTIONS, groups=[["red"]] * 2, top_k=1)
    assert routes == [[("handbook", 1.0)], [("menu", 1.0)]]
    assert all(len(texts) == 1 for texts in seen)
    assert makes.open(encoder=encoder).route(QUESTIONS, groups=[["red"]] * 2, top_k=1) == routes
    with pytest.raises(ValueError, match="user's encoder; pass it"):
        makes.open()
    wide = makes.open(encoder=lambda texts: torch.ones(len(texts), 4))
    with pytest.raises(ValueError, match=says("4 wide", "the encoder that it was made with")):
        wide.route(QUESTIONS, groups=[["red"]] * 2, top_k=2)
    odd = makes.open(encoder=lambda texts: torch.ones(3))
    with pytest.raises(ValueError, match=says("(3,)", "(1, d)")):
        odd.route(QUESTIONS, groups=[["red"]] * 2, top_k=2)


def test_beside_another_lora_memory(tokenizer, tmp_path):
    model = attached("llama")
    ml.attach(model, ml.LoRAMemoryConfig(r=3), name="other")
    bank = ml.LoRABank.create(tmp_path / "bank", model, tokenizer, memory="notes", config=CONFIG)
    bank.add(some("menu"), "red", progress=True)
    state = bank.read(QUESTIONS, groups=[["red"], []], top_k=2)
    assert set(state.fields) == {"notes", "other"}
    assert model(torch.tensor([[1, 300]] * 2), memory_state=state).logits.isfinite().all()
