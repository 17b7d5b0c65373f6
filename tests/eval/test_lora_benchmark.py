"""The benchmark of LoRA memory: PEFT does the same work, a gradient through every step, the command writes all of it."""

import json

import pytest
import torch
from typer.testing import CliRunner

import memlayers as ml
from memlayers.cli import app
from memlayers.cli.common import packaged
from memlayers.eval.speed import lora, lora_outer
from memlayers.eval.speed.lora_peft import with_adapters, write_with_peft
from memlayers.train.config import TrainConfig
from memlayers.writing import of_text, row_losses
from memlayers.yaml_config import load_yaml

SMALL = {"width": 16, "layers": 2}
SMALL_DOCUMENT = {**SMALL, "segment_length": 8, "steps": 2, "question": 3, "new_tokens": 2}
SMALL_ROWS = {**SMALL, "rows": 3, "tokens": 5, "asked": 4, "new_tokens": 3}
SMALL_OUTER = {"r": 2, "batch": 2, "length": 64}


def test_peft_takes_the_same_steps():
    """The loss before every step is that of ours. AdamW divides by the gradient's size, so that
    rounding grows a little from step to step."""
    base, ids = lora.random_base(**SMALL, device="cpu"), torch.randint(lora.VOCAB, (1, 25))
    segments = of_text(ids, torch.ones_like(ids).bool(), 8)
    labels = segments.ids[0].masked_fill(~segments.learned[0], -100)
    ours = []
    for steps in range(4):
        model = lora.with_memory(base, steps=steps, segment_length=8)
        ours.append(row_losses(model, segments, ml.write(model, ids)).item())
    memory = ml.memories(lora.with_memory(base, steps=4, segment_length=8))[lora.NAME]
    theirs = write_with_peft(with_adapters(base, memory, ["default"]), memory, segments.ids[0], labels)
    assert theirs == pytest.approx(ours, rel=1e-4) and theirs[3] < theirs[0]


def test_rows_have_the_same_logits_however_they_are_read():
    arms = lora.row_arms(lora.random_base(**SMALL, device="cpu"), rows=3, tokens=5, asked=4, new_tokens=3)
    one_call = arms["forward: one call"]()
    for other in ("one by one", "PEFT"):
        torch.testing.assert_close(arms[f"forward: {other}"](), one_call, atol=1e-5, rtol=1e-5)
        assert torch.equal(arms[f"generate: {other}"](), arms["generate: one call"]())
    assert (arms["forward: base"]() - one_call).abs().max() > 1e-3
    assert arms["generate: one call"]().shape == (3, 7)


def test_answers_have_the_length_that_is_timed():
    arms = lora.document_arms(lora.random_base(**SMALL, device="cpu"), 16, 8, 2, question=3, new_tokens=2)
    assert arms[lora.ANSWER]().shape == (1, 5) and arms[lora.READ]().shape == (1, 17 + 5)
    assert arms[lora.FORWARD]().shape == (2, 9, lora.VOCAB)


def test_the_outer_steps_are_those_of_the_config():
    trained = load_yaml(packaged("configs/train/lora_passkey.yaml"), [], TrainConfig)
    memory, given = trained.memories["notes"], ml.LoRAMemoryConfig(writer=lora_outer.WRITER).writer
    assert memory.writer.model_copy(update={"unroll": None}) == given and memory.r == memory.lora_alpha == 16
    assert (trained.batch_size, trained.curriculum.segments.stop) == (32, 8)


def test_an_outer_step_reaches_what_its_unroll_allows():
    """Rates of all steps and the base get a gradient; through more steps, another one for the start."""
    starts = []
    for writer in ({"outer_gradient": "fomaml"}, {"unroll": 4}):
        model = lora_outer.outer_step(writer, **SMALL_OUTER, device="cpu")()
        memory = ml.memories(model)["notes"]
        assert (memory.writer.log_rates.grad[-1] != 0).any()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        starts.append(torch.cat([adapter.A.grad.flatten() for adapter in memory.adapters.values()]))
    first_order, full = starts
    assert (full - first_order).norm() > 1e-3 * full.norm()


@pytest.fixture(scope="module")
def parts():
    return {
        "short": lora.compare_document(16, 1, "cpu", **SMALL_DOCUMENT),
        "rows": lora.compare_rows(1, "cpu", **SMALL_ROWS),
        "outer": lora_outer.compare_outer_steps(1, "cpu", **SMALL_OUTER),
    }


def test_rounds_ratios_and_peaks(parts):
    short, rows, outer = parts.values()
    assert set(short["times forward"]) == {lora.WRITE, lora.STREAM, lora.PEFT, lora.BACKWARD}
    assert set(rows["times one call"]) == {n for n in rows["ms"] if "one call" not in n}
    assert list(outer["ms"]) == [*(f"unroll {n}" for n in (4, 3, 2, 1)), "fomaml"]
    assert outer["peak MB"]["unroll 4"] > outer["peak MB"]["unroll 2"] > outer["peak MB"]["fomaml"]
    for part in parts.values():
        assert set(part["peak MB"]) == set(part["ms"]) and min(part["peak MB"].values()) > 0
        assert all(0 < cell["p20"] <= cell["p50"] <= cell["p80"] for cell in part["ms"].values())


def test_a_long_text_has_fewer_rounds_and_arms(monkeypatch):
    monkeypatch.setattr(lora, "LONG", 8)
    long = lora.compare_document(16, 4, "cpu", **SMALL_DOCUMENT)
    assert long["rounds"] == 1 and lora.PEFT not in long["ms"] and {lora.WRITE, lora.READ} <= set(long["ms"])


@pytest.mark.parametrize("read, questions", [(3.0, {"p50": 5.0}), (1.0, {})])
def test_break_even(monkeypatch, read, questions):
    """A writing of 10 s: an answer that saves 2 s pays after 5 questions; one that saves nothing never does."""
    found = {lora.WRITE: 10.0, lora.FORWARD: 1.0, lora.ANSWER: 1.0, lora.READ: read}
    monkeypatch.setattr(lora, "LONG", 8)
    monkeypatch.setattr(
        lora, "time_rounds", lambda arms, rounds, warm_up: {n: torch.tensor([found[n]]).numpy() for n in arms}
    )
    part = lora.compare_document(16, 4, "cpu", **SMALL_DOCUMENT)
    assert part["questions until writing pays"] == pytest.approx(questions)


def test_the_command_prints_and_writes(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(lora, "compare_document", lambda length, rounds, device: parts["short"])
    monkeypatch.setattr(lora, "compare_rows", lambda rounds, device: parts["rows"])
    monkeypatch.setattr(lora, "compare_outer_steps", lambda rounds, device: parts["outer"])
    output = tmp_path / "out.json"
    arguments = ["bench", "lora", "--device", "cpu", "--output", str(output)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "unroll 4" in result.output and "generate: PEFT" in result.output and "peak MB" in result.output
    report = json.loads(output.read_text())
    assert set(report) > {f"{n} tokens" for n in lora.LENGTHS} and report["versions"]["peft"]
    assert report["rows"] == parts["rows"] and report["outer step"] == parts["outer"]
