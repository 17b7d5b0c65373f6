"""What stands over a model's own methods once it has memory: state in, state out.

`forward` of the model takes and returns a `MemoryState`, `forward` of its decoder reads, and
`prepare_inputs_for_generation` tells prompt from generated tokens. The decoder makes a call of its own where it is called
by itself, so that nothing goes around the memory. All of it runs as it stands under `torch.compile`, which does not see
what stands on an instance.
"""

from __future__ import annotations

import inspect
from dataclasses import field, make_dataclass
from functools import cache

import torch
from torch import nn

from .call import BLOCK, CALL, Block, Call, holding
from .follow import follow
from .hooks import LayerHook, MethodOverride
from .loop import run
from .memory import StatefulMemory
from .model import Memories, decoder_layers, decoder_of, text_config
from .state import PENDING, MemoryCache, MemoryState

IGNORED = "keys_to_ignore_at_inference"
"""Field of a config by which HF Trainer knows what of an output is no prediction."""
EXTRA = (("memory_state", None), ("close_memory", False), ("write_memory", None))
"""Arguments of a forward call beside the model's own, and their defaults; see `ModelForward`."""


def override_methods(model: nn.Module, root: Memories) -> None:
    """Put all that stands on the whole model; each has a method `remove`."""
    decoder = decoder_of(model)
    root.hooks = [
        ModelForward(root, model, decoder),
        DecoderForward(root, decoder),
        PrepareInputs(root, model),
    ]
    root.hooks += [LayerHook(root, layer, i) for i, layer in enumerate(decoder_layers(decoder))]
    root.hooks.append(IgnoredKey(model))


class ModelForward(MethodOverride):
    """The model's forward with memory.

    Besides the model's own arguments it takes

    * memory_state: a `MemoryState` to continue from; default: the one on `past_key_values`, else a fresh one.
    * close_memory: write the open segment at the end, so that the next call sees it only through memory.
    * write_memory: False leaves full segments unwritten, as while decoding. Default: True, but for a single
      token after a cache that has some. Memories that every token changes write every token, and with False give back
      the state as it was.

    The output has `memory_state` and, where a cache is used, a `MemoryCache`.

    Raises:
        ValueError: labels of another length than the input; a state of another batch size or memory, or where
            no memory keeps one; a cache of another model; what memory cannot serve, such as attention maps of segments.
    """

    def __init__(self, root: Memories, model: nn.Module, decoder: nn.Module):
        super().__init__(model, "forward")
        self.memories, self.decoder = root, decoder

    @property
    def __signature__(self) -> inspect.Signature:
        signature = super().__signature__
        extra = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in EXTRA]
        own = list(signature.parameters.values())
        at_end = own[-1:] if own[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        return signature.replace(parameters=own[: len(own) - len(at_end)] + extra + at_end)

    @torch.compiler.disable
    def call(self, *args, memory_state=None, close_memory=False, write_memory=None, **kwargs):
        arguments = by_name(super().__signature__, args, kwargs)
        follow(self.module)
        if not any(isinstance(m, StatefulMemory) for m in self.memories.enabled().values()):
            check_stateless(memory_state, arguments.get("past_key_values"))
            with holding(CALL, without_state(self.memories, self.decoder)):
                return self.original(**arguments)
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        inputs = embeds if ids is None else ids
        check_inputs(inputs, arguments.get("labels"))
        call = begin(self.memories, self.decoder, inputs, arguments, memory_state, close_memory, write_memory)
        if arguments.get("pixel_values") is not None and call.schedule.kv == "drop":
            raise ValueError(
                "pixel_values: a memory reads in segments, which would cut images apart; take memories that do not, or "
                "memlayers.disabled(model)"
            )
        arguments["past_key_values"] = call.cache
        as_tuple = arguments.pop("return_dict", None) is False
        with holding(CALL, call):
            output = self.original(**arguments, return_dict=True)
        if not call.done:
            raise ValueError(
                f"{type(self.module).__name__} did not call its decoder, so that memory was not read"
            )
        output = with_state(output, call.state)
        return output.to_tuple() if as_tuple else output


class DecoderForward(MethodOverride):
    """The decoder's forward: takes the call that its model has begun, or begins one, and reads. Called by itself it takes
    and returns what `ModelForward` does."""

    def __init__(self, root: Memories, decoder: nn.Module):
        super().__init__(decoder, "forward")
        self.memories = root

    @torch.compiler.disable
    def call(self, *args, **kwargs):
        arguments, decoder = by_name(self.__signature__, args, kwargs), self.module
        outer = BLOCK.get()
        if outer is not None and outer.call.decoder is decoder:
            raise ValueError(
                "the model was called inside of a call of its own, by a hook perhaps: the two would share a memory. Make the "
                "inner call before or after, or on a copy of the model"
            )
        call, enabled = CALL.get(), self.memories.enabled()
        own = call is None or call.decoder is not decoder or call.done
        if own:
            follow(self.memories.hooks[0].module)
            self._check_head(enabled)
        if not any(isinstance(m, StatefulMemory) for m in enabled.values()):
            check_stateless(arguments.pop("memory_state", None), arguments.get("past_key_values"))
            with holding(BLOCK, Block(without_state(self.memories, decoder))):
                return self.original(**arguments)
        if own:
            asked = [arguments.pop(name, default) for name, default in EXTRA]
            ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
            inputs = embeds if ids is None else ids
            check_inputs(inputs, None)
            call = begin(self.memories, decoder, inputs, arguments, *asked)
        output = self._read(call, arguments)
        return with_state(output, call.state) if own else output

    def _check_head(self, enabled: dict) -> None:
        """Raise ValueError where the decoder, called by itself to be trained, would leave a memory out."""
        if not (self.module.training and torch.is_grad_enabled()):
            return
        for name, memory in enabled.items():
            if memory.needs_head:
                raise ValueError(
                    f"the decoder was called without the model's head, where memory {name!r} has logits of its own, so that a "
                    "loss would leave it out (TRL's trainers take the weight of the head alone). Train it through "
                    "model(...): HF Trainer or memlayers train"
                )

    def _read(self, call: Call, arguments: dict):
        ids, embeds = arguments.pop("input_ids", None), arguments.pop("inputs_embeds", None)
        embeds = self.module.get_input_embeddings()(ids) if embeds is None else embeds
        mask, positions = arguments.pop("attention_mask", None), arguments.pop("position_ids", None)
        if call.mask is None:
            call.mask = new_mask(mask, embeds)
        check_unpacked(positions, call.mask)
        for counted_here in ("cache_position", "use_cache", "past_key_values", "return_dict"):
            arguments.pop(counted_here, None)
        return run(call, self.original, embeds, mask, positions, **arguments)


class PrepareInputs(MethodOverride):
    """Tells the forward call whether it sees the prompt or what was generated."""

    def __init__(self, root: Memories, model: nn.Module):
        super().__init__(model, "prepare_inputs_for_generation")
        self.memories = root

    def call(self, *args, is_first_iteration=False, memory_state=None, write_memory=None, **kwargs):
        inputs = self.original(*args, is_first_iteration=is_first_iteration, **kwargs)
        reading = [m for m in self.memories.enabled().values() if isinstance(m, StatefulMemory)]
        if not reading:
            return inputs
        has_cache = inputs.get("past_key_values") is not None
        if memory_state is not None and (is_first_iteration or not has_cache):
            inputs["memory_state"] = memory_state
        if reading[0].schedule.kv == "drop":
            inputs["write_memory"] = is_first_iteration if write_memory is None else write_memory
            if not has_cache:
                inputs["write_memory"] = True
        return inputs


class IgnoredKey:
    """The output's `memory_state` among the keys of the config that HF Trainer takes for no prediction."""

    def __init__(self, model: nn.Module):
        self.config = model.config
        setattr(self.config, IGNORED, [*getattr(self.config, IGNORED, ["past_key_values"]), "memory_state"])

    def remove(self) -> None:
        """Give the config back what it had."""
        ignored = [key for key in getattr(self.config, IGNORED, []) if key != "memory_state"]
        self.config.__dict__.pop(IGNORED, None)
        if ignored != getattr(self.config, IGNORED, ["past_key_values"]):
            setattr(self.config, IGNORED, ignored)


def without_state(root: Memories, decoder: nn.Module) -> Call:
    """A call in which no memory keeps a state."""
    return Call(decoder, decoder_layers(decoder), {}, root.enabled(), cache=None)


def begin(
    root: Memories,
    decoder: nn.Module,
    inputs: torch.Tensor,
    arguments: dict,
    state: MemoryState | None = None,
    flush: bool = False,
    write: bool | None = None,
) -> Call:
    """The call that these arguments ask for, checked.

    Args:
        inputs: (batch, tokens, ...), ids or embeddings.
        arguments: of the model's or the decoder's forward, by name.
    """
    enabled, config = root.enabled(), text_config(decoder)
    reading = {n: m for n, m in enabled.items() if isinstance(m, StatefulMemory)}
    others = {n: m for n, m in enabled.items() if n not in reading}
    cache = MemoryCache.of(arguments.get("past_key_values"))
    if cache.owner not in (None, root.key):
        raise ValueError(
            "past_key_values is the cache of another model; its keys and values mean nothing here. Give this model the "
            "memory alone: cache.memory_state.to_cache()"
        )
    if state is not None:
        if cache.memory_state is not None and cache.memory_state is not state:
            raise ValueError("memory_state= and past_key_values each carry a state; give one of them")
        cache.memory_state = state
    check_state(reading, cache.memory_state, inputs.shape[0] // cache.rows_per_state)
    layers = decoder_layers(decoder)
    recomputes = decoder.training and any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
    use_cache = arguments.get("use_cache")
    use_cache = getattr(config, "use_cache", False) if use_cache is None else use_cache
    call = Call(
        decoder, layers, reading, others, cache, flush=flush, keep_kv=bool(use_cache) and not recomputes
    )
    call.blocks_keep_kv = not recomputes
    framed = call.schedule.kv == "drop"
    decoding = framed and inputs.shape[1] == 1 and cache.seen > 0
    call.write = not decoding if write is None else write
    call.write |= framed and any(getattr(m.config, "write_while_decoding", False) for m in reading.values())
    mask = arguments.get("attention_mask")
    if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        call.mask = new_mask(mask, inputs)
    cache.owner, cache.written_by_reading = root.key, any(m.gradient_writer is None for m in reading.values())
    wants_maps = arguments.get("output_attentions")
    wants_maps = getattr(config, "output_attentions", False) if wants_maps is None else wants_maps
    if wants_maps and call.schedule.kv != "keep":
        raise ValueError(
            "output_attentions: a memory reads in blocks, whose maps of attention are not those of the text; ask for them "
            "in memlayers.disabled(model)"
        )
    return call


@cache
def _class_with_state(output_class: type) -> type:
    """An output class of transformers with a field `memory_state`, so that what takes an output apart and puts it together
    again (DDP, pytree, accelerate) finds the state among its fields."""
    fields = [("memory_state", "MemoryState | None", field(default=None))]
    namespace = {
        "__reduce__": lambda output: (_output_of, (output_class, dict(output.items()))),
        "__module__": __name__,
    }
    return make_dataclass(
        f"{output_class.__name__}WithMemory", fields, bases=(output_class,), namespace=namespace
    )


def _output_of(output_class: type, items: dict):
    return _class_with_state(output_class)(**items)


def with_state(output, state: MemoryState):
    """An output of transformers with `memory_state` beside its own fields."""
    return _output_of(type(output), {**output, "memory_state": state})


def by_name(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict:
    """The arguments of a call by their names."""
    if not args:
        return dict(kwargs)
    bound = signature.bind_partial(*args, **kwargs)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return {**bound.arguments, **bound.arguments.pop(parameter.name, {})}
    return dict(bound.arguments)


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


def check_inputs(inputs: torch.Tensor | None, labels: torch.Tensor | None) -> None:
    """Raise ValueError for no tokens, or labels of another length."""
    if inputs is None or inputs.shape[1] == 0:
        raise ValueError("the model needs input_ids or inputs_embeds with at least one token, got none")
    if labels is not None and labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, the input {tuple(inputs.shape[:2])}: one label a token, "
            "-100 where there is none"
        )


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
        kind = state.kinds.get(name, memory.state_kind)
        if kind != memory.state_kind:
            raise ValueError(
                f"memory {name!r}: the state is one of kind {kind}, memory {name!r} is of kind {memory.state_kind}; it was "
                "written by another memory"
            )
        memory.check_state(state[name], name)
    if PENDING not in state.fields and any(m.schedule.kv == "drop" for m in reading.values()):
        raise ValueError(
            f"the memory state has no {PENDING!r}, the tokens of the open segment of memories {sorted(reading)}; give "
            "the whole state that a call or ml.write returned"
        )
