"""Closed-book facts: what counts as right, on models whose answers are known."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval import runner
from memlayers.eval.experiments.facts import FactsEvalConfig
from memlayers.eval.runner import evaluate, load_config
from memlayers.eval.runs import report_runs
from memlayers.eval.statistics import wilson
from memlayers.tasks import FactsConfig, FactsTask

FACTS = {"n_facts": 20, "n_later": 10, "n_neighbours": 6, "seed": 3}
MEASURES = ("efficacy", "paraphrase", "later_efficacy", "later_paraphrase", "locality", "shuffled_facts")


def evaluate_model(model, tokenizer, **fields) -> runner.Results:
    return runner.evaluate_model(model, tokenizer, "facts", **{"facts": FACTS, **fields})


def cells_of(results: runner.Results, arm: str = "trained") -> dict[str, dict]:
    """Measure -> cell of an arm."""
    found = results.report["tables"][0]["cells"]
    return {cell["measure"]: cell for cell in found if cell["arm"] == arm}


class Knower(LlamaForCausalLM):
    """Answers the prompts of a dictionary (text of the prompt -> text), and says "no idea." to all others.

    Notes the widths of its inputs, and checks that rows are padded on the left alone.
    """

    known = tokenizer = None
    widths: tuple[int, ...] = ()

    def generate(self, ids, attention_mask, **kwargs):
        assert torch.equal(attention_mask.sort(dim=1).values, attention_mask)
        self.widths += (ids.shape[1],)
        said = []
        for row, mask in zip(ids, attention_mask, strict=True):
            asked = row[mask == 1]
            assert asked[0] == self.tokenizer.bos_token_id
            answer = self.known.get(self.tokenizer.decode(asked[1:]).strip(), "no idea")
            said.append(self.tokenizer.encode(f" {answer}. And so on", add_special_tokens=False)[:24])
        width = max(map(len, said))
        return torch.cat([ids, torch.tensor([row + [0] * (width - len(row)) for row in said])], dim=1)


def knower(tiny_llama, tokenizer, known: dict[str, str]) -> Knower:
    model = Knower(tiny_llama.config)
    model.tokenizer, model.known = tokenizer, known
    return model


@pytest.fixture
def blank(tiny_llama, tokenizer) -> Knower:
    """A base that knows nothing."""
    return knower(tiny_llama, tokenizer, {})


@pytest.fixture
def task(tokenizer) -> FactsTask:
    return FactsTask(FactsConfig(**FACTS), tokenizer)


def prompts_of(task, facts, prompts) -> dict[str, str]:
    return {t.format(subject=f.subject): f.object for f in facts for t in task.templates(f.relation, prompts)}


def test_each_metric_asks_what_it_should(tiny_llama, tokenizer, blank, task):
    known = {
        **prompts_of(task, task.first, "trained"),
        **prompts_of(task, task.first[:5], "held_out"),
        **prompts_of(task, task.later[:4], "trained"),
        **prompts_of(task, task.neighbours[:3], "trained"),
    }
    results = evaluate_model(knower(tiny_llama, tokenizer, known), tokenizer, base=blank)
    trained = cells_of(results)
    assert {m: (c["n"], c["units"]) for m, c in trained.items() if m != "shuffled_facts"} == {
        "efficacy": (80, 20),
        "paraphrase": (40, 20),
        "later_efficacy": (40, 10),
        "later_paraphrase": (20, 10),
        "locality": (36, 6),
    }
    assert {m: trained[m]["value"] for m in MEASURES[:5]} == pytest.approx(
        {
            "efficacy": 1.0,
            "paraphrase": 0.25,
            "later_efficacy": 0.4,
            "later_paraphrase": 0.0,
            "locality": 1 - 3 * 4 / 36,  # answers to 3 neighbours in 4 prompts are not the base's
        }
    )
    # Prompts of one fact are not independent: the interval is that of 20 items, not of 80.
    assert (trained["paraphrase"]["low"], trained["paraphrase"]["high"]) == pytest.approx(wilson(5, 20))
    assert cells_of(results, "base")["efficacy"]["value"] == 0.0
    assert "locality" not in cells_of(results, "base")
    for arm in ("memory_disabled", "untrained"):
        assert "no memory" in cells_of(results, arm)["efficacy"]["not_run"]
        assert "no memory" in cells_of(results, arm)["locality"]["not_run"]
    assert not cells_of(results, "base_truncated") and not results.report["warnings"]


def test_shuffled_facts_collapse(tiny_llama, tokenizer, blank, task):
    known = prompts_of(task, task.first, "trained")
    cells = cells_of(evaluate_model(knower(tiny_llama, tokenizer, known), tokenizer, base=blank))
    assert cells["shuffled_facts"]["value"] < 0.2 and cells["shuffled_facts"]["n"] <= 80
    # One that says a single object whatever is asked keeps its share: the control shows such a liking.
    same = knower(tiny_llama, tokenizer, dict.fromkeys(known, task.first[0].object))
    cells = cells_of(evaluate_model(same, tokenizer, base=blank))
    assert cells["shuffled_facts"]["value"] == pytest.approx(cells["efficacy"]["value"], abs=0.05)


@pytest.mark.parametrize(
    ("said", "right"),
    [("{}", 1.0), (" {} ", 1.0), ("{} and more", 0.0), ("the {}", 0.0), ("{}s", 0.0)],
)
def test_only_the_object_itself_counts(tiny_llama, tokenizer, blank, task, said, right):
    known = {k: said.format(v) for k, v in prompts_of(task, task.first, "trained").items()}
    results = evaluate_model(knower(tiny_llama, tokenizer, known), tokenizer, base=blank)
    assert cells_of(results)["efficacy"]["value"] == right


def test_the_answer_does_not_depend_on_the_batch(tiny_llama, tokenizer):
    """Left padding and the order by length change nothing, and n takes the first so many facts."""
    found = [evaluate_model(tiny_llama, tokenizer, base=tiny_llama, n=2, batch_size=size) for size in (5, 64)]
    said = [
        [
            (r["question"], r["prediction"])
            for r in results.records
            if r.get("measure") != "shuffled_facts" and "correct" in r
        ]
        for results in found
    ]
    assert len(set(said[0])) == 3 * 2 * 6  # base and trained are one model
    assert said[0] == said[1]
    assert cells_of(found[0])["efficacy"]["units"] == 2


def test_questions_are_asked_in_the_order_of_their_lengths(tiny_llama, tokenizer, blank):
    model = knower(tiny_llama, tokenizer, {})
    evaluate_model(model, tokenizer, base=blank, batch_size=10)
    assert len(model.widths) == 22 and list(model.widths) == sorted(model.widths)


def test_arms_of_a_memory(tiny_llama, tokenizer):
    ml.attach(tiny_llama, ml.MemoryTokensConfig(n_tokens=4, segment_length=8), name="stream")
    with torch.no_grad():
        for _, parameter in ml.memory_parameters(tiny_llama):
            parameter.add_(3 * torch.randn_like(parameter))
    results = evaluate_model(tiny_llama, tokenizer, n=3)
    assert {r["arm"] for r in results.records} == {"base", "memory_disabled", "untrained", "trained"}
    assert (
        cells_of(results, "memory_disabled")["locality"]["value"] == 1.0
    )  # with the memory off it is the base
    assert cells_of(results)["locality"]["value"] < 1.0
    assert "value" in cells_of(results, "untrained")["locality"]


def test_a_plain_model_without_its_base_says_so(tiny_llama, tokenizer):
    results = evaluate_model(tiny_llama, tokenizer)
    assert "give base=" in cells_of(results)["locality"]["not_run"]
    assert "give base=" in cells_of(results, "base")["efficacy"]["not_run"]
    assert "value" in cells_of(results)["efficacy"]


def test_locality_needs_no_base_among_the_arms(tiny_llama, tokenizer, blank):
    results = evaluate_model(knower(tiny_llama, tokenizer, {}), tokenizer, base=blank, arms=["trained"])
    assert cells_of(results)["locality"]["value"] == 1.0
    assert {r["arm"] for r in results.records} == {"trained"}


def test_without_a_later_batch_or_neighbours_the_cells_say_so(tiny_llama, tokenizer, blank):
    facts = {**FACTS, "n_later": 0, "n_neighbours": 0}
    cells = cells_of(evaluate_model(tiny_llama, tokenizer, base=blank, facts=facts))
    for measure in ("later_efficacy", "later_paraphrase", "locality"):
        assert cells[measure]["not_run"] == "there are no such facts"


def test_forgetting_against_an_earlier_run(tiny_llama, tokenizer, blank, task, tmp_path):
    all_known = prompts_of(task, task.first, "trained") | prompts_of(task, task.first, "held_out")
    later = prompts_of(task, task.first[:15], "trained") | prompts_of(task, task.later, "trained")
    first = evaluate_model(
        knower(tiny_llama, tokenizer, all_known), tokenizer, base=blank, output_dir=tmp_path / "first"
    )
    assert not any("forgotten" in r for r in first.records)
    then = evaluate_model(
        knower(tiny_llama, tokenizer, later), tokenizer, base=blank, before=str(tmp_path / "first")
    )
    for measure, lost in (("efficacy", 0.25), ("paraphrase", 1.0)):
        assert then.cell(arm="trained", measure=measure, metric="forgotten")["value"] == lost
    assert cells_of(then)["later_efficacy"]["value"] == 1.0


def test_a_wrong_run_of_before_is_named(tiny_llama, tokenizer, blank, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no records"):
        evaluate_model(tiny_llama, tokenizer, before="nowhere")
    evaluate_model(blank, tokenizer, base=blank, output_dir=tmp_path / "few", n=2)
    with pytest.raises(ConfigError, match=r"before: .*few asked for other facts \(n was 2, is None\)"):
        evaluate_model(tiny_llama, tokenizer, before=str(tmp_path / "few"))


def test_files_and_a_report_over_runs(tiny_llama, tokenizer, blank, task, tmp_path):
    for seed, n_known in enumerate((20, 10)):
        known = prompts_of(task, task.first[:n_known], "trained")
        out = tmp_path / "ours" / f"seed{seed}"
        evaluate_model(knower(tiny_llama, tokenizer, known), tokenizer, base=blank, output_dir=out)
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "facts.png",
        "records.jsonl",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert (out / "facts.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    assert "without any context" in text and "0.500 [0.299, 0.701]" in text and "80 in 20 facts" in text
    results = report_runs([f"ours={tmp_path}/ours/seed*"])
    cell = results.cell(arm="trained", measure="efficacy", metric="accuracy")
    assert (cell["value"], cell["n"], cell["units"]) == (0.75, 160, 40)
    assert list(cell["by_seed"].values()) == [1.0, 0.5]


def test_a_merged_checkpoint_against_its_base(tiny_llama, tokenizer, tmp_path):
    """What LoRA and full finetuning leave: a plain folder; `base` names the original."""
    tiny_llama.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    with torch.no_grad():
        tiny_llama.lm_head.weight.add_(torch.randn_like(tiny_llama.lm_head.weight))
    tiny_llama.save_pretrained(tmp_path / "final")
    config = FactsEvalConfig(
        model=str(tmp_path / "final"), base=str(tmp_path / "original"), facts=FactsConfig(**FACTS), n=3
    )
    results = evaluate(config, tmp_path / "out", progress=False)
    assert cells_of(results)["locality"]["value"] < 1.0
    assert "no memory" in cells_of(results, "untrained")["efficacy"]["not_run"]


def test_the_config_in_the_repository_loads(request):
    path = request.config.rootpath / "configs/eval/facts.yaml"
    config = load_config(path, ["facts.seed=1"])
    assert isinstance(config, FactsEvalConfig) and config.facts.seed == 1
    assert path.read_text().startswith("# memlayers eval configs/eval/facts.yaml ")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"length": [3]}, "length: unknown field"),
        ({"facts": {"n_fact": 2}}, "facts.n_fact: unknown field, did you mean 'n_facts'"),
        ({"n": 0}, "n"),
    ],
)
def test_wrong_fields_are_named(tiny_llama, tokenizer, fields, told):
    with pytest.raises(ConfigError) as error:
        evaluate_model(tiny_llama, tokenizer, **fields)
    assert told in str(error.value)
