"""Task tokens in training: their tokenizer, the rows that do not learn, lengths after a step, text as background, texts
to start from, procedures as data."""

from pathlib import Path

import pytest
import torch
from matrix import near, says
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.tasks import ProceduresConfig, ProceduresTask
from memlayers.train.background import divergence
from memlayers.train.config import TrainConfig
from memlayers.train.data import Example, collate
from memlayers.train.log import read_log
from memlayers.train.model import build_model
from memlayers.train.optimizers import parameter_groups
from memlayers.train.run import train
from memlayers.yaml_config import load_yaml

YAML = Path(__file__).parents[2] / "configs" / "train" / "task_tokens.yaml"


@pytest.fixture
def with_tasks(config):
    """A function: a run of three steps with the procedures sort and copy, with changes of their fields."""

    def make(**fields):
        memory = {"type": "task_tokens", "names": ["sort", "copy"], **fields}
        data = {"type": "task", "task": {"type": "passkey", "digits": 3}, "regime": "F", "segment_length": 24}
        return config(
            memories={"tasks": memory}, train_what="memory", data={**data, "segments": 2}, max_steps=3
        )

    return make


def test_a_run_renormalizes_what_learns_and_saves_the_tokenizer(with_tasks, base):
    final = train(with_tasks(train=["copy"], renormalize=True))
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.convert_tokens_to_ids(["<|sort|>", "<|copy|>"]) == [400, 401]
    model = ml.load(final)
    memory, start = ml.memories(model)["tasks"], build_and_seed(with_tasks(train=["copy"]))
    for side, rows in memory.rows.sides().items():
        assert torch.equal(rows["0"], start.rows.sides()[side]["0"]), "a row that does not learn moved"
        torch.testing.assert_close(
            rows["1"].norm().item(), memory.base[side].norm, atol=0, rtol=1e-5
        )  # a float32 sum
    assert not torch.equal(memory.rows.output["1"], start.rows.output["1"])


def build_and_seed(config):
    torch.manual_seed(config.seed)
    return ml.memories(build_model(config)[0])["tasks"]


def test_only_rows_that_learn_are_optimized(with_tasks):
    config = with_tasks(train=["copy"])
    names = [
        n for g in parameter_groups(build_model(config)[0], config.optimizer) for n in g["parameter_names"]
    ]
    assert names == [f"memlayers.tasks.rows.{side}.1" for side in ("input", "output")]


def test_a_tokenizer_without_room_names_the_memory(with_tasks, base, tokenizer):
    larger = AutoTokenizer.from_pretrained(base)
    larger.add_tokens(["<|mine|>"])
    larger.save_pretrained(base)
    with pytest.raises(ConfigError, match=says("memories.tasks:", "no room for")):
        build_model(with_tasks())


def test_divergence_counts_what_procedures_take_from_text(with_tasks):
    """The base's distribution with a share taken away: KL(base ‖ model) is the log of what is left, negated."""
    model = build_model(with_tasks())[0].eval()
    batch = collate([Example((), (), torch.randint(3, 400, (n,)).tolist()) for n in (9, 6)], "W")
    with torch.no_grad():
        far = divergence(model, batch)
        ids, mask = batch.input_ids, batch.attention_mask
        left = model(ids, attention_mask=mask).logits.softmax(-1)[..., :400].sum(-1)
    real = batch.parts > 0
    expected = ((-left.log() * real).sum(1) / real.sum(1)).mean()
    assert expected > 0
    torch.testing.assert_close(far, expected, atol=1e-5, rtol=1e-4)


def test_rows_start_from_texts_where_they_are_new(with_tasks, base):
    """Not where a checkpoint brought them: there they have learned."""
    start = build_and_seed(with_tasks(init_from={"copy": "the pass key"}))
    ids = AutoTokenizer.from_pretrained(base).encode("the pass key", add_special_tokens=False)
    for side, rows in start.rows.sides().items():
        mean = start.base[side].module.weight[ids].detach().mean(0)
        near(rows["1"].detach(), start.base[side].as_long(mean), 1e-6)
        assert not torch.allclose(rows["0"], rows["1"])
    config = with_tasks(init_from={"copy": "the pass key"})
    final = train(config)
    learned = ml.memories(ml.load(final))["tasks"]
    again = config.model_copy(
        update={"memories": {}, "model": config.model.model_copy(update={"path": str(final)})}
    )
    loaded = ml.memories(build_model(again)[0])["tasks"]
    assert loaded.config.init_from == {"copy": "the pass key"}
    assert torch.equal(loaded.rows.input["1"], learned.rows.input["1"])
    assert not torch.equal(loaded.rows.output["1"], start.rows.output["1"])


def test_texts_that_no_row_can_start_from(with_tasks):
    with pytest.raises(ConfigError, match=says("memories.tasks.init_from.copy: '' has no token of the base")):
        build_model(with_tasks(init_from={"copy": ""}))
    with pytest.raises(ConfigError, match=r"memories.tasks.init_from: 'copi' is not among names"):
        with_tasks(init_from={"copi": "the pass key"})


@pytest.fixture
def procedures(tmp_path):
    """A function: the committed config of procedures on a random base that has their words, with changes."""
    task = ProceduresTask(ProceduresConfig())
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape["vocab_size"] = len(task.tokenizer)
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).save_pretrained(tmp_path / "words")
    task.tokenizer.save_pretrained(tmp_path / "words")
    folders = [f"model.path={tmp_path / 'words'}", f"output_dir={tmp_path / 'run'}"]

    def make(*overrides: str) -> TrainConfig:
        return load_yaml(
            YAML, [*folders, "max_steps=30", "optimizer.learning_rate=0.1", *overrides], TrainConfig
        )

    return make


def test_the_committed_config_learns_to_call_procedures(procedures):
    final = train(procedures("memories.tasks.renormalize=false", "log_every=1"))
    losses = [line["loss"] for line in read_log(final.parent / "log.jsonl")]
    assert losses[-1] < losses[0]
    model, tokenizer = ml.load(final), AutoTokenizer.from_pretrained(final)
    memory, task = ml.memories(model)["tasks"], ProceduresTask(ProceduresConfig())
    new = task.new(4, seed=0)
    assert memory.names == [p.name for p in new]
    assert tokenizer.convert_tokens_to_ids(f"<|{new[1].name}|>") == memory.id_of(new[1].name)
    prompts = torch.tensor([task.use(p, ["1", "2", "3", "1"]).prompt for p in new])
    with torch.no_grad():  # a random base does not tell names apart, but a task token is what follows "="
        assert (model(prompts).logits[:, -1].argmax(-1) >= memory.first_id).all()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.n=5", ["no task token for 'amat amit'", "names of the memory"]),
        ("data.n=80", ["data.procedures: 80 procedures are asked for, 72 compositions"]),
        ("data.procedures.seed=1", ["data.procedures: the tokenizer has no token for"]),
    ],
)
def test_procedures_that_the_model_has_not(procedures, override, parts):
    with pytest.raises(ConfigError, match=says(*parts)):
        train(procedures(override))


def test_procedures_of_which_none_is_left(procedures):
    with pytest.raises(ConfigError, match=r"data.first: 4 leaves none of 4"):
        procedures("data.first=4")
