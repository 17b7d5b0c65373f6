"""Perplexity on unseen prose: what the memory, and training for it, did to the language model.

All arms predict the same tokens: every token of a sequence that is not the first of a window. `base` sees the
whole sequence, `base_cut` and `memory_off` only the window a token stands in, `trained` and `untrained` read
the sequence in segments with memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from scipy import stats

import memlayers as ml
from memlayers.config import Strict
from memlayers.core.model import max_positions, reach
from memlayers.files import read_text
from memlayers.limits import Count
from memlayers.tasks.filler import TRAIN_SHARE, split_sentences

ARMS = {"base": ("base", "base_cut"), "untrained": ("untrained",), "trained": ("memory_off", "trained")}
"""Stage (which model) -> arms measured on it."""


class PerplexityConfig(Strict):
    """Prose to measure on: the last part of a text file, which tasks with prose filler do not train on.

    file: a plain text file. windows: tokens of a sequence, in windows. n_sequences: how many sequences, fewer
    if the text ends before.
    """

    file: str
    windows: Count = 8
    n_sequences: Count = Field(32, ge=2)


def unseen_prose(config: PerplexityConfig, tokenizer, window: int) -> torch.Tensor:
    """Sequences (n_sequences, windows · window) of the evaluation part of the file.

    Raises `FileNotFoundError` for a missing file, `ValueError` when the text is too short for two sequences.
    """
    path = Path(config.file)
    if not path.is_file():
        raise FileNotFoundError(f"perplexity.file: there is no file {config.file!r}")
    sentences = split_sentences(read_text(path))
    text = " ".join(sentences[round(len(sentences) * TRAIN_SHARE) :])
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    length = config.windows * window
    n = min(config.n_sequences, len(ids) // length)
    if n < 2:
        raise ValueError(
            f"perplexity.file: the last fifth of {config.file!r} has {len(ids)} tokens, two sequences of "
            f"{length} are needed; lower perplexity.windows or give a longer text"
        )
    return ids[: n * length].view(n, length)


@torch.no_grad()
def measure(
    model, stage: str, sequences: torch.Tensor, window: int, batch_size: int, seed: int, advance: Callable
) -> dict[str, dict]:
    """Perplexity of each arm of `stage`: {tokens, perplexity, ci_low, ci_high} or {not_run: reason}.

    The interval is a 95 % bootstrap over sequences. sequences: (n, length) with length a multiple of `window`.
    """
    cells, length, limit = {}, sequences.shape[1], max_positions(model)
    model.eval()
    for arm in ARMS[stage]:
        cut = arm in ("base_cut", "memory_off")
        if not cut and reach(model) is None and limit is not None and length > limit:
            cells[arm] = {"not_run": f"{length} tokens are more than the model's {limit} positions"}
            continue
        means = []
        for rows in sequences.split(batch_size):
            rows = rows.to(model.device)
            if arm == "memory_off":
                with ml.disabled(model):
                    losses = _losses(model, rows.reshape(-1, window), window)
            else:
                losses = _losses(model, rows.reshape(-1, window) if cut else rows, window)
            means += losses.view(len(rows), -1).mean(1).tolist()
            advance(len(rows))
        cells[arm] = cell_of(means, sequences.numel() - sequences.numel() // window, seed)
    return cells


def _losses(model, ids: torch.Tensor, window: int) -> torch.Tensor:
    """Negative log-likelihood of the tokens that do not open a window, (rows, tokens)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    inside = torch.arange(1, ids.shape[1], device=ids.device) % window != 0
    return losses[:, inside]


def cell_of(means: list[float], tokens: int, seed: int) -> dict:
    bounds = stats.bootstrap(
        (np.array(means),), np.mean, method="percentile", n_resamples=2000, rng=np.random.default_rng(seed)
    ).confidence_interval
    return {
        "tokens": tokens,
        "perplexity": math.exp(np.mean(means)),
        "ci_low": math.exp(bounds.low),
        "ci_high": math.exp(bounds.high),
    }
