"""Task tokens in a model: rows are read and predict as the base's own do, free places never, sizes as the base's."""

import copy

import pytest
import torch
from matrix import ARCHITECTURES, TEXT, VOCAB, near, tokens
from transformers import AutoModelForCausalLM

import memlayers as ml
from memlayers.task_tokens import TaskRows

NAMES = ["sort", None, "copy"]


def with_tokens(model=None, **fields):
    model = model or ARCHITECTURES[0].build().eval()
    return model, ml.attach(model, ml.TaskTokensConfig(**{"names": NAMES, **fields}), "tasks")


@torch.no_grad()
@pytest.mark.parametrize("tied", [None, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_a_row_like_one_of_the_base_is_read_and_predicts_like_it(architecture, tied):
    """Also where an embedding scales its rows, as Gemma's does."""
    if architecture.skip:
        pytest.skip(architecture.skip)
    model, memory = with_tokens(architecture.build().eval(), tied=tied)
    word = int(torch.randint(300, VOCAB, ()))
    for side, rows in memory.rows.sides().items():
        rows["2"].copy_(memory.base[side].module.weight[word])
    ids = tokens(2, TEXT, seed=word)
    ids[0, 4] = ids[1, 7] = word
    called = torch.where(ids == word, memory.id_of("copy"), ids)
    expected, got = model(ids).logits, model(called).logits
    assert torch.equal(got[..., :VOCAB], expected[..., :VOCAB])
    near(got[..., memory.id_of("copy")], got[..., word])


@torch.no_grad()
def test_logits_are_capped_with_the_base():
    """Gemma's tanh lies over all logits; a free place has the least of them."""
    base = next(a for a in ARCHITECTURES if a.name == "gemma3").build()
    config = base.config
    config.final_logit_softcapping = 0.7
    model, memory = with_tokens(AutoModelForCausalLM.from_config(config).eval())
    hidden = {}
    model.lm_head.register_forward_hook(lambda head, args, out: hidden.update(x=args[0]))
    logits = model(tokens(2, TEXT)).logits
    raw = hidden["x"] @ memory.rows.input["0"]
    near(logits[..., VOCAB], 0.7 * torch.tanh(raw / 0.7))
    assert logits[..., VOCAB + 1].unique().tolist() == pytest.approx([-0.7])


def test_a_free_place_is_never_predicted_and_changes_no_gradient():
    ids, results = tokens(2, TEXT), []
    for names in (["sort", "copy"], ["sort", None, "copy"]):
        torch.manual_seed(3)
        model, memory = with_tokens(names=names)
        called = ids.clone()
        called[:, 3] = memory.id_of("copy")
        output = model(called, labels=called)
        output.loss.backward()
        results.append((output.loss, *(row.grad for row in memory.parameters())))
    assert output.logits[..., VOCAB + 1].eq(-torch.inf).all()
    for got, expected in zip(*results, strict=True):
        near(got, expected)
    torch.manual_seed(0)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=True)
    assert not (said == VOCAB + 1).any()


def test_rows_alone_against_brute_force():
    rows = TaskRows(tied=False).double()
    for place in (3, 0, 2):
        rows.put(place, {side: torch.nn.Parameter(torch.randn(6).double()) for side in ("input", "output")})
    assert list(rows.input) == list(rows.output) == ["0", "2", "3"] and rows.free == [1]
    hidden, places = torch.randn(2, 5, 6).double(), torch.tensor([[3, 1], [0, 2]])
    read, logits = rows.read(places, like=hidden), rows.logits(hidden)
    for place in range(4):
        if place == 1:
            assert not read[places == place].any() and logits[..., place].eq(-torch.inf).all()
            continue
        torch.testing.assert_close(read[places == place][0], rows.input[str(place)])
        torch.testing.assert_close(logits[..., place], (hidden * rows.output[str(place)]).sum(-1))
    dropped = rows.drop(2)
    assert dropped.keys() == {"input", "output"} and rows.free == [1, 2] and rows.n_places == 4
    for place in (0, 3):
        rows.drop(place)
    assert rows.logits(hidden).eq(-torch.inf).all() and not rows.read(places, like=hidden).any()


@torch.no_grad()
def test_more_than_ten_rows_stand_at_their_places():
    """As strings "10" comes before "2"."""
    rows, hidden = TaskRows(tied=True), torch.eye(2)
    for place in range(12):
        rows.put(place, {"input": torch.nn.Parameter(torch.full((2,), float(place)))})
    assert rows.read(torch.arange(12), like=hidden)[:, 0].tolist() == list(range(12))
    assert rows.logits(hidden)[0].tolist() == list(range(12))
    rows.drop(3)
    assert rows.logits(hidden)[0].tolist() == [0, 1, 2, -torch.inf, *range(4, 12)]
    assert list(copy.deepcopy(rows).input) == list(rows.input) == [str(n) for n in range(12) if n != 3]


@torch.no_grad()
def test_the_eleventh_procedure_changes_no_logit_of_the_first_ten():
    model, memory = with_tokens(names=[f"p{n}" for n in range(10)])
    ids = tokens(2, TEXT)
    ids[:, 3] = memory.id_of("p2")
    before = model(ids).logits
    memory.add("p10")
    after = model(ids).logits
    assert torch.equal(after[..., : VOCAB + 10], before)
    near(after[..., memory.id_of("p10")], logits_of(model, ids, memory.rows.input["10"]))
    memory.learn(["p10"])
    assert [p for p, row in memory.rows.input.items() if row.requires_grad] == ["10"]


def logits_of(model, ids, row):
    """Hidden states of the decoder times one row."""
    return model.model(ids).last_hidden_state @ row


@torch.no_grad()
def test_new_rows_are_as_long_as_the_base_s(tiny_llama, tokenizer):
    memory = with_tokens(tiny_llama)[1]
    assert not memory.tied
    memory.add("reverse", init_from="The pass key", tokenizer=tokenizer)
    ids = tokenizer.encode("The pass key", add_special_tokens=False)
    for side, module in (("input", tiny_llama.model.embed_tokens), ("output", tiny_llama.lm_head)):
        length = module.weight.norm(dim=1).mean()
        rows = memory.rows.sides()[side]
        near(torch.stack([row.norm() for row in rows.values()]), length.expand(3), 1e-5)
        mean = module.weight[ids].mean(0)
        near(rows["1"], mean * length / mean.norm(), 1e-5)
        assert (rows["0"] - rows["2"]).norm() > 0.1 * length, "two new rows are one"


def test_renormalize_leaves_rows_that_do_not_learn():
    memory = with_tokens(train=["copy"])[1]
    before = {name: row.detach().clone() for name, row in memory.named_parameters()}
    with torch.no_grad():
        for row in memory.parameters():
            row.mul_(3)
    memory.renormalize_()
    assert torch.equal(memory.rows.input["0"], 3 * before["rows.input.0"])
    near(memory.rows.input["2"], before["rows.input.2"], 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("normalize", [False, True])
def test_transition_scores_count_the_wider_vocabulary(normalize):
    model, ids = with_tokens()[0], tokens(2, 6)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        num_beams=3,
        output_scores=True,
        return_dict_in_generate=True,
        length_penalty=0.0,
    )
    scores = model.compute_transition_scores(
        output.sequences, output.scores, output.beam_indices, normalize_logits=normalize
    )
    near(scores.sum(1), output.sequences_scores, 1e-4)  # beams' scores are log-probabilities already
