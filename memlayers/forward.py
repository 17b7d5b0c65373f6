"""What covers a model's own methods once it has memory: state in, state out.

Three methods are covered on the instance: `forward` of the model takes and returns a `MemoryState`, `forward`
of its decoder reads in segments or streams, and `prepare_inputs_for_generation` tells prompt from generated tokens. The
state travels between the first two on the cache, the one argument that every architecture hands through.
"""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import Cache

from . import segments, streaming
from .memory import Fields, Memory
from .model import decoder_layers, decoder_of, max_positions, segmented, stateful
from .state import PENDING, MemoryCache, MemoryState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = "keys_to_ignore_at_inference"
"""Field of a config by which HF Trainer knows what of an output is no prediction."""


def cover(model: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Put the covering functions on the instance."""
    _put(model, "forward", _with_state_arguments(type(model).forward))
    _put(model, "prepare_inputs_for_generation", _prepare_inputs)
    _put(decoder, "forward", _decoder_forward)
    ignored = getattr(model.config, IGNORED, ["past_key_values"])
    setattr(model.config, IGNORED, [*ignored, "memory_state"])


def uncover(model: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Take them off; what was underneath, the class's own or another library's, is there again."""
    for module, name in [(model, "forward"), (model, "prepare_inputs_for_generation"), (decoder, "forward")]:
        del module.__dict__[name]
        below = module.__dict__.pop(f"_below_{name}", None)
        if below is not None:
            module.__dict__[name] = below
    ignored = [key for key in getattr(model.config, IGNORED, []) if key != "memory_state"]
    model.config.__dict__.pop(IGNORED, None)
    if ignored != getattr(model.config, IGNORED, ["past_key_values"]):
        setattr(model.config, IGNORED, ignored)


def _put(module: nn.Module, name: str, function) -> None:
    below = module.__dict__.get(name)
    if below is not None:
        module.__dict__[f"_below_{name}"] = below
    module.__dict__[name] = MethodType(function, module)


def _base(module: nn.Module, name: str):
    """The method underneath."""
    return module.__dict__.get(f"_below_{name}") or MethodType(getattr(type(module), name), module)


def _with_state_arguments(forward):
    """`_model_forward` under the signature of the model's own forward plus the arguments that it adds."""

    @functools.wraps(forward)
    def covered(self, *args, **kwargs):
        return _model_forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in [("memory_state", None), ("close_memory", False), ("write_memory", None)]
    ]
    parameters = list(signature.parameters.values())
    at_end = parameters[-1:] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    covered.__signature__ = signature.replace(
        parameters=parameters[: len(parameters) - len(at_end)] + extra + at_end
    )
    return covered


def _model_forward(self, *args, memory_state=None, close_memory=False, write_memory=None, **kwargs):
    """The model's forward with memory.

    Args:
        memory_state: a `MemoryState` to continue from; default: the one on `past_key_values`, else a fresh one.
        close_memory: write the open segment at the end, so that the next call sees it only through memory.
        write_memory: False leaves full segments unwritten, as while decoding. Default: True, but for a single
            token after a cache that has some. Memories that stream write every token, and with False give back
            the state as it was.

    Returns:
        The model's output with `memory_state` and, where a cache is used, a `MemoryCache`.

    Raises:
        ValueError: labels of another length than the input; a state of another batch size or memory, or where
            no memory keeps one.
    """
    base, reading = _base(self, "forward"), stateful(self)
    arguments = _by_name(base, args, kwargs)
    if not reading:
        if memory_state is not None:
            raise ValueError("memory_state= was given, but no enabled memory of this model keeps a state")
        if isinstance(arguments.get("past_key_values"), MemoryCache):
            raise ValueError(
                "past_key_values is a MemoryCache, but every memory of this model is disabled; give a plain cache "
                "or none"
            )
        return base(*args, **kwargs)
    inputs = (
        arguments.get("input_ids")
        if arguments.get("input_ids") is not None
        else arguments.get("inputs_embeds")
    )
    _check_inputs(inputs, arguments.get("labels"))

    cache = _memory_cache(arguments.get("past_key_values"))
    if memory_state is not None:
        if cache.memory_state is not None and cache.memory_state is not memory_state:
            raise ValueError("memory_state= and past_key_values each carry a state; give one of them")
        cache.memory_state = memory_state
    check_state(reading, cache.memory_state, batch_size=inputs.shape[0] // cache.shared_by)
    use_cache = arguments.get("use_cache")
    use_cache = self.config.use_cache if use_cache is None else use_cache
    checkpointing = self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.modules())
    keep_window = bool(use_cache) and not checkpointing
    if segmented(self):
        decoding = inputs.shape[1] == 1 and cache.seen > 0 if write_memory is None else not write_memory
        cache.request = segments.Request(
            memories=reading,
            layers=decoder_layers(decoder_of(self)),
            write=not decoding or any(m.config.write_while_decoding for m in reading.values()),
            close=close_memory,
            keep_window=keep_window,
            max_positions=max_positions(self),
        )
    else:
        cache.request = streaming_request(
            self, write=write_memory is not False, keep_window=keep_window, in_blocks=not checkpointing
        )
    arguments["past_key_values"] = cache
    as_tuple = arguments.pop("return_dict", None) is False
    output = base(**arguments, return_dict=True)
    output["memory_state"] = cache.memory_state
    return output.to_tuple() if as_tuple else output


def _decoder_forward(
    self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, **kwargs
):
    """The decoder's forward; reads in segments when a `MemoryCache` asks for it, else as it always did."""
    base = _base(self, "forward")
    if not isinstance(past_key_values, MemoryCache):
        kwargs.update(
            attention_mask=attention_mask, past_key_values=past_key_values, inputs_embeds=inputs_embeds
        )
        return base(input_ids=input_ids, **kwargs)
    request, past_key_values.request = past_key_values.request, None
    if request is None:
        raise ValueError("a MemoryCache needs the model's own forward; the decoder alone cannot read it")
    embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
    mask, position_ids = _new_mask(attention_mask, embeds), kwargs.pop("position_ids", None)
    _check_unpacked(position_ids, mask)
    for counted_here in ("cache_position", "use_cache"):
        kwargs.pop(counted_here, None)
    if isinstance(request, streaming.Request):
        return streaming.read(
            base, embeds, mask, past_key_values, request, attention_mask, position_ids, **kwargs
        )
    return segments.read(base, embeds, mask, past_key_values, request, **kwargs)


def streaming_request(
    model: nn.Module, write: bool, keep_window: bool, in_blocks: bool = True
) -> streaming.Request:
    """What a call of `model` asks where its memories stream."""
    decoder, memories = decoder_of(model), stateful(model)
    return streaming.Request(
        memories,
        decoder.config.get_text_config(decoder=True),
        write,
        keep_window,
        sliding_window=next(iter(memories.values())).sliding_window,
        in_blocks=in_blocks,
        absolute_positions=not hasattr(decoder, "rotary_emb"),
    )


def _prepare_inputs(self, *args, is_first_iteration=False, memory_state=None, write_memory=None, **kwargs):
    """Tell the forward call whether it sees the prompt or what was generated."""
    base = _base(self, "prepare_inputs_for_generation")
    inputs = base(*args, is_first_iteration=is_first_iteration, **kwargs)
    if not stateful(self):
        return inputs
    has_cache = inputs.get("past_key_values") is not None
    if memory_state is not None and (is_first_iteration or not has_cache):
        inputs["memory_state"] = memory_state
    if segmented(self):
        inputs["write_memory"] = is_first_iteration if write_memory is None else write_memory
        if not has_cache:
            inputs["write_memory"] = True
    return inputs


def _by_name(function, args: tuple, kwargs: dict) -> dict:
    """The arguments of a call of `function` by their names."""
    if not args:
        return dict(kwargs)
    call = inspect.signature(function).bind_partial(*args, **kwargs)
    for parameter in call.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return {**call.arguments, **call.arguments.pop(parameter.name, {})}
    return dict(call.arguments)


def _memory_cache(past: Cache | None) -> MemoryCache:
    """The memory cache behind what a caller gave: itself, or the one made for an empty cache of his."""
    if past is None:
        return MemoryCache()
    if isinstance(past, MemoryCache):
        return past
    cache = getattr(past, "memory_cache", None)
    if cache is None:
        if past.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values holds {past.get_seq_length()} tokens read without memory; start with "
                "state.to_cache(), or with no cache"
            )
        cache = past.memory_cache = MemoryCache()
    return cache


def _new_mask(attention_mask: torch.Tensor | None, embeds: torch.Tensor) -> torch.Tensor:
    """(batch, tokens) bool for the new tokens, from the mask a caller gave for all tokens so far."""
    rows, n_tokens = embeds.shape[:2]
    if attention_mask is None:
        return torch.ones(rows, n_tokens, dtype=torch.bool, device=embeds.device)
    if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < n_tokens:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; with memory it must be (batch, tokens) "
            f"and cover the input of shape {(rows, n_tokens)}"
        )
    return attention_mask[:, attention_mask.shape[1] - n_tokens :].bool()


def _check_unpacked(position_ids: torch.Tensor | None, mask: torch.Tensor) -> None:
    """Positions are counted inside each segment; those of a caller only tell whether he packed several texts."""
    n_tokens = mask.shape[1]
    if n_tokens == 1 or position_ids is None or position_ids.dim() != 2 or position_ids.shape[-1] != n_tokens:
        return
    goes_back = (position_ids.diff(dim=1) < 0) & mask[:, 1:] & mask[:, :-1]
    if goes_back.any():
        raise ValueError(
            "position_ids start again inside a row: several texts packed into one row would share a memory. "
            "Give each text a row of its own, padded, with an attention_mask"
        )


def _check_inputs(inputs: torch.Tensor | None, labels: torch.Tensor | None) -> None:
    if inputs is None or inputs.shape[1] == 0:
        raise ValueError("the model needs input_ids or inputs_embeds with at least one token, got none")
    if labels is not None and labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, the input {tuple(inputs.shape[:2])}: one label a token, "
            "-100 where there is none"
        )


def check_state(reading: dict[str, Memory], state: MemoryState | None, batch_size: int) -> None:
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
        try:
            memory.check_state(state[name], name)
        except ValueError as error:
            raise ValueError(f"{error}{_both(state[name], memory, name)}") from None
    if PENDING not in state.fields and any(not m.streams for m in reading.values()):
        raise ValueError(
            f"the memory state has no {PENDING!r}, the tokens of the open segment of memories {sorted(reading)}; give "
            "the whole state that a call or ml.write returned"
        )


def _both(fields: Fields, memory: Memory, name: str) -> str:
    """Who wrote `fields` and who is to read them, where that differs."""
    from .kinds import KINDS  # every kind of memory, of which some use this module

    wrote = [said for _, kind in KINDS.values() if (said := kind.wrote(fields)) is not None]
    own = memory.wrote(memory.new_state(1))
    return f". The state is one of {wrote[0]}, memory {name!r} is {own}" if wrote and own not in wrote else ""
