"""What a caller gives, checked where it enters: inputs, masks, positions, states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache import MemoryCache
from .call import Block, Call
from .memory import Memory, StatefulMemory, check_field, check_range
from .model import has_position_table, max_positions
from .state import PENDING, MemoryState

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

IMAGES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
"""Arguments in which a model takes images; `generate` gives them encoded, and {} where there are none."""


def new_mask(attention_mask: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """(batch, tokens) bool for the new tokens, from the mask a caller gave for all tokens so far."""
    rows, n_tokens = inputs.shape[:2]
    if attention_mask is None:
        return torch.ones(rows, n_tokens, dtype=torch.bool, device=inputs.device)
    shape = tuple(getattr(attention_mask, "shape", ()))
    if len(shape) != 2 or shape[0] != rows or shape[1] < n_tokens:
        raise ValueError(
            f"attention_mask has shape {shape or type(attention_mask).__name__}; with memory it must be (batch, tokens) "
            f"and cover the input of shape {(rows, n_tokens)}"
        )
    return attention_mask[:, attention_mask.shape[1] - n_tokens :].bool()


def check_unpacked(position_ids: torch.Tensor | None, mask: torch.Tensor) -> None:
    """Positions are counted inside each segment; those of a caller only tell whether several texts are packed."""
    n_tokens = mask.shape[1]
    if n_tokens == 1 or position_ids is None or position_ids.dim() != 2 or position_ids.shape[-1] != n_tokens:
        return
    goes_back = (position_ids.diff(dim=1) < 0) & mask[:, 1:] & mask[:, :-1]
    if goes_back.any():
        raise ValueError(
            "position_ids start again inside a row: several texts packed into one row would share a memory. "
            "Give each text a row of its own, padded, with an attention_mask"
        )


def check_stateless(state: MemoryState | None, past) -> None:
    """Raise ValueError for a state, or a cache with one, where no memory reads it."""
    if state is not None:
        raise ValueError("memory_state= was given, but no enabled memory of this model keeps a state")
    if isinstance(past, MemoryCache):
        raise ValueError(
            "past_key_values is a MemoryCache, but every memory of this model is disabled; give a plain cache "
            "or none"
        )


def checked_inputs(
    ids: torch.Tensor | None, embeds: torch.Tensor | None, labels: torch.Tensor | None
) -> torch.Tensor:
    """The ids, or embeddings, of a call; ValueError for none or both, no tokens, or labels of another length."""
    if ids is not None and embeds is not None:
        raise ValueError("input_ids and inputs_embeds were both given; give one of them")
    inputs = embeds if ids is None else ids
    if inputs is None or inputs.dim() < 2 or inputs.shape[1] == 0:
        got = "none" if inputs is None else f"shape {tuple(inputs.shape)}"
        raise ValueError(
            f"the model needs input_ids (batch, tokens) or inputs_embeds with at least one token, got {got}"
        )
    if labels is not None and labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, the input {tuple(inputs.shape[:2])}: one label a token, "
            "-100 where there is none"
        )
    return inputs


def check_state(reading: dict[str, StatefulMemory], state: MemoryState | None, batch_size: int) -> None:
    """Raise ValueError unless `state` belongs to these memories and to `batch_size` rows."""
    if state is None:
        return
    if not isinstance(state, MemoryState):
        raise TypeError(f"memory_state must be a MemoryState, got {type(state).__name__}")
    if state.batch_size != batch_size:
        raise ValueError(
            f"the memory state has {state.batch_size} rows, the input {batch_size}; state.select([...]) takes "
            "rows, and state.repeat_interleave(n) makes them fit num_beams=n or num_return_sequences=n"
        )
    if not set(reading) <= set(state.fields):
        have = sorted(set(state.fields) - {PENDING})
        raise ValueError(f"the memory state belongs to memories {have}, this model reads {sorted(reading)}")
    for name, memory in reading.items():
        check_part(memory, state, name)
    if any(m.schedule.kv == "drop" for m in reading.values()):
        _check_pending(reading, state)
    state.trusted |= {*reading, PENDING}


def check_part(memory: StatefulMemory, state: MemoryState, name: str) -> None:
    """Raise ValueError unless the part of `state` with this name is one of `memory`: its kind, its shapes and dtypes, and,
    where the state came from outside, its numbers."""
    kind = state.kinds.get(name, memory.state_kind)
    if kind != memory.state_kind:
        raise ValueError(
            f"memory {name!r}: the state is one of kind {kind}, memory {name!r} is of kind {memory.state_kind}; it was "
            "written by another memory"
        )
    memory.check_state(state[name], name)
    if name not in state.trusted:
        memory.check_numbers(state[name], name)


def _check_pending(reading: Mapping[str, StatefulMemory], state: MemoryState) -> None:
    """Raise ValueError unless the open segment is there: `embeds` (batch, tokens, width), `length` (batch,) int64, which
    says how many of the tokens are in use."""
    if PENDING not in state.fields:
        raise ValueError(
            f"the memory state has no {PENDING!r}, the tokens of the open segment of memories {sorted(reading)}; give "
            "the whole state that a call or ml.write returned"
        )
    fields = state[PENDING]
    if set(fields) != {"embeds", "length"}:
        raise ValueError(
            f"{PENDING!r} of the state has fields {sorted(fields)}, it needs embeds and length, the tokens of the open segment"
        )
    check_field(PENDING, "embeds", fields["embeds"], ("batch", None, "width"), torch.float32)
    check_field(PENDING, "length", fields["length"], ("batch",), torch.int64)
    if PENDING not in state.trusted:
        check_range(PENDING, "length", fields["length"], fields["embeds"].shape[1])


def check_width(call: Call, width: int) -> None:
    """Raise ValueError where a segment with what stands around it is longer than the model's positions."""
    limit = max_positions(call.decoder)
    if limit is not None and width > limit:
        raise ValueError(
            f"the open segment with its memory tokens has {width} tokens, the model has positions for {limit}; lower "
            "segment_length or n_tokens, or generate fewer tokens"
        )


def check_table(call: Call, position_ids: torch.Tensor) -> None:
    """Where positions are looked up in a table, raise ValueError for one past its end."""
    limit = max_positions(call.decoder)
    if has_position_table(call.decoder) and limit is not None and int(position_ids.max()) >= limit:
        raise ValueError(
            f"the text reaches position {int(position_ids.max())}, the model has a table of {limit}; write it in "
            f"pieces of at most {limit} tokens: state = ml.write(model, piece, state)"
        )


def check_not_inside(outer: Block | None, decoder: nn.Module) -> None:
    """Raise ValueError for a call of a decoder inside of a pass of its own."""
    if outer is not None and outer.call.decoder is decoder:
        raise ValueError(
            "the model was called inside of a call of its own, by a hook perhaps: the two would share a memory. Make the "
            "inner call before or after, or on a copy of the model"
        )


def check_head(enabled: Mapping[str, Memory], decoder: nn.Module) -> None:
    """Raise ValueError where a decoder, called by itself to be trained, would leave a memory out."""
    if not (decoder.training and torch.is_grad_enabled()):
        return
    for name, memory in enabled.items():
        if memory.needs_head:
            raise ValueError(
                f"the decoder was called without the model's head, where memory {name!r} has logits of its own, so that a "
                "loss would leave it out (TRL's trainers take the weight of the head alone). Train it through "
                "model(...): HF Trainer or memlayers train"
            )


def checked_state(past: Cache | None, key: str, state: MemoryState | None) -> MemoryState | None:
    """The state that a caller gave, or that a cache carries; ValueError for both, or the cache of another model than the
    one of this key."""
    if not isinstance(past, MemoryCache):
        return state
    if past.owner not in (None, key):
        raise ValueError(
            "past_key_values is the cache of another model; its keys and values mean nothing here. Give this model the "
            "memory alone: cache.memory_state.to_cache()"
        )
    if state is not None and past.memory_state is not None and past.memory_state is not state:
        raise ValueError("memory_state= and past_key_values each carry a state; give one of them")
    return past.memory_state if state is None else state


def check_served(call: Call, arguments: dict, config: PreTrainedConfig) -> None:
    """Raise ValueError for what memories that read in blocks cannot serve: maps of attention, and images."""
    wants_maps = arguments.get("output_attentions")
    wants_maps = getattr(config, "output_attentions", False) if wants_maps is None else wants_maps
    if wants_maps and call.schedule.kv != "keep":
        raise ValueError(
            "output_attentions: a memory reads in blocks, whose maps of attention are not those of the text; ask for them "
            "in memlayers.disabled(model)"
        )
    images = next((name for name in IMAGES if not _is_empty(arguments.get(name))), None)
    if images is not None and call.schedule.kv != "keep":
        raise ValueError(
            f"{images}: a memory reads in segments or windows, which would cut images apart; take memories that do not, or "
            "memlayers.disabled(model)"
        )


def _is_empty(value) -> bool:
    return value is None or (isinstance(value, Mapping) and not value)
