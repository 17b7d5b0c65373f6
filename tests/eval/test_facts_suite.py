"""The closed-book suite: what counts as right, on models whose answers are known."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaForCausalLM

import memlayers as ml
from memlayers.config import ConfigError
from memlayers.eval.config import EvalConfig, FactsSuiteConfig
from memlayers.eval.run import evaluate, evaluate_model, load_config
from memlayers.eval.statistics import wilson
from memlayers.eval.summary import load_group, summary
from memlayers.tasks import FactsConfig, FactsTask

FACTS = {"n_facts": 20, "n_later": 10, "n_neighbours": 6, "seed": 3}
SUITES = {"facts": {"type": "facts", "facts": FACTS}}
CELL = {"n", "facts", "accuracy", "ci_low", "ci_high"}


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
    report = evaluate_model(knower(tiny_llama, tokenizer, known), tokenizer, SUITES, base=blank)
    metrics = report["facts"]["facts"]["metrics"]
    trained = {metric: cells["trained"] for metric, cells in metrics.items()}
    assert {m: (c["n"], c["facts"]) for m, c in trained.items()} == {
        "efficacy": (80, 20),
        "paraphrase": (40, 20),
        "later_efficacy": (40, 10),
        "later_paraphrase": (20, 10),
        "locality": (36, 6),
    }
    assert {m: c["accuracy"] for m, c in trained.items()} == pytest.approx(
        {
            "efficacy": 1.0,
            "paraphrase": 0.25,
            "later_efficacy": 0.4,
            "later_paraphrase": 0.0,
            "locality": 1 - 3 * 4 / 36,  # answers to 3 neighbours in 4 prompts are not the base's
        }
    )
    # Prompts of one fact are not independent: the interval is that of 20 items, not of 80.
    assert (trained["paraphrase"]["ci_low"], trained["paraphrase"]["ci_high"]) == pytest.approx(wilson(5, 20))
    assert metrics["efficacy"]["base"]["accuracy"] == 0.0
    assert "base" not in metrics["locality"]
    for arm in ("memory_off", "untrained"):
        assert "no memory" in metrics["efficacy"][arm]["not_run"]
        assert "no memory" in metrics["locality"][arm]["not_run"]
    assert "base_cut" not in metrics["efficacy"]


def test_shuffled_facts_collapse(tiny_llama, tokenizer, blank, task):
    known = prompts_of(task, task.first, "trained")
    report = evaluate_model(knower(tiny_llama, tokenizer, known), tokenizer, SUITES, base=blank)
    control = report["facts"]["facts"]["controls"]["shuffled_facts"]["trained"]
    assert control["accuracy"] < 0.2 and control["n"] <= 80
    # One that says a single object whatever is asked keeps its share: the control shows such a liking.
    same = knower(tiny_llama, tokenizer, dict.fromkeys(known, task.first[0].object))
    cells = evaluate_model(same, tokenizer, SUITES, base=blank)["facts"]["facts"]
    assert cells["controls"]["shuffled_facts"]["trained"]["accuracy"] == pytest.approx(
        cells["metrics"]["efficacy"]["trained"]["accuracy"], abs=0.05
    )
    assert report["facts"]["facts"]["chance"] == pytest.approx(1 / 40)


@pytest.mark.parametrize(
    ("said", "right"),
    [("{}", 1.0), (" {} ", 1.0), ("{} and more", 0.0), ("the {}", 0.0), ("{}s", 0.0)],
)
def test_only_the_object_itself_counts(tiny_llama, tokenizer, blank, task, said, right):
    known = {k: said.format(v) for k, v in prompts_of(task, task.first, "trained").items()}
    report = evaluate_model(knower(tiny_llama, tokenizer, known), tokenizer, SUITES, base=blank)
    assert report["facts"]["facts"]["metrics"]["efficacy"]["trained"]["accuracy"] == right


def test_the_answer_does_not_depend_on_the_batch(tiny_llama, tokenizer):
    """Left padding and the order by length change nothing, and n takes the first so many facts."""
    suites = {"facts": {**SUITES["facts"], "n": 2}}
    reports = [
        evaluate_model(tiny_llama, tokenizer, suites, base=tiny_llama, batch_size=size) for size in (5, 64)
    ]
    said = [[(row["question"], row["prediction"]) for row in report["samples"]] for report in reports]
    assert len(set(said[0])) == 3 * 2 * 6  # base and trained are one model
    assert said[0] == said[1]
    assert reports[0]["facts"]["facts"]["metrics"]["efficacy"]["trained"]["facts"] == 2


def test_questions_are_asked_in_the_order_of_their_lengths(tiny_llama, tokenizer, blank):
    model = knower(tiny_llama, tokenizer, {})
    evaluate_model(model, tokenizer, SUITES, base=blank, batch_size=10)
    assert len(model.widths) == 22 and list(model.widths) == sorted(model.widths)


def test_arms_of_a_memory(tiny_llama, tokenizer):
    ml.attach(tiny_llama, ml.MemoryTokensConfig(n_tokens=4, segment_length=8), name="stream")
    with torch.no_grad():
        for _, parameter in ml.memory_parameters(tiny_llama):
            parameter.add_(3 * torch.randn_like(parameter))
    suites = {"facts": {**SUITES["facts"], "n": 3}}
    metrics = evaluate_model(tiny_llama, tokenizer, suites)["facts"]["facts"]["metrics"]
    assert list(metrics["efficacy"]) == ["base", "memory_off", "untrained", "trained"]
    assert metrics["locality"]["memory_off"]["accuracy"] == 1.0  # with the memory off it is the base
    assert metrics["locality"]["trained"]["accuracy"] < 1.0
    assert set(metrics["locality"]["untrained"]) == CELL


def test_a_plain_model_without_its_base_says_so(tiny_llama, tokenizer):
    metrics = evaluate_model(tiny_llama, tokenizer, SUITES)["facts"]["facts"]["metrics"]
    assert "give base=" in metrics["locality"]["trained"]["not_run"]
    assert "give base=" in metrics["efficacy"]["base"]["not_run"]
    assert set(metrics["efficacy"]["trained"]) == CELL


def test_locality_needs_no_base_among_the_arms(tiny_llama, tokenizer, blank):
    other = knower(tiny_llama, tokenizer, {})
    report = evaluate_model(other, tokenizer, SUITES, base=blank, arms=["trained"])
    metrics = report["facts"]["facts"]["metrics"]
    assert metrics["locality"]["trained"]["accuracy"] == 1.0
    assert list(metrics["efficacy"]) == ["trained"]


def test_without_a_later_batch_or_neighbours_the_cells_say_so(tiny_llama, tokenizer, blank):
    suites = {"facts": {"type": "facts", "facts": {**FACTS, "n_later": 0, "n_neighbours": 0}}}
    metrics = evaluate_model(tiny_llama, tokenizer, suites, base=blank)["facts"]["facts"]["metrics"]
    for metric in ("later_efficacy", "later_paraphrase", "locality"):
        assert metrics[metric]["trained"] == {"not_run": "there are no such facts"}


def test_forgetting_against_an_earlier_report(tiny_llama, tokenizer, blank, task, tmp_path):
    all_known = prompts_of(task, task.first, "trained") | prompts_of(task, task.first, "held_out")
    later = prompts_of(task, task.first[:15], "trained") | prompts_of(task, task.later, "trained")
    run = {"tokenizer": tokenizer, "base": blank}
    first = evaluate_model(
        knower(tiny_llama, tokenizer, all_known), suites=SUITES, output_dir=tmp_path / "first", **run
    )
    assert "forgetting" not in first["facts"]["facts"]
    suites = {"facts": {**SUITES["facts"], "before": str(tmp_path / "first/report.json")}}
    report = evaluate_model(
        knower(tiny_llama, tokenizer, later), suites=suites, output_dir=tmp_path / "then", **run
    )
    assert report["facts"]["facts"]["forgetting"] == {
        "efficacy": {"before": 1.0, "now": 0.75, "forgotten": 0.25},
        "paraphrase": {"before": 1.0, "now": 0.0, "forgotten": 1.0},
    }
    assert report["facts"]["facts"]["metrics"]["later_efficacy"]["trained"]["accuracy"] == 1.0
    assert "1.000 before, 0.750 now: +0.250 lost" in (tmp_path / "then/report.md").read_text()


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        (None, FileNotFoundError, "suites.facts.before: there is no file"),
        ("{", ConfigError, "is no report with a facts suite 'facts'"),
        ('{"results": {}}', ConfigError, "is no report with a facts suite 'facts'"),
        (
            json.dumps({"facts": {"facts": {"metrics": {}}}, "config": {"suites": {"facts": {"facts": {}}}}}),
            ConfigError,
            "asked for other facts",
        ),
    ],
)
def test_a_wrong_report_of_before_is_named(tiny_llama, tokenizer, tmp_path, content, error, told):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error) as raised:
        evaluate_model(tiny_llama, tokenizer, {"facts": {**SUITES["facts"], "before": str(path)}})
    assert told in str(raised.value)


def test_files_and_the_table_over_seeds(tiny_llama, tokenizer, blank, task, tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text(" ".join(f"The old river runs {n} miles." for n in range(300)))
    perplexity = {"file": str(prose), "windows": 1, "n_sequences": 4}
    for seed, n_known in enumerate((20, 10)):
        known = prompts_of(task, task.first[:n_known], "trained")
        out = tmp_path / "ours" / f"seed{seed}"
        report = evaluate_model(
            knower(tiny_llama, tokenizer, known),
            tokenizer,
            SUITES,
            base=blank,
            output_dir=out,
            window=32,
            perplexity=perplexity,
        )
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "facts.png",
        "report.json",
        "report.md",
        "samples.jsonl",
    ]
    assert (out / "facts.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "report.json").read_text()) == report
    text = (out / "report.md").read_text()
    assert "regime P" in text and "0.500 [0.299, 0.701] n=80 of 20 facts" in text
    assert "right at 0.025" in text and "Perplexity on unseen prose" in text
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    mine = [row for row in rows if (row["metric"], row["arm"]) == ("efficacy", "trained")]
    assert len(mine) == 80 and sum(row["correct"] for row in mine) == 40

    text = summary([load_group(f"ours@P={tmp_path}/ours/seed*")], "facts")
    head, _, ours, *_, base = [line for line in text.splitlines() if line.startswith("|")]
    assert head.startswith("|  | efficacy | paraphrase |") and head.endswith("% above base |")
    assert ours.startswith("| ours | 0.750 (0.500 to 1.000) | 0.000 (0.000 to 0.000) |")
    assert base.startswith("| original checkpoint | 0.000 (0.000 to 0.000) |") and base.endswith(
        "| 0.0 (0.0 to 0.0) |"
    )
    assert "a guess is right at 0.025" in text


def test_facts_beside_texts(tiny_llama, tokenizer, blank):
    suites = {**SUITES, "passkey": {"task": {"type": "passkey"}, "lengths": [64], "n": 2, "regimes": ["F"]}}
    report = evaluate_model(tiny_llama, tokenizer, suites, base=blank)
    assert list(report["facts"]) == ["facts"] and list(report["results"]) == ["passkey"]


def test_a_merged_checkpoint_against_its_base(tiny_llama, tokenizer, tmp_path):
    """What LoRA and full finetuning leave: a plain folder; `base` names the original."""
    tiny_llama.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    with torch.no_grad():
        tiny_llama.lm_head.weight.add_(torch.randn_like(tiny_llama.lm_head.weight))
    tiny_llama.save_pretrained(tmp_path / "final")
    suites = {"facts": {**SUITES["facts"], "n": 3}}
    config = EvalConfig(model=str(tmp_path / "final"), base=str(tmp_path / "original"), suites=suites)
    metrics = evaluate(config, tmp_path / "out", progress=False)["facts"]["facts"]["metrics"]
    assert metrics["locality"]["trained"]["accuracy"] < 1.0
    assert "no memory" in metrics["efficacy"]["untrained"]["not_run"]


def test_the_config_in_the_repository_loads(request):
    path = request.config.rootpath / "configs/eval/facts.yaml"
    config = load_config(path, ["suites.facts.facts.seed=1"])
    assert isinstance(config.suites["facts"], FactsSuiteConfig) and config.suites["facts"].facts.seed == 1
    assert path.read_text().startswith("# memlayers eval --config configs/eval/facts.yaml ")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"length": [3]}, "suites.facts.length: unknown field"),
        ({"facts": {"n_fact": 2}}, "suites.facts.facts.n_fact: unknown field, did you mean 'n_facts'"),
        ({"n": 0}, "suites.facts.n"),
        ({"type": "fact"}, "suites.facts: type 'fact' is not one of"),
    ],
)
def test_wrong_fields_are_named(tiny_llama, tokenizer, fields, told):
    with pytest.raises(ConfigError) as error:
        evaluate_model(tiny_llama, tokenizer, {"facts": {**SUITES["facts"], **fields}})
    assert told in str(error.value)
