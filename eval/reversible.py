"""How much of a text a reversible memory gives back, over how far it compresses.

    python -m memlayers.eval.reversible --config configs/eval/reversible.yaml --out runs/reversible

Every arm is a reversible memory on the same frozen base, trained on the first four fifths of a file with the cycle loss
alone. Of unseen segments (the last fifth) are counted the tokens that come back, and the segments that come back whole.
Beside it: the same before training, memory of another segment, and the most frequent token of the training text. A
memory with `backwards: separate` is the plain autoencoder of the same size.

With `checkpoint`, what `train/run.py` trained is measured too: the same shares, and the perplexity of the last segment of
unseen sequences after the segments before it were read into memory, stood in attention, or were not there.

OUT gets, for each seed, report.json, samples.jsonl and report.md, and then summary.md and reversible.png over all the
seeds that lie there; no picture where only a checkpoint is measured.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from pydantic import Field, model_validator
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

import memlayers as ml
from memlayers.config import ConfigError, Strict
from memlayers.eval.models import load_plain
from memlayers.eval.output import check_output, write_output
from memlayers.eval.perplexity import PerplexityConfig, cell_of, unseen_prose
from memlayers.eval.reversible_report import GIVEN, markdown, picture
from memlayers.eval.speed.timing import where
from memlayers.eval.statistics import paired_bootstrap, wilson
from memlayers.eval.summary import reports_of_seeds
from memlayers.files import read_text
from memlayers.limits import Count, Rate, Seed, Steps
from memlayers.loading import load_tokenizer
from memlayers.tasks.filler import TRAIN_SHARE, split_sentences
from memlayers.yaml_config import load_yaml

MEMORY = "past"


class CycleTraining(Strict):
    """Training of a compressor on segments of text with the cycle loss alone.

    Attributes:
        steps: of AdamW, cosine to 0 after a tenth.
        batch_size: segments a step.
        learning_rate: the highest.
    """

    steps: Steps = 400
    batch_size: Count = 32
    learning_rate: Rate = 2e-2


class ReversibleEvalConfig(CycleTraining):
    """What is measured; the fields of `CycleTraining` are those of every arm.

    Attributes:
        model: folder or hub id of a plain checkpoint, the base.
        file: a plain text file; the last fifth of its sentences is unseen.
        arms: name to memory; {}: only the checkpoint.
        n_segments: unseen segments, fewer if the text ends before.
        checkpoint: folder of a trained model with one reversible memory, `{seed}` stands for the seed; None: none.
        context_segments: read before the last segment, where perplexity is measured.
        n_sequences: for perplexity.
        seeds: of the arms' starts and batches.
        note: for the report, how the settings were chosen.
    """

    model: str
    file: str
    arms: dict[str, ml.ReversibleMemoryConfig] = Field(default_factory=dict)
    n_segments: Count = Field(500, ge=2)
    checkpoint: str | None = None
    context_segments: Count = 3
    n_sequences: Count = Field(100, ge=2)
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    note: str = ""

    @model_validator(mode="after")
    def _fits_together(self):
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: {self.seeds} names a value twice")
        if not self.arms and self.checkpoint is None:
            raise ConfigError("arms: nothing to measure; give arms, or a checkpoint")
        return self


def evaluate(config: ReversibleEvalConfig, output_dir: str | Path, progress: bool = True) -> list[dict]:
    """Measure every seed and write the files; the reports.

    Raises `FileNotFoundError` for a checkpoint or a text that is not there, `ValueError` for a text that is too short
    or a checkpoint without the memory that is measured.
    """
    reports = []
    for seed in config.seeds:
        folder = Path(output_dir) / f"seed{seed}"
        check_output(folder)
        report, samples = measure(config, seed, progress)
        write_output(folder, {"report.md": markdown([report])}, report=report, samples=samples)
        reports.append(report)
    reports_there = reports_of_seeds(Path(output_dir))
    pictures = {"reversible.png": lambda path: picture(reports_there, path)} if config.arms else {}
    write_output(output_dir, {"summary.md": markdown(reports_there)}, pictures)
    return reports


def measure(config: ReversibleEvalConfig, seed: int, progress: bool = False) -> tuple[dict, list[dict]]:
    """What report.json holds of one seed, and a row an arm with the number of right tokens of every segment."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(config.model)
    report: dict = {"config": {**config.model_dump(), "seed": seed}, "arms": {}}
    rows = []
    for name, memory_config in config.arms.items():
        base = load_plain(config.model)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            memory = ml.attach(base, memory_config, name=MEMORY)
        text = texts(config, tokenizer, memory.schedule.reach)
        cell, row = measure_arm(base, memory, *text, config, seed, name if progress else None)
        report["arms"][name] = cell
        rows.append({"arm": name, **row})
    if config.checkpoint is not None:
        model = ml.load(config.checkpoint.format(seed=seed))
        report["continuation"], row = continuation(model, tokenizer, config, seed)
        rows.append({"arm": "checkpoint", **row})
    report |= {**where("cpu", "transformers"), "wall_s": round(time.perf_counter() - started, 1)}
    return report, rows


def texts(config: ReversibleEvalConfig, tokenizer, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The training part (tokens,) and unseen segments (n, length) of the file; raises as `unseen_prose`."""
    prose = PerplexityConfig(file=config.file, windows=1, n_sequences=config.n_segments)
    unseen = unseen_prose(prose, tokenizer, length)
    sentences = split_sentences(read_text(config.file))
    text = " ".join(sentences[: round(len(sentences) * TRAIN_SHARE)])
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0], unseen


def measure_arm(base, memory, seen, unseen, config: ReversibleEvalConfig, seed: int, bar: str | None = None):
    """Train one memory and count; its cell of the report and its row of samples.jsonl."""
    untrained = share(right_tokens(base, memory, unseen), unseen.shape[1], seed)
    started = time.process_time()
    loss = fit(base, memory, seen, config, seed, bar)
    seconds = time.process_time() - started
    right = right_tokens(base, memory, unseen)
    frequent = seen.bincount().argmax()
    cell = {
        "ratio": memory.schedule.reach / memory.config.n_tokens,
        "parameters": sum(p.numel() for p in memory.compressor.parameters()),
        "train_loss": loss,
        **share(right, unseen.shape[1], seed),
        "controls": {
            "untrained": untrained,
            "shuffled": share(right_tokens(base, memory, unseen, shift=1), unseen.shape[1], seed),
            "most_frequent": share((unseen == frequent).sum(1), unseen.shape[1], seed),
        },
        "cpu_s": seconds,
    }
    return cell, {"length": unseen.shape[1], "right": right.tolist()}


def fit(base, memory, seen: torch.Tensor, config: CycleTraining, seed: int, bar: str | None = None) -> float:
    """Train `memory` on random segments of `seen` (tokens,) with the cycle loss; its mean over the last tenth."""
    optimizer = torch.optim.AdamW(memory.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, config.steps // 10, config.steps)
    generator, losses = torch.Generator().manual_seed(seed), []
    span = torch.arange(memory.schedule.reach)
    for _ in tqdm(range(config.steps), desc=f"seed {seed}, {bar}", disable=bar is None, mininterval=10):
        starts = torch.randint(len(seen) - len(span) + 1, (config.batch_size, 1), generator=generator)
        ids = seen[starts + span]
        loss = memory.extra_loss(base, ids, torch.ones_like(ids, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return mean(losses[-max(1, len(losses) // 10) :])


@torch.no_grad()
def right_tokens(model, memory, segments: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """How many tokens of each segment (n, length) come back, (n,); `shift`: each from the memory of another segment."""
    mask = torch.ones_like(segments, dtype=torch.bool)
    embeds = model.get_input_embeddings()(segments)
    state = memory.update(memory.new_state(len(segments)), None, embeds, mask)
    said, _ = memory.read_back(model, {name: x.roll(shift, 0) for name, x in state.items()})
    return (said == segments).sum(1)


def share(right: torch.Tensor, length: int, seed: int) -> dict:
    """Shares of tokens and of whole segments, with 95 % intervals: a bootstrap over segments, and Wilson's."""
    shares, n, whole = (right / length).tolist(), len(right), int((right == length).sum())
    low, high = paired_bootstrap(shares, range(n), seed=seed)
    tokens = {"tokens": mean(shares), "tokens_low": low, "tokens_high": high}
    low, high = wilson(whole, n)
    return {**tokens, "segments": whole / n, "segments_low": low, "segments_high": high, "n_segments": n}


@torch.no_grad()
def continuation(model, tokenizer, config: ReversibleEvalConfig, seed: int) -> tuple[dict, dict]:
    """What a checkpoint gives back, and the perplexity of what follows on it, by what stands before."""
    found = {n: m for n, m in ml.memories(model).items() if isinstance(m, ml.ReversibleMemory)}
    if len(found) != 1:
        raise ValueError(f"checkpoint: needs one reversible memory, found {sorted(found) or 'none'}")
    (name, memory), window = *found.items(), ml.window(model)
    model.eval()
    _, segments = texts(config, tokenizer, window)
    right = right_tokens(model, memory, segments)
    prose = PerplexityConfig(
        file=config.file, windows=config.context_segments + 1, n_sequences=config.n_sequences
    )
    sequences = unseen_prose(prose, tokenizer, window)
    before, last = sequences[:, :-window], sequences[:, -window:]
    trained = ml.write(model, before)
    losses = {"memory": _losses(model, last, memory_state=trained)}
    rolled = trained.select(torch.arange(len(last)).roll(1))
    losses["shuffled_memory"] = _losses(model, last, memory_state=rolled)
    with ml.disabled(model):
        losses["text"], losses["nothing"] = _losses(model, sequences)[:, 1 - window :], _losses(model, last)
    fresh = ml.detach(model, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ml.attach(fresh, memory.config, name=name)
    losses["untrained_memory"] = _losses(fresh, last, memory_state=ml.write(fresh, before))
    cells = {given: cell_of(losses[given].mean(1).tolist(), losses[given].numel(), seed) for given in GIVEN}
    shares = {"ratio": window / memory.config.n_tokens, **share(right, window, seed)}
    return {**shares, "perplexity": cells}, {"length": window, "right": right.tolist()}


def _losses(model, ids: torch.Tensor, **state) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False, **state).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def main(
    config: Annotated[Path, typer.Option(help="YAML file; see configs/eval/reversible.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the reports.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
) -> None:
    """Measure how much of a text a reversible memory gives back."""
    evaluate(load_yaml(config, overrides or [], ReversibleEvalConfig), out)
    typer.echo(f"wrote {out / 'summary.md'} and what lies beside it")


if __name__ == "__main__":
    typer.run(main)
