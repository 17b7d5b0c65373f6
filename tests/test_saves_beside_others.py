"""`ml.save` into a folder where other files stand: none of them is replaced, and what the folder holds can be moved."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import memlayers as ml
from memlayers.files import read_json
from tests.killing import contents
from tests.matrix import llama

BASE_FILES = ("base/config.json", "base/model.safetensors")


def model_with(seed=0):
    model = llama().model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * seed)
    return model


@pytest.mark.parametrize("name", [*BASE_FILES, "tokenizer_config.json"])
def test_a_file_of_others_is_named_and_stays(tmp_path, tokenizer, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(
        FileExistsError, match=f"{path.name} (was not written by ml.save|is not of this save)"
    ):
        ml.save(model_with(), tmp_path / "out", save_base=True, tokenizer=tokenizer)
    assert contents(tmp_path) == before


def test_a_model_card_of_the_users_stays(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    ml.save(model_with(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert "README.md" not in read_json(tmp_path / "memory_config.json")["files"]
    ml.load(tmp_path, base=llama().base())


def test_a_model_card_that_was_edited_stays_and_one_that_was_not_is_written_anew(tmp_path):
    ml.save(model_with(), tmp_path)
    first = (tmp_path / "README.md").read_text()
    ml.save(model_with(1), tmp_path, save_base=True)
    assert (tmp_path / "README.md").read_text() != first
    (tmp_path / "README.md").write_text(first + "\nEvaluated by hand.\n")
    ml.save(model_with(2), tmp_path)
    assert "Evaluated by hand." in (tmp_path / "README.md").read_text()


def test_saving_into_the_bases_own_folder_adds_to_it(tmp_path, tokenizer):
    llama().base().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("# The base\n")
    before = contents(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ml.attach(model, ml.MemoryTokensConfig(n_tokens=2, segment_length=4), name="stream")
    ml.save(model, tmp_path / "model", tokenizer=tokenizer)
    after = contents(tmp_path / "model")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"memory.safetensors", "memory_config.json"}
    ml.load(tmp_path / "model")


def test_over_a_save_of_an_earlier_version(tmp_path):
    """It has no list of files; those that it must have written are replaced."""
    ml.save(model_with(), tmp_path / "out", save_base=True)
    config = read_json(tmp_path / "out" / "memory_config.json")
    (tmp_path / "out" / "memory_config.json").write_text(
        json.dumps({**{k: v for k, v in config.items() if k != "files"}, "format": 1})
    )
    model = model_with(3)
    ml.save(model, tmp_path / "out", save_base=True)
    loaded = ml.load(tmp_path / "out")
    for (name, one), two in zip(model.named_parameters(), loaded.parameters()):
        assert torch.equal(one, two), name


def test_a_base_beside_the_checkpoint_moves_along_with_it(tmp_path, monkeypatch):
    run = tmp_path / "run"
    llama().base().save_pretrained(run / "start")
    model = AutoModelForCausalLM.from_pretrained(run / "start")
    ml.attach(model, ml.MemoryTokensConfig(n_tokens=2, segment_length=4), name="stream")
    ml.save(model, run / "final")
    assert read_json(run / "final" / "memory_config.json")["base"]["name_or_path"] == "../start"
    shutil.move(run, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere" / "final")
    for folder in (tmp_path / "elsewhere" / "final", "."):
        loaded = ml.load(folder)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", ["../..", "../../start", "../", "../start/..", "../."])
def test_another_path_upwards_is_what_transformers_takes_it_for(tmp_path, name):
    """Only a folder right beside the checkpoint is looked for there."""
    from memlayers.checkpoint import place_of

    assert place_of(tmp_path, name) == name
