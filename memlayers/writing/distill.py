"""What a writer learns from a teacher: the base that reads a text, on continuations that it draws itself (context
distillation on self-study, Cartridges, 2506.06266, sections 4.1 and 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..core.masks import positions_of
from ..core.model import (
    decoder_of,
    device_of,
    eval_mode,
    max_positions,
    new_cache,
    text_config,
    without_state,
)
from ..core.size import check_fits
from .config import DistillSection
from .segments import Segments, right_aligned

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def of_teacher(
    model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, config: DistillSection
) -> tuple[Segments, torch.Tensor]:
    """Continuations that the base, without memories that keep a state, draws behind each text, and what it says there.

    Every row is given the same random numbers, so that what it draws does not depend on the rows beside it.

    Args:
        input_ids: (batch, tokens).
        mask: (batch, tokens) bool, False at padding, which may stand anywhere.

    Returns:
        A segment a continuation, which ends where an end of sequence is drawn; and log-probabilities (batch,
        continuations, length, vocabulary) float32 of the token behind each.

    Raises:
        ValueError: a text without tokens, or one that leaves no positions for a continuation.
        ConfigError: what the teacher says is more than this machine has memory for.
    """
    device, rows = device_of(model), len(input_ids)
    ids, used = right_aligned(input_ids.to(device), mask.to(device))
    _check(model, used, config)
    positions = positions_of(used)
    generator = torch.Generator().manual_seed(config.seed)
    numbers = torch.rand(config.length, 1, config.continuations, generator=generator, dtype=torch.float64)
    ends = _ends(model, device)
    with without_state(model), eval_mode(model):
        cache = new_cache(decoder_of(model))
        seen = used.long()
        said = _read(model, ids, seen, positions, cache).repeat_interleave(config.continuations, 0)
        cache.batch_repeat_interleave(config.continuations)
        seen, place = (x.repeat_interleave(config.continuations, 0) for x in (seen, positions[:, -1:]))
        drawn, teacher = [], []
        for number in numbers.to(device):
            token = _draw(said, number.expand(rows, -1).reshape(-1, 1))
            seen, place = torch.cat([seen, torch.ones_like(token)], 1), place + 1
            said = _read(model, token, seen, place, cache)
            drawn.append(token)
            teacher.append(said.log_softmax(-1))
    ids = torch.cat(drawn, 1).view(rows, config.continuations, config.length)
    real = torch.isin(ids, ends).cumsum(-1) == 0
    teacher = torch.stack(teacher, 1).view(*ids.shape, -1)
    return Segments(ids, real, real), teacher


def _read(model, ids: torch.Tensor, seen: torch.Tensor, positions: torch.Tensor, cache) -> torch.Tensor:
    """The logits (rows, vocabulary) float32 behind the last of `ids`, which join the cache."""
    output = model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


def _draw(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The token (rows, 1) at which the summed probabilities pass a number in [0, 1)."""
    summed = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(summed, numbers.contiguous(), right=True).clamp(max=logits.shape[-1] - 1)


def _ends(model: PreTrainedModel, device: torch.device) -> torch.Tensor:
    end = getattr(model.generation_config, "eos_token_id", None)
    return torch.tensor([] if end is None else end, dtype=torch.int64, device=device).reshape(-1)


def _check(model: PreTrainedModel, used: torch.Tensor, config: DistillSection) -> None:
    lengths, limit = used.sum(1), max_positions(model)
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"row {empty[0]} has no token; writer.distill draws continuations of a text")
    need = int(lengths.max()) + config.length
    if limit is not None and need > limit:
        raise ValueError(
            f"writer.distill: the teacher reads the whole text and a continuation, {int(lengths.max())} + {config.length} "
            f"tokens, the model has {limit} positions; lower writer.distill.length or write pieces: "
            "state = ml.write(model, piece, state)"
        )
    if device_of(model).type == "cpu":
        numbers = len(used) * config.continuations * config.length * text_config(model).vocab_size
        told = "writer.distill.continuations: lower it, or length, or write fewer rows: what the teacher says"
        check_fits(8 * numbers, told)  # float32, once a step and once together
