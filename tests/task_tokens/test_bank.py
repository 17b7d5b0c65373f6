"""The bank: procedures are added, removed, exported; their ids stay; every mistake is one clear error."""

import pytest
import torch
from matrix import ARCHITECTURES, TEXT, VOCAB, says, tokens
from safetensors.torch import load_file, save_file

import memlayers as ml
from memlayers.files import DamagedFile

TIED = ARCHITECTURES[0]


def bank(names=("sort", "copy", "reverse"), model=None, **fields):
    model = model or TIED.build().eval()
    return model, ml.attach(model, ml.TaskTokensConfig(names=list(names), **fields), "tasks")


def rows_of(memory):
    return {name: row.detach().clone() for name, row in memory.named_parameters()}


def test_ids_stay_when_others_go_and_places_are_used_again():
    memory = bank()[1]
    before = rows_of(memory)
    memory.remove("copy")
    assert memory.names == ["sort", "reverse"] and memory.config.names == ["sort", None, "reverse"]
    assert memory.id_of("reverse") == VOCAB + 2
    assert memory.add("count") == VOCAB + 1 and memory.add("sum") == VOCAB + 3
    assert memory.config.names == ["sort", "count", "reverse", "sum"]
    now = rows_of(memory)
    assert list(now) == [f"rows.input.{place}" for place in range(4)]
    assert [n for n in before if torch.equal(now[n], before[n])] == ["rows.input.0", "rows.input.2"]


@torch.no_grad()
def test_what_is_saved_is_what_is_there(tmp_path):
    """After removing and adding, with a free place left and some that do not learn."""
    model, memory = bank(renormalize=True)
    given = memory.config
    memory.remove("sort")
    memory.remove("reverse")
    memory.add("count")
    memory.learn(["count"])
    ml.save(model, tmp_path)
    loaded = ml.load(tmp_path, base=TIED.build().eval())
    same = ml.memories(loaded)["tasks"]
    assert same.config == memory.config and same.config.names == ["count", "copy", None]
    assert given.names == ["sort", "copy", "reverse"], "a config that was given was changed"
    assert [row.requires_grad for row in same.parameters()] == [True, False]
    ids = tokens(2, TEXT)
    ids[:, 2:4] = torch.tensor([memory.id_of("count"), memory.id_of("copy")])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_procedure_works_in_another_model(tmp_path, tied):
    first, memory = bank(tied=tied)
    memory.export("reverse", tmp_path / "reverse.safetensors")
    second, other = bank(names=["count"], tied=tied)
    assert other.add_exported(tmp_path / "reverse.safetensors", name="backwards") == VOCAB + 1
    a, b = tokens(2, TEXT), tokens(2, TEXT)
    a[:, 3], b[:, 3] = memory.id_of("reverse"), other.id_of("backwards")
    one, two = first(a).logits, second(b).logits
    assert torch.equal(one[..., :VOCAB], two[..., :VOCAB])
    assert torch.equal(one[..., VOCAB + 2], two[..., VOCAB + 1])
    assert [path.name for path in tmp_path.iterdir()] == ["reverse.safetensors"]


def test_a_bf16_base_is_the_same_base(tmp_path):
    bank()[1].export("sort", tmp_path / "sort.safetensors")
    memory = bank(names=[], model=TIED.build().bfloat16())[1]
    assert memory.add_exported(tmp_path / "sort.safetensors") == VOCAB
    assert memory.rows.input["0"].dtype == torch.float32


def test_files_that_are_no_procedure_for_this_base(tmp_path, tiny_llama):
    file = tmp_path / "sort.safetensors"
    memory = bank()[1]
    memory.export("sort", file)
    untied, small, shifted = (
        bank(names=[], tied=False)[1],
        bank(names=[], model=tiny_llama)[1],
        TIED.build(),
    )
    torch.nn.init.normal_(shifted.model.embed_tokens.weight)
    for other, parts in [
        (untied, ["one row (tied)", "two rows (untied)"]),
        (small, ["512 vocabulary rows of 32", "has 400 of 32"]),
        (bank(names=[], model=shifted)[1], ["another base of the same shape"]),
        (memory, ["a procedure named 'sort'", "choose another name"]),
    ]:
        before = other.config
        with pytest.raises(ValueError, match=says(*parts)):
            other.add_exported(file)
        assert other.config is before
    with pytest.raises(FileNotFoundError, match=says("no procedure at", "gone")):
        memory.add_exported(tmp_path / "gone")
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-9])
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    save_file(
        {"x": torch.zeros(1), **load_file(file)},
        tmp_path / "more",
        metadata={"format": "memlayers.task_token.v1"},
    )
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "flipped").write_bytes(damaged)
    with pytest.raises(DamagedFile, match=says("flipped", "tensor", "not as it was written")):
        memory.add_exported(tmp_path / "flipped")
    for name, part in [("cut", "cut short"), ("foreign", "not a procedure"), ("more", "has tensors")]:
        with pytest.raises(ValueError, match=says(str(tmp_path / name), part)):
            memory.add_exported(tmp_path / name, verify=False)
        with pytest.raises(ValueError, match=says(str(tmp_path / name))):
            memory.add_exported(tmp_path / name)


def test_names_that_cannot_be():
    model, memory = bank()
    with pytest.raises(ValueError, match="there is a procedure named 'copy'"):
        memory.add("copy")
    with pytest.raises(ml.ConfigError, match="names: ' ' is no name"):
        memory.add(" ")
    with pytest.raises(ml.ConfigError, match="names: 'a' is there 2 times"):
        ml.TaskTokensConfig(names=["a", None, "a"])
    with pytest.raises(ml.ConfigError, match="train: 'b' is not among names, \\['a'\\]"):
        ml.TaskTokensConfig(names=["a"], train=["b"])
    with pytest.raises(ml.ConfigError, match="train: 'b' is not among names"):
        memory.learn(["b"])
    with pytest.raises(ml.ConfigError, match="this model has task tokens, memory 'tasks'; add"):
        ml.attach(model, ml.TaskTokensConfig(names=["more"]), "more")
    assert memory.config.names == ["sort", "copy", "reverse"] and len(rows_of(memory)) == 3


def test_a_removed_procedure_that_is_asked_for(tmp_path):
    model, memory = bank()
    gone, ids = memory.id_of("copy"), tokens(1, 5)
    memory.remove("copy")
    for ask in (memory.id_of, memory.remove, lambda name: memory.export(name, tmp_path / "x")):
        with pytest.raises(KeyError, match=says("no procedure named 'copy'", "removed", "sort", "reverse")):
            ask("copy")
    for wrong in (gone, VOCAB + 3):
        ids[0, 2] = wrong
        with pytest.raises(ValueError, match=says(f"input_ids: {wrong} is the id of no procedure", "'sort'")):
            model(ids)
    assert not list(tmp_path.iterdir())


def test_an_untied_head_asked_to_tie(tiny_llama):
    with pytest.raises(ml.ConfigError, match=says("tied:", "LlamaForCausalLM is not tied", "set false")):
        bank(model=tiny_llama, tied=True)
    assert ml.memories(tiny_llama) == {} and "forward" not in vars(tiny_llama.model.embed_tokens)
    assert not bank(model=tiny_llama)[1].tied


def test_a_text_to_start_from_needs_tokens(tokenizer):
    memory = bank(model=TIED.build())[1]
    with pytest.raises(ValueError, match="give the base's tokenizer="):
        memory.add("count", init_from="count the words")
    with pytest.raises(ValueError, match="init_from: '' has no token"):
        memory.add("count", init_from="", tokenizer=tokenizer)
    assert "count" not in memory.names


def test_a_config_says_what_rows_start_from(tokenizer):
    texts = {"copy": "the pass key", "sort": "A boat"}
    memory = bank(model=TIED.build(), init_from=texts)[1]
    before = rows_of(memory)
    memory.start_from_texts_(tokenizer)
    for place, text in ((1, texts["copy"]), (0, texts["sort"])):
        ids = tokenizer.encode(text, add_special_tokens=False)
        mean = memory.base["input"].module.weight[ids].detach().mean(0)
        row = memory.rows.input[str(place)].detach()
        torch.testing.assert_close(row, memory.base["input"].as_long(mean))
        assert memory.rows.input[str(place)].requires_grad
    assert torch.equal(memory.rows.input["2"], before["rows.input.2"])
    memory.remove("copy")
    assert memory.config.init_from == {"sort": "A boat"}
    wrong = bank(model=TIED.build(), init_from={"sort": "A boat", "copy": ""})[1]
    before = rows_of(wrong)
    with pytest.raises(ml.ConfigError, match=says("init_from.copy: '' has no token of the base")):
        wrong.start_from_texts_(tokenizer)
    assert all(torch.equal(row, before[name]) for name, row in rows_of(wrong).items())
    with pytest.raises(ml.ConfigError, match="init_from: 'b' is not among names"):
        ml.TaskTokensConfig(names=["a"], init_from={"b": "x"})


def test_an_empty_bank_is_the_base(tmp_path):
    model, ids = TIED.build().eval(), tokens(2, TEXT)
    with torch.no_grad():
        expected = model(ids).logits
        memory = bank(names=[], model=model)[1]
        assert torch.equal(model(ids).logits, expected)
        ml.save(model, tmp_path)
        loaded = ml.load(tmp_path, base=TIED.build().eval())
        memory.add("sort")
        assert model(ids).logits.shape[-1] == VOCAB + 1
    assert torch.equal(loaded(ids).logits, expected)
